"""What every step cache of the native engine is: a chain of blocks that leaves some out, told of each evaluation.

A generation begins with an empty cache and leaves none behind. Around each evaluation of the network the engine states
which step and which guidance branches it computes. What was decided is read afterwards: by the trace of the run, and by
copies on meta that repeat the evaluation to count its work and its communication.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from sglang_gen.engine.cfg import Encoded, Guidance
from sglang_gen.engine.denoise import Predict
from sglang_gen.models.chain import Block, Chain, State

Conditions = Sequence[tuple[Any, ...]]  # the conditioning of each block
BRANCHES = ("conditional", "unconditional")  # names of the guidance branches, in the order of their numbers


@dataclass(frozen=True)
class Evaluation:
    """One call of the network. Its rows are the images of each branch in turn.

    `index` counts the evaluations of a generation and `step` those of this network, from 0. `branches` are those that
    this rank computes in the call, and `together` those that all ranks compute in it. `sequential` says that the
    branches are computed one after the other, and `guided` that the step has both. A generation has `evaluations`.
    """

    index: int
    step: int
    branches: tuple[int, ...]
    together: tuple[int, ...]
    images: int
    sequential: bool = False
    guided: bool = False
    evaluations: int = 0


@dataclass(frozen=True)
class Decision:
    """What one image and branch did in one step: `computed`, `reused` or `extrapolated`.

    `residual` is the relative change that was compared with `threshold`; None if something else decided.
    """

    step: int
    image: int
    branch: str
    decision: str
    residual: float | None = None
    threshold: float | None = None


class CachedChain(Chain):
    """A chain whose blocks are run by another one, `chain`, which may time or name them."""

    graphs = 1  # that compilation of the whole network needs for each shape

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()
        self.warming = False
        self.evaluation: Evaluation | None = None
        self.decisions: list[Decision] = []  # of the generation that runs or ran last
        self.choice: Hashable = None  # what was decided in the last evaluation, as `repeat` takes it
        self.choices: list[tuple[int, Hashable]] = []  # of the generation, with the index of each evaluation
        self._repeated: list[Hashable] | None = None

    def forward(self, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any) -> State:
        if self._repeated is not None:
            return self.repeated(self._repeated.pop(0), blocks, state, conditions, *shared)
        return self.run(blocks, state, conditions, *shared)

    def run(self, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any) -> State:
        """The state after the evaluation that goes on."""
        if self.evaluation is None:  # outside of a generation nothing is reused
            return self.chain(blocks, state, conditions, *shared)  # type: ignore[no-any-return]
        state = self.evaluated(self.evaluation, blocks, state, conditions, *shared)
        self.choices.append((self.evaluation.index, self.choice))
        return state

    def evaluated(
        self,
        evaluation: Evaluation,
        blocks: Sequence[Block],
        state: State,
        conditions: Conditions,
        *shared: Any,
    ) -> State:
        """The state after all blocks, of which some may be left out."""
        raise NotImplementedError

    def repeated(
        self,
        choice: Hashable,
        blocks: Sequence[Block],
        state: State,
        conditions: Conditions,
        *shared: Any,
    ) -> State:
        """The same blocks and collectives as in the evaluation with this `choice`, on meta."""
        raise NotImplementedError

    def partial_choices(self, images: int, branches: int) -> list[Hashable]:
        """Choices for an evaluation of these, in which blocks see other shapes than where all is computed."""
        return []

    def begin(self, warming: bool = False) -> None:
        """Start a generation with an empty cache. One that warms up compiles what a later one may need."""
        self.warming = warming
        self.decisions, self.choices, self.choice = [], [], None

    def end(self) -> None:
        """Release all tensors."""

    def before(self, evaluation: Evaluation) -> None:
        """Prepare for an evaluation."""
        self.evaluation = evaluation

    def after(self, evaluation: Evaluation) -> None:
        """Take in what an evaluation has computed."""
        self.evaluation = None

    def repeat(self, choices: Sequence[Hashable]) -> None:
        """Let the next evaluations do what those with these choices did, on a copy on meta."""
        self._repeated = list(choices)

    def trace(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The decisions of the last generation; `numbers` are those of the batch's images in the run."""
        return [asdict(each) | {"image": numbers[each.image]} for each in self.decisions]


class PlannedChain(CachedChain):
    """A chain in which the step alone decides what is reused.

    All that differs between steps happens before and after the evaluation. Inside, the chain is either given what an
    earlier evaluation has computed or computes it, so that both can be compiled as a whole and captured.
    """

    graphs = 2  # one that computes everything, one that reuses

    def __init__(self) -> None:
        super().__init__()
        self.added: tuple[Tensor, ...] | None = None  # for the evaluation that follows; None: it computes everything
        self.computed: tuple[Tensor, ...] = ()  # by the last evaluation

    @property
    def form(self) -> Hashable:
        """What distinguishes the graph of the evaluation that follows from others of the same shapes."""
        return self.added is None

    def decide(self, evaluation: Evaluation, how: str, choice: Hashable) -> None:
        """Record what is done in the evaluation that follows, which is the same for all images and branches."""
        self.choice = choice
        self.choices.append((evaluation.index, choice))
        self.decisions += [
            Decision(evaluation.step, image, BRANCHES[branch], how)
            for image in range(evaluation.images)
            for branch in evaluation.together
        ]


@contextmanager
def generation(caches: Sequence[CachedChain], warming: bool = False) -> Iterator[None]:
    """A generation, after which nothing is left in the caches, however it ends."""
    for cache in caches:
        cache.begin(warming)
    try:
        yield
    finally:
        for cache in caches:
            cache.evaluation = None
            cache.end()


def observed(
    prepare: Callable[[Encoded], Predict],
    encoded: Encoded,
    guidance: Guidance,
    steps: Sequence[int],
    networks: Sequence[str],
    caches: Mapping[str, CachedChain],
    over_ranks: bool,
) -> Callable[[Encoded], Predict]:
    """`prepare` for `guided`, whose predictions tell the caches which evaluation they are.

    `steps` and `networks` are the step of each evaluation and the network that computes it; `over_ranks` says that each
    rank computes one branch.
    """
    places = [list(networks[:index]).count(name) for index, name in enumerate(networks)]
    both = tuple(range(len(encoded)))[::-1]
    sequential = guidance.on and not guidance.batched and not over_ranks

    def prepared(texts: Encoded) -> Predict:
        predict = prepare(texts)
        branches = tuple(_branch(encoded, text) for text in texts)

        def evaluate(latents: Tensor, index: int) -> Tensor:
            guided = guidance.on and (guidance.steps is None or steps[index] in guidance.steps)
            together = both if over_ranks and guided else branches
            cache = caches[networks[index]]
            images = len(latents) // len(branches)
            place, last = places[index], places[-1]
            evaluation = Evaluation(index, place, branches, together, images, sequential, guided, last + 1)
            cache.before(evaluation)
            prediction = predict(latents, index)
            cache.after(evaluation)
            return prediction

        return evaluate

    return prepared


def _branch(encoded: Encoded, text: tuple[Tensor, ...]) -> int:
    """Number of the branch that these encoded texts belong to; the conditional one is the last of `encoded`."""
    position = next(index for index, other in enumerate(encoded) if other is text)
    return len(encoded) - 1 - position


def runner(network: Any) -> nn.Module:
    """The module whose attribute `chain` runs the blocks of a network, with or without a step cache."""
    cached: nn.Module = network.chain if isinstance(network.chain, CachedChain) else network
    return cached
