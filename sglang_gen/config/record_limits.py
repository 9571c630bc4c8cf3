"""What a run record cannot decide. A record may be a stranger's: it repeats what was generated, and neither allows code
to run, nor chooses folders outside, nor tells anybody."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sglang_gen.config.schema import Tracker
from sglang_gen.errors import UserError

CODE = "model.trust_remote_code"
FOLDERS = ("output.path", "offload.disk_path")  # that a run writes into
# Of the other run, not of its result.
NEVER = ("output.perf_dump_path", "log_level", "tracking.name", "tracking.project")
GROUPS = ("output", "offload", "tracking", "experiment")  # whose options could set such keys


def check_options(options: Mapping[str, str], record: str | Path) -> None:
    """Raises UserError for an option in place of keys, as no record has them, where it could set what is withheld."""
    for group in GROUPS:
        if group in options:
            raise UserError(f"{record}: '{group}' of the record's run is not a mapping")


def withhold(values: dict[str, Any], record: str | Path) -> dict[str, Any]:
    """Takes out of a record's values what only the command line can decide, and returns it by config path."""
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
    except ValueError:  # a zero byte, which the plan refuses
        return True
    return any(real.is_relative_to(place) for place in places)


def check(withheld: Mapping[str, Any], record: str, model: Any) -> None:
    """Raises UserError for a record that lets a model's code run. `withheld` is what the command line does not give."""
    if CODE in withheld:
        raise UserError(
            f"{record} is a run record with {CODE}: true, and a record does not allow code by itself: read the code of "
            f"{model or 'its model'}, then add --trust-remote-code"
        )


def warnings(withheld: Mapping[str, Any], record: str) -> list[str]:
    """What of the record is not repeated, and would be missed."""
    found = [
        f"{path}={withheld[path]} of {record} is not used: it lies outside the working directory and the folder of the "
        "record; give it again to write there"
        for path in FOLDERS
        if path in withheld
    ]
    if withheld.get("tracking.name", Tracker.none) is not Tracker.none:
        name = withheld["tracking.name"].name
        found.append(f"tracking={name} of {record} is not used: a record tells nobody; add tracking={name} to tell it")
    return found
