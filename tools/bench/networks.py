"""Benchmarks one denoising step of the native engine and of other engines, interleaved in one process.

    python -m tools.bench.networks                       # the embedded model, and networks that suit a laptop
    python -m tools.bench.networks --device cuda --work NAME,NAME

`tools.bench.network_entries` says who takes part. Our networks use the attention kernel that attention=auto, the
default of a run, chooses for these shapes; the table names it. Every round calls each entry once, starting with another
one each time. The table shows the median time, and the speed-up over diffusers' default: the geometric mean over
rounds of its time over the entry's, with the 95 % interval of the paired ratios. Comparisons with each peer follow,
and the machine's matmul rate in the same rounds. A slow machine never makes the benchmark fail.

`tools.bench.pictures` benchmarks whole generations.
"""

import argparse
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from sglang_gen.engine import attention_autotune, attention_kernels
from sglang_gen.perf import cpu_dtype
from sglang_gen.perf.clock import synchroniser
from sglang_gen.perf.statistics import quantile
from sglang_gen.tensor_tree import to_meta
from tools.bench import network_entries as entries
from tools.bench import works
from tools.bench.host_networks import DeviceSlot
from tools.bench.network_entries import Call, Kernels

ATTENTION = "its attention alone"  # by SDPA
SIDES = {"cpu": 2048, "cuda": 8192}  # size of the matmul that measures the rate: on a GPU a smaller one is too short
Seconds = dict[str, list[float]]  # of each entry, by round


def rate_name(device: str, dtype: torch.dtype) -> str:
    return f"matrix product {SIDES[device]}^3, {entries.short(dtype)}"


def kernel_of_auto(work: works.Work, device: str, dtype: torch.dtype) -> attention_kernels.Choice:
    """The kernel that attention=auto chooses for this work, as in `attention_kernels.timed_by_shape`."""
    if dtype is torch.float32 and (device != "cpu" or cpu_dtype.fastest_matmul() == "torch"):
        return attention_kernels.sdpa()
    latents, *given = (tensor.to("meta") for tensor in work.inputs(dtype, "cpu"))
    shapes = works.traced_on_meta(
        work, (), works.outline(work, dtype),
        lambda network: network(latents, works.conditioning(work, given, network, meta=True), 0),
    ).attention  # fmt: skip
    names = attention_kernels.candidates(shapes, device, dtype)
    timed = {name: attention_kernels.named(name).kernel for name in names}
    return attention_kernels.named(attention_autotune.fastest(timed, shapes, device, dtype))


def ceilings(work: works.Work, device: str, dtype: torch.dtype) -> tuple[dict[str, Call], dict[str, int]]:
    """Calls that measure the machine's rates in the same rounds, and the FLOPs of each and of the network."""
    latents, *given = work.inputs(dtype, device)
    network, condition = works.outline(work, dtype), partial(works.conditioning, work, given)
    side, rate = SIDES[device], rate_name(device, dtype)
    x, w = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    counter, attention_name = FlopCounterMode(display=False), f"{ATTENTION}, {entries.short(dtype)}"

    def count_flops(meta_copy: Any) -> None:
        conditioning = condition(meta_copy, meta=True)
        with counter:  # does not count attention, whose shapes the trace on meta records
            meta_copy(to_meta(latents), conditioning, 0)

    shapes = works.traced_on_meta(work, (), network, count_flops).attention
    problems = []
    for (batch, heads, length, keys, width), count in shapes.items():
        q, k, v = (torch.randn(batch, rows, heads, width, device=device) for rows in (length, keys, keys))
        problems.append((count, [tensor.to(dtype).transpose(1, 2) for tensor in (q, k, v)]))

    def attend() -> None:
        for count, (q, k, v) in problems:
            for _ in range(count):
                scaled_dot_product_attention(q, k, v)

    attention = sum(4 * b * h * length * keys * d * count for (b, h, length, keys, d), count in shapes.items())
    flops = {rate: 2 * side**3, attention_name: attention, "network": attention + int(counter.get_total_flops())}
    return {rate: lambda: linear(x, w), attention_name: attend}, flops


def timed(call: Call, wait: Callable[[], None]) -> tuple[float, Any]:
    """Seconds of the call, and its result."""
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - start, result


@torch.no_grad()
def first_calls(calls: dict[str, Call], slot: DeviceSlot, device: str) -> dict[str, float]:
    """Seconds of every first call, including compilation. Asserts that all results agree, are finite and of order 1."""
    results = {}
    for name, call in calls.items():
        slot.make_ready(name)
        results[name] = timed(call, synchroniser(device))
    expected = results[entries.REFERENCE][1].float()
    assert torch.isfinite(expected).all()
    assert 0.05 < expected.std() < 20, f"the output has a deviation of {expected.std():.3g}"
    for name, (_, result) in results.items():
        error = ((result.float() - expected).abs().max() / expected.abs().max()).item()
        assert error < (1e-3 if "float32" in name else 0.1), f"{name} differs from {entries.REFERENCE} by {error:.2g}"
    return {name: seconds for name, (seconds, _) in results.items()}


@torch.no_grad()
def rounds_of(calls: dict[str, Call], slot: DeviceSlot, rounds: int, device: str) -> Seconds:
    """Seconds of each call in each round; every round starts with another call."""
    seconds: Seconds = {name: [] for name in calls}
    for number in range(rounds):
        start = number % len(calls)
        for name in list(calls)[start:] + list(calls)[:start]:
            if slot.make_ready(name):
                calls[name]()  # a GPU is slow after it was idle
            seconds[name].append(timed(calls[name], synchroniser(device))[0])
    return seconds


def paired(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Their time over ours: geometric mean of the ratios of each round, and its 95 % interval (Student's t)."""
    logs = [math.log(b / a) for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return f"{math.exp(mean):.2f}"
    half = quantile(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(mean):.2f} ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})"


def comparisons(seconds: Seconds, dtypes: Sequence[torch.dtype]) -> list[str]:
    """Ours against each peer, and our modes against each other; a ratio above 1 favours the first of the two.

    The last of `dtypes` is that of dtype=auto.
    """
    default = entries.ours_name(dtypes[-1], "eager")
    pairs = [("our default", default, "diffusers' default", entries.REFERENCE)]
    for dtype in dtypes:
        short = entries.short(dtype)
        eager, regional = (entries.ours_name(dtype, mode) for mode in ("eager", "regional"))
        best = min((entries.ours_name(dtype, mode) for mode in ("regional", "full")), key=lambda n: _mean(seconds[n]))
        pairs.append((f"{short}: compile=regional", regional, "our eager", eager))
        pairs.append(
            (
                f"{short}: {best.rpartition(', ')[2]}",
                best,
                "diffusers + torch.compile",
                entries.theirs_name(dtype, True),
            )
        )
        if (anchor := entries.openvino_name(dtype)) in seconds:
            pairs.append((f"{short}: {best.rpartition(', ')[2]}", best, "OpenVINO", anchor))
    return [f"- {ours} against {peer}: {paired(seconds[a], seconds[b])}" for ours, a, peer, b in pairs]  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(math.log(value) for value in values)


def table(first: dict[str, float], seconds: Seconds, flops: dict[str, int], kernels: Kernels, device: str) -> str:
    """Markdown table with one line per entry, followed by the comparisons."""
    rates = {dtype: rate_name(device, dtype) for dtype in kernels}
    rate = {name: flops[name] / statistics.median(seconds[name]) for name in rates.values()}
    lines = [
        "| what | ms (least to most) | speed-up over diffusers (95 %) | GFLOP/s | first call, s |",
        "|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        median, work = statistics.median(values), flops.get(name, flops["network"])
        ratio = "" if name in flops else paired(values, seconds[entries.REFERENCE])
        lines.append(
            f"| {name} | {1000 * median:.0f} ({1000 * min(values):.0f} to {1000 * max(values):.0f}) | {ratio} | "
            f"{work / median / 1e9:.0f} | {f'{first[name]:.1f}' if name in first else ''} |"
        )
    total, share = (
        flops["network"] / 1e9,
        flops[f"{ATTENTION}, {entries.short(next(iter(kernels)))}"] / flops["network"],
    )
    chosen = ", ".join(f"{kernel.name} in {entries.short(dtype)}" for dtype, kernel in kernels.items())
    summary = (
        f"{total:.0f} GFLOP, {share:.0%} of them attention. Attention of ours (auto): {chosen}; of diffusers: sdpa."
    )
    measured_rates = ", ".join(f"{entries.short(d)} {rate[name] / 1e9:.0f} GFLOP/s" for d, name in rates.items())
    return "\n".join([*lines, "", *comparisons(seconds, [*kernels]), "", f"{summary} Matrix rate: {measured_rates}."])


def measured(work: works.Work, rounds: int, device: str) -> str:
    """Benchmark one work and return its table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = works.stored(work, Path(temporary))
        works.check_activations(work, *works.theirs(work, folder, torch.bfloat16, device))
        clear(device)
        kernels = {dtype: kernel_of_auto(work, device, dtype) for dtype in entries.our_dtypes(device)}
        calls, slot = entries.entries(work, folder, device, kernels)
        first = first_calls(calls, slot, device)
        flops: dict[str, int] = {}
        for dtype in kernels:
            more, counted = ceilings(work, device, dtype)
            calls |= more
            flops |= counted
        seconds = rounds_of(calls, slot, rounds, device)
    return table(first, seconds, flops, kernels, device)


def clear(device: str) -> None:
    """Free unused GPU memory."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=f"landscape,{works.LAPTOP}", help=f"of {', '.join(works.WORKS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    for name in arguments.work.split(","):
        work = works.WORKS[name]()
        print(f"\n## {work.title}\n\n{measured(work, arguments.rounds, arguments.device)}", flush=True)
        torch.compiler.reset()
        clear(arguments.device)


if __name__ == "__main__":
    main()
