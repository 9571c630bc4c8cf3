"""What a command left on its standard streams."""

from dataclasses import dataclass

import sentences


@dataclass(frozen=True)
class Finished:
    """How a command ended: exit code, standard output, and the log lines of standard error."""

    code: int
    out: str
    err: str

    def __post_init__(self) -> None:
        sentences.note_stderr(self.err)

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()
