"""The schema of a run: one root dataclass, with one nested dataclass per config group.

Every documented default is defined here or in a YAML file of `conf/`. Hydra checks the types of YAML files against this
schema; `leaves` and `values.coerce` check flags and configuration files.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


class BackendName(Enum):
    auto = "auto"
    sglang = "sglang"
    diffusers = "diffusers"


class DType(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Matmul(Enum):
    auto = "auto"
    torch = "torch"
    onednn = "onednn"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class LogLevel(Enum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class QuantMethod(Enum):
    none = "none"
    prequantized = "prequantized"
    int8 = "int8"
    fp8 = "fp8"
    nunchaku = "nunchaku"


class CacheMethod(Enum):
    none = "none"
    dbcache = "dbcache"
    deepcache = "deepcache"
    planned = "planned"


class Tracker(Enum):
    none = "none"
    csv = "csv"
    wandb = "wandb"


class GuidanceBatching(Enum):
    auto = "auto"
    batched = "batched"
    sequential = "sequential"


class Weights(Enum):
    pretrained = "pretrained"
    random = "random"


@dataclass
class Model:
    """The model's weights, and how a diffusers pipeline is assembled from them."""

    preset: str | None = None  # name of the option in conf/model whose settings apply
    path: str | None = None  # hub id, local folder or single file; null with landscape: the embedded folder
    id: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    pipeline_class_name: str | None = None
    component_paths: dict[str, str] = field(default_factory=dict)
    configs: str | None = None  # folder or hub id with the component configs and tokenizers for a single file
    weights: Weights = Weights.pretrained  # random: drawn from a fixed seed, and no weight file is read
    example_prompt: str | None = None


@dataclass
class Backend:
    name: BackendName = BackendName.auto
    float32_matmul: Matmul = Matmul.auto
    diffusers_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Parallel:
    """num_gpus = dp_size * cfg * ring_degree * ulysses_degree * tp_size, where cfg is 2 with enable_cfg_parallel."""

    num_gpus: int = 1
    tp_size: int | None = None
    sp_degree: int | None = None
    ulysses_degree: int | None = None
    ring_degree: int | None = None
    dp_size: int = 1
    dp_degree: int = 1
    enable_cfg_parallel: bool = False
    timeout_minutes: float = 30.0  # longest time that a rank waits for another


# Fields of `Parallel` that determine the layout.
DEGREES = (
    "num_gpus", "tp_size", "sp_degree", "ulysses_degree", "ring_degree", "dp_size", "dp_degree", "enable_cfg_parallel",
)  # fmt: skip


@dataclass
class Offload:
    dit_cpu_offload: bool = False
    dit_layerwise_offload: bool = False
    text_encoder_cpu_offload: bool = False
    image_encoder_cpu_offload: bool = False
    vae_cpu_offload: bool = False
    disk_path: str | None = None  # folder for weights offloaded to disk


@dataclass
class Adapter:
    path: str | None = None
    nickname: str = "default"
    scale: float = 1.0
    target_modules: list[str] = field(default_factory=list)


@dataclass
class Lora:
    path: str | None = None
    nickname: str = "default"
    scale: float = 1.0
    target_modules: list[str] = field(default_factory=list)
    adapters: list[Adapter] = field(default_factory=list)


@dataclass
class Quant:
    method: QuantMethod = QuantMethod.none
    transformer_weights_path: str | None = None
    nunchaku_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class Attention:
    backend: str = "auto"
    backend_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class Cache:
    """Step caches; the fields of dbcache have the names of cache-dit's configuration."""

    method: CacheMethod = CacheMethod.none
    cache_dit_config: dict[str, Any] = field(default_factory=dict)
    Fn_compute_blocks: int = 8
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.08
    max_accumulated_residual_diff_threshold: float | None = None
    max_warmup_steps: int = 8
    warmup_interval: int = 1
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    enable_separate_cfg: bool | None = None
    steps_computation_mask: list[int] | None = None
    steps_computation_policy: str = "dynamic"
    calibrator: str | None = None
    taylorseer_order: int = 1
    interval: int = 3  # deepcache: number of steps from one full forward to the next
    branch: int = 0  # deepcache: skip connection at which a reused step turns back, from the outermost
    center: int | None = None  # deepcache: step around which full forwards are denser; null: evenly spaced
    power: float = 1.4  # deepcache: how much denser
    plan_file: str | None = None  # planned: the schedule that `sglang tune cache` wrote


@dataclass
class Compile:
    enable_torch_compile: bool = False
    regional: bool = True
    cuda_graphs: bool = False  # capture the network's forward pass once for each input shape, and replay it
    warmup: bool = False
    warmup_steps: int = 1
    disable_autocast: bool = False


@dataclass
class Sampling:
    prompt: str | None = None
    negative_prompt: str | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_interval: list[float] | None = None  # guided steps, from and to as fractions of all steps; null: all
    guidance_batching: GuidanceBatching = GuidanceBatching.auto  # both branches in one batch, or sequentially
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    num_samples: int = 1
    batch_size: int = 1
    max_sequence_length: int | None = None
    prompts_file: str | None = None
    prompts: list[dict[str, Any]] = field(default_factory=list)
    image_path: str | None = None
    num_frames: int | None = None
    latents: str | None = None  # safetensors file of an earlier run whose `noise` the first step starts from


@dataclass
class Output:
    path: str = "outputs/"
    perf_dump_path: str | None = None
    latents: bool = False
    fps: int | None = None


@dataclass
class Perf:
    tag: str | None = None
    machine_rates: bool = True  # measure this machine's matmul and memory rates once and cache them
    work: bool = True  # count FLOPs and bytes of each stage, and predict memory and times
    calibrate: bool = False  # measure a fixed work beside each generation, to which perf check relates processor time
    blocks: bool = False  # time each block of the denoising network
    trace: bool = False  # write a profiler trace of one more batch after the timed generations
    repeat: int = 1  # generations in one process, for more observations and a check that all are identical
    interleave: bool = False  # in a multirun, the repeats of all jobs in turn
    objective: str | None = None  # key of a number in the dump that a job of a multirun returns to its sweeper


@dataclass
class Quality:
    """Measures of the images, and what they are compared with."""

    manifest: str | None = None  # file of JSON lines with the prompts and seeds of the run, or a name in the package
    reference: str | None = None  # folder of an earlier run; auto: made once without approximations, and kept
    metrics: list[str] = field(default_factory=list)  # entry points of the group sglang_gen.metrics


@dataclass
class Tracking:
    name: Tracker = Tracker.none
    project: str = "sglang-gen"


@dataclass
class Sweep:
    """How a multirun treats its jobs; the same for all of them."""

    resume: bool = True  # keep jobs that an earlier run of the sweep completed in the same folder
    skip_refused: bool = False  # refused jobs do not change the exit code
    fresh: bool = False  # start each job in a process of its own


@dataclass
class Machine:
    """Rates of a named machine, in place of measured ones."""

    name: str = "auto"
    matmul_tflops: float | None = None  # dense bf16
    attention_tflops: float | None = None  # null: same as matmul_tflops
    memory_gb_per_s: float | None = None
    link_gb_per_s: float | None = None  # from one GPU to the others, in one direction
    link_latency_us: float | None = None  # of a collective, however little it sends; null: none


@dataclass
class Run:
    model: Model = field(default_factory=Model)
    backend: Backend = field(default_factory=Backend)
    parallel: Parallel = field(default_factory=Parallel)
    offload: Offload = field(default_factory=Offload)
    lora: Lora = field(default_factory=Lora)
    quant: Quant = field(default_factory=Quant)
    attention: Attention = field(default_factory=Attention)
    cache: Cache = field(default_factory=Cache)
    compile: Compile = field(default_factory=Compile)
    sampling: Sampling = field(default_factory=Sampling)
    output: Output = field(default_factory=Output)
    perf: Perf = field(default_factory=Perf)
    quality: Quality = field(default_factory=Quality)
    tracking: Tracking = field(default_factory=Tracking)
    machine: Machine = field(default_factory=Machine)
    sweep: Sweep = field(default_factory=Sweep)
    dry_run: bool | str = False  # false, true (a table) or json
    device: Device = Device.auto
    dtype: DType = DType.auto
    deterministic: bool = False
    log_level: LogLevel = LogLevel.info


def leaves() -> dict[str, Any]:
    """Every config path of the schema with its type, in order: `{"sampling.seed": int | None, ...}`."""
    return dict(_leaves(Run))


@cache
def _leaves(cls: type, prefix: str = "") -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        path = f"{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            kinds |= _leaves(typing.cast(type, kind), f"{path}.")
        else:
            kinds[path] = kind
    return kinds


def get(run: Run, path: str) -> Any:
    """The value at a config path."""
    value: Any = run
    for name in path.split("."):
        value = getattr(value, name)
    return value


def put(run: Run, path: str, value: Any) -> None:
    """Set the value at a config path; `value` has passed `values.coerce`."""
    *parents, name = path.split(".")
    setattr(get(run, ".".join(parents)) if parents else run, name, value)


def plain(value: Any) -> Any:
    """Convert dataclasses, enums, tuples and sets to dicts, names and lists that JSON can represent."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(value)
    return str(value) if isinstance(value, Path) else value


# Settings that may name a local file or folder, in which a leading ~ is expanded to the home folder.
LOCAL = (
    "model.path", "model.configs", "lora.path", "quant.transformer_weights_path", "offload.disk_path",
    "sampling.image_path", "sampling.latents", "sampling.prompts_file", "quality.manifest", "quality.reference",
    "cache.plan_file", "output.path", "output.perf_dump_path",
)  # fmt: skip

# Minimum and maximum of numeric settings; larger values would overflow or exhaust memory.
BOUNDS: dict[str, tuple[float, float]] = {
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
    "parallel.timeout_minutes": (0.01, 100_000),
}


def user_gave(run: Run, sources: Mapping[str, str], path: str) -> bool:
    """Whether a flag, an override or a configuration file sets a value other than the schema's default."""
    return sources.get(path) in ("flag", "override", "file") and get(run, path) != get(Run(), path)
