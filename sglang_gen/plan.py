"""Decides everything once, from pure facts, and refuses the impossible in one sentence.

In: the composed `Run`, the model's card, the machine. Out: a frozen `Plan` that every later step obeys.
"""

import json
import math
import os.path
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_gen import env, layout, remote_code
from sglang_gen.errors import UserError, nearest
from sglang_gen.flags import BY_PATH
from sglang_gen.schema import BackendName, CacheMethod, Device, DType, QuantMethod, Run, Tracker, get, leaves, plain
from sglang_gen.types import Layout, ModelCard, Plan, Sample, user_gave
from sglang_gen.values import check_plain, parse_json

if TYPE_CHECKING:
    from sglang_gen.config import Composed

# What this version cannot do yet: the config paths, and the sentence for a run that asks for one of them.
MISSING: tuple[tuple[tuple[str, ...], str], ...] = (
    (("quant.",), "quantized weights are not available in this version; run with quant=none"),
    (("cache.interval",), "DeepCache is not available in this version; run with cache=none"),
    (("compile.disable_autocast",), "choosing the stored dtype is not available in this version; name it with --dtype"),
)


def check(composed: "Composed") -> None:
    """Refuse what needs no look at the model to be refused. Raises UserError."""
    _check_values(composed.run)
    refuse_missing(composed.run, composed.sources)
    _choose_backend(composed.run)


def make_plan(composed: "Composed", card: ModelCard) -> Plan:
    """The plan of a run that passed `check`. Raises UserError when the run cannot be what it asks to be."""
    run, sources = composed.run, composed.sources
    degrees = layout.infer(run.parallel, _given_degrees(composed), _common_heads(card))
    if degrees.ranks > 1:
        raise UserError(
            f"Running on {degrees.ranks} ranks ({_degrees(degrees)}) is not available in this version; "
            "run with parallel=single"
        )
    run = _pin_prompts(run)
    samples = _samples(run)
    device = choose_device(run.device)
    dtype = choose_dtype(run.dtype, device)
    _check_size(run, card)
    return Plan(
        run=run,
        sources=sources,
        card=card,
        layout=degrees,
        backend=_choose_backend(run),
        device=device,
        dtype=dtype,
        batches=_batches(samples, run.sampling.batch_size),
        requested=requested(run),
        effective=_effective(run, degrees, device, dtype),
        warnings=tuple(_warnings(run, sources, composed.versions) + remote_code.warnings(run.model, card)),
    )


# Settings that act only together with another: the prefix of the one, whether the other is there, and its name.
NEEDS: tuple[tuple[str, Callable[[Run], bool], str], ...] = (
    ("lora.", lambda run: bool(run.lora.path or run.lora.adapters), "lora.path"),
    (
        "cache.",
        lambda run: run.cache.method is not CacheMethod.none or bool(run.cache.cache_dit_config),
        "a step cache",
    ),
    ("compile.regional", lambda run: run.compile.enable_torch_compile, "--enable-torch-compile"),
    ("compile.warmup_steps", lambda run: run.compile.warmup, "--warmup"),
    ("offload.disk_path", lambda run: run.offload.dit_layerwise_offload, "--dit-layerwise-offload"),
    ("model.configs", lambda run: Path(run.model.path or "").expanduser().is_file(), "a single file as --model-path"),
    ("tracking.project", lambda run: run.tracking.name is Tracker.wandb, "tracking=wandb"),
)


def refuse_missing(run: Run, sources: Mapping[str, str]) -> None:
    """Refuse, by name, every setting that differs from the schema's and whose engine work does not exist yet."""
    plainest = Run()
    for path in leaves():
        for prefixes, sentence in MISSING:
            if path.startswith(prefixes) and get(run, path) != get(plainest, path):
                by = sources.get(path, "default")
                raise UserError(f"{path}={_shown(get(run, path))} (from {by}): {sentence}")


def _shown(value: Any) -> str:
    value = plain(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# The least and the most that a number may be; above, arithmetic or memory ends before the run does.
BOUNDS: dict[str, tuple[int, int]] = {
    "sampling.num_inference_steps": (1, 100_000),
    "sampling.num_samples": (1, 1_000_000),
    "sampling.batch_size": (1, 1_000_000),
    "sampling.height": (1, 65_536),
    "sampling.width": (1, 65_536),
    "sampling.max_sequence_length": (1, 1_000_000),
    "sampling.seed": (0, 2**63 - 1),
    "compile.warmup_steps": (1, 100_000),
    "sampling.num_frames": (1, 100_000),
    "output.fps": (1, 1000),
    "perf.repeat": (1, 10_000),
}
FREE_TEXT = ("sampling.prompt", "sampling.negative_prompt")  # may be empty and hold any character


def _check_values(run: Run) -> None:
    try:
        check_plain(plain(run))
    except ValueError as error:
        raise UserError(str(error)) from None
    if run.model.path is None and run.model.preset != "landscape":
        raise UserError("No model is named: give --model-path, or a preset such as model=sdxl")
    for path in leaves():
        value = get(run, path)
        if isinstance(value, str) and path not in FREE_TEXT:
            _check_name(path, value)
    for path, (least, most) in BOUNDS.items():
        value = get(run, path)
        if value is not None and value < least:
            raise UserError(f"{path} is {value}; it must be at least {least}")
        if value is not None and value > most:
            raise UserError(f"{path} is {value}; it must be at most {most}")
    if run.dry_run not in (False, True, "json"):
        raise UserError(f"dry_run is '{run.dry_run}'; it must be false, true or json")


def _check_name(path: str, value: str) -> None:
    """Texts that are not prompts name things: files, folders, models."""
    if not value.strip():
        raise UserError(f"{path} is blank; leave it out instead")
    if "\0" in value:
        raise UserError(f"{path} holds a zero byte")
    if any(len(part.encode()) > 255 for part in value.split("/")):
        raise UserError(f"{path} is too long to name anything: '{value[:40]}...'")
    if path == "output.perf_dump_path" and os.path.isdir(value):
        raise UserError(f"{path} is the folder {value}; it must name a JSON file")


def _given_degrees(composed: "Composed") -> set[str]:
    """Fields of the parallel group that somebody stated: the user, or the file of the chosen option."""
    return {
        path.removeprefix("parallel.")
        for path, source in composed.sources.items()
        if path.startswith("parallel.") and source != "default"
    }


def _common_heads(card: ModelCard) -> int | None:
    """Greatest common divisor of the attention head counts of the denoising network."""
    for name in ("transformer", "unet"):
        if name in card.components:
            config = card.components[name].config
            heads = config.get("num_attention_heads") or config.get("attention_head_dim")
            if isinstance(heads, list):
                blocks = config.get("down_block_types", [""] * len(heads))
                heads = math.gcd(*(count for count, kind in zip(heads, blocks, strict=False) if "Attn" in kind))
            return heads if isinstance(heads, int) and heads > 0 else None
    return None


def _degrees(degrees: Layout) -> str:
    return f"dp {degrees.dp}, cfg {degrees.cfg}, ring {degrees.ring}, ulysses {degrees.ulysses}, tp {degrees.tp}"


def _choose_backend(run: Run) -> str:
    if run.backend.name is BackendName.sglang:
        raise UserError("The native engine is not available in this version; run with --backend diffusers")
    return "diffusers"


def choose_device(wanted: Device) -> str:
    """cpu or cuda. Raises UserError where cuda is asked for and absent."""
    import torch

    if wanted is Device.cuda and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA device; run with device=cpu")
    if wanted is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted.name


def choose_dtype(wanted: DType, device: str) -> str:
    """The compute dtype; auto is bfloat16 where the hardware multiplies it (capability flags alone), else float32."""
    if wanted is not DType.auto:
        return wanted.name
    if device == "cuda":
        import torch

        return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32"
    return "bfloat16" if env.cpu_has_bf16() else "float32"


def _pin_prompts(run: Run) -> Run:
    """The lines of sampling.prompts_file as sampling.prompts, so that the record repeats without the file."""
    sampling = run.sampling
    stated = [sampling.prompt is not None, bool(sampling.prompts_file), bool(sampling.prompts)]
    if sum(stated) > 1:
        raise UserError("sampling.prompt, sampling.prompts_file and sampling.prompts exclude each other; give one")
    seed = sampling.seed if sampling.seed is not None else secrets.randbelow(2**32)
    prompts = _read_prompts(sampling.prompts_file) if sampling.prompts_file else sampling.prompts
    for entry in prompts:
        _check_prompt(entry)
    return replace(run, sampling=replace(sampling, seed=seed, prompts=prompts, prompts_file=None))


def _read_prompts(path: str) -> list[dict[str, Any]]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"sampling.prompts_file: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"sampling.prompts_file: {path} is not UTF-8 text") from None
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            entries.append({"prompt": line})
            continue
        try:
            entries.append(parse_json(line))
        except ValueError as error:
            raise UserError(f"sampling.prompts_file: {path}, line {number} {error}") from None
    if not entries:
        raise UserError(f"sampling.prompts_file: {path} holds no prompt")
    return entries


def _check_prompt(entry: Mapping[str, Any]) -> None:
    kinds = {"prompt": str, "negative_prompt": str, "seed": int}
    for key, value in entry.items():
        if key not in kinds:
            raise UserError(f"A prompt has the unknown key '{key}'{nearest(key, kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise UserError(f"A prompt's '{key}' is {value!r}; it must be {'an integer' if key == 'seed' else 'text'}")
    if "prompt" not in entry:
        raise UserError(f"A prompt entry has no 'prompt': {json.dumps(dict(entry), ensure_ascii=False)}")
    least, most = BOUNDS["sampling.seed"]
    if not least <= entry.get("seed", 0) <= most:
        raise UserError(f"A prompt's seed is {entry['seed']}; it must lie between {least} and {most}")


def _samples(run: Run) -> list[Sample]:
    """Every picture of the run: for each prompt, seeds base, base + 1, ...; each prompt starts at the run's seed."""
    sampling, seed = run.sampling, run.sampling.seed
    assert seed is not None  # pinned before
    entries = sampling.prompts or [{"prompt": sampling.prompt}]
    samples: list[Sample] = []
    most = BOUNDS["sampling.num_samples"][1]
    if len(entries) * sampling.num_samples > most:
        raise UserError(f"{len(entries)} prompts x {sampling.num_samples} samples are more than {most} pictures")
    for entry in entries:
        base = int(entry.get("seed", seed))
        if base + sampling.num_samples - 1 > BOUNDS["sampling.seed"][1]:
            raise UserError(f"The seeds from {base} on leave the range of seeds with {sampling.num_samples} samples")
        negative = entry.get("negative_prompt", sampling.negative_prompt)
        for offset in range(sampling.num_samples):
            samples.append(Sample(len(samples), entry["prompt"], negative, base + offset))
    return samples


def _batches(samples: list[Sample], size: int) -> tuple[tuple[Sample, ...], ...]:
    """Consecutive samples in batches of at most `size`; with and without negative prompt are not mixed."""
    batches: list[list[Sample]] = []
    for sample in samples:
        last = batches[-1] if batches else []
        same = bool(last) and (last[-1].negative_prompt is None) == (sample.negative_prompt is None)
        if same and len(last) < size:
            last.append(sample)
        else:
            batches.append([sample])
    return tuple(tuple(batch) for batch in batches)


def size_multiple(card: ModelCard) -> int | None:
    """Pixels that height and width must be a multiple of: VAE downsampling times the patch size."""
    vae, network = card.components.get("vae"), card.components.get("transformer")
    channels = vae.config.get("block_out_channels") if vae else None
    if vae is None or vae.class_name != "AutoencoderKL" or not channels:
        return None
    patch = network.config.get("patch_size", 1) if network else 1
    if network and "Flux" in network.class_name:
        patch = 2  # FLUX packs 2 x 2 latents into one token outside of its network
    return int(2 ** (len(channels) - 1) * patch) if isinstance(patch, int) else None


def _check_size(run: Run, card: ModelCard) -> None:
    multiple = size_multiple(card)
    for name in ("height", "width"):
        value = getattr(run.sampling, name)
        if multiple and value is not None and value % multiple:
            below, above = value // multiple * multiple, (value // multiple + 1) * multiple
            choice = f"{below} or {above}" if below else str(above)
            raise UserError(f"sampling.{name} is {value}; this model takes multiples of {multiple}, such as {choice}")


def requested(run: Run) -> dict[str, Any]:
    """The request where a choice can differ from what takes effect."""
    degrees = {name: value for name, value in plain(run.parallel).items() if value is not None}
    return {
        "backend": run.backend.name.name,
        "attention": run.attention.backend,
        "dtype": run.dtype.name,
        "device": run.device.name,
        "parallel": degrees,
        "cache": run.cache.method.name,
        "quantization": run.quant.method.name,
        "offload": [name for name, value in plain(run.offload).items() if value is True],
        "lora": [adapter["path"] for adapter in [plain(run.lora), *plain(run.lora.adapters)] if adapter["path"]],
        "compile": run.compile.enable_torch_compile,
    }


def _effective(run: Run, degrees: Layout, device: str, dtype: str) -> dict[str, Any]:
    """What the plan expects to take effect; the engine replaces it by what it reads back once it is built."""
    asked = requested(run)
    cached = run.cache.method is not CacheMethod.none or bool(run.cache.cache_dit_config)
    return {
        "backend": _choose_backend(run),
        "attention": "sdpa" if asked["attention"] == "auto" else asked["attention"],
        "dtype": dtype,
        "device": device,
        "parallel": plain(degrees),
        "cache": CacheMethod.dbcache.name if cached else CacheMethod.none.name,
        "quantization": QuantMethod.none.name,
        "offload": [] if device == "cpu" else asked["offload"],
        "lora": asked["lora"],
        "compile": asked["compile"],
        "seed": run.sampling.seed,
    }


def _differs(run: Run, sources: Mapping[str, str], path: str) -> bool:
    return sources.get(path, "default") not in ("default", "preset") and get(run, path) != get(Run(), path)


def _warnings(run: Run, sources: Mapping[str, str], versions: Mapping[str, str | None]) -> list[str]:
    """Settings that the user gave and that change nothing, and a record that was made elsewhere."""
    found = []
    for path in leaves():
        for prefix, present, name in NEEDS:
            if path.startswith(prefix) and user_gave(run, sources, path) and not present(run):
                found.append(f"{BY_PATH[path].option if path in BY_PATH else path} has no effect without {name}")
    if user_gave(run, sources, "perf.machine_rates") and run.machine.name != "auto":
        found.append(f"perf.machine_rates has no effect: the rates are those of machine={run.machine.name}")
    if not run.output.perf_dump_path:
        idle = [
            path for path in leaves() if path.startswith(("perf.", "machine.name")) and _differs(run, sources, path)
        ]
        found += [f"{path} has no effect without --perf-dump-path" for path in idle]
    if run.model.revision and (run.model.path is None or Path(run.model.path).expanduser().exists()):
        found.append("--revision has no effect: the model is a local folder or file")
    here = env.versions()
    other = [f"{name} {then} (here {here.get(name)})" for name, then in versions.items() if here.get(name) != then]
    if other:
        found.append(f"The record was made with other versions, so the result may differ: {', '.join(other)}")
    return found
