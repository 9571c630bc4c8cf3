"""The card, its driver, and the versions of what computes on it."""

import importlib.metadata
import shutil
import subprocess

import torch

from sglang_gen import env
from tools.gpu_first.sections import Settings, table

PACKAGES = (
    "torch", "triton", "diffusers", "transformers", "safetensors", "flash-attn", "flash-attn-3", "sageattention",
    "torchao", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
)  # fmt: skip
QUERY = "name,driver_version,power.limit,clocks.max.sm,clocks.max.memory,temperature.gpu,mig.mode.current"


def describe(settings: Settings) -> str:
    rows = [
        ("processor", f"{env.cpu()[0]}, {env.cpu_count()} processors, {torch.get_num_threads()} threads"),
        ("host memory, GiB", f"{env.memory_bytes('cpu') / 2**30:.0f}"),
        ("commit", env.commit_hash()),
        *((f"package {name}", version) for name in PACKAGES if (version := _version(name))),
    ]
    if settings.gpu:
        rows += _gpu()
    return table(("what", "value"), rows)


def _gpu() -> list[tuple[str, object]]:
    properties = torch.cuda.get_device_properties(0)
    return [
        ("GPU", f"{properties.name}, {properties.multi_processor_count} multiprocessors"),
        ("compute capability", f"{properties.major}.{properties.minor}"),
        ("GPU memory, GiB", f"{properties.total_memory / 2**30:.1f}"),
        ("GPUs", torch.cuda.device_count()),
        ("CUDA of torch", torch.version.cuda),
        ("cuDNN", torch.backends.cudnn.version()),
        (f"nvidia-smi: {QUERY}", _nvidia_smi()),
    ]


def _nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return "not found"
    words = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    return (done.stdout or done.stderr).strip().replace("\n", "; ")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
