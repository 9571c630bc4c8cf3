"""A small chain with a step cache: in one process and on ranks."""

import torch
from torch import Tensor

from sglang_gen.engine.caching.block_cache import BlockCache, Ranks
from sglang_gen.engine.caching.cached_chain import Evaluation, generation
from sglang_gen.engine.caching.decider import Rules
from sglang_gen.errors import LostError, RunError
from sglang_gen.parallel.mesh import SEQUENCE, Mesh

TOKENS = 7


def block(scale: float):
    """A block that depends on the image, the text and its own condition."""

    def compute(x: Tensor, text: Tensor, condition: Tensor, _shared: tuple) -> tuple[Tensor, Tensor]:
        return x + scale * torch.tanh(x * condition + text.mean(dim=1, keepdim=True)), text * (1 + scale)

    return compute


BLOCKS = [block(scale) for scale in (0.1, 0.4, 0.2, 0.3)]


def conditions(x: Tensor) -> list[tuple[Tensor, ...]]:
    """Each block's condition, a row per sample."""
    return [(torch.full((len(x), 1, 1), 1.0 + 0.1 * index),) for index in range(len(BLOCKS))]


def spread(mesh: Mesh) -> Ranks:
    return Ranks(mesh.axis(SEQUENCE), mesh.axis("cfg"), mesh.axis("tp"))


def evaluate(cache: BlockCache, evaluation: Evaluation, x: Tensor) -> None:
    cache.evaluation = evaluation
    cache(BLOCKS, (x, torch.ones(len(x), 2, 4)), conditions(x), ())


def images(step: int, tokens: int = TOKENS, branch: int = 0) -> Tensor:
    """The image stream of one sample `[1, L, 4]`; its tokens change unequally from step to step."""
    start = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(3))[branch : branch + 1]
    return start * (1 + 0.1 * step * torch.linspace(0, 1, tokens)[:, None])


def decide_differently(mesh: Mesh) -> str:
    """The error of a rank if the last rank has another threshold."""
    threshold = 0.0 if mesh.rank == mesh.layout.ranks - 1 else 0.9
    cache = BlockCache(Rules(threshold), 1, ranks=spread(mesh))
    if threshold == 0.0:  # it compares as the others do, and decides otherwise
        cache.rules = Rules(1e-9)
    together = (1, 0) if mesh.size("cfg") > 1 else (0,)
    mine = (together[mesh.index("cfg")],)
    try:
        with generation([cache]):
            for step in range(2):
                evaluate(cache, Evaluation(step, step, mine, together, 1), images(step))
    except (RunError, LostError) as error:
        return str(error)
    return ""


def changes_of(tokens: int, branches: int) -> list[float]:
    """The relative change of the first block's residual, of all tokens and branches."""
    cache = BlockCache(Rules(0.9), 1)
    rows = tuple(range(branches))[::-1]
    with generation([cache]):
        for step in range(3):
            x = torch.cat([images(step, tokens, branch) for branch in rows])
            evaluate(cache, Evaluation(step, step, rows, rows, 1), x)
    return [each.residual for each in cache.decisions if each.branch == "conditional" and each.residual is not None]


def changes_on_ranks(mesh: Mesh) -> list[float]:
    """The same, with the tokens and branches spread over the ranks."""
    axis = mesh.axis(SEQUENCE)
    parts = [part.tolist() for part in torch.arange(TOKENS).tensor_split(axis.size)]
    together = tuple(range(mesh.size("cfg")))[::-1]
    mine = together[mesh.index("cfg")]
    cache = BlockCache(Rules(0.9), 1, ranks=spread(mesh))
    with generation([cache]):
        for step in range(3):
            x = images(step, TOKENS, mine)[:, parts[axis.index]]
            evaluate(cache, Evaluation(step, step, (mine,), together, 1), x)
    return [each.residual for each in cache.decisions[:: len(together)] if each.residual is not None]
