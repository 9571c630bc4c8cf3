"""What a command left on its standard streams."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finished:
    """How a command ended: exit code, standard output, and the log lines of standard error."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()
