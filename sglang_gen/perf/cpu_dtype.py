"""dtype=auto on a CPU: bfloat16 or float32, by the rates of a matrix product, measured once and kept on disk."""

import contextlib
import hashlib
import json
import math
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sglang_gen import env, files

DTYPES = ("float32", "bfloat16")
NEAR = 0.9  # of float32's rate: from there on bfloat16 is taken, which needs half the memory
HOPELESS = 0.1  # of float32's rate: a processor that emulates bfloat16 is not asked for larger products
FIRST = 128  # rows and columns: 5 ms where bfloat16 is emulated at 1 GFLOP/s
LONG_ENOUGH = 0.002  # seconds of a product that its start no longer decides
DTYPE_ROUNDS = 5
BUDGET = 0.2  # seconds in all


@dataclass(frozen=True)
class Choice:
    """What `auto` takes on this CPU. `rates` in GFLOP/s by dtype; empty where `source` is not a measurement."""

    dtype: str
    rates: dict[str, float]
    source: str

    def recorded(self) -> dict[str, Any]:
        """As `effective.dtype_choice` of the run record."""
        return {**{f"{name}_gflops": rate for name, rate in self.rates.items()}, "source": self.source}


def choose() -> Choice:
    """bfloat16 where its rate is at least 0.9 of float32's. Raises UserError for a variable that names neither."""
    if (given := env.cpu_dtype(DTYPES)) is not None:
        return Choice(given, {}, env.CPU_DTYPE)
    rates = _rates(_kept_at())
    dtype = "bfloat16" if rates["bfloat16"] >= NEAR * rates["float32"] else "float32"
    return Choice(dtype, dict(rates), "measured")


def _kept_at() -> Path:
    """The file of this processor with these threads and this torch."""
    import torch

    name, flags = env.cpu()
    facts = [name, sorted(flags), env.cpu_count(), torch.get_num_threads(), torch.__version__]
    return env.cache_dir() / "dtype" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"


@cache  # also where the folder cannot be written, so that both plans of a run have the same dtype
def _rates(path: Path) -> dict[str, float]:
    if (kept := _read(path)) is not None:
        return kept
    measured = measure()
    if (kept := _read(path)) is not None:  # of a run that was measuring at the same time: both decide alike
        return kept
    with contextlib.suppress(OSError):  # an unwritable cache costs the next run a measurement, nothing else
        files.write_json(path, measured)
    return measured


def _read(path: Path) -> dict[str, float] | None:
    """Kept rates; None where there are none, or the file is not whole."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(kept, dict):
        return None
    rates: dict[str, Any] = {name: kept.get(name) for name in DTYPES}
    whole = all(isinstance(rate, float) and math.isfinite(rate) and rate > 0 for rate in rates.values())
    return rates if whole else None


def measure() -> dict[str, float]:
    """GFLOP/s by dtype of a product that is large enough to tell, or as large as fits into `BUDGET` seconds."""
    start, size = time.perf_counter(), FIRST
    while True:
        before = time.perf_counter()
        seconds = _seconds(size)
        now = time.perf_counter()
        rates = {name: round(2 * size**3 / each / 1e9, 2) for name, each in seconds.items()}
        hopeless = rates["bfloat16"] < HOPELESS * rates["float32"]
        if hopeless or max(seconds.values()) > LONG_ENOUGH or now - start + 8 * (now - before) > BUDGET:
            return rates
        size *= 2


def _seconds(size: int) -> dict[str, float]:
    """Of a linear layer on `size` tokens: the least of several rounds, in which the dtypes take turns."""
    import torch
    from torch.nn.functional import linear

    operands = {name: torch.ones(2, size, size, dtype=getattr(torch, name)) for name in DTYPES}  # draws no noise
    least = dict.fromkeys(DTYPES, math.inf)
    with torch.no_grad():
        for turn in range(1 + DTYPE_ROUNDS):
            for name, (tokens, weight) in operands.items():
                start = time.perf_counter()
                linear(tokens, weight)
                if turn > 0:  # the first call prepares kernel and threads
                    least[name] = min(least[name], time.perf_counter() - start)
    return least
