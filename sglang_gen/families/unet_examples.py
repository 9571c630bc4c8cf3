"""Examples of the UNet families: inputs of one evaluation, with pooled text and sizes where the network takes them."""

from typing import Any

from torch import Tensor

from sglang_gen.families.contract import ComponentConfig
from sglang_gen.families.examples_contract import Examples


class UNetExamples(Examples):
    """`given` are the text, and for networks with added embeddings the pooled text and the sizes."""

    timesteps = (981, 500, 7)
    size = (8, 12)

    def shapes(self, config: ComponentConfig, tokens: int, height: int, width: int) -> tuple[tuple[int, ...], ...]:
        shapes = ((config.get("in_channels", 4), height, width), (tokens, config["cross_attention_dim"]))
        if not config.get("addition_embed_type"):
            return shapes
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return (*shapes, (pooled,))

    def further(self, config: ComponentConfig, like: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        """Original size, corner of the crop and target size `[B, 6]`, other ones for each image."""
        if not config.get("addition_embed_type"):
            return ()
        high, wide = 8 * height, 8 * width
        rows = [[high * (row + 1), wide * (row + 1), 4 * row, 8 * row, high, wide] for row in range(len(like))]
        return (like.new_tensor(rows),)

    def conditions(self, given: tuple[Any, ...], height: int, width: int, guidance: float) -> tuple[Any, ...]:
        return given

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
        text, *added = given
        arguments = {"sample": latents, "timestep": timestep[0], "encoder_hidden_states": text}
        if not added:
            return arguments
        return {**arguments, "added_cond_kwargs": dict(zip(("text_embeds", "time_ids"), added, strict=True))}
