"""The environment, read here and nowhere else: variables, folders, versions, CPU flags."""

import gc
import hashlib
import importlib.metadata
import netrc
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from sglang_gen.errors import UserError

VERSION = "0.1.0"
PACKAGES = (
    "sglang-gen", "torch", "diffusers", "transformers", "tokenizers", "safetensors", "accelerate", "huggingface-hub",
    "hydra-core", "omegaconf", "numpy", "pillow",
)  # fmt: skip


@dataclass(frozen=True)
class Torchrun:
    """What torchrun, or a launcher like it, says of the process that it started."""

    rank: int
    ranks: int
    local: int  # rank on this machine
    here: int  # ranks on this machine
    node: int  # one number for all ranks of a machine, 0 for that of rank 0
    attempt: int = 0  # how often torchrun has started anew
    keeps_store: bool = False  # rank 0 keeps the store in which the ranks meet; else torchrun does


def torchrun() -> Torchrun | None:
    """None where this process is nobody's rank. Raises UserError for numbers that are none, or are not all there."""
    if not all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None

    def number(name: str, default: int = 0) -> int:
        text = os.environ.get(name) or str(default)
        if not text.isdecimal():
            raise UserError(f"The environment variable {name} is '{text}'; torchrun sets it to a number")
        return int(text)

    rank, ranks = number("RANK"), number("WORLD_SIZE")
    if ranks > 1 and not os.environ.get("LOCAL_RANK"):
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {ranks}, so a launcher has started this process, but not LOCAL_RANK, its "
            "number on this machine; set it too, or unset RANK for a run of its own"
        )
    local = number("LOCAL_RANK")
    return Torchrun(
        rank=rank,
        ranks=ranks,
        local=local,
        here=number("LOCAL_WORLD_SIZE", 1),
        node=number("GROUP_RANK", rank - local),  # ranks of a machine are consecutive
        attempt=number("TORCHELASTIC_RESTART_COUNT"),
        keeps_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )


def use_modelscope() -> bool:
    """SGLANG_USE_MODELSCOPE=1 or true: model ids are ModelScope's."""
    return os.environ.get("SGLANG_USE_MODELSCOPE", "").lower() in ("1", "true")


def cache_dir() -> Path:
    """Of measured rates, chosen kernels, compiled blocks: SGLANG_GEN_CACHE, else XDG_CACHE_HOME, else ~/.cache."""
    if explicit := os.environ.get("SGLANG_GEN_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-gen"


def conf_dir() -> Path:
    """The shipped configuration: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def embedded_model() -> Path:
    return Path(__file__).parent / "assets" / "landscape"


def preset_configs(preset: str) -> Path:
    """Folder with the component configs of a preset; it need not exist."""
    return Path(__file__).parent / "assets" / "configs" / preset


def prepare_libraries() -> None:
    """Variables that libraries read once: set at the door of a process, before they are imported or compute anything.

    Telemetry, and the remarks that are made at an import, are off. cuBLAS is deterministic only with a fixed workspace,
    which torch reads at the first product of the process. It is fixed for every run, since a later one of the process
    may want it, and has torch's own size on a Hopper.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def collect_rarely() -> None:
    """Libraries make a million objects and hardly a cycle: looking for them at Python's 700 costs a start 0.7 s."""
    gc.set_threshold(10_000)


def package_version(name: str) -> str | None:
    """Installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def keep_compiled() -> None:
    """What torch.compile makes stays beside the measured rates, where the next process finds it.

    torch goes by graphs and its own version alone; how our collectives are lowered is in the name of the folder.
    """
    lowering = (Path(__file__).parent / "parallel" / "inductor_lowering.py").read_bytes()
    folder = cache_dir() / "compile" / hashlib.sha256(lowering).hexdigest()[:8]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # then in torch's own temporary folder
        return
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def has_nunchaku() -> bool:
    """Whether the SVDQuant project's nunchaku is installed, and not the package of that name on PyPI."""
    try:
        files = importlib.metadata.distribution("nunchaku").files or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(str(file) == "nunchaku/models/transformers/transformer_flux.py" for file in files)


def of_rank(threads: int | None) -> dict[str, str]:
    """The environment of a rank's process: this one, the way to this package, and a number of OpenMP threads."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(
        path for path in (str(Path(__file__).parent.parent), found.get("PYTHONPATH")) if path
    )
    if threads is not None:
        found.setdefault("OMP_NUM_THREADS", str(threads))
    return found


@cache
def versions() -> Mapping[str, str | None]:
    """Installed versions of the packages that can change a picture or its speed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        found[name] = package_version(name)
    return MappingProxyType(found)


@cache
def commit_hash() -> str | None:
    """Commit of this checkout, with `-dirty` where tracked files differ; None when installed from a wheel."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if status.stdout.strip() else commit


@cache
def cpu() -> tuple[str, frozenset[str]]:
    """Model name and capability flags of the CPU, from /proc/cpuinfo where there is one."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields.get("model name", platform.machine()), frozenset(fields.get("flags", "").split())


CPU_DTYPE = "SGLANG_GEN_CPU_DTYPE"


def cpu_dtype(legal: Sequence[str]) -> str | None:
    """What dtype=auto is on a CPU, where SGLANG_GEN_CPU_DTYPE says it. Raises UserError for none of the legal names."""
    given = os.environ.get(CPU_DTYPE) or None
    if given is not None and given not in legal:
        raise UserError(f"The environment variable {CPU_DTYPE} is '{given}'; it must be {' or '.join(legal)}")
    return given


def wandb_mode() -> str | None:
    """offline where W&B has neither a mode nor a key (WANDB_API_KEY, `wandb login`); None leaves the choice to W&B."""
    if any(os.environ.get(name) for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return None
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host):
                return None
        except (OSError, netrc.NetrcParseError):
            continue
    return "offline"


def can_compile(device: str) -> bool:
    """Whether torch.compile finds the C++ compiler that it needs on a CPU: $CXX, else the usual ones."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return device != "cpu" or any(shutil.which(name) for name in names)


def require_compiler(device: str) -> None:
    """Raises UserError where torch.compile cannot work."""
    if not can_compile(device):
        raise UserError("compile: torch.compile on CPU needs a C++ compiler (g++ or clang++); run with compile=none")


def cpu_count() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes(device: str) -> int:
    """All memory of one GPU, or of this machine."""
    if device != "cuda":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def gpu_count() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()
