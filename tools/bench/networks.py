"""One denoising step of the native engine beside its peers, interleaved in one process.

    python -m tools.bench.networks                       # the embedded model, a UNet and a DiT that suit a laptop
    python -m tools.bench.networks --device cuda --work sdxl,flux_dev

Peers: diffusers in its default dtype (float32), in bfloat16, in bfloat16 under torch.compile, and OpenVINO with its
bfloat16 hint where it is installed. Ours attends with the kernel that attention=auto, the default of a run, takes for
these shapes, and the table names it. On a GPU ours also runs as CUDA graphs. Every round calls each of them once,
another one first every time. The table gives the median time, the ratio of geometric means to ours (compiled) with its
95 % interval, and the share of the machine's own matrix rate, which is measured in the same rounds. Nothing here fails
because a machine is slow.

On a GPU all of ours have one copy of the weights, which stays. Those of the peers wait on the host, and one peer's are
on the GPU at a time: they come before its call in every round, and it is called once untimed first, since the GPU has
rested. So FLUX dev needs some 71 GiB of the GPU (22 for ours, 44 for float32, graphs, activations), 67 of the host.

One evaluation is not a picture: `tools.bench.pictures` times whole generations.
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

from sglang_gen.backends.native.execution import laid_out
from sglang_gen.engine import attention_autotune, attention_kernels
from sglang_gen.engine.compile import Compiled
from sglang_gen.engine.cuda_graphs import Graphs
from sglang_gen.perf.clock import synchroniser
from sglang_gen.perf.statistics import judge
from sglang_gen.tensor_tree import to_meta
from tools.bench import works
from tools.bench.guests import Guest, Room

OURS, REFERENCE = "sglang-gen, compiled", "diffusers, float32 (its default)"
ATTENTION = "its attention alone, SDPA"
SIDES = {"cpu": 2048, "cuda": 8192}  # of the product that gives the matrix rate: on a GPU a smaller one is over at once
CAPTURING = CROWDED = ("cuda",)  # devices with CUDA graphs; and those without room for everybody's weights
Call = Callable[[], Any]


def rate_name(device: str) -> str:
    return f"matrix product {SIDES[device]}^3, bfloat16"


def kernel_of_auto(work: works.Work, device: str, dtype: torch.dtype = torch.bfloat16) -> attention_kernels.Choice:
    """The kernel that attention=auto takes for this work, as `Execution` chooses it: in float32 torch's own choice."""
    if dtype is torch.float32:
        return attention_kernels.sdpa()
    latents, text, pooled = (each.to("meta") for each in work.inputs(dtype, "cpu"))
    shapes = works.rehearsed(
        work, (), works.outline(work, dtype),
        lambda twin: twin(latents, works.conditioning(work, text, pooled, twin, meta=True), 0),
    ).attention  # fmt: skip
    names = attention_kernels.candidates(shapes, device, dtype)
    timed = {name: attention_kernels.named(name).kernel for name in names}
    return attention_kernels.named(attention_autotune.fastest(timed, shapes, device, dtype))


def entries(
    work: works.Work, folder: Path, device: str, kernel: attention_kernels.Choice
) -> tuple[dict[str, Call], Room]:
    """What is timed, by the name that the table shows; and what each has to have on the device before it is called.

    `kernel` is that of our attentions.
    """
    ours = partial(our_call, work, _our_networks(work, folder, device), device, kernel)
    found: dict[str, Call] = {"sglang-gen, eager": ours(compiled=False), OURS: ours(compiled=True)}
    if device in CAPTURING:
        found["sglang-gen, eager, graphs"] = ours(compiled=False, graphs=True)
        found["sglang-gen, compiled, graphs"] = ours(compiled=True, graphs=True)
    peers, room = _peers(work, folder, device)
    found |= peers
    if device == "cpu" and importlib.util.find_spec("openvino"):
        found["OpenVINO, bfloat16 hint"] = _openvino(work, folder)
    return found, room


def _peers(work: works.Work, folder: Path, device: str) -> tuple[dict[str, Call], Room]:
    half, compiled = "diffusers, bfloat16", "diffusers, bfloat16, torch.compile"
    if device not in CROWDED:
        networks = {name: works.their_network(work, folder, torch.bfloat16).to(device) for name in (half, compiled)}
        networks[REFERENCE] = works.their_network(work, folder, torch.float32).to(device)
        room = Room({})
    else:
        networks = dict.fromkeys((half, compiled), works.their_network(work, folder, torch.bfloat16))
        networks[REFERENCE] = works.their_network(work, folder, torch.float32)
        guests = {id(network): Guest(network, device) for network in networks.values()}
        room = Room({name: guests[id(network)] for name, network in networks.items()})
    networks[compiled] = torch.compile(networks[compiled])
    dtypes = {REFERENCE: torch.float32, half: torch.bfloat16, compiled: torch.bfloat16}
    return {name: _theirs(networks[name], works.their_arguments(work, dtypes[name], device)) for name in dtypes}, room


def _theirs(network: Any, arguments: dict[str, Any]) -> Call:
    return lambda: network(**arguments, return_dict=False)[0]


def _our_networks(work: works.Work, folder: Path, device: str) -> Callable[[], tuple[Any, Any, Tensor]]:
    """Gives a network of ours, what gives its conditioning, and the latents.

    Where there is no room all have the same weights. Elsewhere not: one would find them in the cache after another.
    """
    load = partial(works.ours, work, folder, torch.bfloat16, device)
    if device not in CROWDED:
        return load
    network, condition, latents = load()
    return lambda: (sharing(network), condition, latents)


def sharing(network: torch.nn.Module) -> torch.nn.Module:
    """The same network once more, with the very same weights."""
    return copy.deepcopy(network, {id(each): each for each in (*network.parameters(), *network.buffers())})


def our_call(
    work: works.Work,
    load: Callable[[], tuple[Any, Any, Tensor]],
    device: str,
    kernel: attention_kernels.Choice,
    compiled: bool,
    graphs: bool = False,
) -> Call:
    """One evaluation of the network that `load` gives, with its conditioning and latents."""
    network, condition, latents = load()
    network = laid_out(network, latents.dtype)
    summing = attention_kernels.kernel_with_lse(kernel.name, device, latents.dtype)
    works.whole(work).parallelize(network).set_kernel(kernel.kernel, summing)
    conditioning = condition(network)
    if not compiled:
        if graphs:
            Graphs(network)
        return lambda: network(latents, conditioning, 0)
    glue = importlib.import_module(f"sglang_gen.families.{work.glue}.pipeline")
    shapes = works.rehearsed(
        work, glue.REGIONS, network, lambda twin: twin(to_meta(latents), condition(twin, meta=True), 0)
    )
    blocks = Compiled(network, glue.REGIONS, device)
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
    """The machine's own rates, timed in the same rounds, and the FLOPs of each and of the network."""
    latents, text, pooled = work.inputs(torch.bfloat16, device)
    network, condition = works.outline(work, torch.bfloat16), partial(works.conditioning, work, text, pooled)
    side, rate = SIDES[device], rate_name(device)
    x, w = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    counter = FlopCounterMode(display=False)

    def count_flops(twin: Any) -> None:
        conditioning = condition(twin, meta=True)
        with counter:  # attention is not in it: the rehearsal notes it instead
            twin(to_meta(latents), conditioning, 0)

    shapes = works.rehearsed(work, (), network, count_flops).attention
    problems = []
    for (batch, heads, length, keys, width), count in shapes.items():
        q, k, v = (torch.randn(batch, each, heads, width, device=device) for each in (length, keys, keys))
        problems.append((count, [each.to(torch.bfloat16).transpose(1, 2) for each in (q, k, v)]))

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
def first_calls(calls: dict[str, Call], room: Room, device: str) -> dict[str, float]:
    """Seconds of everybody's first call, compilation included. All must give the same finite numbers of order one."""
    found = {}
    for name, call in calls.items():
        room.make_ready(name)
        found[name] = timed(call, synchroniser(device))
    expected = found[REFERENCE][1].float()
    assert torch.isfinite(expected).all()
    assert 0.05 < expected.std() < 20, f"the output has a deviation of {expected.std():.3g}"
    for name, (_, result) in found.items():
        error = ((result.float() - expected).abs().max() / expected.abs().max()).item()
        assert error < 0.1, f"{name} differs from {REFERENCE} by {error:.2g}"
    return {name: seconds for name, (seconds, _) in found.items()}


@torch.no_grad()
def rounds_of(calls: dict[str, Call], room: Room, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call in each of the rounds, in which they take turns, another one first every time."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        start = number % len(calls)
        for name in list(calls)[start:] + list(calls)[:start]:
            if room.make_ready(name):
                calls[name]()  # a GPU that has rested is slow at first
            seconds[name].append(timed(calls[name], synchroniser(device))[0])
    return seconds


def table(
    first: dict[str, float], seconds: dict[str, list[float]], flops: dict[str, int], product: str, kernel: str
) -> str:
    """Markdown: a line for each entry. `product` is that of the matrix rate, `kernel` attends in ours."""
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
    said = f"{total:.0f} GFLOP, {share:.0%} of them attention; matrix rate {rate / 1e9:.0f} GFLOP/s. "
    said += f"Attention of ours: {kernel} (auto); of diffusers: sdpa."
    return "\n".join([*lines, "", said])


def measured(work: works.Work, rounds: int, device: str) -> str:
    """The table of one work."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = works.stored(work, Path(temporary))
        works.check_activations(work, *works.theirs(work, folder, torch.bfloat16, device))
        clear(device)
        kernel = kernel_of_auto(work, device)
        calls, room = entries(work, folder, device, kernel)
        first = first_calls(calls, room, device)
        rates, flops = ceilings(work, device)
        seconds = rounds_of(calls | rates, room, rounds, device)
    return table(first, seconds, flops, rate_name(device), kernel.name)


def clear(device: str) -> None:
    """Leave a GPU's memory to what comes next."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="landscape,unet,dit", help=f"of {', '.join(works.WORKS)}")
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
