"""Trackers: log the settings and measurements of a run to a CSV file or to Weights & Biases."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_gen import files, log
from sglang_gen.config.schema import Run, Tracker, plain
from sglang_gen.errors import RunError, in_our_words
from sglang_gen.outputs.dump_path import RUNS
from sglang_gen.perf.dump_numbers import ACCURACIES, QUALITY, TIMES, peak_memory, times

LOCK_SECONDS = 60.0  # longest wait for another run that writes its row
SETTINGS = ("num_inference_steps", "guidance_scale", "seed", "num_samples", "batch_size")
# Keys of a dump that are not measurements: they are in the tracker's config, or are logged in another form.
NO_NUMBERS = ("schema_version", "requested", "effective", "fingerprint", "samples", "denoise_steps_ms", "repeats")


def track(run: Run, report: Mapping[str, Any], paths: Sequence[Path], wandb_mode: str | None = "offline") -> None:
    """Log the run to its tracker. `report` is the perf dump, `paths` are the generated files.

    `wandb_mode` is W&B's mode (online, offline, disabled); None leaves the choice to W&B's settings. Raises RunError.
    """
    if run.tracking.name is Tracker.csv:
        path = Path(run.output.path) / RUNS
        append_row(path, row(run, report, paths))
        log.info(f"Run added to: {path}")
    elif run.tracking.name is Tracker.wandb:
        _log_to_wandb(run, report, paths, wandb_mode)


def row(run: Run, report: Mapping[str, Any], paths: Sequence[Path]) -> dict[str, Any]:
    """One row of `runs.csv`. Every run has the same columns."""
    measured, memory = times(report), peak_memory(report)
    requested, effective = report["requested"], report["effective"]
    return {
        "timestamp": report["timestamp"],
        "request_id": report["request_id"],
        "commit_hash": report["commit_hash"],
        "tag": report["tag"],
        "model": report["meta"]["model"],
        "prompt": report["meta"]["prompt"],
        "files": " ".join(path.name for path in paths),
        **{name: getattr(run.sampling, name) for name in SETTINGS},
        "height": effective.get("height"),
        "width": effective.get("width"),
        **{f"{name}_s": round(measured[name].median, 6) if name in measured else None for name in TIMES},
        "images_per_second": report["images_per_second"],
        "joules_per_image": (report.get("energy_j") or {}).get("per_image"),
        "peak_host_mb": memory.get("peak_host_mb"),
        "peak_device_mb": memory.get("peak_device_mb"),
        **{name: (report.get("quality") or {}).get(name) for name in QUALITY},
        **{f"requested.{name}": _text(value) for name, value in requested.items()},
        **{f"effective.{name}": _text(effective.get(name)) for name in requested},
        "fingerprint": report["fingerprint"]["hash"],
        **{name: (report.get("quality") or {}).get(name) for name in ("verdict", *ACCURACIES)},
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def append_row(path: Path, values: Mapping[str, Any]) -> None:
    """Append a row to a CSV file atomically. Other runs may append to it at the same time.

    A new column is added at the end and is empty in older rows. A column that only the file has is empty in the new
    row. Raises RunError.
    """
    try:
        with files.alone(path, path.with_name(f".{path.name}.lock"), LOCK_SECONDS):
            header, rows = _read_rows(path)
            columns = list(dict.fromkeys([*header, *values]))
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows([*rows, values])
            files.save_bytes(path, text.getvalue().encode())
    except OSError as error:
        raise RunError(f"{path} cannot be written: {in_our_words(error)}") from error


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows; both empty if there is no file. A byte order mark from a spreadsheet program is dropped."""
    if not path.exists():
        return [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            rows = list(reader)
            header = list(reader.fieldnames or ())
    except (csv.Error, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not a CSV file; move it away") from error
    if any(None in row for row in rows):  # DictReader keeps surplus fields under None
        raise RunError(f"{path} has a row that is longer than its header; move it away")
    return header, rows


def _log_to_wandb(run: Run, report: Mapping[str, Any], paths: Sequence[Path], mode: str | None) -> None:
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)  # no system metrics: the run is over
    described = {name: report[name] for name in ("requested", "effective", "fingerprint")}
    try:
        with wandb.init(
            project=run.tracking.project,
            mode=mode,  # type: ignore[arg-type]  # W&B checks the word and names the legal ones
            dir=run.output.path,
            config={**plain(run), **described},
            tags=[run.perf.tag] if run.perf.tag else None,
            job_type="generate",
            settings=settings,
            reinit="create_new",  # a W&B run of the caller continues
        ) as session:
            for step in report["denoise_steps_ms"]:
                session.log({"denoise_step_ms": step["duration_ms"]})
            session.log({**numbers(report), **_media(report, paths)})
            folder = None if session.disabled else session.settings.sync_dir
    except (wandb.Error, OSError, ValueError) as error:  # ValueError: a setting that W&B refuses
        raise RunError(f"The images are saved, but W&B did not accept the run: {in_our_words(error)}") from error
    if folder is None:
        log.warning("tracking=wandb has no effect: W&B is disabled by its own settings (WANDB_MODE)")
    else:
        log.info(f"Run logged to W&B: {folder}")


def numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """All measured numbers of a dump as a flat dict: `steps/denoising/duration_ms`, `work/denoising/mfu`."""
    return {
        name: number
        for key, value in report.items()
        if key not in NO_NUMBERS
        for name, number in _flat(value, key).items()
    }


def _flat(value: Any, name: str) -> dict[str, float]:
    if isinstance(value, Mapping):
        return {path: number for key, item in value.items() for path, number in _flat(item, f"{name}/{key}").items()}
    if isinstance(value, list):  # only stages, which have names; other lists are not logged
        named = [item for item in value if isinstance(item, Mapping) and "name" in item]
        return {path: number for item in named for path, number in _flat(item, f"{name}/{item['name']}").items()}
    return {name: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}


def _media(report: Mapping[str, Any], paths: Sequence[Path]) -> dict[str, list[Any]]:
    """W&B media objects by kind, each with its prompt as the caption."""
    import wandb

    kinds = {".png": ("pictures", wandb.Image), ".mp4": ("videos", wandb.Video), ".wav": ("sounds", wandb.Audio)}
    prompts = {sample["file"]: sample["prompt"] for sample in report["samples"]}
    media: dict[str, list[Any]] = {}
    for path in paths:
        name, kind = kinds[path.suffix]
        media.setdefault(name, []).append(kind(str(path), caption=prompts.get(path.name)))
    return media
