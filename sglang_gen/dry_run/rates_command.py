"""The command `sglang perf rates`: measures the rates of this machine and keeps them for predictions."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from sglang_gen import env, files, log
from sglang_gen.errors import RunError, UserError, in_our_words, nearest

RATES_HELP = """\
usage: sglang perf rates [--dtype DTYPE[,DTYPE...]] [--ranks N] [--device cpu|cuda]

Measures how long kernels and collectives of growing size take on this machine, and keeps the answer for the predictions
of perf dumps and dry runs. Run it while nothing else runs, once for each dtype and number of ranks that you use.

options:
  --dtype DTYPE[,DTYPE...]  float32, bfloat16 or float16 (default: float32,bfloat16)
  --ranks N                 ranks that compute at the same time, and share the cores of a CPU (default: 1)
  --device cpu|cuda         where (default: cpu)"""
RATES_DTYPES = ("float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"sglang perf rates: {message}")


def main(argv: Sequence[str]) -> int:
    """Run `sglang perf rates ARGV...`; returns 0. Raises UserError, or RunError if the rates cannot be kept."""
    if "-h" in argv or "--help" in argv:
        files.print_result(RATES_HELP)
        return 0
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(list(argv))
    dtypes = given.dtype.split(",")
    for dtype in dtypes:
        if dtype not in RATES_DTYPES:
            known = ", ".join(RATES_DTYPES)
            raise UserError(f"--dtype is '{dtype}'{nearest(dtype, RATES_DTYPES)}; it must be one of {known}")
    _check_machine(given.device, given.ranks)
    for dtype in dtypes:
        _check_place(given.device, dtype, given.ranks)
    for dtype in dtypes:
        _measure(given.device, dtype, given.ranks)
    return 0


def _check_place(device: str, dtype: str, ranks: int) -> None:
    """Raises UserError, or RunError on a full disk, if the rates could not be kept after they are measured."""
    from sglang_gen.dry_run import machine_rates

    try:
        files.prepare_file(machine_rates.cache_file(device, dtype, ranks, _threads(ranks)))
    except (UserError, RunError) as error:
        raise type(error)(f"The rates cannot be kept: {error}") from error


def _threads(ranks: int) -> int:
    import torch

    return min(torch.get_num_threads(), max(env.cpu_count() // ranks, 1))


def _check_machine(device: str, ranks: int) -> None:
    """Raises UserError for a device or number of ranks that this machine does not have."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device is '{device}'; it must be cpu or cuda")
    most = env.cpu_count() if device == "cpu" else env.gpu_count()
    if not 1 <= ranks <= most:
        unit = "cores" if device == "cpu" else "GPUs"
        raise UserError(f"--ranks is {ranks} and this machine has {most} {unit}; it must be 1 to {most}")


def _measure(device: str, dtype: str, ranks: int) -> None:
    """Measure and keep the rates of one dtype, and print a line about them, also if they cannot be kept."""
    from sglang_gen.dry_run import machine_rates, rate_measurement

    threads = _threads(ranks)
    rates = rate_measurement.measure(ranks, threads, device, dtype)
    path = machine_rates.cache_file(device, dtype, ranks, threads)
    speeds = ", ".join(
        f"{kind} {curve[-1][0] / curve[-1][1] / 1e9:.3g}"
        for kind, curve in {**rates.curves, **rates.collectives}.items()
    )
    sizes = f"{log.quantity(ranks, 'rank')} of {log.quantity(threads, 'thread')}"
    line = (
        f"{dtype}, {sizes}: {speeds} (GFLOP/s or GB/s of the largest call); {rates.launch_us:.1f} us of Python per "
        "kernel"
    )
    try:
        machine_rates.save(rates, path)
    except OSError as error:
        files.print_result(line)
        raise RunError(f"The rates cannot be kept in {path}: {in_our_words(error)}") from error
    files.print_result(f"{line}; kept in {path}")
