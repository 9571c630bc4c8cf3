"""What a family brings for tests, benchmarks and comparisons with diffusers. A run of the command never imports it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from sglang_gen.families.contract import ComponentConfig, Spec

# Our name of each tensor that `encode` returns, in its order, and the names of diffusers' argument (one of them).
EncodedNames = tuple[tuple[str, tuple[str, ...]], ...]
ENCODED_NAMES: EncodedNames = (
    ("text", ("encoder_hidden_states",)),
    ("pooled text", ("pooled_projections", "text_embeds")),
)


@dataclass(frozen=True, kw_only=True)
class NetworkBenchmark:
    """One evaluation of a denoising network: of its own `config`, of a preset's in full size, or of the embedded model.

    `side` is the height and width of what the network sees: latents, or tokens if the family packs latents; None:
    the config's sample_size.
    """

    title: str
    batch: int
    tokens: int  # of the text
    side: int | None = None
    config: ComponentConfig | None = None
    preset: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunBenchmark:
    """A whole generation of a preset with random weights, `side` x `side` pixels."""

    title: str
    preset: str
    side: int
    steps: int
    network: NetworkBenchmark  # the evaluation in which the activations of the random weights are checked
    changes: Mapping[str, ComponentConfig] = field(default_factory=dict)  # to the configs of the preset's components
    target: float | None = None  # seconds of denoising on an H200


class Examples(ABC):
    """Networks of one family, and how diffusers' and our network are called with the same inputs.

    B images, T text tokens; `height` and `width` are rows and columns of what the network sees: of latents, or of
    tokens if the family packs latents.
    """

    tiny: ClassVar[ComponentConfig]  # the denoising network of the family's tiny pipeline
    variants: ClassVar[Mapping[str, ComponentConfig]]  # small networks that differ in what their configs switch on
    timesteps: ClassVar[tuple[float, ...]] = (987.6, 500.0, 7.5)
    size: ClassVar[tuple[int, int]] = (12, 18)  # height and width
    encoded: ClassVar[EncodedNames] = ENCODED_NAMES
    networks: ClassVar[Mapping[str, NetworkBenchmark]] = {}
    runs: ClassVar[Mapping[str, RunBenchmark]] = {}

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @abstractmethod
    def shapes(self, config: ComponentConfig, tokens: int, height: int, width: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the latents and of the encoded texts, without the batch dimension."""

    def further(self, config: ComponentConfig, like: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        """Further tensors of the conditioning, `[B, ...]`, for latents `like`; they follow the encoded texts."""
        return ()

    @abstractmethod
    def conditions(self, given: tuple[Any, ...], height: int, width: int, guidance: float) -> tuple[Any, ...]:
        """Arguments of our network's `condition` after the timesteps; `given`: encoded texts and further tensors."""

    def arguments(
        self,
        config: ComponentConfig,
        latents: Tensor,
        given: tuple[Tensor, ...],
        timestep: Tensor,
        height: int,
        width: int,
        guidance: float,
    ) -> dict[str, Any]:
        """Arguments of diffusers' network for the same evaluation; `timestep` of 0..1000 is `[B]`.

        A family whose network diffusers lacks does not define it.
        """
        raise NotImplementedError(f"diffusers has no network to compare {self.spec.name} with")


def filled(rows: int, value: float, like: Tensor) -> Tensor:
    return torch.full((rows,), value, device=like.device)
