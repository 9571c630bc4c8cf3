"""The machine: its hardware, and its matmul and memory rates, which are measured once and cached on disk."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_gen import env, files
from sglang_gen.config.schema import Machine
from sglang_gen.errors import in_our_words
from sglang_gen.perf.clock import synchroniser


def describe(device: str) -> dict[str, Any]:
    """CPU, GPUs, threads and library versions; nothing is measured."""
    import torch

    name, _ = env.cpu()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if device == "cuda" else []
    return {
        "cpu": name,
        "cpu_count": env.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "versions": dict(env.versions()),
    }


def rates(device: str, dtype: str, named: Machine) -> dict[str, Any]:
    """`{matmul_tflops, memory_gb_per_s, source}`, measured once per dtype and torch version, or of a named machine.

    A named machine has `link_gb_per_s` too, and its matmul rate is None except in half precision. Returns only
    `{source}` if memory is too short to measure.
    """
    if named.name != "auto":
        half = dtype in ("bfloat16", "float16")
        return {
            "matmul_tflops": named.matmul_tflops if half else None,
            "memory_gb_per_s": named.memory_gb_per_s,
            "link_gb_per_s": named.link_gb_per_s,
            "source": f"machine={named.name}",
        }
    facts = describe(device)
    key = json.dumps([facts["cpu"], facts["threads"], facts["gpus"], device, dtype, facts["versions"]["torch"]])
    path = env.cache_dir() / "machine" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if (cached := _read(path)) is not None:
        return cached
    try:
        measured = {**_measure(device, dtype), "source": "measured"}
    except RuntimeError as error:  # out of memory: the network is still loaded; images and times are not affected
        return {"source": f"not measured: {in_our_words(error)}"}
    with contextlib.suppress(OSError):  # if the cache cannot be written, the next run measures again
        files.write_json(path, measured)
    return measured


def _read(path: Path) -> dict[str, Any] | None:
    """Rates that an earlier run cached; None if the file does not exist or is incomplete."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    rates = [content.get("matmul_tflops"), content.get("memory_gb_per_s")] if isinstance(content, dict) else [None]
    if not all(isinstance(rate, float) and rate > 0 for rate in rates):
        return None
    return {"matmul_tflops": rates[0], "memory_gb_per_s": rates[1], "source": "measured"}


def _measure(device: str, dtype: str) -> dict[str, float]:
    import torch

    wait = synchroniser(device)
    size, seconds = 256, 0.0
    while seconds < 0.02 and size < 8192:  # some dtypes are very slow on some machines, so start with a small size
        size *= 2
        left = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        right = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        seconds = _best(lambda left=left, right=right: left @ right, wait, repeats=3)  # type: ignore[misc]
    count = 2**26 if device == "cpu" else min(2**30, torch.cuda.mem_get_info()[0] // 16)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    copying = _best(lambda: target.copy_(source), wait, repeats=5)
    moved = 2 * source.numel() * source.element_size()
    return {
        "matmul_tflops": round(2 * size**3 / seconds / 1e12, 4),
        "memory_gb_per_s": round(moved / copying / 1e9, 2),
    }


def _best(work: Callable[[], Any], wait: Callable[[], None], repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs, after one uncounted run."""
    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])
