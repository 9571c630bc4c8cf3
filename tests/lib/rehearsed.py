"""Networks of any layout without ranks: rehearsed on the meta device, as each rank would have them."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from sglang_gen.config.schema import Run
from sglang_gen.dry_run.traces import NetworkTrace, trace_network
from sglang_gen.engine.cfg import Guidance
from sglang_gen.families import registry
from sglang_gen.families.contract import Request
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.types import Component, Layout, ModelCard, Size

FAMILIES = {spec.name: registry.pipeline(spec) for spec in registry.specs()}
FACTOR = 8  # pixels a side of one latent
SHALLOW = {
    "num_layers": 1, "num_single_layers": 1, "dual_attention_layers": (0,), "layers_per_block": 1,
    "transformer_layers_per_block": 1,
}  # fmt: skip


def shallow(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same layers less often."""
    return {**config, **{key: value for key, value in SHALLOW.items() if key in config}}


def card_of(pipeline: str, config: Mapping[str, Any], encoders: Mapping[str, Any] | None = None) -> ModelCard:
    """A model with this network; of its text encoders only their lengths and widths matter."""
    parts = {"text_encoder": {}, "text_encoder_2": {"projection_dim": 8}, **(encoders or {}),
             FAMILIES[pipeline].spec.network: config}  # fmt: skip
    return ModelCard("a model", None, "", {name: Component("", "", None, part) for name, part in parts.items()})


def rank(
    pipeline: str, card: ModelCard, layout: Layout, number: int, height: int, width: int, scale: float = 1.0,
    dtype: torch.dtype = torch.float32, rows: int = 1, text_length: int | None = None, fused: bool = False,
    attention: str = "auto",
) -> NetworkTrace:  # fmt: skip
    """One rank's step for pictures of so many pixels."""
    run = Run()
    run.compile.enable_torch_compile, run.attention.backend = fused, attention
    name = str(dtype).removeprefix("torch.")
    plan: Any = SimpleNamespace(
        pipeline_class=FAMILIES[pipeline].spec.pipeline_class,
        card=card,
        dtype=name,
        run=run,
        device="cpu",
        matmul="torch",
    )
    request = Request(Size(height, width), FACTOR, steps=2, guidance=3.5, text_length=text_length)
    return trace_network(plan, Mesh(layout, number), request, rows, Guidance(scale))


def runs(pipeline: str, card: ModelCard, layout: Layout, height: int, width: int) -> bool:
    """Whether every rank of the layout has a part that fits."""
    for number in range(layout.ranks):
        try:
            rank(pipeline, card, layout, number, height, width, text_length=16)
        except (AssertionError, RuntimeError):
            return False
    return True
