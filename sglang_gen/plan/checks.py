"""Checks and warnings of a composed request that need no model."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_gen import env, files
from sglang_gen.config.flags import BY_PATH
from sglang_gen.config.schema import (
    BOUNDS,
    DEGREES,
    Run,
    Tracker,
    get,
    leaves,
    plain,
    user_gave,
)
from sglang_gen.config.values import check_plain
from sglang_gen.errors import InvalidValueError, UserError
from sglang_gen.outputs import dump_path
from sglang_gen.perf import objective
from sglang_gen.plan import (
    guidance,
    offloading,
    quality_request,
    quantization,
    random_request,
    step_cache,
    stored_dtype,
)
from sglang_gen.types import Sample

if TYPE_CHECKING:
    from sglang_gen.config.compose import Composed

# Config paths that this version does not support yet, and the error for a run that sets one of them.
UNAVAILABLE: tuple[tuple[tuple[str, ...], str], ...] = ()


def check_request(composed: "Composed") -> None:
    """Raises UserError for a request that no model could run."""
    _check_values(composed.run)
    _check_files(composed.run)
    refuse_missing(composed.run, composed.sources)
    random_request.check_random_weights(composed.run)  # before the files of other weights are looked for
    guidance.check_interval(composed.run)
    quantization.check_quantization(composed.run)
    stored_dtype.check_single_dtype(composed.run)
    offloading.check_offloading(composed.run)
    step_cache.check_cache_settings(composed.run)
    quality_request.check_quality(composed.run, composed.sources)
    objective.check_objective(composed.run)
    _check_block_timings(composed.run)


def _check_block_timings(run: Run) -> None:
    """Raises UserError if the blocks of the network do not run one by one."""
    if run.perf.blocks and (together := _blocks_together(run)):
        raise UserError(
            f"perf.blocks times each block of the network, and {together}; run with compile=none or compile=regional"
        )


def _blocks_together(run: Run) -> str | None:
    """The setting that runs all blocks at once, as a clause; None if they run one by one."""
    if run.compile.cuda_graphs:
        return "compile.cuda_graphs replays all of them at once"
    whole = run.compile.enable_torch_compile and not run.compile.regional
    return "compile=full compiles all of them at once" if whole else None


# Settings that need another one: their prefixes, whether the other one is set, and its name.
SETTINGS_THAT_NEED_ANOTHER: tuple[tuple[str | tuple[str, ...], Callable[[Run], bool], str], ...] = (
    (("lora.nickname", "lora.scale", "lora.target_modules"), lambda run: bool(run.lora.path), "lora.path"),
    (
        "cache.",
        lambda run: step_cache.wanted(run.cache),
        "a step cache",
    ),
    ("compile.regional", lambda run: run.compile.enable_torch_compile, "--enable-torch-compile"),
    ("compile.warmup_steps", lambda run: run.compile.warmup, "--warmup"),
    ("model.configs", lambda run: Path(run.model.path or "").is_file(), "a single file as --model-path"),
    (
        "parallel.timeout_minutes",
        lambda run: any(getattr(run.parallel, name) not in (None, False, 1) for name in DEGREES),
        "several ranks",
    ),
    ("tracking.project", lambda run: run.tracking.name is Tracker.wandb, "tracking=wandb"),
)


def refuse_missing(run: Run, sources: Mapping[str, str]) -> None:
    """Raises UserError for a setting of `UNAVAILABLE` that differs from the schema's default."""
    plainest = Run()
    for path in leaves():
        for prefixes, sentence in UNAVAILABLE:
            if path.startswith(prefixes) and get(run, path) != get(plainest, path):
                by = sources.get(path, "default")
                raise UserError(f"{path}={_shown(get(run, path))} (from {by}): {sentence}")


def _shown(value: Any) -> str:
    value = plain(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


FREE_TEXT = ("sampling.prompt", "sampling.negative_prompt")  # may be empty and hold any character


def _check_values(run: Run) -> None:
    try:
        check_plain(plain(run))
    except InvalidValueError as error:
        raise UserError(str(error)) from None
    if run.model.path is None and run.model.preset != env.EMBEDDED_MODEL:
        raise UserError("No model is named: give --model-path or model=NAME (sglang models lists the names)")
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
    """Raises UserError for a text that cannot name a file, a folder or a model."""
    if not value.strip():
        raise UserError(f"{path} is blank; leave it out instead")
    if "\0" in value:
        raise UserError(f"{path} holds a zero byte")
    if any(len(part.encode()) > 255 for part in value.split("/")):
        raise UserError(f"{path} is too long to name anything: '{value[:40]}...'")
    if path == dump_path.KEY:
        dump_path.check_dump_path(value)


def _check_files(run: Run) -> None:
    """Raises UserError for an output path that something else occupies."""
    folder = Path(run.output.path)
    files.check_folder(folder)
    if run.tracking.name is Tracker.csv:
        files.check_file(folder / dump_path.RUNS)


def noise_warnings(run: Run, batches: tuple[tuple[Sample, ...], ...]) -> list[str]:
    """Warn of samples that `sampling.latents` makes identical, whatever their seeds."""
    samples = [sample for batch in batches for sample in batch]
    if run.sampling.latents is None or len({(each.prompt, each.negative_prompt) for each in samples}) == len(samples):
        return []
    return [
        "sampling.latents: all samples start from the same noise, so samples of one prompt differ only if the "
        "scheduler draws noise in its steps"
    ]


def _differs(run: Run, sources: Mapping[str, str], path: str) -> bool:
    return sources.get(path, "default") not in ("default", "preset") and get(run, path) != get(Run(), path)


def sweep_warnings(run: Run, sources: Mapping[str, str], in_sweep: bool) -> list[str]:
    """Warnings of settings that only a multirun reads."""
    meanings = {
        "perf.objective": "it is what a job returns to the sweeper",
        "perf.interleave": "it is the order of the repeats of several jobs",
    }
    meanings |= {path: "it is a setting of the sweep" for path in leaves() if path.startswith("sweep.")}
    given = [path for path in meanings if not in_sweep and user_gave(run, sources, path)]
    return [f"{path} has no effect outside a multirun: {meanings[path]}" for path in given]


# Settings of the group `perf` that need no dump: a check of its own, a file of its own, and what a sweep reads.
WITHOUT_DUMP = ("perf.repeat", "perf.trace", "perf.interleave", "perf.objective")


def request_warnings(run: Run, sources: Mapping[str, str], versions: Mapping[str, str | None]) -> list[str]:
    """Warnings of settings that have no effect, and of a record that was made with other versions."""
    found = []
    for path in leaves():
        for prefix, present, name in SETTINGS_THAT_NEED_ANOTHER:
            if path.startswith(prefix) and user_gave(run, sources, path) and not present(run):
                found.append(f"{BY_PATH[path].option if path in BY_PATH else path} has no effect without {name}")
    if user_gave(run, sources, "perf.machine_rates") and run.machine.name != "auto":
        found.append(f"perf.machine_rates has no effect: the rates are those of machine={run.machine.name}")
    if not run.output.perf_dump_path:
        idle = [
            path
            for path in leaves()
            if path.startswith("perf." if run.dry_run else ("perf.", "machine.name")) and _differs(run, sources, path)
            if path not in WITHOUT_DUMP
        ]
        found += [f"{path} has no effect without --perf-dump-path" for path in idle]
    if run.perf.trace and (together := _blocks_together(run)):
        found.append(
            f"perf.trace: the trace has no names of blocks, since {together}; run with compile=none or "
            "compile=regional to see them"
        )
    if run.model.revision and (run.model.path is None or Path(run.model.path).exists()):
        found.append("--revision has no effect: the model is a local folder or file")
    here = env.versions()
    other = [f"{name} {then} (here {here.get(name)})" for name, then in versions.items() if here.get(name) != then]
    if other:
        found.append(f"The record was made with other versions, so the result may differ: {', '.join(other)}")
    return found
