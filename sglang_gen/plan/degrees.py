"""Infers parallel degrees from those that were given, so that the equation between them holds."""

import math
from collections.abc import Mapping, Set

from sglang_gen.config.schema import DEGREES, Parallel
from sglang_gen.errors import UserError
from sglang_gen.types import Layout

# Fields that an error message proposes to change, and the largest value that it proposes.
PROPOSED = ("num_gpus", "dp_size", "tp_size", "sp_degree", "ring_degree", "ulysses_degree", "dp_degree")
MOST_PROPOSED = 256
EQUATION = "num_gpus = dp_size * cfg * ring_degree * ulysses_degree * tp_size"


def stated(sources: Mapping[str, str]) -> set[str]:
    """Fields of the parallel group set by the user or by the file of the chosen option."""
    return {name for name in DEGREES if sources.get(f"parallel.{name}", "default") != "default"}


def infer(parallel: Parallel, given: Set[str], heads: int | None = None) -> Layout:
    """The layout for the given degrees; `given` names the fields that were set explicitly.

    `heads` is the greatest common divisor of the attention head counts of all layers. The Ulysses degree becomes the
    largest that divides the heads of a tensor parallel rank; Ring gets the rest of the sequence parallel degree.
    Raises UserError if the equation cannot hold.
    """
    stated = {name: getattr(parallel, name) for name in given if getattr(parallel, name) is not None}
    for name, value in stated.items():
        if name != "enable_cfg_parallel" and value < 1:
            raise UserError(f"parallel.{name} is {value}; a degree is at least 1")
    cfg = 2 if parallel.enable_cfg_parallel else 1
    layout = _fill(stated, cfg, heads)
    if violation := _violation(layout, stated):
        raise UserError(f"{violation}; {_proposals(layout, stated, cfg, heads)}")
    return layout


def _fill(stated: Mapping[str, int], cfg: int, heads: int | None) -> Layout:
    """Infer the degrees that were not given."""
    tp, dp = stated.get("tp_size", 1), _data_degree(stated)
    sp = _sequence_degree(stated, dp, cfg * tp)
    ring, ulysses = _split_sequence(sp, stated.get("ring_degree"), stated.get("ulysses_degree"), heads, tp)
    return Layout(dp, cfg, ring, ulysses, tp)


def _proposals(layout: Layout, stated: Mapping[str, int], cfg: int, heads: int | None) -> str:
    """At most three overrides, each of which makes the equations hold, in the order of the size of the change."""
    distances: dict[str, float] = {}
    shown: dict[str, str] = {}
    for name in PROPOSED:
        now, nearest = stated.get(name, 1), math.inf
        for value in range(1, min(max(*stated.values(), layout.ranks), MOST_PROPOSED) + 1):
            given, distance = {**stated, name: value}, abs(math.log2(value / now))
            if value != now and distance < nearest and not _violation(_fill(given, cfg, heads), given):
                nearest = distances[name] = distance
                shown[name] = f"parallel.{name}={value}"
    best = sorted(distances, key=distances.__getitem__)[:3]
    return f"take {' or '.join(shown[name] for name in best)}" if best else "more than one of them has to change"


def _data_degree(stated: Mapping[str, int]) -> int:
    """The number of data parallel groups: as given, or the number of ranks divided by the size of a group, or 1."""
    if "dp_size" in stated or not {"num_gpus", "dp_degree"} <= stated.keys():
        return stated.get("dp_size", 1)
    return max(stated["num_gpus"] // stated["dp_degree"], 1)


def _sequence_degree(stated: Mapping[str, int], dp: int, cfg_and_tp: int) -> int:
    """The sequence parallel degree: as given, or ring times Ulysses, or the ranks divided by the other degrees."""
    ring, ulysses = stated.get("ring_degree"), stated.get("ulysses_degree")
    if "sp_degree" in stated:
        return stated["sp_degree"]
    if ring and ulysses:
        return ring * ulysses
    ranks = stated.get("num_gpus", stated.get("dp_degree", 0) * dp)
    return max(ranks // (dp * cfg_and_tp), ring or ulysses or 1)


def _split_sequence(sp: int, ring: int | None, ulysses: int | None, heads: int | None, tp: int) -> tuple[int, int]:
    """(ring, ulysses) with ring * ulysses = sp, as far as the given degrees allow it."""
    if ring is not None:
        return ring, ulysses or max(sp // ring, 1)
    if ulysses is not None:
        return max(sp // ulysses, 1), ulysses
    per_rank = (heads or sp * tp) // tp
    best = math.gcd(sp, per_rank)
    return sp // best, best


def _violation(layout: Layout, stated: Mapping[str, int]) -> str | None:
    """A clause that names the equation that does not hold; None if all hold."""
    values = (
        f"dp_size {layout.dp}, cfg {layout.cfg}, ring_degree {layout.ring}, "
        f"ulysses_degree {layout.ulysses}, tp_size {layout.tp}"
    )
    num_gpus = stated.get("num_gpus", layout.ranks)
    if num_gpus != layout.ranks:
        return f"{EQUATION} does not hold: {values} make {layout.ranks}, num_gpus is {num_gpus}"
    sp = stated.get("sp_degree", layout.ring * layout.ulysses)
    if sp != layout.ring * layout.ulysses:
        return (
            f"sp_degree = ring_degree * ulysses_degree does not hold: "
            f"sp_degree is {sp}, ring_degree {layout.ring}, ulysses_degree {layout.ulysses}"
        )
    per_group = layout.ranks // layout.dp
    if stated.get("dp_degree", per_group) != per_group:
        return (
            f"dp_degree = num_gpus / dp_size does not hold: dp_degree is {stated['dp_degree']}, "
            f"num_gpus {layout.ranks}, dp_size {layout.dp}"
        )
    return None
