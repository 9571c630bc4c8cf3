"""Peak memory of a stage: of torch's CUDA allocator, and the anonymous host memory of this process."""

import threading
from dataclasses import asdict, dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_INTERVAL = 0.01  # seconds between two samples of the host memory


@dataclass(frozen=True)
class Checkpoint:
    """Megabytes (2**20 bytes) at the end of a stage, and its peak. None for values that are not available."""

    allocated_mb: float | None
    reserved_mb: float | None
    peak_allocated_mb: float | None
    peak_reserved_mb: float | None
    peak_host_anon_mb: float | None

    def merge(self, other: "Checkpoint") -> "Checkpoint":
        """This checkpoint with the higher peaks of the two."""
        mine, its = asdict(self), asdict(other)
        for name in mine:
            if name.startswith("peak") and None not in (mine[name], its[name]):
                mine[name] = max(mine[name], its[name])
        return Checkpoint(**mine)

    def allocating(self, megabytes: float | None) -> "Checkpoint":
        """This checkpoint with a peak of at least `megabytes` allocated."""
        return self.merge(Checkpoint(None, None, megabytes, None, None))


def host_anon_mb() -> float | None:
    """Anonymous resident memory of this process in megabytes; memory-mapped files do not count."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return None


class Memory:
    """Context manager that samples host memory from a thread, since the kernel does not record its peak."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before_mb = self._peak = host_anon_mb()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> "Memory":
        if self._peak is not None:
            self._thread.start()
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._peak = max(self._peak or 0.0, host_anon_mb() or 0.0)

    def checkpoint(self) -> Checkpoint:
        """Memory now, and its peak since the last checkpoint."""
        now = host_anon_mb()
        peak = None if now is None else max(self._peak or 0.0, now)
        self._peak = now
        if self.device != "cuda":
            return Checkpoint(None, None, None, None, _rounded(peak))
        import torch

        megabyte = 2**20
        checkpoint = Checkpoint(
            _rounded(torch.cuda.memory_allocated() / megabyte),
            _rounded(torch.cuda.memory_reserved() / megabyte),
            _rounded(torch.cuda.max_memory_allocated() / megabyte),
            _rounded(torch.cuda.max_memory_reserved() / megabyte),
            _rounded(peak),
        )
        torch.cuda.reset_peak_memory_stats()
        return checkpoint


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
