"""attention=auto: the fastest of several exact kernels on the run's own shapes, timed once and kept on disk."""

import contextlib
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Mapping

import torch

from sglang_gen import env, files
from sglang_gen.models.attention import Kernel
from sglang_gen.perf.clock import synchroniser

Shapes = Counter[tuple[int, ...]]  # (B, H, L, S, D) of a call -> calls in one evaluation of the network
MARGIN = 0.95  # another kernel than the first has to be clearly faster, so that noise does not choose
ROUNDS = 5


def fastest(kernels: Mapping[str, Kernel], shapes: Shapes, device: str, dtype: torch.dtype) -> str:
    """The name of the kernel with the least time for all calls; of equals the first.

    The answer is kept per device, dtype, shapes, kernels and version of torch, so that it is timed once on a machine.
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
    with contextlib.suppress(OSError):  # an unwritable cache costs the next run a moment, nothing else
        taken = {name: value for name, value in seconds.items() if math.isfinite(value)}
        files.write_json(path, {"kernel": chosen, "seconds": taken})
    return chosen


def measure(kernels: Mapping[str, Kernel], shapes: Shapes, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of each kernel for all calls: the least of several rounds, in which the kernels take turns.

    A kernel that does not take all of the shapes needs forever; the first takes them, or the error is its own.
    """
    wait = synchroniser(device)
    seconds, first = dict.fromkeys(kernels, 0.0), next(iter(kernels))
    for (batch, heads, length, keys, width), count in shapes.items():
        drawn = [torch.randn(batch, each, heads, width, device=device, dtype=dtype) for each in (length, keys, keys)]
        q, k, v = (each.transpose(1, 2) for each in drawn)  # as they leave a product
        least = dict.fromkeys(kernels, float("inf"))
        for _ in range(ROUNDS):
            for name, kernel in kernels.items():
                if math.isinf(seconds[name]):
                    continue
                wait()
                start = time.perf_counter()
                try:
                    kernel(q, k, v)
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
