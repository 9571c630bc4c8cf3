"""Rendezvous of ranks started by torchrun: a store that holds rank 0's plan and the outcome of the run."""

import json
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sglang_gen.env import Torchrun
from sglang_gen.errors import LostError, RunError
from sglang_gen.launch import plan_json
from sglang_gen.types import Plan

POLL = 0.05  # seconds between polls; a blocking wait would not react to signals
CONNECT = timedelta(minutes=5)


@dataclass(frozen=True)
class End:
    """Outcome of the run for all ranks: the exit code, and after a failure its sentence, rank and machine."""

    code: int
    sentence: str = ""
    rank: int = 0
    node: int = 0


class Rendezvous:
    """One rank's access to the store. Every method raises LostError if the store cannot be reached."""

    def __init__(self, place: Torchrun, store: Any) -> None:
        self.place, self.store = place, store

    @classmethod
    def join(cls, place: Torchrun) -> "Rendezvous":
        """Connect to the store given by the environment. Raises RunError if it does not answer."""
        try:
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=CONNECT)))  # type: ignore[attr-defined]
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"Rank {place.rank} cannot reach the other ranks: another program has MASTER_PORT, or nothing "
                "answers at MASTER_ADDR"
            ) from error
        return cls(place, dist.PrefixStore(f"sglang-gen/{place.attempt}", store))  # type: ignore[attr-defined]

    def again(self) -> "Rendezvous":
        """A copy with its own connection to the store, for another thread."""
        return Rendezvous(self.place, self.store.clone())

    def _ask(self, method: str, *words: Any) -> Any:
        try:
            return getattr(self.store, method)(*words)
        except RuntimeError as error:
            raise LostError(f"Rank {self.place.rank} lost the connection to torchrun") from error

    def post(self, plan: Plan) -> None:
        """Send rank 0's plan to the other ranks."""
        self._ask("set", "plan", plan_json.encode(plan))

    def plan(self) -> Plan | None:
        """The plan of rank 0; None if it is not posted yet. Raises ValueError for a text that is not a plan."""
        if not self._ask("check", ["plan"]):
            return None
        return plan_json.decode(self._ask("get", "plan"))

    def end(self, end: End) -> End:
        """End the run for all ranks. Returns the outcome that was posted first, which is the one that counts."""
        said = self._ask("compare_set", "end", "", json.dumps(asdict(end)))
        return End(**json.loads(said))

    def is_first(self, text: str) -> bool:
        """Whether this rank is the first one to log this text."""
        mine = str(self.place.rank)
        return str(self._ask("compare_set", f"said {text}", "", mine).decode()) == mine

    def ended(self) -> End | None:
        return End(**json.loads(self._ask("get", "end"))) if self._ask("check", ["end"]) else None

    def gather(self, name: str, seconds: float = float("inf")) -> None:
        """A barrier: wait, at most `seconds`, until every rank has reached the point `name`."""
        until = time.monotonic() + seconds
        self._ask("add", name, 1)
        while self._ask("add", name, 0) < self.place.ranks and time.monotonic() < until:
            time.sleep(POLL)
