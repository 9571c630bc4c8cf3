"""Small networks of a family beside diffusers', with the same inputs: what each of the two computes."""

from typing import Any

import diffusers
import tiny
import torch

from sglang_gen.families import registry


class Reference:
    """The variants of one family's network, and functions that evaluate diffusers' network and ours."""

    def __init__(self, family: str) -> None:
        self.examples = registry.examples(registry.by_name(family))
        self.variants = {name: dict(config) for name, config in self.examples.variants.items()}
        self.timesteps, self.size = torch.tensor(self.examples.timesteps), self.examples.size
        self.kind = getattr(diffusers, self.examples.spec.network_classes[0])

    def network(self, **config: Any) -> Any:
        """diffusers' network with weights that make every part matter."""
        return tiny.fill(self.kind(**config), 5)

    def inputs(self, config: dict, dtype: torch.dtype, batch: int = 3, height: int = 0, width: int = 0) -> tuple:
        """Latents, texts, and further tensors of the conditioning."""
        generator = torch.Generator().manual_seed(0)
        size = (height or self.size[0], width or self.size[1])
        shapes = self.examples.shapes(config, 9, *size)
        latents, *texts = (
            torch.randn((batch, *shape), generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
        )
        return (latents, *texts, *self.examples.further(config, latents, *size))

    def grid(self, latents: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of the latents; packed ones have the size of the examples."""
        return tuple(latents.shape[-2:]) if latents.ndim == 4 else self.size

    @torch.no_grad()
    def theirs(self, network: Any, latents: Any, *given: Any, step: int, guidance: float = 3.5) -> torch.Tensor:
        times = self.timesteps[step].expand(len(latents))
        size = self.grid(latents)
        arguments = self.examples.arguments(network.config, latents, given, times, *size, guidance)
        return network(**arguments, return_dict=False)[0]

    @torch.no_grad()
    def ours(self, network: Any, latents: Any, *given: Any, step: int, guidance: float = 3.5) -> torch.Tensor:
        return network(latents, network.condition(*self.conditions(latents, given, guidance)), step)

    def conditions(self, latents: Any, given: tuple, guidance: float = 3.5) -> tuple:
        """Arguments of our network's `condition`."""
        return (self.timesteps, *self.examples.conditions(given, *self.grid(latents), guidance))
