"""Energy of a generation in joules, from the machine's own counters: Linux powercap (RAPL) and NVIDIA's NVML.

A RAPL counter measures a whole processor package or its memory, including the work of other processes. RAPL covers
Intel's and AMD's processors under the same names. Its counters wrap around and are therefore polled.
"""

import errno
import importlib
import re
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_gen import log
from sglang_gen.errors import InvalidValueError, in_our_words

POWERCAP = Path("/sys/class/powercap")
# Seconds between two polls. At 500 W a counter with the usual range of 262 kJ wraps around every 524 s, one with the
# smallest range (32 bits of 15.3 uJ) every 131 s.
POLLING = 1.0
SOURCES = ("cpu", "dram", "gpu")
# Zones by the names of their folder and of their domain. The zone psys covers the packages again, and so do the zones
# of a package other than dram; intel-rapl-mmio is a second interface of the same counters.
DOMAINS = {
    "cpu": (re.compile(r"intel-rapl:\d+"), re.compile(r"package-.*")),
    "dram": (re.compile(r"intel-rapl:\d+:\d+"), re.compile(r"dram")),
}

Reading = Mapping[str, float | None]  # joules by source; None for a source that this rank reads and that failed
Counter = Callable[[], float]  # joules since an arbitrary moment


class Zone:
    """A RAPL counter: joules since its creation, continuous across wrap-arounds."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError or InvalidValueError if the counter cannot be read."""
        self.folder, self.used_uj = folder, 0
        self.range_uj = _number(folder / "max_energy_range_uj")
        self.last_uj = self._now()
        self.lock = threading.Lock()  # the polling thread reads too

    def _now(self) -> int:
        return _number(self.folder / "energy_uj")

    def __call__(self) -> float:
        with self.lock:
            now = self._now()
            self.used_uj += now - self.last_uj + (self.range_uj if now < self.last_uj else 0)
            self.last_uj = now
            return self.used_uj / 1e6


def _number(path: Path) -> int:
    text = path.read_text().strip()
    if not text.isdecimal():
        raise InvalidValueError(f"{path.name} holds no number")
    return int(text)


def zones(root: Path) -> dict[str, list[Counter]]:
    """The counters of all processor packages and of their memory. A source is missing unless all its counters work."""
    found: dict[str, list[Counter]] = {}
    for source, (folder, domain) in DOMAINS.items():
        try:
            places = [place for place in sorted(root.glob("intel-rapl:*")) if folder.fullmatch(place.name)]
            own = [place for place in places if domain.fullmatch((place / "name").read_text().strip())]
            found |= {source: [Zone(place) for place in own]} if own else {}
        except (OSError, ValueError) as error:  # on most systems only root reads the counters
            log.debug(f"Energy: the counters of {source} in {root} cannot be read: {in_our_words(error)}")
    return found


def gpu(ending: ExitStack) -> list[Counter]:
    """The counter of this rank's GPU; none without the package nvidia-ml-py or without a counter."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        log.debug("Energy: the package nvidia-ml-py, which reads a GPU's counter, is not installed")
        return []
    import torch

    try:
        nvml.nvmlInit()
        ending.callback(nvml.nvmlShutdown)
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:  # no driver, a GPU without the counter, a part of a GPU (MIG)
        log.debug(f"Energy: the GPU's counter cannot be read:\n{traceback.format_exc()}")
        return []

    def joules() -> float:
        try:
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
        except nvml.NVMLError as error:
            raise OSError(errno.EIO, "NVML does not read the GPU's counter any more") from error

    return [joules]


@dataclass
class Meter:
    """Measures the energy of generations with the counters of this rank.

    `counters` has an entry for every source that this rank reads, with no counters for one that cannot be read.
    """

    counters: Mapping[str, Sequence[Counter]]
    generations: list[dict[str, float | None]] = field(default_factory=list)  # joules of each, by source

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Context whose energy is appended to `generations`."""
        before = self.read()
        yield
        after = self.read()
        self.generations.append({name: _difference(before[name], after[name]) for name in after})

    def read(self) -> Reading:
        return {name: _sum(counters) for name, counters in self.counters.items()}


def _sum(counters: Sequence[Counter]) -> float | None:
    try:
        return sum(counter() for counter in counters) if counters else None
    except (OSError, ValueError):
        return None


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else round(after - before, 6)


@contextmanager
def metered(device: str, first: bool, root: Path | None = None) -> Iterator[Meter]:
    """Context with the meter of one rank: the machine's processors if it is the `first` rank on it, and its own GPU."""
    with ExitStack() as ending:
        wrapping = zones(root or POWERCAP) if first else {}
        counters: dict[str, list[Counter]] = {"cpu": [], "dram": []} | wrapping if first else {}
        if device == "cuda":
            counters["gpu"] = gpu(ending)
        if wrapping:
            ending.enter_context(_polled(wrapping.values()))
        yield Meter(counters)


@contextmanager
def _polled(sources: Iterable[Sequence[Counter]]) -> Iterator[None]:
    """Context in which a thread reads the counters often enough to see every wrap-around."""
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(POLLING):
            for counters in sources:
                _sum(counters)

    thread = threading.Thread(target=poll, name="energy", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def add(report: dict[str, Any], device: str) -> None:
    """Add the energy of each generation to a dump whose ranks list their readings in `energy_j`, one per generation.

    Each rank's entry keeps its own reading of the first generation, as far as there is one.
    """
    readings = [rank["energy_j"] for rank in report["ranks"]]
    totals = [total(generation, len(report["samples"]), device) for generation in zip(*readings, strict=True)]
    report["energy_j"] = totals[0]
    for repeat, energy in zip(report["repeats"], totals, strict=True):
        repeat["energy_j"] = energy and energy["total"]
    for rank in report["ranks"]:
        first = rank["energy_j"][0]
        rank["energy_j"] = {name: round(joules, 3) for name, joules in first.items() if joules} or None


def total(readings: Sequence[Reading], images: int, device: str) -> dict[str, Any] | None:
    """`{total, per_image, sources}` of one generation from the readings of its ranks; None if nothing was measured.

    A source counts if every rank that reads it could, and if it advanced at all: a virtual machine may have counters
    that stand still. Without the GPU's own counter the energy of a run on GPUs is unknown.
    """
    sources: dict[str, float] = {}
    for name in SOURCES:
        values = [reading[name] for reading in readings if name in reading]
        known = [value for value in values if value is not None]
        if len(known) == len(values) and sum(known) > 0:
            sources[name] = round(sum(known), 3)
    if not sources or (device == "cuda" and "gpu" not in sources):
        return None
    joules = sum(sources.values())
    return {"total": round(joules, 3), "per_image": round(joules / images, 3), "sources": sources}
