"""Atomic writing of output files, numbered so that they never overwrite each other.

A file is written under a temporary name, flushed, and then linked to its final name. The link fails if the name is
taken, even by a concurrent run in the same folder, and the next number is tried.
"""

import errno
import json
import os
import re
import secrets
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sglang_gen import destination, log
from sglang_gen.errors import InvalidValueError, RunError, UserError, in_our_words

if TYPE_CHECKING:
    from PIL import Image

PNG_KEY = "sglang_gen"  # name of the PNG text chunk that holds the run record
RESULT = re.compile(r"generated_[a-z]+_(\d+)(\..+)")  # file names of `save_numbered`
BESIDE = (".json", ".safetensors")  # suffixes of the files that accompany a result
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)

Write = Callable[[BinaryIO], object]


def prepare_folder(folder: Path) -> None:
    """Create the output folder and check that it is writable. Raises UserError, or RunError on a full disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder, ".test") as probe:
            probe.write_bytes(b"x")
    except OSError as error:
        raise _write_error(error, folder, RunError if error.errno in FULL else UserError) from None


def prepare_file(path: Path, stream: bool = False) -> None:
    """Check that a file can be written, and create its folder. With `stream`, devices and FIFOs are accepted too.

    Raises UserError, or RunError on a full disk.
    """
    check_file(path, stream)
    to = destination.find(path)
    if to.is_stream:
        return
    if path.is_symlink() and not to.path.parent.is_dir():
        raise UserError(
            f"{path} cannot be written: It is a link into the folder {to.path.parent}, which does not exist"
        )
    prepare_folder(to.path.parent)


def check_file(path: Path, stream: bool = False) -> None:
    """Raises UserError for an existing path that is not a regular file or, with `stream`, a stream."""
    try:
        to = destination.find(path)
        if stream:
            to.check_stream()
        else:
            to.check_file()
    except OSError as error:
        raise _write_error(error, path, UserError) from None


@contextmanager
def alone(path: Path, lock: Path, seconds: float, kind: type[Exception] = RunError) -> Iterator[None]:
    """Context in which no other process that names the file `lock` changes `path`. Raises an error of this kind."""
    from filelock import FileLock, Timeout

    held = FileLock(lock, timeout=seconds)
    try:
        if lock.is_symlink():  # older versions of filelock truncate the link's target
            raise kind(f"{path} cannot be written: {lock.name} is a symbolic link")
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        raise kind(f"{path} has been locked by another run for {seconds:.0f} s") from None
    except OSError as error:
        raise _write_error(error, path, kind) from error
    try:
        yield
    finally:
        held.release()


def check_folder(path: Path) -> None:
    """Raises UserError if `path` is not a folder and cannot become one, because a file has its name or a parent's."""
    for place in (path, *path.parents):
        if os.path.isdir(place):
            return
        if os.path.lexists(place):
            raise UserError(f"{path} cannot be written: {'It' if place == path else place} is not a folder")


def _write_error(error: OSError, path: Path, kind: type[Exception] = RunError) -> Exception:
    return kind(f"{path} cannot be written: {in_our_words(error)}")


@contextmanager
def _temporary(folder: Path, suffix: str) -> Iterator[Path]:
    """A temporary path in `folder`; the file is removed on exit."""
    path = folder / f".tmp-{os.getpid()}-{secrets.token_hex(6)}{suffix}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _fill(path: Path, write: Write) -> None:
    with open(path, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def record_bytes(content: Any) -> bytes:
    """JSON in the format of all our files: indented UTF-8."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, replacing an existing file. Raises OSError."""
    write_bytes(path, record_bytes(content))


def write_bytes(path: Path, data: bytes, stream: bool = False) -> None:
    """Write a file atomically, replacing an existing one. For a symbolic link, its target is replaced.

    With `stream` the bytes may be written to a device, a FIFO or a file descriptor, which raise OSError otherwise.
    """
    to = destination.find(path)
    if stream and to.is_stream:
        to.stream(data)
        return
    to.check_file()
    if not path.is_symlink():
        path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(to.path.parent, to.path.suffix) as temporary:
        _fill(temporary, lambda file: file.write(data))
        destination.replace(temporary, to.path)


def save_json(path: Path, content: Any, stream: bool = False) -> None:
    """`write_json` that raises RunError with one sentence if the file cannot be written."""
    save_bytes(path, record_bytes(content), stream)


def save_bytes(path: Path, data: bytes, stream: bool = False) -> None:
    """`write_bytes` that raises RunError with one sentence if the file cannot be written."""
    try:
        write_bytes(path, data, stream)
    except OSError as error:
        raise _write_error(error, path) from error


def save_numbered(
    folder: Path,
    name: str,
    write: Callable[[BinaryIO, dict[str, Any]], object],
    record: Callable[[str], dict[str, Any]],
    latents: Mapping[str, Any] | None = None,
) -> Path:
    """Write one result, its record as JSON, and `latents`, tensors by name, as safetensors. Returns the result's path.

    `name`, such as image.png, becomes image_N.png in `folder` with the first N that no file of that stem has, with any
    suffix. `record(file name)` is the record of the result, and `write(file, record)` writes the result. All files are
    complete before the first is linked to its name, which claims the number. Raises RunError.
    """
    path = folder
    stem, suffix = os.path.splitext(name)

    def writers(content: dict[str, Any]) -> dict[str, Write]:
        found: dict[str, Write] = {
            suffix: lambda file: write(file, content),
            ".json": lambda file: file.write(record_bytes(content)),
        }
        if latents is not None:
            found[".safetensors"] = lambda file: file.write(safetensors_bytes(latents))
        return found

    try:
        number = _next_number(folder, stem)
        while True:
            finished: dict[Path, Path] = {}
            with ExitStack() as stack:
                for ending, writer in writers(record(f"{stem}_{number}{suffix}")).items():
                    path = folder / f"{stem}_{number}{ending}"
                    finished[path] = stack.enter_context(_temporary(folder, ending))
                    _fill(finished[path], writer)
                first, *others = finished
                if _claim(finished[first], first):
                    for path in others:
                        destination.replace(finished[path], path)
                    return first
            number = max(number + 1, _next_number(folder, stem))
    except OSError as error:
        raise _write_error(error, path) from error


def results(folder: Path) -> list[str]:
    """Names of the generated images, videos and audio files in a folder, in the order of their numbers."""
    matches = [match for name in os.listdir(folder) if (match := RESULT.fullmatch(name)) and match[2] not in BESIDE]
    return [match[0] for match in sorted(matches, key=lambda match: (int(match[1]), match[0]))]


def _next_number(folder: Path, stem: str) -> int:
    pattern = re.compile(rf"{re.escape(stem)}_(\d+)\.")
    taken = [int(match[1]) for name in os.listdir(folder) if (match := pattern.match(name))]
    return max(taken, default=-1) + 1


def _claim(temporary: Path, path: Path) -> bool:
    """Link a finished file to its final name. Returns False if the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        return _claim_without_links(temporary, path)
    return True


def _claim_without_links(temporary: Path, path: Path) -> bool:
    """`_claim` for file systems without hard links: create an empty file, then replace it by the finished one."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    try:
        os.replace(temporary, path)
    except BaseException:
        path.unlink()
        raise
    return True


def save_image(
    folder: Path, frame: Any, record: Callable[[str], dict[str, Any]], latents: Mapping[str, Any] | None = None
) -> Path:
    """Save a uint8 [H, W, 3] image as the next generated_image_N.png, with its record as PNG text and as a JSON file.

    `latents`, tensors by name, are saved as a safetensors file of the same name. Raises RunError.
    """
    return save_numbered(folder, "generated_image.png", partial(_write_png, frame), record, latents)


def _write_png(frame: Any, file: BinaryIO, record: dict[str, Any]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(PNG_KEY, json.dumps(record, ensure_ascii=False))
    Image.fromarray(frame).save(file, format="png", pnginfo=info)


@contextmanager
def opened_image(path: Path) -> "Iterator[Image.Image]":
    """Context with an image of a user's file. Raises FileNotFoundError, or InvalidValueError.

    Errors inside the context become the latter too, because PIL decodes late. Its warnings about odd files are
    dropped. An image of more pixels than PIL takes for an attack is refused before it is decoded.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise InvalidValueError("it is a folder") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InvalidValueError(f"it has more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller") from None
    except Image.UnidentifiedImageError:
        empty = not path.stat().st_size
        raise InvalidValueError("the file is empty" if empty else "its format is unknown, or it is damaged") from None
    except (OSError, SyntaxError, EOFError, struct.error) as error:  # PIL raises SyntaxError for a broken PNG
        raise InvalidValueError(_problem(error)) from error


def _problem(error: Exception) -> str:
    """What PIL's exception for a damaged image means, as a clause."""
    if isinstance(error, OSError) and error.errno is not None:
        return in_our_words(error)
    return "it is damaged or truncated"


def safetensors_bytes(tensors: Mapping[str, Any]) -> bytes:
    """Serialize tensors by name in the safetensors format."""
    from safetensors.torch import save

    return save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})  # type: ignore[no-any-return]


def print_result(text: str) -> None:
    """Print a result to standard output, if it is open. Raises RunError if it cannot be written.

    Raises BrokenPipeError if nobody reads it.
    """
    if sys.stdout is None:
        return
    try:
        print(log.encodable(text, sys.stdout.encoding or "utf-8"), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or the interpreter would report the same error at exit
        raise RunError(f"The result cannot be written to standard output: {error.strerror}") from error
