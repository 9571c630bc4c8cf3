"""One denoising step of a published network in each mode: its time, its kernels, and how idle the GPU was in it."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sglang_gen.errors import RunError, UserError
from sglang_gen.perf.clock import timer
from tools.bench import network_entries, networks
from tools.gpu_first import network
from tools.gpu_first.sections import FAILED, Settings, described, table

ROUNDS = {"full": 10, "tiny": 2}
TOP = 6  # kernels named of each mode
TOLERANCE = 0.05  # of the largest number of an eager evaluation
# Mode -> how it is called, and the least seconds that must be left to begin it on networks of full size.
MODES: Mapping[str, tuple[Mapping[str, Any], float]] = {
    "eager": ({"mode": "eager"}, 0.0),
    "CUDA graphs": ({"mode": "eager", "graphs": True}, 10.0),
    "compile=regional": ({"mode": "regional"}, 45.0),
    "compile=regional, CUDA graphs": ({"mode": "regional", "graphs": True}, 20.0),
    "compile=full": ({"mode": "full"}, 120.0),
}


def of(name: str) -> Callable[[Settings], str]:
    """The section of one network."""
    return partial(_measure, name)


def modes(name: str, settings: Settings) -> dict[str, tuple[Mapping[str, Any], float]]:
    """The modes of a network on this device: a CPU has no CUDA graphs. Of tiny ones only the first is compiled."""
    full = settings.size == "full"
    return {
        mode: (words, least if full else 0.0)
        for mode, (words, least) in MODES.items()
        if (settings.gpu or "graphs" not in words)
        and (full or words["mode"] == "eager" or (name == network.NAMES[0] and words["mode"] == "regional"))
    }


@torch.no_grad()
def _measure(name: str, settings: Settings) -> str:
    work = network.chosen(settings)[name]
    loaded = network.drawn(work, settings)
    kernel = networks.kernel_of_auto(work, settings.device, network.dtype(settings))
    rows, kernels, expected = [], [], None
    for mode, (words, least) in modes(name, settings).items():
        if settings.seconds_left < least:
            rows.append((mode, "skipped: too little time left", "", "", "", ""))
            continue
        try:
            call = network_entries.our_call(work, lambda: _sharing(*loaded), settings.device, kernel, **words)
            first, result = networks.timed(call, timer(settings.device).synchronise)
            expected = result if expected is None else expected
            error = ((result.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
            median = _milliseconds(call, settings)
            busy, span, top = profiled(call, settings)
        except (RuntimeError, AssertionError, TypeError, ValueError, UserError, RunError) as problem:
            rows.append((mode, f"{FAILED}: {described(problem)}", "", "", "", ""))
            continue
        wrong = "" if error <= TOLERANCE else f" {FAILED}"
        idle = f"{max(0.0, 1 - busy / span):.0%}" if settings.gpu else "not measured on a CPU"
        rows.append((mode, f"{median:.2f}", f"{busy:.2f}", idle, f"{first:.1f}", f"{error:.1e}{wrong}"))
        kernels += [(mode, f"{spent:.2f}", kind, count) for (kind, count), spent in top]
    columns = ("mode", "ms a step", "ms of kernels", "GPU idle", "first call, s", "error against eager")
    memory = f" Peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB." if settings.gpu else ""
    return (
        f"{work.title}, {network.dtype(settings)}, attention {kernel.name}.{memory}\n\n{table(columns, rows)}\n\n"
        f"{table(('mode', 'ms', 'kernel', 'calls'), kernels)}"
    )


def _sharing(model: Any, condition: Any, latents: Any) -> tuple[Any, Any, Any]:
    return network_entries.sharing(model), condition, latents


def _milliseconds(call: Callable[[], Any], settings: Settings) -> float:
    """Median time of a step in a queue of several, as in the denoising loop."""
    clock = timer(settings.device)
    marks = [clock.mark()]
    for _ in range(ROUNDS[settings.size]):
        call()
        marks.append(clock.mark())
    clock.synchronise()
    return statistics.median(clock.elapsed_ms(*pair) for pair in pairwise(marks))


def profiled(call: Callable[[], Any], settings: Settings) -> tuple[float, float, list[tuple[tuple[str, int], float]]]:
    """Milliseconds of kernels, milliseconds from the first to the last of them, and the longest (kernel, calls)."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if settings.gpu else [])]
    with profile(activities=activities) as watched:
        call()
        if settings.gpu:
            torch.cuda.synchronize()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    ranges = []
    for event in watched.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu != settings.gpu or getattr(event, "is_user_annotation", False):
            continue
        spent = (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1000
        times[event.name] += spent
        counts[event.name] += 1
        ranges.append((event.time_range.start, event.time_range.end))
    busy = sum(times.values())
    span = (max(end for _, end in ranges) - min(start for start, _ in ranges)) / 1000 if ranges else 1.0
    top = [((name[:90], counts[name]), spent) for name, spent in times.most_common(TOP)]
    return busy, span, top
