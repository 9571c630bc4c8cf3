"""dtype=auto and backend.float32_matmul=auto on a CPU, by matmul rates that are measured once and cached on disk."""

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
ONEDNN_RATE = "float32_onednn"  # float32 by oneDNN; torch's own float32 product uses MKL or another BLAS
RATES = ("float32", ONEDNN_RATE, "bfloat16")
FASTER = 1.05  # oneDNN is chosen from this multiple of the rate of torch's own product on
NEAR = 0.9  # bfloat16 is chosen from this fraction of float32's rate on, since it needs half the memory
HOPELESS = 0.1  # below this fraction of float32's rate bfloat16 is emulated, and larger products are not measured
FIRST = 128  # rows and columns of the first product: 5 ms if bfloat16 is emulated at 1 GFLOP/s
LONG_ENOUGH = 0.002  # seconds of a product for which call overhead is negligible
DTYPE_ROUNDS = 5
BUDGET = 0.2  # seconds in all


@dataclass(frozen=True)
class Choice:
    """The dtype of `auto` on this CPU. `rates` is in GFLOP/s by dtype, and empty if nothing was measured."""

    dtype: str
    rates: dict[str, float]
    source: str

    def recorded(self) -> dict[str, Any]:
        """As `effective.dtype_choice` of the run record."""
        return {**{f"{name}_gflops": rate for name, rate in self.rates.items()}, "source": self.source}


def choose(native: bool) -> Choice:
    """bfloat16 if its rate is at least 0.9 of the float32 rate of the backend (`native`: this project's engine).

    Raises UserError if the environment variable names another dtype.
    """
    if (given := env.cpu_dtype(DTYPES)) is not None:
        return Choice(given, {}, env.CPU_DTYPE)
    rates = _rates(_cache_file())
    single = max(rates["float32"], rates[ONEDNN_RATE]) if native else rates["float32"]
    dtype = "bfloat16" if rates["bfloat16"] >= NEAR * single else "float32"
    return Choice(dtype, dict(rates), "measured")


def fastest_matmul() -> str:
    """`onednn` or `torch`: the library of float32 products. Nothing is measured if the variable sets the dtype."""
    if env.cpu_dtype(DTYPES) is not None:
        return "torch"
    rates = _rates(_cache_file())
    return "onednn" if rates[ONEDNN_RATE] >= FASTER * rates["float32"] else "torch"


def _cache_file() -> Path:
    """The cache file for this processor, number of threads and version of torch."""
    import torch

    name, flags = env.cpu()
    facts = [name, sorted(flags), env.cpu_count(), torch.get_num_threads(), torch.__version__]
    return env.cache_dir() / "dtype" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"


@cache  # so that all plans of a run have the same dtype even if the folder cannot be written
def _rates(path: Path) -> dict[str, float]:
    if (cached := _read(path)) is not None:
        return cached
    measured = measure()
    if (cached := _read(path)) is not None:  # another run measured at the same time; both use its rates
        return cached
    with contextlib.suppress(OSError):  # if the cache cannot be written, the next run measures again
        files.write_json(path, measured)
    return measured


def _read(path: Path) -> dict[str, float] | None:
    """Cached rates; None if the file does not exist or is incomplete."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    rates: dict[str, Any] = {name: content.get(name) for name in RATES}
    complete = all(isinstance(rate, float) and math.isfinite(rate) and rate > 0 for rate in rates.values())
    return rates if complete else None


def measure() -> dict[str, float]:
    """GFLOP/s of `RATES` for a product that takes long enough, or for the largest that fits into `BUDGET` seconds."""
    start, size = time.perf_counter(), FIRST
    while True:
        before = time.perf_counter()
        seconds = _seconds(size)
        now = time.perf_counter()
        rates = {name: round(2 * size**3 / duration / 1e9, 2) for name, duration in seconds.items()}
        hopeless = rates["bfloat16"] < HOPELESS * rates["float32"]
        if hopeless or max(seconds.values()) > LONG_ENOUGH or now - start + 8 * (now - before) > BUDGET:
            return rates
        size *= 2


def _seconds(size: int) -> dict[str, float]:
    """Seconds of a `size` x `size` linear layer on `size` tokens, for `RATES`: the minimum of interleaved rounds."""
    import torch
    from torch.nn.functional import linear

    from sglang_gen.models.matmul import has_onednn, onednn_linear

    operands = {name: torch.ones(2, size, size, dtype=getattr(torch, name)) for name in DTYPES}  # draws no noise
    operands = {name: operands[name.removesuffix("_onednn")] for name in RATES}
    least = dict.fromkeys(RATES, math.inf)
    onednn = onednn_linear if has_onednn() else linear
    with torch.no_grad():
        for turn in range(1 + DTYPE_ROUNDS):
            for name, (tokens, weight) in operands.items():
                start = time.perf_counter()
                (onednn if name == ONEDNN_RATE else linear)(tokens, weight)
                if turn > 0:  # the first call initializes kernels and threads
                    least[name] = min(least[name], time.perf_counter() - start)
    return least
