"""Classifier-free guidance (Ho and Salimans 2022) around a function that predicts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_gen.engine.denoise import Predict
from sglang_gen.parallel.collectives import Axis, gather

Encoded = Sequence[tuple[Tensor, ...]]  # encoded texts of each branch; that of the prompts is the last
ONE_RANK = Axis("cfg", 1, 0)
MAPS = 32  # widest maps that one evaluation is reckoned to hold at once; eager networks hold 11 to 27


@dataclass(frozen=True)
class Guidance:
    """`uncond + scale * (text - uncond)`; a scale of 1 and below is none.

    `rescale` is how far its deviation is brought back to that of the text alone (Lin et al. 2023, section 3.4). Of the
    steps only those in `steps` are guided; None is all (Kynkäänniemi et al. 2024). `batched` is both branches at once.
    """

    scale: float
    rescale: float = 0.0
    steps: range | None = None
    batched: bool = True

    @property
    def on(self) -> bool:
        return self.scale > 1


def guided(
    prepare: Callable[[Encoded], Predict],
    encoded: Encoded,
    guidance: Guidance,
    numbers: Sequence[int],
    cfg: Axis = ONE_RANK,
) -> Predict:
    """What predicts under guidance. `numbers[i]` is the step that evaluation i belongs to.

    Where a step is not guided the network sees the text alone: half of the rows. On two ranks along `cfg` each computes
    one branch.
    """
    text_alone = encoded[-1:]
    if not guidance.on:
        return prepare(text_alone)
    inside = [guidance.steps is None or number in guidance.steps for number in numbers]
    apart = cfg.size > 1
    text = None if (guidance.batched or apart) and all(inside) else prepare(text_alone)
    if apart:
        pair = _apart(prepare(encoded[cfg.index : cfg.index + 1]), cfg)
    else:
        pair = _together(prepare(encoded)) if guidance.batched else _in_turn(prepare(encoded[:-1]), text)

    def predict(latents: Tensor, index: int) -> Tensor:
        if text is not None and not inside[index]:
            return text(latents, index)
        without, with_text = pair(latents, index)
        prediction = without + guidance.scale * (with_text - without)
        return _rescaled(prediction, with_text, guidance.rescale) if guidance.rescale > 0 else prediction

    return predict


def kinds(guidance: Guidance, numbers: Sequence[int]) -> list[int]:
    """For each evaluation the first that is like it: that belongs to a guided step too, or neither does."""
    inside = [guidance.on and (guidance.steps is None or number in guidance.steps) for number in numbers]
    return [inside.index(kind) for kind in inside]


def _together(both: Predict) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """Both branches in one batch `[2 B, ...]`, without the text first."""

    def pair(latents: Tensor, index: int) -> tuple[Tensor, Tensor]:
        without, with_text = both(torch.cat([latents, latents]), index).chunk(2)
        return without, with_text

    return pair


def _apart(mine: Predict, cfg: Axis) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """This rank's branch, and the other's from its rank."""

    def pair(latents: Tensor, index: int) -> tuple[Tensor, Tensor]:
        without, with_text = gather(mine(latents, index), cfg).wait()
        return without, with_text

    return pair


def _in_turn(without: Predict, text: Predict | None) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """One branch after the other, `[B, ...]` each."""
    assert text is not None
    return lambda latents, index: (without(latents, index), text(latents, index))


def _rescaled(prediction: Tensor, text: Tensor, share: float) -> Tensor:
    deviations = [each.flatten(1).std(dim=1) for each in (text, prediction)]
    ratio = (deviations[0] / deviations[1]).view(-1, *[1] * (text.ndim - 1))
    return share * (prediction * ratio) + (1 - share) * prediction


def free_memory(device: str) -> int | None:
    """Bytes that a GPU can still give, those that torch keeps for itself included; None on the CPU."""
    if device != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def together_fits(free: int | None, rows: int, row_bytes: int) -> bool:
    """Whether a batch fits into the free memory at once; on the CPU (None) it is taken to.

    `rows` is the batch, of both branches where they are computed together, `row_bytes` the widest map of one row.
    """
    return free is None or MAPS * rows * row_bytes <= free
