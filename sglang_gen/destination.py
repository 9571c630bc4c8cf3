"""Resolves an output path before it is written: a replaceable file, a stream, or something that is refused.

Only a regular file or a new path is ever replaced. Devices, FIFOs and file descriptors of this process (/dev/stdout,
/dev/fd/3) are streams: they are opened and written to, never replaced.
"""

import errno
import fcntl
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

DESCRIPTOR = re.compile(r"(?:/proc/(\d+)(?:/task/\d+)?|/dev)/fd/(\d+)")
LINKS = 40  # maximum number of symbolic links followed, as in the kernel
FILE_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFLNK: "a link",
}


@dataclass(frozen=True)
class Destination:
    """Target of an output path. Symbolic links in `path` are resolved."""

    path: Path
    kind: str | None  # such as "a FIFO"; None for a regular file or a new path, which can be replaced
    is_stream: bool = False
    descriptor: int | None = None  # file descriptor of this process

    def check_file(self) -> None:
        """Raises OSError for anything but a regular file or a new path."""
        if self.kind is not None:
            raise _refusal(self.kind)

    def check_stream(self) -> None:
        """Raises OSError for anything but a regular file, a new path, or a stream that this process may write to."""
        if not self.is_stream:
            self.check_file()
        elif self.descriptor is not None:
            if fcntl.fcntl(self.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "It is open for reading only")
        elif not os.access(self.path, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def stream(self, data: bytes) -> None:
        """Write to the stream at its current position. Raises OSError."""
        if self.descriptor is None:
            opened = os.open(self.path, os.O_WRONLY | os.O_NOCTTY)  # neither created nor truncated
        else:
            for text in (sys.stdout, sys.stderr):  # keeps earlier output in front of the data
                if text is not None:
                    text.flush()
            opened = os.dup(self.descriptor)
        with open(opened, "wb") as file:
            file.write(data)


def find(name: Path) -> Destination:
    """The destination of `name`, with links resolved. Raises OSError if it cannot be resolved."""
    path = name
    for _ in range(LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        if match := DESCRIPTOR.fullmatch(str(path)):
            return _descriptor(path, match[1], int(match[2]))
        if not path.is_symlink():
            return _described(path)
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _descriptor(path: Path, process: str | None, number: int) -> Destination:
    """A file descriptor of this process is used directly: reopening a file would write from its start."""
    if process not in (None, str(os.getpid())):
        return Destination(path, "a descriptor of another process")
    kind = stat.S_IFMT(os.fstat(number).st_mode)
    if kind in (stat.S_IFDIR, stat.S_IFBLK):
        return Destination(path, FILE_KINDS[kind])
    return Destination(path, f"the descriptor {number}", True, number)


def _described(path: Path) -> Destination:
    try:
        kind = stat.S_IFMT(path.lstat().st_mode)
    except FileNotFoundError:
        return Destination(path, None)
    if kind == stat.S_IFREG:
        return Destination(path, None)
    return Destination(path, FILE_KINDS.get(kind, "no file"), kind in (stat.S_IFCHR, stat.S_IFIFO))


def replace(finished: Path, path: Path) -> None:
    """Rename a finished file to `path`, a new path or a regular file. Links are not followed. Raises OSError."""
    try:
        kind = stat.S_IFMT(path.lstat().st_mode)
    except FileNotFoundError:
        kind = stat.S_IFREG
    if kind != stat.S_IFREG:
        raise _refusal(FILE_KINDS.get(kind, "no file"))
    os.replace(finished, path)


def _refusal(kind: str) -> OSError:
    if kind == FILE_KINDS[stat.S_IFDIR]:
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return OSError(errno.EINVAL, f"It is {kind}, and only a regular file can be replaced")
