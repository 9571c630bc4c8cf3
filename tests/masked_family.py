"""A family whose texts have their own lengths: FLUX's text encoder, latents and decoding, the network of `masked`."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import masked
import whole
from torch import Tensor

from sglang_gen.engine.denoise import Predict
from sglang_gen.families import prediction, registry, text_encoding
from sglang_gen.families.contract import CLASSIFIER_FREE, ComponentConfig, Request, Spec
from sglang_gen.families.flux.pipeline import FluxPipeline
from sglang_gen.families.pipeline_contract import Pipeline
from sglang_gen.models.layers import WHOLE
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.types import Plan

NAME = "flux"
SETTINGS: Mapping[str, Any] = {"text_masks": (1,), "guidance": CLASSIFIER_FREE}  # what differs from FLUX's spec


class MaskedPipeline(FluxPipeline):
    """Texts are padded to the longest of their batch."""

    tensor_parallel = masked.TENSOR
    sharding = masked.SHARDING
    regions = (masked.Block,)

    def build(self, diffusers_config: ComponentConfig) -> masked.Masked:
        heads = diffusers_config["num_attention_heads"]
        return masked.Masked(masked.Config(
            channels=diffusers_config["in_channels"], text_width=diffusers_config["joint_attention_dim"], heads=heads,
            width=heads * diffusers_config["attention_head_dim"], layers=diffusers_config["num_layers"],
        ))  # fmt: skip

    def sources(self, name: str) -> Mapping[str, str]:
        return {name: WHOLE}

    def encode(
        self, components: Mapping[str, Any], diffusers_config: ComponentConfig, texts: list[str], length: int | None
    ) -> tuple[Tensor, ...]:
        encoder, tokenizer, texts = text_encoding.encoder_inputs(components, "_2", texts)
        given = tokenizer(texts, padding="longest", max_length=self.spec.tokens(length), truncation=True,
                          return_tensors="pt")  # fmt: skip
        states = encoder(given.input_ids, attention_mask=given.attention_mask)[0]
        return states, given.attention_mask.bool()

    def encoded_shapes(self, configs: Mapping[str, ComponentConfig], length: int | None) -> tuple[tuple[int, ...], ...]:
        tokens = self.spec.tokens(length)
        return (tokens, configs[self.spec.network]["joint_attention_dim"]), (tokens,)

    def prepare(
        self,
        networks: prediction.NetworkSchedule,
        timesteps: Tensor,
        request: Request,
        encoded: Sequence[tuple[Tensor, ...]],
    ) -> Predict:
        return prediction.predictor(networks, timesteps, *prediction.joined(encoded))


@contextmanager
def registered() -> Iterator[None]:
    """The family in the place of FLUX."""
    specs = tuple(replace(spec, **SETTINGS) if spec.name == NAME else spec for spec in registry.specs())
    original = registry.pipeline

    def pipeline(spec: Spec) -> Pipeline:
        return MaskedPipeline(spec) if spec.name == NAME else original(spec)

    with patch.object(registry, "specs", lambda: specs), patch.object(registry, "pipeline", pipeline):
        yield


def generated(mesh: Mesh, planned: Plan) -> whole.Happened:
    """Carry out the plan on this rank."""
    with registered():
        return whole.generated(mesh, planned)


def store(flux: Path, folder: Path) -> Path:
    """A copy of FLUX's tiny pipeline with the weights of this network."""
    shutil.copytree(flux, folder)
    shutil.rmtree(folder / "transformer")
    config = json.loads((flux / "transformer" / "config.json").read_text())
    masked.store(folder / "transformer", MaskedPipeline(registry.by_name(NAME)).build(config))
    shutil.copy(flux / "transformer" / "config.json", folder / "transformer")
    return folder
