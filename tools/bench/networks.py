"""One denoising step of the native engine beside its peers, interleaved in one process.

    python -m tools.bench.networks                       # the embedded model, a UNet and a DiT that suit a laptop
    python -m tools.bench.networks --device cuda --work sdxl,flux_dev

Peers: diffusers in its default dtype (float32), in bfloat16, in bfloat16 under torch.compile, and OpenVINO with its
bfloat16 hint where it is installed. On a GPU ours also runs as CUDA graphs. Every round calls each of them once. The
table gives the median time, the ratio of geometric means to ours (compiled) with its 95 % interval, and the share of
the machine's own matrix rate, which is measured in the same rounds. Nothing here fails because a machine is slow.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from sglang_gen.backends.execution import laid_out
from sglang_gen.engine.compile import Compiled
from sglang_gen.engine.graphs import Graphs
from sglang_gen.nested import to_meta
from sglang_gen.perf.record import synchroniser
from sglang_gen.perf.statistics import judge
from tools.bench import works

OURS, REFERENCE = "sglang-gen, compiled", "diffusers, float32 (its default)"
RATE, ATTENTION = "matrix product 2048^3, bfloat16", "its attention alone, SDPA"
Call = Callable[[], Any]


def entries(work: works.Work, folder: Path, device: str) -> dict[str, Call]:
    """What is timed, by the name that the table shows."""
    half = torch.bfloat16
    found: dict[str, Call] = {"sglang-gen, eager": _ours(work, folder, device, compiled=False)}
    found[OURS] = _ours(work, folder, device, compiled=True)
    if device == "cuda":
        found["sglang-gen, eager, graphs"] = _ours(work, folder, device, compiled=False, graphs=True)
        found["sglang-gen, compiled, graphs"] = _ours(work, folder, device, compiled=True, graphs=True)
    found[REFERENCE] = _theirs(work, folder, torch.float32, device)
    found["diffusers, bfloat16"] = _theirs(work, folder, half, device)
    network, arguments = works.theirs(work, folder, half, device)
    compiled = torch.compile(network)
    found["diffusers, bfloat16, torch.compile"] = lambda: compiled(**arguments, return_dict=False)[0]
    if device == "cpu" and importlib.util.find_spec("openvino"):
        found["OpenVINO, bfloat16 hint"] = _openvino(work, folder)
    return found


def _theirs(work: works.Work, folder: Path, dtype: torch.dtype, device: str) -> Call:
    network, arguments = works.theirs(work, folder, dtype, device)
    return lambda: network(**arguments, return_dict=False)[0]


def _ours(work: works.Work, folder: Path, device: str, compiled: bool, graphs: bool = False) -> Call:
    network, condition, latents = works.ours(work, folder, torch.bfloat16, device)
    network = laid_out(network, torch.bfloat16)
    conditioning = condition(network)
    if not compiled:
        if graphs:
            Graphs(network)
        return lambda: network(latents, conditioning, 0)
    glue = importlib.import_module(f"sglang_gen.pipelines.{work.glue}")
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


def ceilings(work: works.Work, folder: Path, device: str) -> tuple[dict[str, Call], dict[str, int]]:
    """The machine's own rates, timed in the same rounds, and the FLOPs of each and of the network."""
    network, condition, latents = works.ours(work, folder, torch.bfloat16, device)
    x, w = (torch.randn(2048, 2048, device=device).to(torch.bfloat16) for _ in range(2))
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
    flops = {RATE: 2 * 2048**3, ATTENTION: attention, "network": attention + int(counter.get_total_flops())}
    return {RATE: lambda: linear(x, w), ATTENTION: attend}, flops


def timed(call: Call, wait: Callable[[], None]) -> tuple[float, Any]:
    """Seconds of the call, and its result."""
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - start, result


@torch.no_grad()
def first_calls(calls: dict[str, Call], device: str) -> dict[str, float]:
    """Seconds of everybody's first call, compilation included. All must give the same finite numbers of order one."""
    found = {name: timed(call, synchroniser(device)) for name, call in calls.items()}
    expected = found[REFERENCE][1].float()
    assert torch.isfinite(expected).all()
    assert 0.05 < expected.std() < 20, f"the output has a deviation of {expected.std():.3g}"
    for name, (_, result) in found.items():
        error = ((result.float() - expected).abs().max() / expected.abs().max()).item()
        assert error < 0.1, f"{name} differs from {REFERENCE} by {error:.2g}"
    return {name: seconds for name, (seconds, _) in found.items()}


@torch.no_grad()
def rounds_of(calls: dict[str, Call], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call in each of the rounds, in which they take turns, another one first every time."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        start = number % len(calls)
        for name in list(calls)[start:] + list(calls)[:start]:
            seconds[name].append(timed(calls[name], synchroniser(device))[0])
    return seconds


def table(first: dict[str, float], seconds: dict[str, list[float]], flops: dict[str, int]) -> str:
    """Markdown: a line for each entry."""
    rate = flops[RATE] / statistics.median(seconds[RATE])
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
    said = f"{total:.0f} GFLOP, {share:.0%} of them attention; matrix rate {rate / 1e9:.0f} GFLOP/s."
    return "\n".join([*lines, "", said])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="landscape,unet,dit", help=f"of {', '.join(works.WORKS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    for name in arguments.work.split(","):
        work = works.WORKS[name]()
        with tempfile.TemporaryDirectory() as temporary:
            folder = works.stored(work, Path(temporary))
            works.check_activations(work, folder, arguments.device)
            calls = entries(work, folder, arguments.device)
            first = first_calls(calls, arguments.device)
            rates, flops = ceilings(work, folder, arguments.device)
            seconds = rounds_of(calls | rates, arguments.rounds, arguments.device)
        print(f"\n## {work.title}\n\n{table(first, seconds, flops)}", flush=True)
        torch.compiler.reset()


if __name__ == "__main__":
    main()
