"""Classifier-free guidance (Ho and Salimans 2022) as a wrapper around a `Predict` function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_gen.engine.denoise import Predict
from sglang_gen.parallel.collectives import Axis, gather

Encoded = Sequence[tuple[Tensor, ...]]  # encoded texts of each guidance branch; the conditional branch is the last
ONE_RANK = Axis("cfg", 1, 0)
MAPS = 32  # estimated peak memory of one evaluation in units of its largest activation; eager networks need 11 to 27


@dataclass(frozen=True)
class Guidance:
    """`uncond + scale * (cond - uncond)`; no guidance at a scale of 1 or below.

    `rescale` mixes in the prediction rescaled to the standard deviation of `cond` (Lin et al. 2023, section 3.4). Only
    steps in `steps` are guided; None means all (Kynkäänniemi et al. 2024). `batched` runs both branches as one batch.
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
    """The guided prediction as a `Predict` function. `numbers[i]` is the step that evaluation i belongs to.

    In unguided steps the network evaluates only the conditional branch. On two ranks along `cfg` each evaluates one
    branch.
    """
    conditional = encoded[-1:]
    if not guidance.on:
        return prepare(conditional)
    inside = [guidance.steps is None or number in guidance.steps for number in numbers]
    cfg_parallel = cfg.size > 1
    text = None if (guidance.batched or cfg_parallel) and all(inside) else prepare(conditional)
    if cfg_parallel:
        pair = _on_two_ranks(prepare(encoded[cfg.index : cfg.index + 1]), cfg)
    else:
        pair = _batched(prepare(encoded)) if guidance.batched else _sequential(prepare(encoded[:-1]), text)

    def predict(latents: Tensor, index: int) -> Tensor:
        if text is not None and not inside[index]:
            return text(latents, index)
        without, with_text = pair(latents, index)
        prediction = without + guidance.scale * (with_text - without)
        return _rescaled(prediction, with_text, guidance.rescale) if guidance.rescale > 0 else prediction

    return predict


def kinds(guidance: Guidance, numbers: Sequence[int], networks: Sequence[str] = ()) -> list[int]:
    """For each evaluation the index of the first one of its kind: guided or unguided, and by the same network.

    `networks` names the network of each evaluation, if there are several.
    """
    inside = [guidance.on and (guidance.steps is None or number in guidance.steps) for number in numbers]
    found = list(zip(inside, networks or [""] * len(inside), strict=True))
    return [found.index(kind) for kind in found]


def _batched(both: Predict) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """Both branches as one batch `[2 B, ...]`, the unconditional branch first."""

    def pair(latents: Tensor, index: int) -> tuple[Tensor, Tensor]:
        without, with_text = both(torch.cat([latents, latents]), index).chunk(2)
        return without, with_text

    return pair


def _on_two_ranks(mine: Predict, cfg: Axis) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """Evaluate this rank's branch and gather both."""

    def pair(latents: Tensor, index: int) -> tuple[Tensor, Tensor]:
        without, with_text = gather(mine(latents, index), cfg).wait()
        return without, with_text

    return pair


def _sequential(without: Predict, text: Predict | None) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """Evaluate one branch after the other, `[B, ...]` each."""
    assert text is not None
    return lambda latents, index: (without(latents, index), text(latents, index))


def _rescaled(prediction: Tensor, text: Tensor, rescale: float) -> Tensor:
    deviations = [x.flatten(1).std(dim=1) for x in (text, prediction)]
    ratio = (deviations[0] / deviations[1]).view(-1, *[1] * (text.ndim - 1))
    return rescale * (prediction * ratio) + (1 - rescale) * prediction


def free_memory(device: str) -> int | None:
    """Free bytes of the GPU, including memory that torch has reserved but not allocated; None on the CPU."""
    if device != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def batch_fits(free: int | None, rows: int, row_bytes: int) -> bool:
    """Whether one evaluation of `rows` samples fits into `free` bytes; always True on the CPU (None).

    `rows` counts both branches if they run as one batch; `row_bytes` is the largest activation of one sample.
    """
    return free is None or MAPS * rows * row_bytes <= free
