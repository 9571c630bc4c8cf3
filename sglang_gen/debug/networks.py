"""Both networks on the same inputs, module by module.

Every module of ours that has been compared hands on diffusers' numbers in place of its own. So an error is what one
module adds, or what stands between it and the modules before it: rounding does not pile up through a deep network, and
nothing behind a defect differs because of it.
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
    """Ours and theirs, with the modules that are the same in both."""

    ours: nn.Module
    theirs: nn.Module
    pairs: Pairs
    tolerance: float
    stage: str = "network"


@dataclass(frozen=True)
class Compared:
    """Rows in the order in which modules of ours finish, and those with weights that ran and have none."""

    rows: list[Row]
    left_out: tuple[str, ...]


def compare(networks: Networks, run_ours: Run, run_theirs: Run, step: int | None = None) -> Compared:
    """A row for each module that has a partner and an output that can stand beside its partner's."""
    with watching.outputs(networks.theirs, {name for names in networks.pairs.values() for name in names}) as theirs:
        run_theirs()
    calls: dict[str, list[float | None]] = {}

    def led(name: str, output: Any) -> Any:
        before = calls.setdefault(name, [])
        found = tensor_match.partners(
            tensor_match.tensors(output), _of(theirs, networks.pairs.get(name, ()), len(before))
        )
        before.append(tensor_match.worst(found) if found else None)
        return _handed_on(output, found)

    weighted = [name for name, module in networks.ours.named_modules() if module.state_dict()]
    with watching.changed(networks.ours, weighted, led):
        run_ours()
    limit = networks.tolerance
    whole = {name: [error for error in errors if error is not None] for name, errors in calls.items()}
    rows = [
        Row(networks.stage, name, ", ".join(networks.pairs[name]), max(errors), judge(max(errors), limit), step)
        for name, errors in whole.items()
        if errors
    ]
    return Compared(_marked(rows), tuple(sorted(name for name, errors in whole.items() if not errors)))


def _handed_on(output: Any, found: dict[int, Partner]) -> Any:
    """The output with their numbers; where it is neither a tensor nor a tuple of tensors, as it is."""

    def theirs(place: int, own: Tensor) -> Tensor:
        return found[place].theirs.to(own) if place in found else own

    if isinstance(output, Tensor):
        return theirs(0, output)
    if isinstance(output, tuple) and all(isinstance(item, Tensor) for item in output):
        return tuple(theirs(place, item) for place, item in enumerate(output))
    return output


def _marked(rows: list[Row]) -> list[Row]:
    """The rows with those of modules inside of others told apart."""
    around = [f"{row.ours}." for row in rows if row.ours]
    return [replace(row, outer=not row.ours.startswith(tuple(around))) for row in rows]


def cause(networks: Networks, run_ours: Run, run_theirs: Run, rows: Sequence[Row]) -> Cause | None:
    """Where to look when the first module that differs is given something else already; None where it is not.

    That is the innermost module around it whose own first input is the same on both sides.
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
        mine, its = _of(ours, [name], 0)[:1], _of(theirs, networks.pairs[name][:1], 0)
        found = tensor_match.partners(mine, its[:1]) or tensor_match.partners(
            mine, its[::-1]
        )  # text stands before the image
        if found and judge(tensor_match.worst(found), networks.tolerance) is not Verdict.different:
            return None if name == first.ours else Cause(name, networks.pairs[name][0])
    return None


def _upwards(name: str) -> list[str]:
    """The module, the one around it, and so on up to the network ''."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _of(seen: watching.Seen, names: Sequence[str], call: int) -> list[Tensor]:
    """The tensors of one call of the modules, one behind the other; of a module without that call none."""
    return [tensor for name in names for tensor in [[], *seen.get(name, [])[call : call + 1]][-1]]
