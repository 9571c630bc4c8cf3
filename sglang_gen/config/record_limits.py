"""Settings that a run record may not set. A record may come from an untrusted source: it repeats a generation, but
cannot allow remote code, write to folders elsewhere, or start a tracker."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sglang_gen.config.schema import Tracker
from sglang_gen.errors import UserError

CODE = "model.trust_remote_code"
FOLDERS = ("output.path", "offload.disk_path")  # folders that a run writes to
# Settings of the recorded run that do not affect its result.
NEVER = (
    "output.perf_dump_path", "log_level", "perf.trace", "tracking.name", "tracking.project",
    "sweep.resume", "sweep.skip_refused", "sweep.fresh",
)  # fmt: skip
GROUPS = ("output", "offload", "tracking", "experiment")  # groups whose options could set such keys


def check_options(options: Mapping[str, str], record: str | Path) -> None:
    """Raises UserError if a record names an option of a group that could set withheld keys; real records hold keys."""
    for group in GROUPS:
        if group in options:
            raise UserError(f"{record}: '{group}' of the record's run is not a mapping")


def withhold(values: dict[str, Any], record: str | Path) -> dict[str, Any]:
    """Remove the values that only the command line may set from a record's `values`, and return them by config path."""
    inside = (Path.cwd(), Path(os.path.realpath(record)).parent)
    taken = [
        path
        for path, value in values.items()
        if path in NEVER or (path == CODE and value) or (path in FOLDERS and value and not _lies_in(value, inside))
    ]
    return {path: values.pop(path) for path in taken}


def _lies_in(folder: str, places: Collection[Path]) -> bool:
    try:
        real = Path(os.path.realpath(os.path.expanduser(folder)))
    except ValueError:  # a zero byte, which `plan.make` refuses
        return True
    return any(real.is_relative_to(place) for place in places)


def check_trusted_code(withheld: Mapping[str, Any], record: str, model: Any) -> None:
    """Raises UserError for a record that sets trust_remote_code if the command line does not. See `withhold`."""
    if CODE in withheld:
        raise UserError(
            f"{record} is a run record with {CODE}: true, and a record does not allow code by itself: read the code of "
            f"{model or 'its model'}, then add --trust-remote-code"
        )


def warnings(withheld: Mapping[str, Any], record: str) -> list[str]:
    """Warnings about withheld settings whose absence changes where the run writes or what it tracks."""
    ignored = [
        f"{path}={withheld[path]} of {record} is not used: it lies outside the working directory and the folder of the "
        "record; give it again to write there"
        for path in FOLDERS
        if path in withheld
    ]
    if withheld.get("tracking.name", Tracker.none) is not Tracker.none:
        name = withheld["tracking.name"].name
        ignored.append(
            f"tracking={name} of {record} is not used: a record does not start a tracker; add tracking={name} to use it"
        )
    return ignored
