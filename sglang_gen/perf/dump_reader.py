"""Reads perf dumps: the recipe (what was run), and the observations of each metric.

A dump is a JSON object with `total_duration_ms` and `steps`. Ours have `schema_version`, a `fingerprint` and possibly
`repeats`; upstream's have none of these, and their recipe is model, prompt and number of denoising steps.
"""

import datetime
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

from sglang_gen.config.schema import SCHEMA_VERSION
from sglang_gen.errors import InvalidValueError, UserError, in_our_words
from sglang_gen.perf.paired_quality import Measures, by_sample

PEAKS = ("peak_allocated_mb", "peak_reserved_mb", "peak_host_anon_mb")
CALIBRATION = "calibration"  # processor time of the fixed work of perf.calibrate; no metric of the program
MOST_OF_A_METRIC = 1e15  # milliseconds or MB; a larger number is a mistake
WHOLE_TIMES = {"total": "total_duration_ms", "cpu": "cpu_duration_ms", CALIBRATION: "calibration_cpu_ms"}
NO_COMMIT = ("N/A", "unknown")  # upstream's, if it is not in a checkout


@dataclass(frozen=True)
class Origin:
    """Where a dump comes from. `identity` tells dumps apart, wherever their files are."""

    commit: str | None
    date: str | None  # ISO 8601, in UTC
    identity: str
    hardware: tuple[str, ...]  # processor and GPUs; empty for a dump of upstream


@dataclass(frozen=True)
class Dump:
    """One dump: its recipe, and the observations of each metric."""

    path: Path
    meta: dict[str, Any]  # model, prompt, denoising_steps
    fingerprint: str | None
    fields: dict[str, Any]
    metrics: dict[str, list[float]]
    images: int | None  # None if the dump does not list its samples
    origin: Origin
    quality: Measures = field(default_factory=dict)

    @property
    def recipe(self) -> str:
        return self.fingerprint or json.dumps(self.meta, sort_keys=True)


def collect(paths: Iterable[str | Path]) -> list[Dump]:
    """Read the dumps at `paths`, each a dump file or a folder that contains dumps; a file and its copies count once.

    Raises UserError for files that are missing, broken, or written by a newer version.
    """
    collected: dict[object, Dump] = {}
    for path in map(Path, paths):
        folder = is_folder(path)
        if folder is None:
            raise UserError(f"{path} does not exist")
        dumps = [read(file) for file in json_files(path)] if folder else [read(path, strict=True)]
        if not any(dumps):
            raise UserError(f"The folder {path} holds no perf dump")
        for dump in filter(None, dumps):
            collected.setdefault(dump.origin.identity if dump.origin.date else dump.path.resolve(), dump)
    return list(collected.values())


def is_folder(path: Path) -> bool | None:
    """Whether `path` is a folder, not a file; None if there is neither. Raises UserError if it cannot be reached."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, in_our_words(error)) from error


def json_files(folder: Path) -> list[Path]:
    """JSON files in the order of their paths, numbers by value: the jobs of a sweep in their order.

    Raises UserError for a folder inside that cannot be read.
    """
    files = [
        path
        for place, _, names in os.walk(folder, onerror=_refuse_folder)
        for path in (Path(place, name) for name in names if name.endswith(".json") and not name.startswith("."))
        if _is_file(path)
    ]
    return sorted(files, key=lambda path: ([_natural(part) for part in path.parts], path))


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:  # removed meanwhile, or a link to nothing
        return False
    except OSError as error:
        raise _unreadable(path, in_our_words(error)) from error


def _refuse_folder(error: OSError) -> NoReturn:
    raise _unreadable(error.filename, in_our_words(error)) from error


def _unreadable(path: str | Path, reason: str) -> UserError:
    return UserError(f"{path} cannot be read: {reason}")


def _natural(part: str) -> tuple[int, int, str]:
    return (0, int(part), part) if part.isdecimal() and len(part) < 19 else (1, 0, part)


def read(path: Path, strict: bool = False) -> Dump | None:
    """Read the dump in a file. For other JSON files returns None, or raises UserError if `strict`."""
    return parse_dump(path, parse_json(path), strict)


def parse_json(path: Path) -> Any:
    """The JSON of a file. Raises UserError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error.msg} in line {error.lineno}") from None
    except InvalidValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON: a number has thousands of digits") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None
    except OSError as error:
        raise _unreadable(path, in_our_words(error)) from error


def parse_dump(path: Path, content: Any, strict: bool = False) -> Dump | None:
    """The dump in the parsed JSON of a file; None, or UserError if `strict`, for other JSON."""
    if not is_dump(content):
        if strict:
            raise UserError(f"{path} is not a perf dump: it has no total_duration_ms and steps")
        return None
    version = content.get("schema_version", 0)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {version}, this program reads versions up to {SCHEMA_VERSION}")
    return _dump(path, content)


def is_dump(content: Any) -> bool:
    """Whether parsed JSON is a perf dump, ours or upstream's."""
    return isinstance(content, dict) and {"total_duration_ms", "steps"} <= content.keys()


def _refuse(constant: str) -> None:
    raise InvalidValueError(f"{constant} is not a JSON number")


def _dump(path: Path, content: Mapping[str, Any]) -> Dump:
    try:
        metrics = _metrics(content)
        denoising = content.get("denoise_steps_ms") or next(iter(_repeats(content))).get("denoise_steps_ms") or ()
        meta, fingerprint = content.get("meta") or {}, content.get("fingerprint") or {}
        hash_, fields = fingerprint_of(fingerprint)
        named = {"model": meta.get("model"), "prompt": meta.get("prompt")}
        samples = content.get("samples")
        return Dump(
            path=path,
            meta={
                **named,
                "denoising_steps": len({_step_number(index, entry) for index, entry in enumerate(denoising)}),
            },
            fingerprint=hash_,
            fields=fields,
            metrics=metrics,
            images=len(samples) if samples else None,
            quality=by_sample(content.get("quality")),
            origin=_origin(content, metrics),
        )
    except (TypeError, AttributeError, KeyError, ValueError, OverflowError) as error:
        own = isinstance(error, InvalidValueError)
        reason = in_our_words(error) if own else "its entries do not have the layout of a dump"
        raise UserError(f"{path} cannot be compared: {reason}") from None


def fingerprint_of(entry: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Hash and fields of the entry `fingerprint`. Raises InvalidValueError for values of another kind."""
    hash_, fields = entry.get("hash"), entry.get("fields")
    if hash_ is not None and not (isinstance(hash_, str) and hash_):
        raise InvalidValueError(f"fingerprint.hash is {_short(hash_)}, not a text")
    if fields is not None and not isinstance(fields, dict):
        raise InvalidValueError(f"fingerprint.fields is {_short(fields)}, not an object")
    return hash_, fields or {}


def _origin(content: Mapping[str, Any], metrics: Mapping[str, list[float]]) -> Origin:
    date, commit, machine = content.get("timestamp"), content.get("commit_hash"), content.get("machine") or {}
    text = json.dumps([date, content.get("request_id"), metrics], sort_keys=True)
    return Origin(
        commit=str(commit) if commit and commit not in NO_COMMIT else None,
        date=utc(date) if date else None,
        identity=hashlib.sha256(text.encode()).hexdigest()[:12],
        hardware=tuple(map(str, machine.get("gpus") or filter(None, [machine.get("cpu")]))),
    )


def utc(date: Any) -> str:
    """A date of ISO 8601 in UTC, to the millisecond, so that the order of texts is that of time."""
    try:
        moment = datetime.datetime.fromisoformat(date)
        moment = moment.replace(tzinfo=datetime.UTC) if moment.tzinfo is None else moment.astimezone(datetime.UTC)
    except (TypeError, ValueError, OverflowError):
        raise InvalidValueError(f"its timestamp is {_short(date)}, not a date of ISO 8601") from None
    return moment.isoformat(timespec="milliseconds")


def _step_number(index: int, entry: Any) -> Any:
    return entry.get("step", index) if isinstance(entry, dict) else index


def _repeats(content: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return content.get("repeats") or [content]


def _metrics(content: Mapping[str, Any]) -> dict[str, list[float]]:
    """Each repeat is one observation; metrics outside the repeats (loading, memory) have one observation per dump."""
    metrics: dict[str, list[float]] = {}
    for repeat in _repeats(content):
        for name, value in _times(repeat).items():
            metrics.setdefault(name, []).append(value)
    check_times(metrics)
    once = {name: value for name, value in _stages(content).items() if name not in metrics}
    for checkpoint in (content.get("memory_checkpoints") or {}).values():
        for peak in PEAKS:
            if checkpoint.get(peak) is not None:
                name = f"memory.{peak.removesuffix('_mb')}"
                once[name] = max(once.get(name, 0.0), number_of(checkpoint[peak], peak))
    return metrics | {name: [value] for name, value in once.items()}


def _times(repeat: Mapping[str, Any]) -> dict[str, float]:
    steps = [
        number_of(entry["duration_ms"] if isinstance(entry, dict) else entry, "a denoising step")
        for entry in repeat.get("denoise_steps_ms") or ()
    ]
    middle = {"step": median(steps)} if steps else {}
    cpu, fixed = repeat.get("cpu_duration_ms"), repeat.get("calibration_cpu_ms")
    return {
        "total": number_of(repeat["total_duration_ms"], "total_duration_ms"),
        **_stages(repeat),
        **middle,
        **({} if cpu is None else {"cpu": number_of(cpu, "cpu_duration_ms")}),
        **({CALIBRATION: number_of(fixed, "calibration_cpu_ms")} if fixed else {}),
    }


def _stages(content: Mapping[str, Any]) -> dict[str, float]:
    stages: dict[str, float] = {}
    for entry in content.get("steps") or ():
        name = f"stage.{entry['name']}"
        what = f"the stage {entry['name']}"
        stages[name] = number_of(stages.get(name, 0.0) + number_of(entry["duration_ms"], what), what)
    return stages


def check_times(metrics: Mapping[str, Sequence[float]]) -> None:
    """Raises InvalidValueError for a whole time of zero, which nothing takes; a stage or a step may round to zero."""
    for name, field_name in WHOLE_TIMES.items():
        if not all(metrics.get(name, ())):
            raise InvalidValueError(f"its {field_name} is zero")


def number_of(value: Any, what: str) -> float:
    """A time or an amount of memory. Raises InvalidValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < MOST_OF_A_METRIC:
        raise InvalidValueError(
            f"{what} is {_short(value)}, not a number of at least 0 and below {MOST_OF_A_METRIC:.0e}"
        )
    return float(value)


def _short(value: Any) -> str:
    return json.dumps(value)[:40]
