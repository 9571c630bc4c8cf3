"""attention=auto: times exact attention kernels on the shapes of the run and caches the fastest on disk."""

import contextlib
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from sglang_gen import env, files
from sglang_gen.models.attention import Kernel
from sglang_gen.perf.clock import synchroniser

# (B, H, L, S, D) of a call, or (B, H, L, S, D, "masked") -> calls in one evaluation of the network
Shapes = Counter[tuple[Any, ...]]
MARGIN = 0.95  # a kernel replaces the first one only if it is clearly faster, so that noise does not decide
ROUNDS = 5


def fastest(kernels: Mapping[str, Kernel], shapes: Shapes, device: str, dtype: torch.dtype) -> str:
    """Name of the kernel with the shortest total time over all calls; the first one unless another is clearly faster.

    Results are cached on disk by device, dtype, shapes, kernels and torch version.
    """
    if len(kernels) == 1:
        return next(iter(kernels))
    facts = [_device_name(device), str(dtype), sorted(shapes.items()), sorted(kernels), torch.__version__]
    path = env.cache_dir() / "attention" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if (kept := json.loads(path.read_text(encoding="utf-8")).get("kernel")) in kernels:
            return str(kept)
    seconds = measure(kernels, shapes, device, dtype)
    first = next(iter(kernels))
    best = min(seconds, key=lambda name: seconds[name])
    chosen = best if seconds[best] < MARGIN * seconds[first] else first
    with contextlib.suppress(OSError):  # if the cache is not writable, the next run measures again
        finite = {name: value for name, value in seconds.items() if math.isfinite(value)}
        files.write_json(path, {"kernel": chosen, "seconds": finite})
    return chosen


def measure(kernels: Mapping[str, Kernel], shapes: Shapes, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Total seconds of each kernel over all calls, each call timed as the minimum of several interleaved rounds.

    A kernel that does not support all shapes gets infinity; an error of the first kernel is raised.
    """
    wait = synchroniser(device)
    seconds, first = dict.fromkeys(kernels, 0.0), next(iter(kernels))
    for (batch, heads, length, keys, width, *masked), count in shapes.items():
        sizes = [(batch, tokens, heads, width) for tokens in (length, keys, keys)]
        # [B, L, H, D] transposed: the strides that q, k and v have after a linear layer
        inputs = [torch.randn(size, device=device, dtype=dtype).transpose(1, 2) for size in sizes]
        if masked:
            inputs.append(torch.ones(batch, 1, 1, keys, device=device, dtype=torch.bool))
        least = dict.fromkeys(kernels, float("inf"))
        for _ in range(ROUNDS):
            for name, kernel in kernels.items():
                if math.isinf(seconds[name]):
                    continue
                wait()
                start = time.perf_counter()
                try:
                    kernel(*inputs)
                except RuntimeError:
                    if name == first:
                        raise
                    seconds[name] = math.inf
                    continue
                wait()
                least[name] = min(least[name], time.perf_counter() - start)
        for name in kernels:
            seconds[name] += count * least[name]
    return seconds


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{env.cpu()[0]} x {torch.get_num_threads()}"
