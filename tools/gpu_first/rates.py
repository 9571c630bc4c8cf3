"""The sustained rate of matrix products, beside the table of known machines: a warm GPU is slower than a cold one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from sglang_gen.perf.clock import timer
from tools.gpu_first.sections import FAILED, Settings, described, table

SECONDS = {"full": 2.0, "tiny": 0.05}  # of each measurement
SIDES = {"full": 8192, "tiny": 256}
MACHINES = Path(__file__).parents[2] / "conf" / "machine"
LEAST = 0.7  # of the table's rate: less means a slower card than the table knows, or one that others use


def measure(settings: Settings) -> str:
    """Rates of a square product: of the first tenth of the time, of all of it, and the known one."""
    known, rows = known_rate(settings), []
    for name, product in products(settings).items():
        try:
            first, sustained = rate(product, 2 * SIDES[settings.size] ** 3, settings)
        except RuntimeError as error:
            rows.append((name, FAILED, described(error), ""))
            continue
        share = f"{sustained / known:.0%}" if known and name != "fp8" else ""
        if known and name == "bf16" and sustained < LEAST * known:
            share += f" {FAILED}: below {LEAST:.0%}"
        rows.append((name, f"{first:.1f}", f"{sustained:.1f}", share))
    columns = ("dtype", "TFLOP/s, first tenth", f"TFLOP/s over {SECONDS[settings.size]:g} s", "of the table's rate")
    said = f"known rate of this machine: {known} TFLOP/s" if known else "this machine is not in conf/machine"
    return f"{table(columns, rows)}\n\nA product of {SIDES[settings.size]}^3; {said}."


def products(settings: Settings) -> dict[str, Callable[[], Any]]:
    """The product to time for each dtype that this device multiplies."""
    side, device = SIDES[settings.size], settings.device
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a, b = left.to(dtype), right.to(dtype)
        calls[name] = lambda a=a, b=b: a @ b
    if settings.gpu and torch.cuda.get_device_capability() >= (8, 9):
        a, b = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        calls["fp8"] = lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)
    return calls


def rate(product: Callable[[], Any], flops: int, settings: Settings) -> tuple[float, float]:
    """TFLOP/s of the first tenth of the time and of the whole time; the host waits ten times, the GPU never idles."""
    clock, wanted = timer(settings.device), 1000 * SECONDS[settings.size]
    for _ in range(3):
        product()
    clock.synchronise()
    begun = clock.mark()
    product()
    ended = clock.mark()
    clock.synchronise()
    calls = max(1, int(wanted / 10 / max(clock.elapsed_ms(begun, ended), 1e-3)))
    marks = [clock.mark()]
    for _ in range(10):
        for _ in range(calls):
            product()
        marks.append(clock.mark())
    clock.synchronise()
    tenth, whole = (clock.elapsed_ms(marks[0], marks[index]) for index in (1, 10))
    return calls * flops / tenth / 1e9, 10 * calls * flops / whole / 1e9


def known_rate(settings: Settings) -> float | None:
    """TFLOP/s of this machine in half precision, if conf/machine has it."""
    if not settings.gpu:
        return None
    card = torch.cuda.get_device_name().lower()
    for file in MACHINES.glob("*.yaml"):
        facts = yaml.safe_load(file.read_text())
        if facts["name"] in card:
            return float(facts["matmul_tflops"])
    return None
