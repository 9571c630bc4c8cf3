"""The only module that reads the environment: variables, folders, package versions, CPU flags."""

import gc
import hashlib
import importlib.metadata
import importlib.util
import netrc
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from sglang_gen.errors import UserError

EMBEDDED_MODEL = "landscape"  # its preset and its folder
VERSION = "0.1.0"
LOOPBACK = "lo"  # Linux's name of the interface
PACKAGES = (
    "sglang-gen", "torch", "diffusers", "transformers", "tokenizers", "safetensors", "accelerate", "huggingface-hub",
    "hydra-core", "omegaconf", "numpy", "pillow",
)  # fmt: skip


@dataclass(frozen=True)
class Torchrun:
    """Environment variables that torchrun, or a similar launcher, sets for each process."""

    rank: int
    ranks: int
    local: int  # rank on this machine
    here: int  # ranks on this machine
    node: int  # index of the machine, 0 for the machine of rank 0
    attempt: int = 0  # number of restarts by torchrun
    keeps_store: bool = False  # True if rank 0 hosts the rendezvous store, False if torchrun does


def torchrun() -> Torchrun | None:
    """The launcher's variables; None if no launcher started this process.

    Raises UserError for a value that is not a number or out of range, a rank outside of the world, or a missing
    LOCAL_RANK.
    """
    if not all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None

    def number(name: str, default: int = 0, least: int = 0, most: int = 2**31 - 1) -> int:
        text = os.environ.get(name) or str(default)
        if not (text.isascii() and text.isdecimal()):
            raise UserError(f"The environment variable {name} is '{text}'; torchrun sets it to a number")
        if len(text) > 20 or not least <= int(text) <= most:
            raise UserError(f"The environment variable {name} is {text}; it must lie between {least} and {most}")
        return int(text)

    rank, ranks = number("RANK"), number("WORLD_SIZE", least=1)
    number("MASTER_PORT", least=1, most=65_535)
    if ranks > 1 and not os.environ.get("LOCAL_RANK"):
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {ranks}, so a launcher has started this process, but not LOCAL_RANK, its "
            "number on this machine; set it too, or unset RANK for a run of its own"
        )
    if rank >= max(ranks, 1):
        raise UserError(f"RANK is {rank} and WORLD_SIZE {ranks}: ranks are numbered from 0 to WORLD_SIZE - 1")
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
    """Whether model ids refer to ModelScope (SGLANG_USE_MODELSCOPE=1 or true)."""
    return os.environ.get("SGLANG_USE_MODELSCOPE", "").lower() in ("1", "true")


def cache_dir() -> Path:
    """Folder of rates, kernel choices, compiled code, references: SGLANG_GEN_CACHE, XDG_CACHE_HOME or ~/.cache."""
    if explicit := os.environ.get("SGLANG_GEN_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-gen"


def conf_dir() -> Path:
    """Folder of the shipped configuration: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def embedded_model() -> Path:
    return Path(__file__).parent / "assets" / EMBEDDED_MODEL


def manifests() -> Path:
    """Folder of the prompt manifests in the package."""
    return Path(__file__).parent / "assets" / "manifests"


def entry_points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """Entry points of the installed packages in a group, by name."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=group)}


def preset_configs(preset: str) -> Path:
    """Folder with the component configs of a preset; it may not exist."""
    return Path(__file__).parent / "assets" / "configs" / preset


def prepare_libraries() -> None:
    """Set the variables that libraries read once. Call it when a process starts, before they are imported.

    Telemetry and messages at import are turned off. cuBLAS is deterministic only with a fixed workspace, which torch
    reads at the first matrix product of a process. It is set for every run, because a later run of the process may be
    deterministic; the size is torch's default on Hopper.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d warns of every attempt to connect
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reports its start and end otherwise
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def collect_rarely() -> None:
    """Raise the garbage collector's threshold from 700: imports create many objects and few cycles (0.7 s of CPU)."""
    gc.set_threshold(10_000)


def package_version(name: str) -> str | None:
    """Installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def keep_compiled() -> None:
    """Keep the compilation cache of torch.compile in `cache_dir`, so that later processes reuse it.

    torch's cache key covers the graph and torch's version only, so the folder is named by a hash of our Inductor
    lowerings.
    """
    lowering = (Path(__file__).parent / "parallel" / "inductor_lowering.py").read_bytes()
    folder = cache_dir() / "compile" / hashlib.sha256(lowering).hexdigest()[:8]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # torch then uses its own temporary folder
        return
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def has_nunchaku() -> bool:
    """Whether the nunchaku package of the SVDQuant project is installed, not the PyPI package of the same name."""
    try:
        files = importlib.metadata.distribution("nunchaku").files or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(str(file) == "nunchaku/models/transformers/transformer_flux.py" for file in files)


def rank_variables(threads: int | None) -> dict[str, str]:
    """Environment variables of a rank's process: a copy of ours, with PYTHONPATH and the number of OpenMP threads.

    gloo listens on the loopback interface unless the user named another, so that no other machine reaches the ranks.
    """
    variables = dict(os.environ)
    variables["PYTHONPATH"] = os.pathsep.join(
        path for path in (str(Path(__file__).parent.parent), variables.get("PYTHONPATH")) if path
    )
    if threads is not None:
        variables.setdefault("OMP_NUM_THREADS", str(threads))
    if LOOPBACK in (name for _, name in socket.if_nameindex()):
        variables.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    return variables


@cache
def versions() -> Mapping[str, str | None]:
    """Installed versions of the packages that can change an image or its speed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        installed[name] = package_version(name)
    return MappingProxyType(installed)


@cache
def commit_hash() -> str | None:
    """Commit of this checkout, with `-dirty` if tracked files were modified; None when installed from a wheel."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "--no-optional-locks", "-C", str(root)]  # a run that is killed meanwhile leaves no lock behind
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if status.stdout.strip() else commit


@cache
def cpu() -> tuple[str, frozenset[str]]:
    """Model name and capability flags of the CPU, from /proc/cpuinfo if it exists."""
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
    """The dtype that SGLANG_GEN_CPU_DTYPE selects for dtype=auto on a CPU. Raises UserError if it is not in `legal`."""
    given = os.environ.get(CPU_DTYPE) or None
    if given is not None and given not in legal:
        raise UserError(f"The environment variable {CPU_DTYPE} is '{given}'; it must be {' or '.join(legal)}")
    return given


def wandb_mode() -> str | None:
    """The offline mode if W&B has neither a mode nor a key (WANDB_API_KEY, `wandb login`); None lets W&B choose."""
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


def missing_for_compiling(device: str) -> str | None:
    """What torch.compile needs to generate code for this device and does not find; None if nothing is missing.

    On a CPU Inductor compiles C++ that includes Python.h; on a GPU Triton compiles C that does.
    """
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton (pip install triton)"
    variable, language, names = "CXX", "C++", ["clang++" if sys.platform == "darwin" else "g++"]
    if device == "cuda":
        variable, language, names = "CC", "C", ["gcc", "clang"]
    given = os.environ.get(variable)
    if given and shutil.which(given) is None:
        return f"a {language} compiler, and there is no '{given}', which the environment variable {variable} names"
    if not given and not any(map(shutil.which, names)):
        other = f"; {variable}=clang++ takes another" if language == "C++" else ""
        return f"a {language} compiler ({' or '.join(names)}{other})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"the headers of this Python (python3-dev), and there is no {header}"
    return None


def require_compiler(device: str, setting: str = "compile: torch.compile", instead: str = "compile=none") -> None:
    """Raises UserError that names what torch.compile lacks on this device, and what to run with instead."""
    missing = missing_for_compiling(device)
    if missing is not None:
        where = "a GPU" if device == "cuda" else "CPU"
        raise UserError(f"{setting} on {where} needs {missing}; install it, or run with {instead}")


def cpu_count() -> int:
    """Number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes(device: str) -> int:
    """Total memory in bytes of one GPU, or of the host."""
    if device != "cuda":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def gpu_count() -> int:
    """Number of GPUs visible to torch."""
    import torch

    return torch.cuda.device_count()
