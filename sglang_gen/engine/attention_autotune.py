"""attention=auto: times exact attention kernels on the shapes of the run and caches the fastest on disk."""

import contextlib
import hashlib
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sglang_gen import env, files
from sglang_gen.models.attention import Kernel
from sglang_gen.perf.clock import Timer, timer

# (B, H, L, S, D) of a call -> calls in one evaluation of the network; behind D stand "masked" for a call with a mask,
# and "lse" for one that returns the log-sum-exp of its scores too
Shapes = Counter[tuple[Any, ...]]
MARGIN = 0.95  # a kernel replaces the first one only if it is clearly faster, so that noise does not decide
ROUNDS = 5
BATCH_MS = 2.0  # shortest time of a batch of calls: a single call may take less than the host takes to launch it
MOST_CALLS = 500  # in a batch: a GPU's queue holds about 1000 kernels
METHOD = 2  # of timing; a new one does not read the answers of an older one
ATTENTION_PACKAGES = ("flash_attn", "flash_attn_3", "sageattention")
CYCLES_PER_MS = 2_000_000  # of a GPU's clock, at its fastest
MOST_HELD_MS = 100.0  # launching a batch takes less, but for the first call of a kernel that is compiled


def fastest(
    kernels: Mapping[str, Kernel],
    shapes: Shapes,
    device: str,
    dtype: torch.dtype,
    with_lse: Mapping[str, Kernel] | None = None,
) -> str:
    """Name of the kernel with the shortest total time over all calls; the first one unless another is clearly faster.

    `with_lse` are the functions of the same kernels that return the log-sum-exp too, for the calls that need it.
    Results are cached on disk by everything that `facts` lists.
    """
    if len(kernels) == 1:
        return next(iter(kernels))
    key = facts(kernels, shapes, device, dtype)
    path = env.cache_dir() / "attention" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    if (cached := _cached(path, key)) in kernels:
        return cached
    seconds = measure(kernels, shapes, device, dtype, with_lse)
    first = next(iter(kernels))
    best = min(seconds, key=lambda name: seconds[name])
    chosen = best if seconds[best] < MARGIN * seconds[first] else first
    with contextlib.suppress(OSError):  # if the cache is not writable, the next run measures again
        finite = {name: value for name, value in seconds.items() if math.isfinite(value)}
        files.write_json(path, {"kernel": chosen, "seconds": finite, "facts": key})
    return chosen


def facts(kernels: Mapping[str, Kernel], shapes: Shapes, device: str, dtype: torch.dtype) -> list[Any]:
    """What an answer depends on, as in its JSON file: shapes, kernels, hardware and the versions of libraries."""
    versions = {name: env.package_version(name) for name in ATTENTION_PACKAGES}
    calls = [[list(shape), count] for shape, count in sorted(shapes.items(), key=repr)]
    return [METHOD, *_hardware(device), str(dtype), calls, sorted(kernels), str(torch.__version__), versions]


def _hardware(device: str) -> list[Any]:
    """Name of the processor; of a GPU with its compute capability and the version of cuDNN."""
    if device != "cuda":
        return [f"{env.cpu()[0]} x {torch.get_num_threads()}"]
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return [torch.cuda.get_device_name(), list(torch.cuda.get_device_capability()), cudnn]


def _cached(path: Any, key: list[Any]) -> str:
    """The answer in a file, if it was found under the same facts; else nothing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("facts") == key:
            return str(content.get("kernel"))
    return ""


def measure(
    kernels: Mapping[str, Kernel],
    shapes: Shapes,
    device: str,
    dtype: torch.dtype,
    with_lse: Mapping[str, Kernel] | None = None,
) -> dict[str, float]:
    """Total seconds of each kernel over all calls, each call timed as the median of several interleaved batches.

    A kernel that does not support all shapes gets infinity; an error of the first kernel is raised.
    """
    clock = timer(device)
    seconds, first = dict.fromkeys(kernels, 0.0), next(iter(kernels))
    for shape, count in shapes.items():
        inputs, functions = _inputs(shape, device, dtype), with_lse if with_lse and "lse" in shape else kernels
        batches = {}
        for name in kernels:
            if math.isinf(seconds[name]):
                continue
            try:
                batches[name] = _Batch(functions[name], inputs, device, clock)
            except RuntimeError:
                if name == first:
                    raise
                seconds[name] = math.inf
        rounds = [{name: batch.time() for name, batch in batches.items()} for _ in range(ROUNDS)]
        for name in batches:
            seconds[name] += count * statistics.median(times[name] for times in rounds)
    return seconds


def _inputs(shape: tuple[Any, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v, and a mask if there is one, with the strides that they have after a linear layer."""
    batch, heads, length, keys, width, *tags = shape
    sizes = [(batch, tokens, heads, width) for tokens in (length, keys, keys)]
    inputs = [torch.randn(size, device=device, dtype=dtype).transpose(1, 2) for size in sizes]
    if "masked" in tags:
        inputs.append(torch.ones(batch, 1, 1, keys, device=device, dtype=torch.bool))
    return inputs


class _Batch:
    """Calls of one kernel that are timed together."""

    def __init__(self, kernel: Callable[..., Any], inputs: list[Tensor], device: str, clock: Timer) -> None:
        """Warms up, and finds the number of calls that take `BATCH_MS`. Raises RuntimeError for other shapes."""
        self.kernel, self.inputs, self.device, self.clock = kernel, inputs, device, clock
        self.calls, self.launch_ms = 1, 0.0
        self.time()
        while (spent := 1000 * self.calls * self.time()) < BATCH_MS and self.calls < MOST_CALLS:
            wanted = math.ceil(1.2 * self.calls * BATCH_MS / spent) if spent > 0 else MOST_CALLS
            self.calls = min(max(wanted, self.calls + 1), 20 * self.calls, MOST_CALLS)

    def time(self) -> float:
        """Seconds of one call.

        The GPU is kept busy until the host has launched the batch, so that the calls follow one another without a gap.
        """
        self.clock.synchronise()
        _hold(self.device, 1.5 * self.launch_ms * self.calls)
        begun = self.clock.mark()
        launched = time.perf_counter()
        for _ in range(self.calls):
            self.kernel(*self.inputs)
        self.launch_ms = 1000 * (time.perf_counter() - launched) / self.calls
        ended = self.clock.mark()
        self.clock.synchronise()
        return self.clock.elapsed_ms(begun, ended) / 1000 / self.calls


def _hold(device: str, milliseconds: float) -> None:
    """Keep a GPU busy for about so long; it does not compute anything."""
    if device == "cuda" and milliseconds:
        torch.cuda._sleep(int(CYCLES_PER_MS * min(milliseconds, MOST_HELD_MS)))  # type: ignore[no-untyped-call]
