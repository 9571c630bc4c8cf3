"""Compares both networks on the same inputs, module by module.

After the comparison each of our modules returns diffusers' output instead of its own. So an error was made in one
module, or between it and the modules before it: rounding does not accumulate through a deep network, and a defect does
not change the modules after it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from sglang_gen.debug import tensor_match, watching
from sglang_gen.debug.correspondence import Pairs
from sglang_gen.debug.tensor_match import Partner
from sglang_gen.debug.verdict import Cause, Row, Verdict, first_difference, judge

Run = Callable[[], object]


@dataclass(frozen=True)
class Networks:
    """Our network and diffusers', with their pairs of corresponding modules."""

    ours: nn.Module
    theirs: nn.Module
    pairs: Pairs
    tolerance: float
    stage: str = "network"


@dataclass(frozen=True)
class Compared:
    """Rows in the order in which our modules finish; `left_out`: modules with weights that ran and have no row."""

    rows: list[Row]
    left_out: tuple[str, ...]


def compare(networks: Networks, run_ours: Run, run_theirs: Run, step: int | None = None) -> Compared:
    """One row for each module that has a counterpart with a comparable output."""
    with watching.outputs(networks.theirs, {name for names in networks.pairs.values() for name in names}) as theirs:
        run_theirs()
    calls: dict[str, list[float | None]] = {}

    def led(name: str, output: Any) -> Any:
        before = calls.setdefault(name, [])
        matched = tensor_match.partners(
            tensor_match.tensors(output), _of(theirs, networks.pairs.get(name, ()), len(before))
        )
        before.append(tensor_match.worst(matched) if matched else None)
        return _substituted(output, matched)

    weighted = [name for name, module in networks.ours.named_modules() if module.state_dict()]
    with watching.changed(networks.ours, weighted, led):
        run_ours()
    limit = networks.tolerance
    known = {name: [error for error in errors if error is not None] for name, errors in calls.items()}
    rows = [
        Row(networks.stage, name, ", ".join(networks.pairs[name]), max(errors), judge(max(errors), limit), step)
        for name, errors in known.items()
        if errors
    ]
    return Compared(_marked(rows), tuple(sorted(name for name, errors in known.items() if not errors)))


def _substituted(output: Any, matched: dict[int, Partner]) -> Any:
    """The output with diffusers' values; unchanged if it is neither a tensor nor a tuple of tensors."""

    def theirs(place: int, own: Tensor) -> Tensor:
        return matched[place].theirs.to(own) if place in matched else own

    if isinstance(output, Tensor):
        return theirs(0, output)
    if isinstance(output, tuple) and all(isinstance(item, Tensor) for item in output):
        return tuple(theirs(place, item) for place, item in enumerate(output))
    return output


def _marked(rows: list[Row]) -> list[Row]:
    """The rows with `outer` set to False for modules inside other modules of the list."""
    around = [f"{row.ours}." for row in rows if row.ours]
    return [replace(row, outer=not row.ours.startswith(tuple(around))) for row in rows]


def cause(networks: Networks, run_ours: Run, run_theirs: Run, rows: Sequence[Row]) -> Cause | None:
    """The cause if the input of the first module that differs already differs; None if its input is the same.

    The cause is the innermost enclosing module whose first input is the same on both sides.
    """
    first = first_difference(rows)
    if first is None or not first.ours:
        return None
    compared = {row.ours for row in rows}
    around = [name for name in _upwards(first.ours) if name in compared]
    with watching.inputs(networks.theirs, {networks.pairs[name][0] for name in around}) as theirs:
        run_theirs()
    with watching.inputs(networks.ours, around) as ours:
        run_ours()
    for name in around:
        our, their = _of(ours, [name], 0)[:1], _of(theirs, networks.pairs[name][:1], 0)
        matched = tensor_match.partners(our, their[:1]) or tensor_match.partners(
            our, their[::-1]
        )  # the text precedes the image
        if matched and judge(tensor_match.worst(matched), networks.tolerance) is not Verdict.different:
            return None if name == first.ours else Cause(name, networks.pairs[name][0])
    return None


def _upwards(name: str) -> list[str]:
    """The module and its enclosing modules, up to the network ''."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _of(seen: watching.Seen, names: Sequence[str], call: int) -> list[Tensor]:
    """The concatenated lists of tensors of one call of each module; a module without such a call adds none."""
    return [tensor for name in names for tensor in [[], *seen.get(name, [])[call : call + 1]][-1]]
