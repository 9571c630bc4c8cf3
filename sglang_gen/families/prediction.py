"""Turns a network and encoded prompts into a `Predict` function for the sampling loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sglang_gen.engine.denoise import Predict


def joined(encoded: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Concatenate the encoded prompts of several guidance branches into one batch.

    A boolean tensor `[B, T]` is the mask of the text `[B, T, ...]` before it (see `Spec.text_masks`). Both are padded
    to the longest branch: the text with zeros, the mask with False.
    """
    parts = list(zip(*encoded, strict=True))
    masks = [part[0].dtype == torch.bool for part in parts]
    padded = [own or following for own, following in zip(masks, [*masks[1:], False], strict=True)]
    return tuple(torch.cat(_padded(part) if pad else part) for part, pad in zip(parts, padded, strict=True))


def _padded(texts: Sequence[Tensor]) -> list[Tensor]:
    """`[B, T, ...]` of every branch, padded with zeros to the longest T."""
    longest = max(text.shape[1] for text in texts)
    return [F.pad(text, (0, 0) * (text.ndim - 2) + (0, longest - text.shape[1])) for text in texts]


def without_text(encoded: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Zeros in place of encoded prompts. Masks stay, so that as many tokens of zeros are attended to."""
    return tuple(tensor if tensor.dtype == torch.bool else torch.zeros_like(tensor) for tensor in encoded)


@dataclass(frozen=True)
class NetworkSchedule:
    """Denoising networks by name, and the name of the network that computes each timestep.

    A trace of one network leaves the others out, and evaluates only the timesteps of that network.
    """

    networks: Mapping[str, Any]
    names: tuple[str, ...]

    @classmethod
    def of_one(cls, network: Any, timesteps: int) -> "NetworkSchedule":
        """One network that computes every timestep."""
        return cls({"": network}, ("",) * timesteps)


def predictor(schedule: NetworkSchedule, timesteps: Tensor, *conditions: Any) -> Predict:
    """The networks' prediction as a function of latents and index of the timestep.

    `conditions` are arguments of each network's `condition` after its timesteps. A network is conditioned on the
    timesteps that it computes.
    """
    conditioned = {}
    for name, network in schedule.networks.items():
        own = [index for index, other in enumerate(schedule.names) if other == name]
        if own:
            times = timesteps if len(own) == len(timesteps) else timesteps[own]
            conditioned[name] = (network, network.condition(times, *conditions))
    places = [schedule.names[:index].count(name) for index, name in enumerate(schedule.names)]

    def predict(latents: Tensor, index: int) -> Tensor:
        network, conditioning = conditioned[schedule.names[index]]
        prediction: Tensor = network(latents, conditioning, places[index])
        return prediction

    return predict
