"""The axes of the search: settings, each with the overrides that are tried for it."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from sglang_gen.config.choices import Choices
from sglang_gen.config.config_file import read_config_file
from sglang_gen.config.overrides import covers
from sglang_gen.config.schema import CacheMethod, DType, Run, leaves
from sglang_gen.errors import UserError, nearest

# Ends of the interval of guidance. Guidance in the first steps decides the image, so that all intervals begin at 0.
INTERVAL_ENDS = (0.8, 0.6, 0.7, 0.5, 0.9, 0.4)
STEP_FRACTIONS = (0.75, 0.5, 0.85, 0.6)
BATCH_SIZES = (4, 8, 2)
# Further settings of the options of the group `cache`, by their method: the presets suit large transformers.
CACHE_SETTINGS = {
    CacheMethod.dbcache: (
        "cache.Fn_compute_blocks=1",
        "cache.Fn_compute_blocks=1 cache.residual_diff_threshold=0.2",
        "cache.Fn_compute_blocks=1 cache.residual_diff_threshold=0.4 cache.max_warmup_steps=4",
    ),
    CacheMethod.deepcache: ("cache.interval=2", "cache.interval=5"),
}


@dataclass(frozen=True)
class Axis:
    """A setting of the search. `keys` are config groups or config paths; a request that sets one of them fixes the
    axis."""

    name: str
    keys: tuple[str, ...]
    by_default: bool
    meaning: str
    words: Callable[[Run, Callable[[str], list[str]]], Iterable[str]]  # (base, options of a group) -> changes


def _options(group: str) -> Callable[[Run, Callable[[str], list[str]]], Iterable[str]]:
    return lambda _run, options_of: (f"{group}={option}" for option in options_of(group))


TUNED_AXES = (
    Axis("dtype", ("dtype",), True, "number format",
         lambda _run, _options_of: (f"dtype={name}" for name in DType.__members__ if name != "auto")),
    Axis("compile", ("compile",), True, "torch.compile and CUDA graphs", _options("compile")),
    Axis("cache", ("cache",), True, "step caches", _options("cache")),
    Axis("guidance", ("sampling.guidance_interval",), True, "interval of the guided steps",
         lambda _run, _options_of: (f"sampling.guidance_interval=[0,{end}]" for end in INTERVAL_ENDS)),
    Axis("attention", ("attention",), True, "attention kernel", _options("attention")),
    Axis("layout", ("parallel",), True, "processes or GPUs that share one image", _options("parallel")),
    Axis("quant", ("quant",), False, "quantized weights", _options("quant")),
    Axis("batching", ("sampling.guidance_batching",), False, "both branches of guidance in one batch or sequentially",
         lambda _run, _options_of: ("sampling.guidance_batching=sequential",)),
    Axis("steps", ("sampling.num_inference_steps",), False, "fewer denoising steps than the base",
         lambda run, _options_of: (f"sampling.num_inference_steps={count}" for count in _fewer_steps(run))),
    Axis("throughput", ("sampling.batch_size",), False, "batches of images, and layouts with data parallelism",
         lambda _run, _options_of: (f"sampling.batch_size={size}" for size in BATCH_SIZES)),
)  # fmt: skip
THROUGHPUT = "throughput"  # without this axis, layouts with data parallelism are left out


def _fewer_steps(run: Run) -> list[int]:
    steps = run.sampling.num_inference_steps
    counts = (round(steps * fraction) for fraction in STEP_FRACTIONS)
    return list(dict.fromkeys(count for count in counts if 0 < count < steps))


def select(requested: Sequence[str] | None, fixed: Collection[str]) -> list[Axis]:
    """The axes to search: those `requested`, or the default ones, without those that are `fixed`.

    Raises UserError for an unknown axis, for a requested one that is fixed, and if none is left.
    """
    names = [axis.name for axis in TUNED_AXES]
    for name in requested or ():
        if name not in names:
            raise UserError(f"--axes: there is no axis '{name}'{nearest(name, names)} (axes: {', '.join(names)})")
        if name in fixed:
            raise UserError(f"--axes names {name}, and the request sets it; leave one of the two out")
    chosen = [axis for axis in TUNED_AXES if (axis.by_default if requested is None else axis.name in requested)]
    left = [axis for axis in chosen if axis.name not in fixed]
    if not left:
        raise UserError("Nothing is left to search: the request sets every axis; leave out a setting, or name --axes")
    return left


def fixed_axes(choices: Choices, sources: dict[str, str]) -> set[str]:
    """Names of the axes that the request sets, by a flag, an override, a file or an experiment."""
    given = {word.partition("=")[0].lstrip("+~") for word in choices.overrides} | set(choices.flags)
    if choices.file is not None:
        content = read_config_file(choices.file)
        given |= {*content.values, *content.options}
    given |= {path for path in leaves() if sources.get(path) == "experiment"}
    return {axis.name for axis in TUNED_AXES for key in axis.keys if any(covers(key, path) for path in given)}
