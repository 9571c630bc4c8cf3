"""Recipes of perf dumps: the fields in which two of them differ, and the fields that a config path decides."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sglang_gen.config.schema import leaves
from sglang_gen.errors import UserError, nearest
from sglang_gen.perf.dump_reader import Dump

_HARDWARE = ("device", "cpu_count", "threads")  # entries of the field `hardware`

# Config path or group -> fields of a recipe. The other paths of a group decide the fields of the group.
_FIELDS = {
    "attention": ("attention",),
    "backend": ("backend", "components", "diffusers_kwargs", "true_cfg"),
    "backend.name": ("backend", "components"),
    "backend.diffusers_kwargs": ("diffusers_kwargs", "true_cfg"),
    "cache": ("cache",),
    "compile": ("compile", "cuda_graphs", "warmup_steps"),
    "compile.cuda_graphs": ("cuda_graphs",),
    "compile.enable_torch_compile": ("compile",),
    "compile.regional": ("compile",),
    "compile.warmup": ("warmup_steps",),
    "compile.warmup_steps": ("warmup_steps",),
    "deterministic": ("deterministic",),
    "device": ("device", "hardware"),
    "dtype": ("dtype",),
    "model": ("model", "pipeline", "networks", "components", "max_sequence_length"),
    "offload": ("offload",),
    "output.latents": ("latents_saved",),
    "parallel": ("parallel", "hardware.threads"),  # ranks on a CPU share its cores
    "parallel.dp_degree": ("parallel.dp", "hardware.threads"),
    "parallel.dp_size": ("parallel.dp", "hardware.threads"),
    "parallel.enable_cfg_parallel": ("parallel.cfg", "hardware.threads"),
    "parallel.ring_degree": ("parallel.ring", "hardware.threads"),
    "parallel.tp_size": ("parallel.tp", "hardware.threads"),
    "parallel.ulysses_degree": ("parallel.ulysses", "hardware.threads"),
    "quant": ("quantization", "components"),
    "sampling.batch_size": ("batches",),
    "sampling.guidance_batching": ("guidance_batching",),
    "sampling.guidance_interval": ("guidance_interval",),
    "sampling.guidance_scale": ("guided",),
    "sampling.height": ("size",),
    "sampling.image_path": ("input_picture",),
    "sampling.max_sequence_length": ("max_sequence_length",),
    "sampling.negative_prompt": ("true_cfg",),
    "sampling.num_frames": ("num_frames",),
    "sampling.num_inference_steps": ("steps", "denoising_steps"),
    "sampling.num_samples": ("batches",),
    "sampling.prompts": ("batches",),
    "sampling.prompts_file": ("batches",),
    "sampling.width": ("size",),
}  # fmt: skip
_UNRECORDED = {
    "backend.float32_matmul",
    "cache.cache_dit_config",
    "compile.disable_autocast",
    "parallel.timeout_minutes",
}


def fields_of(keys: Sequence[str], dumps: Iterable[Dump]) -> dict[str, tuple[str, ...]]:
    """The recipe's fields that each key of `--across` decides; a key is a config path, a group or a field itself.

    Raises UserError for a key that no recipe has.
    """
    recorded = {name for dump in dumps for name in (*flat(dump.fields), *dump.meta)}
    return {key: _fields_of(key, recorded) for key in keys}


def _fields_of(key: str, recorded: Iterable[str]) -> tuple[str, ...]:
    group, paths = key.partition(".")[0], leaves()
    if key in _FIELDS:
        return _FIELDS[key]
    if key in paths and key not in _UNRECORDED:
        if group == "cache":
            return ("cache",) if key == "cache.method" else (key,)
        if group in _FIELDS:
            return _FIELDS[group]
    if any(_is_part(name, key) for name in recorded):
        return (key,)
    if key in paths or any(_is_part(path, key) for path in paths):
        raise UserError(f"--across: {key} is not part of a recipe, so dumps that differ in it are compared without it")
    names = {name.partition(".")[0] for name in recorded} | set(_FIELDS) | set(paths)
    raise UserError(f"--across: there is no setting '{key}'{nearest(key, sorted(names))}")


def _is_part(name: str, of: str) -> bool:
    return name == of or name.startswith(f"{of}.")


def differences(base: Dump, new: Dump) -> list[dict[str, Any]]:
    """`{field, base, new}` for each field that differs, in the fingerprint or (if a side has none) in `meta`."""
    if base.fingerprint is None or new.fingerprint is None:
        left, right = base.meta, new.meta
    elif base.fingerprint == new.fingerprint:
        return []
    else:
        left, right = flat(base.fields), flat(new.fields)
    names = [
        name for name in {**left, **right} if left.get(name) != right.get(name) or (name in left) != (name in right)
    ]
    if not names and left is not base.meta:
        return [{"field": "hash", "base": base.fingerprint, "new": new.fingerprint}]
    return [{"field": name, "base": left.get(name), "new": right.get(name)} for name in names]


def allowed(difference: Mapping[str, Any], across: Mapping[str, Sequence[str]]) -> bool:
    """Whether a difference is in a field of `across`, the fields by key of `fields_of`."""
    return any(_is_part(difference["field"], field) for fields in across.values() for field in fields)


def keys_of(differences: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys of `--across` that allow these differences."""
    keys = list[str]()
    for item in differences:
        if not allowed(item, {key: _FIELDS.get(key, (key,)) for key in keys}):
            keys.append(item["field"].partition(".")[0])
    return keys


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of a recipe by their path, such as `parallel.tp`."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if f"{prefix}{name}" == "hardware" and isinstance(value, list) and len(value) == len(_HARDWARE):
            value = dict(zip(_HARDWARE, value, strict=True))
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
