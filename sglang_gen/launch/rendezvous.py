"""Where the ranks that torchrun started meet: a store that holds the plan of rank 0 and how the run ended."""

import json
import pickle
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sglang_gen.env import Torchrun
from sglang_gen.errors import LostError, RunError, first_line
from sglang_gen.types import Plan

POLL = 0.05  # seconds between two looks; a look that waits would be deaf to signals
CONNECT = timedelta(minutes=5)


@dataclass(frozen=True)
class End:
    """How the run ended for everybody: the exit code, and after a failure its sentence and whose it is."""

    code: int
    sentence: str = ""
    rank: int = 0
    node: int = 0


class Meeting:
    """The store as one rank sees it. Every method raises LostError where the store is gone."""

    def __init__(self, place: Torchrun, store: Any) -> None:
        self.place, self.store = place, store

    @classmethod
    def join(cls, place: Torchrun) -> "Meeting":
        """Connect to the store that the environment names. Raises RunError where nobody answers."""
        try:
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=CONNECT)))  # type: ignore[attr-defined]
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"Rank {place.rank} does not reach the other ranks at MASTER_ADDR and MASTER_PORT: {first_line(error)}"
            ) from error
        return cls(place, dist.PrefixStore(f"sglang-gen/{place.attempt}", store))  # type: ignore[attr-defined]

    def again(self) -> "Meeting":
        """The same by a connection of its own, for another thread."""
        return Meeting(self.place, self.store.clone())

    def _ask(self, method: str, *words: Any) -> Any:
        try:
            return getattr(self.store, method)(*words)
        except RuntimeError as error:
            raise LostError(f"Rank {self.place.rank} lost the connection to torchrun") from error

    def post(self, plan: Plan) -> None:
        """Rank 0 gives the others the plan."""
        self._ask("set", "plan", pickle.dumps(plan))

    def plan(self) -> Plan | None:
        """None where rank 0 has not posted it yet."""
        if not self._ask("check", ["plan"]):
            return None
        plan: Plan = pickle.loads(self._ask("get", "plan"))
        return plan

    def end(self, end: End) -> End:
        """End the run for everybody; the end that counts, which is the first one said."""
        said = self._ask("compare_set", "end", "", json.dumps(asdict(end)))
        return End(**json.loads(said))

    def is_first(self, text: str) -> bool:
        """Whether no other rank has come with this text before."""
        mine = str(self.place.rank)
        return str(self._ask("compare_set", f"said {text}", "", mine).decode()) == mine

    def ended(self) -> End | None:
        return End(**json.loads(self._ask("get", "end"))) if self._ask("check", ["end"]) else None

    def gather(self, name: str, seconds: float = float("inf")) -> None:
        """Wait, at most `seconds`, until every rank has come to the point `name`; each may first take its time."""
        until = time.monotonic() + seconds
        self._ask("add", name, 1)
        while self._ask("add", name, 0) < self.place.ranks and time.monotonic() < until:
            time.sleep(POLL)
