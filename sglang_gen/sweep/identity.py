"""What determines the results of a job: its request, its input files, the code and the environment.

A resumed sweep keeps a completed job whose identity has not changed.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_gen import env, files
from sglang_gen.config.overrides import covers
from sglang_gen.config.schema import LOCAL, Run, get, leaves, plain, user_gave
from sglang_gen.perf import cpu_dtype, machine
from sglang_gen.plan import degrees
from sglang_gen.plan.make import choose_device

if TYPE_CHECKING:
    from sglang_gen.config.compose import Composed

# Settings that do not change what a job generates and measures.
IRRELEVANT = ("output.path", "log_level", "dry_run", "perf.objective", "sweep")
OUTPUTS = ("output.path", "output.perf_dump_path", "offload.disk_path")
READ_WHOLE = (
    "cache.plan_file",
    "sampling.",
    "quality.manifest",
    "lora.",
)  # inputs whose contents are compared; weights take long
OTHER_LIBRARIES = ("peft", "cache-dit", "torchao", "gguf")  # change images or times too, see `env.PACKAGES`


def identify(composed: "Composed") -> dict[str, Any]:
    """The identity of a job as readable parts, each of which JSON can represent. Raises UserError for device=cuda
    without a GPU."""
    run = composed.run
    facts = machine.describe(choose_device(run.device))
    facts["versions"] |= {name: env.package_version(name) for name in OTHER_LIBRARIES}
    return {
        "request": _request(run),
        "given": [path for path in leaves() if not _irrelevant(path) and user_gave(run, composed.sources, path)],
        "degrees": sorted(degrees.stated(composed.sources)),
        "inputs": dict(_inputs(run)),
        "code": {"version": env.VERSION, "files": _package_digest()},
        "environment": {**facts, "cpu_dtype": env.cpu_dtype(cpu_dtype.DTYPES), "modelscope": env.use_modelscope()},
    }


def change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """A clause that says in what two identities differ; None if they are equal."""
    differences = [
        (part, path)
        for part in now
        for path in _differences(before.get(part), now[part])
    ]  # fmt: skip
    if not differences:
        return None
    part, path = next((each for each in differences if each[0] not in ("given", "degrees")), differences[0])
    match part:
        case "code":
            return "the code of sglang-gen changed"
        case "inputs":
            return f"the file or folder of {path} changed"
        case "environment":
            return f"{path} of the environment changed"
        case "request":
            return f"{path} changed"
    return "other settings were given by hand"


def _differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Paths at which two nested values differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in {**before, **now}:
            if name in before and name in now:
                yield from _differences(before[name], now[name], f"{path}.{name}")
            else:
                yield f"{path}.{name}".lstrip(".")
    elif before != now:
        yield path.lstrip(".")


def _irrelevant(path: str) -> bool:
    return any(covers(outer, path) for outer in IRRELEVANT)


def _request(run: Run) -> dict[str, Any]:
    """All settings that can affect the job's results."""
    request: dict[str, Any] = plain(run)
    for path in IRRELEVANT:
        group, _, name = path.rpartition(".")
        del (request[group] if group else request)[name]
    dump = request["output"]["perf_dump_path"]
    request["output"]["perf_dump_path"] = dump and os.path.basename(dump)
    return request


def _inputs(run: Run) -> Iterator[tuple[str, Any]]:
    """The state of each local file or folder that the run reads, by the config path that names it."""
    named = {path: get(run, path) for path in LOCAL if path not in OUTPUTS}
    named |= {f"lora.adapters.{index}": adapter.path for index, adapter in enumerate(run.lora.adapters)}
    named |= {f"model.component_paths.{name}": path for name, path in run.model.component_paths.items()}
    for path, name in named.items():
        if name is None:
            continue
        with suppress(OSError, ValueError):  # an unreadable or impossible name, which the plan refuses
            place = Path(name).expanduser()
            if place.is_dir():
                only_images = path == "quality.reference"  # not the notes and tables beside them
                yield (
                    path,
                    _digest([_state(each, place) for each in _files(place) if not only_images or _is_result(each)]),
                )
            elif place.is_file():
                yield path, _content(place) if path.startswith(READ_WHOLE) else _digest([_state(place, place.parent)])


def _files(folder: Path) -> list[Path]:
    return sorted(Path(place, name) for place, _, names in os.walk(folder) for name in names)


def _is_result(path: Path) -> bool:
    return files.RESULT.fullmatch(path.name) is not None


def _state(path: Path, root: Path) -> list[Any]:
    """Name, size and time of change of a file, which together stand for its content."""
    state = path.stat()
    return [str(path.relative_to(root)), state.st_size, state.st_mtime_ns]


def _content(path: Path) -> str:
    state = path.stat()
    return _content_of(path, state.st_size, state.st_mtime_ns)


@cache
def _content_of(path: Path, _size: int, _changed: int) -> str:
    return file_digest(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@cache
def _package_digest() -> str:
    """Digest of all files of the installed package or checkout, with uncommitted changes. Takes 0.1 s."""
    package = Path(env.__file__).parent
    sources = [path for path in _files(package) if "__pycache__" not in path.parts]
    return _digest([[str(path.relative_to(package)), file_digest(path)] for path in sources])
