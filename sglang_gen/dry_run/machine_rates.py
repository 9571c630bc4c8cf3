"""Seconds of kernels and collectives on this machine, as `sglang perf rates` has measured them and kept them on disk.

A rate is a curve: seconds of calls of growing work. Small calls are dominated by their launch, large ones by arithmetic
or memory traffic, and the speed between depends on caches, so no single number describes a processor.
"""

import bisect
import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_gen import env, files
from sglang_gen.dry_run.roofline import Kernels, Work
from sglang_gen.parallel.collectives import Traffic
from sglang_gen.perf.machine import describe
from sglang_gen.types import Plan

Curve = list[tuple[float, float]]  # (work, seconds) of a call, in order; work is FLOPs or bytes
RATES_METHOD = 5  # a new one does not read the rates of an older one


@dataclass(frozen=True)
class Rates:
    """`curves` by kind of kernel, `collectives` by name, `launch_us` of Python between two kernels.

    The longer ranks compute before a collective, the longer one of them waits for the others. `collectives` have been
    measured after products of `between_s[0]` seconds, and `later` after those of `between_s[1]`.
    `library_mb` is the memory that torch's libraries keep once their kernels have run, `shape_mb` what they keep for
    each shape of a kind of kernel, and `shape_s` the seconds that its first call takes longer: oneDNN generates code.
    """

    measured_at: str
    threads: int
    ranks: int
    launch_us: float
    library_mb: float
    shape_mb: Mapping[str, float]
    shape_s: Mapping[str, float]
    curves: Mapping[str, Curve]
    collectives: Mapping[str, Curve]
    later: Mapping[str, Curve]
    between_s: tuple[float, float]

    def seconds(self, kernels: Kernels, attention: str, matmul: str) -> float:
        """Seconds of kernels that Python launches in sequence; products and attention by the kernels of these names."""
        return sum(self.parts(kernels, attention, matmul).values())

    def parts(self, kernels: Kernels, attention: str, matmul: str) -> dict[str, float]:
        """The same by kind, under the names of the estimate's prediction."""

        def total(work: Work, kind: str) -> float:
            return sum(
                calls * (max(at(self.curves[kind], flops), at(self.curves["copy"], moved)) + self.launch_us / 1e6)
                for (flops, moved), calls in work.items()
            )

        product = f"product {matmul}" if f"product {matmul}" in self.curves else "product torch"
        return {
            "products_ms": total(kernels.products, product) + total(kernels.convolutions, "convolution"),
            "attention_ms": total(kernels.attention, f"attention {attention}"),
            "elementwise_ms": sum(
                calls * (at(self.curves[kind], moved) + self.launch_us / 1e6)
                for (kind, moved), calls in kernels.others.items()
            ),
        }

    def libraries_mb(self, products: int, convolutions: int, matmul: str) -> float:
        """Memory of libraries that have computed products and convolutions of so many shapes."""
        return self.library_mb + _of_shapes(self.shape_mb, products, convolutions, matmul)

    def first_calls_s(self, products: int, convolutions: int, matmul: str) -> float:
        """Seconds that the first products and convolutions of so many shapes take longer than later ones."""
        return _of_shapes(self.shape_s, products, convolutions, matmul)

    def seconds_between_ranks(self, sent: Traffic, computing: float) -> float | None:
        """Seconds of the collectives of `sent` among so many seconds of kernels; None if they were not measured."""
        total, calls = 0.0, sum(sent.calls.values())
        short, long = self.between_s
        part = min(max((computing / calls - short) / (long - short), 0.0), 1.0) if calls and long > short else 0.0
        for name, count in sent.calls.items():
            curves = [curves.get(name.split()[0]) for curves in (self.collectives, self.later)]
            if curves[0] is None or curves[1] is None:
                return None
            after_short, after_long = (at(curve, sent.bytes[name] / count) for curve in curves if curve is not None)
            total += count * ((1 - part) * after_short + part * after_long)
        return total


def _of_shapes(each: Mapping[str, float], products: int, convolutions: int, matmul: str) -> float:
    product = each.get(f"product {matmul}", each.get("product torch", 0.0))
    return products * product + convolutions * each.get("convolution", 0.0)


def at(curve: Curve, work: float) -> float:
    """Seconds of a call of this work: the speed of the largest measured call beyond it, that of neighbours between.

    Less work than that of the smallest measured call takes as long.
    """
    works = [point[0] for point in curve]
    index = bisect.bisect_left(works, work)
    if index == 0:
        return curve[0][1]
    if index == len(curve):
        return curve[-1][1] * work / works[-1]
    (low, before), (high, after) = curve[index - 1 : index + 1]
    part = math.log(work / low) / math.log(high / low)
    return float(before * (after / before) ** part)


def cache_file(device: str, dtype: str, ranks: int, threads: int) -> Path:
    """Where the rates of so many ranks on this machine are kept, each with so many threads."""
    facts = describe(device)
    key = [RATES_METHOD, facts["cpu"], facts["cpu_count"], facts["gpus"], device, dtype, ranks, threads]
    key.append(facts["versions"]["torch"])
    return env.cache_dir() / "machine" / f"rates_{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"


def save(rates: Rates, path: Path) -> None:
    """Keep rates. Raises OSError."""
    files.write_json(path, vars(rates))


def read(path: Path) -> Rates | None:
    """Kept rates; None if there are none or the file is incomplete."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        content = json.loads(path.read_text(encoding="utf-8"))
        content["between_s"] = tuple(content["between_s"])
        for name in ("curves", "collectives", "later"):
            content[name] = {kind: [tuple(point) for point in curve] for kind, curve in content[name].items()}
        return Rates(**content)
    return None


def of_run(plan: Plan, threads: int) -> Rates | None:
    """The rates for a run of this plan, whose ranks compute with so many threads; None if none were measured."""
    return read(cache_file(plan.device, plan.dtype, plan.here, threads))


def facts(rates: Rates | None) -> dict[str, Any]:
    """What a dump tells about the rates that its predictions were made with."""
    if rates is None:
        return {"reason": "the rates of this machine were not measured for this dtype and number of ranks"}
    return {name: getattr(rates, name) for name in ("measured_at", "threads", "ranks", "launch_us", "library_mb")}
