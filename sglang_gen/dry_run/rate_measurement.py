"""Measures the rates of kernels and collectives in one process per rank, which all compute at the same time."""

import datetime
import gc
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sglang_gen import signals
from sglang_gen.dry_run.machine_rates import Curve, Rates
from sglang_gen.dry_run.roofline import Kernels
from sglang_gen.engine import attention_kernels
from sglang_gen.engine.freed_memory import return_freed_memory
from sglang_gen.errors import RunError
from sglang_gen.models.attention import SelfAttention
from sglang_gen.models.layers import FeedForward, modulate
from sglang_gen.models.matmul import has_onednn, onednn_linear
from sglang_gen.parallel import mesh
from sglang_gen.parallel.collectives import Axis, all_reduce, exchange, gather
from sglang_gen.perf.clock import synchroniser
from sglang_gen.perf.memory import host_anon_mb
from sglang_gen.types import Layout

Draw = Callable[..., Tensor]  # random numbers of a shape
Call = tuple[float, Callable[[], Any]]  # (FLOPs or bytes, function)
Computation = tuple[Callable[[], Any], ...]
SECONDS = 0.04  # for the measurement of one call, which is repeated at least `LEAST` times
LEAST, MOST = 3, 200
SHAPES = 12  # whose memory is measured
TOGETHER, BETWEEN_COLLECTIVES = 100, (3e7, 3e8)  # collectives for a mean, and FLOPs of the products before each
ROUNDS, FEWER = 3, 2**21  # means, of which the median counts; bytes of collectives whose means are of fewer calls
RATES_PATIENCE = 300.0  # seconds until a rank has measured everything


def measure(ranks: int, threads: int, device: str, dtype: str) -> Rates:
    """The rates of rank 0 among `ranks` processes of this machine with so many threads each.

    Raises RunError if a process ends without an answer.
    """
    store, context = mesh.local_store(), multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # starting it unblocks SIGINT
    pipes = [context.Pipe() for _ in range(ranks)]
    work = [(rank, ranks, threads, store.port, device, dtype, pipes[rank][1]) for rank in range(ranks)]
    processes = [context.Process(target=_serve, args=each, daemon=True) for each in work]
    try:
        with signals.interrupts_held():
            for process, (_, theirs) in zip(processes, pipes, strict=True):
                process.start()
                theirs.close()
        if not pipes[0][0].poll(RATES_PATIENCE):
            raise RunError(f"The rates were not measured within {RATES_PATIENCE:.0f} seconds")
        content: dict[str, Any] = pipes[0][0].recv()
        for process in processes:
            process.join(RATES_PATIENCE)
    except EOFError:
        raise RunError("A process that measured the rates ended without an answer") from None
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Rates(measured_at=now, threads=threads, ranks=ranks, **content)


def _serve(rank: int, ranks: int, threads: int, port: int, device: str, dtype: str, pipe: Connection) -> None:
    signals.ignore_interrupts()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    pair = mesh.join(Layout(tp=ranks), rank, port, device) if ranks > 1 else mesh.Mesh()
    with torch.no_grad():
        content = _content(pair, device, getattr(torch, dtype))
    mesh.leave()
    if rank == 0:
        pipe.send(content)
    pipe.close()


def _content(ranks: mesh.Mesh, device: str, dtype: torch.dtype) -> dict[str, Any]:
    wait = synchroniser(device)
    gc.collect()
    before = host_anon_mb()

    def curve(calls: Iterator[Call]) -> Curve:
        return [(work, _seconds(call, wait, ranks)) for work, call in calls]

    curves = {kind: curve(calls) for kind, calls in _kernels(device, dtype).items()}
    gc.collect()
    return_freed_memory()
    after = host_anon_mb()
    launch_us = _launch_us(curves, device, dtype, wait)
    collectives, between_s = _between_ranks(ranks, device, dtype, wait)
    between = {"collectives": collectives[0], "later": collectives[1], "between_s": between_s}
    found = {"curves": curves, **between, "launch_us": launch_us, "library_mb": 0.0, "shape_mb": {}, "shape_s": {}}
    if device == "cpu" and before is not None and after is not None:
        first = {kind: _first_calls(calls) for kind, calls in _shapes(dtype).items()}
        shapes = sum(len(curves[kind]) * size for kind, (size, _) in first.items())
        found |= {"library_mb": round(max(after - before - shapes, 0.0), 2)}
        found |= {"shape_mb": {kind: size for kind, (size, _) in first.items()}}
        found |= {"shape_s": {kind: seconds for kind, (_, seconds) in first.items()}}
    return found


def _shapes(dtype: torch.dtype) -> dict[str, list[Callable[[], Any]]]:
    """Products and convolutions of shapes that have not been computed before, by kind of kernel."""
    drawn = partial(_drawn, "cpu", dtype)
    linears: dict[str, Callable[..., Any]] = {"product torch": F.linear}
    if dtype is torch.float32 and has_onednn():
        linears["product onednn"] = onednn_linear
    found: dict[str, list[Callable[[], Any]]] = {
        kind: [partial(linear, drawn(1, 40 + rows, 96), drawn(160, 96), drawn(160)) for rows in range(SHAPES)]
        for kind, linear in linears.items()
    }
    found["convolution"] = [
        partial(F.conv2d, drawn(1, 24, side, 20), drawn(40, 24, 3, 3), drawn(40), padding=1)
        for side in range(20, 20 + SHAPES)
    ]
    return found


def _first_calls(calls: Sequence[Callable[[], Any]]) -> tuple[float, float]:
    """Of calls of new shapes: megabytes that libraries keep for each, and seconds that its first call takes longer."""
    gc.collect()
    return_freed_memory()
    before = host_anon_mb() or 0.0
    first = statistics.median(_timed(call) for call in calls)
    return_freed_memory()
    kept = round(max((host_anon_mb() or 0.0) - before, 0.0) / len(calls), 3)
    return kept, max(first - statistics.median(_timed(call) for call in calls), 0.0)


def _timed(call: Callable[[], Any], wait: Callable[[], None] = lambda: None) -> float:
    """Seconds of a call; on one thread of the processor, whose time other programs of a busy machine change less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    wait()
    start = clock()
    call()
    wait()
    return clock() - start


def _seconds(call: Callable[[], Any], wait: Callable[[], None], ranks: mesh.Mesh) -> float:
    """Median seconds of a call."""
    times: list[float] = []
    call()
    ranks.barrier()
    begun = time.perf_counter()
    while len(times) < LEAST or (len(times) < MOST and time.perf_counter() - begun < SECONDS):
        times.append(_timed(call, wait))
    return sorted(times)[len(times) // 2]


def _between_ranks(
    ranks: mesh.Mesh, device: str, dtype: torch.dtype, wait: Callable[[], None]
) -> tuple[list[dict[str, Curve]], list[float]]:
    """Curves of collectives after a short and after a long computation, by name, and the seconds of these computations.

    A computation is a block of small kernels and a product. A rank waits for the others, which do not compute equally
    long, and some calls take many times the median, so a step with many calls takes their mean.
    """
    if (axis := ranks.axis("tp")).size == 1:
        return [{}, {}], [0.0, 0.0]

    def mean(*calls: Callable[[], Any], times: int = TOGETHER) -> float:
        for each in calls:
            each()
        ranks.barrier()
        wait()
        start = time.perf_counter()
        for _ in range(times):
            for each in calls:
                each()
        wait()
        return (time.perf_counter() - start) / times

    block, x = _Block().to(device, dtype), torch.randn(1, 8, 16, device=device).to(dtype)
    found: list[dict[str, Curve]] = []
    seconds: list[float] = []
    for least in BETWEEN_COLLECTIVES:
        products = _products(F.linear, partial(_drawn, device, dtype))
        computation = (partial(block, x), next(call for flops, call in products if flops >= least))

        def longer(sent: float, call: Callable[[], Any], computation: Computation = computation) -> float:
            times = TOGETHER if sent < FEWER else TOGETHER // 10
            rounds = ((mean(*computation, call, times=times), mean(*computation, times=times)) for _ in range(ROUNDS))
            return statistics.median(both - alone for both, alone in rounds)

        seconds.append(statistics.median(mean(*computation) for _ in range(ROUNDS)))
        found.append({
            name: [(sent, max(longer(sent, call), 1e-6)) for sent, call in calls]
            for name, calls in _collectives(axis, device).items()
        })  # fmt: skip
    return found, seconds


def _kernels(device: str, dtype: torch.dtype) -> dict[str, Iterator[Call]]:
    """Calls of growing work, by kind of kernel."""
    drawn = partial(_drawn, device, dtype)
    names = [name for name in attention_kernels.legal(device, dtype) if name not in ("auto", "flex")]
    found = {f"attention {name}": _attention(attention_kernels.named(name).kernel, drawn) for name in names}
    found["product torch"] = _products(F.linear, drawn)
    if device == "cpu" and dtype is torch.float32 and has_onednn():
        found["product onednn"] = _products(onednn_linear, drawn)
    numbers = partial(_elementwise, drawn, dtype.itemsize)
    return {
        **found,
        "convolution": _convolutions(drawn),
        "move": numbers(lambda x: x * x, traffic=3),
        "copy": numbers(torch.clone, traffic=2),
        "activation": numbers(lambda x: F.gelu(x, approximate="tanh"), traffic=2),
        "norm": numbers(lambda x: F.layer_norm(x, (64,)), traffic=2),
    }


def _drawn(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _products(linear: Callable[..., Any], drawn: Draw) -> Iterator[Call]:
    for rows, width in ((8, 32), (64, 128), (256, 256), (256, 1024), (1024, 1024)):
        yield 2 * rows * width**2, partial(linear, drawn(1, rows, width), drawn(width, width), drawn(width))


def _convolutions(drawn: Draw) -> Iterator[Call]:
    for width, side in ((8, 8), (32, 32), (64, 64), (128, 128)):
        tensors = drawn(1, width, side, side), drawn(width, width, 3, 3), drawn(width)
        yield 18 * width**2 * side**2, partial(F.conv2d, *tensors, padding=1)


def _attention(kernel: Callable[..., Any], drawn: Draw) -> Iterator[Call]:
    for heads, tokens in ((1, 16), (4, 64), (4, 256), (8, 1024)):
        q, k, v = (drawn(1, tokens, heads, 64).transpose(1, 2) for _ in range(3))
        yield 4 * heads * tokens**2 * 64, partial(kernel, q, k, v)


def _elementwise(drawn: Draw, itemsize: int, function: Callable[[Tensor], Any], traffic: int) -> Iterator[Call]:
    """`traffic` is the number of tensors that the function reads and writes."""
    for size in (2**8, 2**14, 2**18, 2**22, 3 * 2**23, 3 * 2**24):  # bytes; the heap has blocks of at most 32 MiB
        yield traffic * size, partial(function, drawn(size // itemsize // 64, 64))


class _Block(nn.Module):
    """A transformer block whose kernels are so small that Python takes most of its time."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = SelfAttention(16, 2), FeedForward(16)

    def forward(self, x: Tensor) -> Tensor:
        scale = x[:, :1]
        x = x + scale * self.attention(modulate(x, scale, scale))
        out: Tensor = x + scale * self.feed_forward(modulate(x, scale, scale))
        return out


def _launch_us(curves: dict[str, Curve], device: str, dtype: torch.dtype, wait: Callable[[], None]) -> float:
    """Microseconds that Python takes for each kernel of a block, beyond the time of a call of the kernel alone."""
    block, x = _Block().to(device, dtype), torch.randn(1, 8, 16, device=device).to(dtype)
    with torch.device("meta"):
        copy, empty = _Block().to(dtype), torch.empty(1, 8, 16, dtype=dtype)
    copy.attention.attend.kernel = lambda q, k, v: torch.empty_like(q)
    with Kernels(fused=False) as kernels:
        copy(empty)
    calls = 1 + sum(kernels.products.values()) + sum(kernels.others.values())  # 1: attention
    alone = sum(kernels.products.values()) * curves["product torch"][0][1] + curves["attention sdpa"][0][1]
    alone += sum(count * curves[kind][0][1] for (kind, _), count in kernels.others.items())
    whole = _seconds(lambda: block(x), wait, mesh.Mesh())
    return float(round(max(whole - alone, 0.0) / calls * 1e6, 3))


def _collectives(axis: Axis, device: str) -> dict[str, Iterator[Call]]:
    """Collectives of growing traffic: the bytes that leave a rank, as `Traffic` counts them."""

    def sizes(call: Callable[[Tensor], Any], sent: float) -> Iterator[Call]:
        for count in (2**4, 2**10, 2**14, 2**18, 2**21):
            count *= axis.size
            x = torch.zeros(count, device=device)
            yield sent * count * 4, lambda x=x: call(x)  # type: ignore[misc]

    n = axis.size
    parts: Callable[[Tensor], Sequence[int]] = lambda x: [len(x) // n] * n  # noqa: E731
    return {
        "all_reduce": sizes(lambda x: all_reduce(x, axis), 2 * (n - 1) / n),
        "all_gather": sizes(lambda x: gather(x, axis).wait(), n - 1),
        "all_to_all": sizes(lambda x: exchange(x, parts(x), parts(x), axis).wait(), (n - 1) / n),
    }
