"""What a step cache did in each step, for each image and guidance branch: in the dump and as log lines.

A row has `{step, image, branch, decision, residual, threshold}`; `decision` is computed, reused or extrapolated, and
`residual` the relative change that was compared with `threshold`, or None if something else decided.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
MOST_LINES = 8  # log lines of one run


def reused_steps(trace: Sequence[Row]) -> int:
    """The largest number of steps that an image and branch reused."""
    return max((len(_reused(rows)) for rows in _by_branch(trace).values()), default=0)


def _reused(rows: Sequence[Row]) -> list[int]:
    return [row["step"] for row in rows if row["decision"] != "computed"]


def _by_branch(trace: Sequence[Row]) -> dict[tuple[int, str], list[Row]]:
    """The rows of each image and branch, in the order of the steps."""
    found: dict[tuple[int, str], list[Row]] = {}
    for row in sorted(trace, key=lambda row: (row["image"], row["branch"], row["step"])):
        found.setdefault((row["image"], row["branch"]), []).append(row)
    return found


def dumped(trace: Sequence[Row]) -> dict[str, Any]:
    """The dump's `cache`: the decisions of all images, and those of the first image's conditional branch in short."""
    ordered = sorted(trace, key=lambda row: (row["image"], row["step"], row["branch"]))
    rows = next((rows for (_, branch), rows in _by_branch(trace).items() if branch == "conditional"), [])
    return {
        "steps": ["compute" if row["decision"] == "computed" else "reuse" for row in rows],
        "reused": len(_reused(rows)),
        "residual_diffs": {str(row["step"]): row["residual"] for row in rows if row["residual"] is not None},
        "trace": [dict(row) for row in ordered],
    }


def merged(parts: Sequence[Sequence[Row] | None]) -> list[Row] | None:
    """The traces of several ranks as one; None if there is no step cache."""
    found = [part for part in parts if part is not None]
    return [row for part in found for row in part] if found else None


def idle(trace: Sequence[Row]) -> str | None:
    """The warning that no step of a run was reused, with the threshold that would have allowed it; None if one was."""
    if not trace or reused_steps(trace):
        return None
    rows, why = [row for row in trace if row["residual"]], ""
    if rows:
        closest = min(rows, key=lambda row: float(row["residual"]))
        why = (
            f"; the residual changed by at least {closest['residual']:.3g}, and residual_diff_threshold is "
            f"{closest['threshold']}"
        )
    return f"cache: no step was reused, so the cache saved nothing{why}"


def lines(trace: Sequence[Row]) -> list[str]:
    """What each image reused, in a line; branches that did the same share one."""
    images: dict[int, dict[tuple[int, ...], list[str]]] = {}
    steps: dict[int, int] = {}
    for (image, branch), rows in _by_branch(trace).items():
        images.setdefault(image, {}).setdefault(tuple(_reused(rows)), []).append(branch)
        steps[image] = max(steps.get(image, 0), len(rows))
    found = []
    for image, branches in images.items():
        for reused, names in branches.items():
            which = f" ({names[0]} branch)" if len(branches) > 1 else ""
            listed = f": {', '.join(map(str, reused))}" if reused else ""
            found.append(f"Step cache: image {image}{which} reused {len(reused)} of {steps[image]} steps{listed}")
    more = len(found) - MOST_LINES
    return [*found[:MOST_LINES], *([f"Step cache: {more} more lines of this kind are left out"] if more > 0 else [])]
