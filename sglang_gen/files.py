"""What a run leaves on disk: numbered files that never overwrite, written atomically.

A file is written under a temporary name, flushed, and only then linked to its own name; the link fails where the name
is taken, also by another run in the same folder at the same moment, and the next number is tried.
"""

import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sglang_gen import destination
from sglang_gen.errors import RunError, UserError

PNG_KEY = "sglang_gen"  # name of the PNG text chunk that holds the run record
RESULT = re.compile(r"generated_[a-z]+_(\d+)(\..+)")  # names that `save_numbered` gives
BESIDE = (".json", ".safetensors")  # suffixes of what lies beside a result
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)

Write = Callable[[BinaryIO], object]


def prepare_folder(folder: Path) -> None:
    """Create the output folder and prove that it can be written. Raises UserError, or RunError on a full disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder, ".test") as probe:
            probe.write_bytes(b"x")
    except OSError as error:
        raise _write_error(error, folder, RunError if error.errno in FULL else UserError) from None


def prepare_file(path: Path, stream: bool = False) -> None:
    """Prove that a file can be written: replaced, or with `stream` also written to as a device or a FIFO is.

    Its folder is made. Raises UserError, or RunError on a full disk.
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
    """Raises UserError for a name that is neither free nor a regular file's nor, with `stream`, a stream's."""
    try:
        to = destination.find(path)
        if stream:
            to.check_stream()
        else:
            to.check_file()
    except OSError as error:
        raise _write_error(error, path, UserError) from None


def check_folder(path: Path) -> None:
    """Raises UserError where a folder is neither there nor can be made, since another thing has its name."""
    for place in (path, *path.parents):
        if place.is_dir():
            return
        if os.path.lexists(place):
            raise UserError(f"{path} cannot be written: {'It' if place == path else place} is not a folder")


def _write_error(error: OSError, path: Path, kind: type[Exception] = RunError) -> Exception:
    return kind(f"{path} cannot be written: {error.strerror or error}")


@contextmanager
def _temporary(folder: Path, suffix: str) -> Iterator[Path]:
    """A name in `folder` that is gone afterwards, whatever happens."""
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
    """JSON as every file of ours holds it."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; an existing file is replaced whole or not at all. Raises OSError."""
    write_bytes(path, record_bytes(content))


def write_bytes(path: Path, data: bytes, stream: bool = False) -> None:
    """Write a file atomically; an existing one is replaced whole or not at all. A link stays: its target is replaced.

    With `stream` a device, a FIFO or a descriptor takes the bytes and stays what it is; without, it is refused. Raises
    OSError.
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
    """`write_json` for the user's eyes. Raises RunError with one sentence when the file cannot be written."""
    save_bytes(path, record_bytes(content), stream)


def save_bytes(path: Path, data: bytes, stream: bool = False) -> None:
    """`write_bytes` for the user's eyes. Raises RunError with one sentence when the file cannot be written."""
    try:
        write_bytes(path, data, stream)
    except OSError as error:
        raise _write_error(error, path) from error


def save_numbered(folder: Path, stem: str, files: Callable[[str], Mapping[str, Write]]) -> Path:
    """Write the files of one result as `folder/stem_N.suffix` with the first free N; the path of the first is returned.

    `files("stem_N")` gives a writer for each suffix. A number is free when no file of that stem carries it, whatever
    its suffix. All files are whole before the first gets its name, which claims the number. Raises RunError.
    """
    path = folder
    try:
        number = _next_number(folder, stem)
        while True:
            finished: dict[Path, Path] = {}
            with ExitStack() as stack:
                for suffix, write in files(f"{stem}_{number}").items():
                    path = folder / f"{stem}_{number}{suffix}"
                    finished[path] = stack.enter_context(_temporary(folder, suffix))
                    _fill(finished[path], write)
                first, *others = finished
                if _claim(finished[first], first):
                    for path in others:
                        destination.replace(finished[path], path)
                    return first
            number = max(number + 1, _next_number(folder, stem))
    except OSError as error:
        raise _write_error(error, path) from error


def results(folder: Path) -> list[str]:
    """Names of the pictures, videos and sounds in a folder, in the order of their numbers."""
    found = [match for name in os.listdir(folder) if (match := RESULT.fullmatch(name)) and match[2] not in BESIDE]
    return [match[0] for match in sorted(found, key=lambda match: (int(match[1]), match[0]))]


def _next_number(folder: Path, stem: str) -> int:
    pattern = re.compile(rf"{re.escape(stem)}_(\d+)\.")
    taken = [int(found[1]) for name in os.listdir(folder) if (found := pattern.match(name))]
    return max(taken, default=-1) + 1


def _claim(temporary: Path, path: Path) -> bool:
    """Give a finished file its name; False when the name is taken."""
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
    """For file systems without hard links: reserve the name, then put the finished file in its place."""
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


def save_picture(
    folder: Path, frame: Any, record: Callable[[str], dict[str, Any]], latents: Mapping[str, Any] | None = None
) -> Path:
    """One uint8 [H, W, 3] frame as the next generated_image_N.png, its record inside and beside it as JSON.

    `latents`, tensors by name, are kept as safetensors beside it. Raises RunError.
    """

    def files(name: str) -> dict[str, Write]:
        content = record(f"{name}.png")
        found: dict[str, Write] = {
            ".png": lambda file: _write_png(file, frame, content),
            ".json": lambda file: file.write(record_bytes(content)),
        }
        if latents is not None:
            found[".safetensors"] = lambda file: file.write(safetensors_bytes(latents))
        return found

    return save_numbered(folder, "generated_image", files)


def _write_png(file: BinaryIO, frame: Any, record: dict[str, Any]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(PNG_KEY, json.dumps(record, ensure_ascii=False))
    Image.fromarray(frame).save(file, format="png", pnginfo=info)


def safetensors_bytes(tensors: Mapping[str, Any]) -> bytes:
    """Tensors by name as one safetensors file."""
    from safetensors.torch import save

    return save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})  # type: ignore[no-any-return]
