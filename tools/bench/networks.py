"""Benchmarks one denoising step of the native engine and of other engines, interleaved in one process.

    python -m tools.bench.networks                       # the embedded model, and networks that suit a laptop
    python -m tools.bench.networks --device cuda --work NAME,NAME

The others are diffusers in its default dtype (float32), in bfloat16, in bfloat16 with torch.compile, and OpenVINO with
its bfloat16 hint if it is installed. Our networks use the attention kernel that attention=auto, the default of a run,
chooses for these shapes; the table names it. On a GPU our networks also run as CUDA graphs. Every round calls each
entry once, starting with another one each time. The table shows the median time, the ratio of geometric means to ours
(compiled) with its 95 % interval, and the fraction of the machine's matmul rate, which is measured in the same rounds.
A slow machine never makes the benchmark fail.

On a GPU all our networks share one copy of the weights, which stays there. The weights of the others are kept on the
host, and those of one network at a time are copied to the GPU before its call in every round; the network is then
called once untimed, since the GPU was idle. So a network of 12 billion parameters needs some 71 GiB of GPU memory (22
for ours, 44 for float32, graphs, activations) and 67 of host memory.

`tools.bench.pictures` benchmarks whole generations.
"""

import argparse
import copy
import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from sglang_gen.backends.native.build import to_channels_last
from sglang_gen.engine import attention_autotune, attention_kernels
from sglang_gen.engine.compile import Compiled
from sglang_gen.engine.cuda_graphs import Graphs
from sglang_gen.perf.clock import synchroniser
from sglang_gen.perf.statistics import judge
from sglang_gen.tensor_tree import to_meta
from tools.bench import works
from tools.bench.host_networks import DeviceSlot, HostNetwork

OURS, REFERENCE = "sglang-gen, compiled", "diffusers, float32 (its default)"
ATTENTION = "its attention alone, SDPA"
SIDES = {"cpu": 2048, "cuda": 8192}  # size of the matmul that measures the rate: on a GPU a smaller one is too short
CAPTURING = CROWDED = ("cuda",)  # devices with CUDA graphs; devices that cannot hold the weights of all entries
Call = Callable[[], Any]


def rate_name(device: str) -> str:
    return f"matrix product {SIDES[device]}^3, bfloat16"


def kernel_of_auto(work: works.Work, device: str, dtype: torch.dtype = torch.bfloat16) -> attention_kernels.Choice:
    """The kernel that attention=auto chooses for this work, as in `Execution`: torch's default in float32."""
    if dtype is torch.float32:
        return attention_kernels.sdpa()
    latents, *given = (tensor.to("meta") for tensor in work.inputs(dtype, "cpu"))
    shapes = works.traced_on_meta(
        work, (), works.outline(work, dtype),
        lambda network: network(latents, works.conditioning(work, given, network, meta=True), 0),
    ).attention  # fmt: skip
    names = attention_kernels.candidates(shapes, device, dtype)
    timed = {name: attention_kernels.named(name).kernel for name in names}
    return attention_kernels.named(attention_autotune.fastest(timed, shapes, device, dtype))


def entries(
    work: works.Work, folder: Path, device: str, kernel: attention_kernels.Choice
) -> tuple[dict[str, Call], DeviceSlot]:
    """The calls to time, by their name in the table, and the device slot for the networks that are kept on the host.

    `kernel` is the attention kernel of our networks.
    """
    ours = partial(our_call, work, _our_networks(work, folder, device), device, kernel)
    calls: dict[str, Call] = {"sglang-gen, eager": ours(compiled=False), OURS: ours(compiled=True)}
    if device in CAPTURING:
        calls["sglang-gen, eager, graphs"] = ours(compiled=False, graphs=True)
        calls["sglang-gen, compiled, graphs"] = ours(compiled=True, graphs=True)
    peers, slot = _peers(work, folder, device)
    calls |= peers
    if device == "cpu" and importlib.util.find_spec("openvino"):
        calls["OpenVINO, bfloat16 hint"] = _openvino(work, folder)
    return calls, slot


def _peers(work: works.Work, folder: Path, device: str) -> tuple[dict[str, Call], DeviceSlot]:
    half, compiled = "diffusers, bfloat16", "diffusers, bfloat16, torch.compile"
    if device not in CROWDED:
        networks = {name: works.their_network(work, folder, torch.bfloat16).to(device) for name in (half, compiled)}
        networks[REFERENCE] = works.their_network(work, folder, torch.float32).to(device)
        slot = DeviceSlot({})
    else:
        networks = dict.fromkeys((half, compiled), works.their_network(work, folder, torch.bfloat16))
        networks[REFERENCE] = works.their_network(work, folder, torch.float32)
        host_networks = {id(network): HostNetwork(network, device) for network in networks.values()}
        slot = DeviceSlot({name: host_networks[id(network)] for name, network in networks.items()})
    networks[compiled] = torch.compile(networks[compiled])
    dtypes = {REFERENCE: torch.float32, half: torch.bfloat16, compiled: torch.bfloat16}
    return {name: _theirs(networks[name], works.their_arguments(work, dtypes[name], device)) for name in dtypes}, slot


def _theirs(network: Any, arguments: dict[str, Any]) -> Call:
    return lambda: network(**arguments, return_dict=False)[0]


def _our_networks(work: works.Work, folder: Path, device: str) -> Callable[[], tuple[Any, Any, Tensor]]:
    """A function that returns our network, a function for its conditioning, and the latents.

    On a crowded device all networks share their weights. Elsewhere each has its own: shared weights would still be in
    the cache after the previous call.
    """
    load = partial(works.ours, work, folder, torch.bfloat16, device)
    if device not in CROWDED:
        return load
    network, condition, latents = load()
    return lambda: (sharing(network), condition, latents)


def sharing(network: torch.nn.Module) -> torch.nn.Module:
    """A copy of the network that shares its weights."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})


def our_call(
    work: works.Work,
    load: Callable[[], tuple[Any, Any, Tensor]],
    device: str,
    kernel: attention_kernels.Choice,
    compiled: bool,
    graphs: bool = False,
    whole: bool = False,
) -> Call:
    """A call that evaluates the network returned by `load` once, with its conditioning and latents.

    If it is compiled, `whole` compiles the network as one graph, and not its blocks.
    """
    network, condition, latents = load()
    if latents.dtype.itemsize == 2:
        to_channels_last(network)
    summing = attention_kernels.kernel_with_lse(kernel.name, device, latents.dtype)
    works.whole(work).parallelize(network).set_kernel(kernel.kernel, summing)
    conditioning = condition(network)
    if not compiled:
        if graphs:
            Graphs(network)
        return lambda: network(latents, conditioning, 0)
    regions = () if whole else work.pipeline.regions
    shapes = works.traced_on_meta(
        work,
        regions or (type(network),),
        network,
        lambda copied: copied(to_meta(latents), condition(copied, meta=True), 0),
    )
    blocks = Compiled(network, regions, device)
    blocks.expect(shapes)
    if graphs:
        Graphs(network)

    def call() -> Tensor:
        with blocks.limited():
            return network(latents, conditioning, 0)

    return call


def _openvino(work: works.Work, folder: Path) -> Call:
    import openvino

    network, arguments = works.theirs(work, folder, torch.float32, "cpu")
    nested = arguments.pop("added_cond_kwargs", {})
    names, inner = list(arguments), list(nested)

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *values: Tensor) -> Tensor:
            given = dict(zip(names, values[: len(names)], strict=True))
            if inner:
                given["added_cond_kwargs"] = dict(zip(inner, values[len(names) :], strict=True))
            return self.network(**given, return_dict=False)[0]

    inputs = (*arguments.values(), *nested.values())
    model = openvino.convert_model(Positional(), example_input=inputs)
    request = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"}).create_infer_request()
    arrays = [value.numpy() for value in inputs]
    return lambda: torch.from_numpy(request.infer(arrays)[0])


def ceilings(work: works.Work, device: str) -> tuple[dict[str, Call], dict[str, int]]:
    """Calls that measure the machine's rates in the same rounds, and the FLOPs of each and of the network."""
    latents, *given = work.inputs(torch.bfloat16, device)
    network, condition = works.outline(work, torch.bfloat16), partial(works.conditioning, work, given)
    side, rate = SIDES[device], rate_name(device)
    x, w = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    counter = FlopCounterMode(display=False)

    def count_flops(meta_copy: Any) -> None:
        conditioning = condition(meta_copy, meta=True)
        with counter:  # does not count attention, whose shapes the trace on meta records
            meta_copy(to_meta(latents), conditioning, 0)

    shapes = works.traced_on_meta(work, (), network, count_flops).attention
    problems = []
    for (batch, heads, length, keys, width), count in shapes.items():
        q, k, v = (torch.randn(batch, rows, heads, width, device=device) for rows in (length, keys, keys))
        problems.append((count, [tensor.to(torch.bfloat16).transpose(1, 2) for tensor in (q, k, v)]))

    def attend() -> None:
        for count, (q, k, v) in problems:
            for _ in range(count):
                scaled_dot_product_attention(q, k, v)

    attention = sum(4 * b * h * length * keys * d * count for (b, h, length, keys, d), count in shapes.items())
    flops = {rate: 2 * side**3, ATTENTION: attention, "network": attention + int(counter.get_total_flops())}
    return {rate: lambda: linear(x, w), ATTENTION: attend}, flops


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
    expected = results[REFERENCE][1].float()
    assert torch.isfinite(expected).all()
    assert 0.05 < expected.std() < 20, f"the output has a deviation of {expected.std():.3g}"
    for name, (_, result) in results.items():
        error = ((result.float() - expected).abs().max() / expected.abs().max()).item()
        assert error < 0.1, f"{name} differs from {REFERENCE} by {error:.2g}"
    return {name: seconds for name, (seconds, _) in results.items()}


@torch.no_grad()
def rounds_of(calls: dict[str, Call], slot: DeviceSlot, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call in each round; every round starts with another call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        start = number % len(calls)
        for name in list(calls)[start:] + list(calls)[:start]:
            if slot.make_ready(name):
                calls[name]()  # a GPU is slow after it was idle
            seconds[name].append(timed(calls[name], synchroniser(device))[0])
    return seconds


def table(
    first: dict[str, float], seconds: dict[str, list[float]], flops: dict[str, int], product: str, kernel: str
) -> str:
    """Markdown table, one line per entry. `product` is the entry of the matmul rate, `kernel` our attention kernel."""
    rate = flops[product] / statistics.median(seconds[product])
    lines = [
        "| what | ms (least to most) | time / ours (95 %) | share of the matrix rate | first call, s |",
        "|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        median, work = statistics.median(values), flops.get(name, flops["network"])
        verdict = judge(seconds[OURS], values, tolerance=0.02)
        low, high = verdict.interval or (verdict.ratio, verdict.ratio)
        ratio = f"{verdict.ratio:.2f} ({low:.2f} to {high:.2f})" if name not in flops else ""
        lines.append(
            f"| {name} | {1000 * median:.0f} ({1000 * min(values):.0f} to {1000 * max(values):.0f}) | {ratio} | "
            f"{work / median / rate:.0%} | {f'{first[name]:.1f}' if name in first else ''} |"
        )
    total, share = flops["network"] / 1e9, flops[ATTENTION] / flops["network"]
    summary = f"{total:.0f} GFLOP, {share:.0%} of them attention; matrix rate {rate / 1e9:.0f} GFLOP/s. "
    summary += f"Attention of ours: {kernel} (auto); of diffusers: sdpa."
    return "\n".join([*lines, "", summary])


def measured(work: works.Work, rounds: int, device: str) -> str:
    """Benchmark one work and return its table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = works.stored(work, Path(temporary))
        works.check_activations(work, *works.theirs(work, folder, torch.bfloat16, device))
        clear(device)
        kernel = kernel_of_auto(work, device)
        calls, slot = entries(work, folder, device, kernel)
        first = first_calls(calls, slot, device)
        rates, flops = ceilings(work, device)
        seconds = rounds_of(calls | rates, slot, rounds, device)
    return table(first, seconds, flops, rate_name(device), kernel.name)


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
