"""Sizes in a component's configuration that no network can have, found before a library builds it.

A network of a billion layers does not fail: it is being built until memory runs out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError

WIDTH, LAYERS = (1, 10**6), (0, 10**4)
SIZE_LIMITS: Mapping[str, tuple[int, int]] = {
    "in_channels": WIDTH, "out_channels": WIDTH, "latent_channels": WIDTH, "block_out_channels": WIDTH,
    "hidden_size": WIDTH, "intermediate_size": WIDTH, "d_model": WIDTH, "d_ff": WIDTH, "num_attention_heads": WIDTH,
    "num_heads": WIDTH, "attention_head_dim": WIDTH, "cross_attention_dim": WIDTH, "joint_attention_dim": WIDTH,
    "norm_num_groups": WIDTH, "patch_size": WIDTH, "vocab_size": (1, 10**8), "num_layers": LAYERS,
    "num_single_layers": LAYERS, "num_hidden_layers": LAYERS, "layers_per_block": LAYERS,
    "transformer_layers_per_block": LAYERS,
}  # fmt: skip


def check_sizes(path: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError for a size that is no number, or outside of what a network can have."""
    for key, (least, most) in SIZE_LIMITS.items():
        if config.get(key) == []:
            raise UserError(f"{path}: {key} is an empty list; it must be an integer or a list of integers")
        for value in _leaves(config.get(key)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise UserError(f"{path}: {key} is {str(value)[:40]!r}; it must be an integer or a list of integers")
            if not least <= value <= most:
                raise UserError(f"{path}: {key} is {value}; it must be between {least} and {most}")


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [] if value is None else [value]
