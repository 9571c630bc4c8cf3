"""The works to benchmark: one evaluation of a denoising network, with random weights or those of the embedded model."""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor

from sglang_gen import env
from sglang_gen.engine.meta_trace import Shapes, trace_on_meta
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.weights.load import load

TIME = 500.0  # timestep, of 1000


@dataclass(frozen=True)
class Work:
    """A network in diffusers and in the native engine, and the inputs of one evaluation: latents, text, pooled text."""

    title: str
    kind: Any  # the class in diffusers
    family: str  # package in sglang_gen/families
    config: Mapping[str, Any]
    batch: int
    tokens: int  # text tokens
    size: int  # height and width in latents; for FLUX in packed tokens
    weights: Path | None = None  # folder; None for random weights

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        c = self.config
        flux = self.kind is FluxTransformer2DModel
        latents = (self.size**2, c["in_channels"]) if flux else (c["in_channels"], self.size, self.size)
        width = c.get("joint_attention_dim") or c["cross_attention_dim"]
        pooled = c.get("pooled_projection_dim") or c["projection_class_embeddings_input_dim"] - 6 * 256
        return draw(self.batch, *latents), draw(self.batch, self.tokens, width), draw(self.batch, pooled)


DIT = Work(
    "FLUX-shaped DiT, 285 M, 1024 + 128 tokens", FluxTransformer2DModel, "flux",
    {
        "patch_size": 1, "in_channels": 64, "num_layers": 4, "num_single_layers": 8, "attention_head_dim": 128,
        "num_attention_heads": 8, "joint_attention_dim": 1024, "pooled_projection_dim": 768, "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    batch=1, tokens=128, size=32,
)  # fmt: skip
UNET = Work(
    "SDXL-shaped UNet, 64 x 64 latents, batch 2", UNet2DConditionModel, "sdxl",
    {
        "sample_size": 64, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (128, 256, 512), "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 6),
        "attention_head_dim": (2, 4, 8), "cross_attention_dim": 1024, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 6 * 256 + 768,
        "use_linear_projection": True,
    },
    batch=2, tokens=77, size=64,
)  # fmt: skip


def landscape() -> Work:
    folder = env.embedded_model() / "transformer"
    config = json.loads((folder / "config.json").read_text())
    return Work("landscape, batch 2", SD3Transformer2DModel, "sd3", config, 2, 109, config["sample_size"], folder)


def published(title: str, preset: str, kind: Any, family: str, batch: int, tokens: int, size: int) -> Work:
    """A preset's network in full size, with random weights."""
    name = "unet" if kind is UNet2DConditionModel else "transformer"
    config = json.loads((env.preset_configs(preset) / name / "config.json").read_text())
    return Work(title, kind, family, config, batch, tokens, size)


WORKS: Mapping[str, Callable[[], Work]] = {
    "landscape": landscape,
    "unet": lambda: UNET,
    "dit": lambda: DIT,
    "sdxl": lambda: published("SDXL, 1024 x 1024, batch 2", "sdxl", UNet2DConditionModel, "sdxl", 2, 77, 128),
    "flux_dev": lambda: published("FLUX.1 dev, 1024 x 1024", "flux_dev", FluxTransformer2DModel, "flux", 1, 512, 64),
}


def stored(work: Work, folder: Path) -> Path:
    """The folder of the work's checkpoint; random weights are drawn and saved to `folder` in bfloat16."""
    if work.weights is not None:
        return work.weights
    torch.manual_seed(0)
    work.kind(**work.config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def theirs(work: Work, folder: Path, dtype: torch.dtype, device: str) -> tuple[Any, dict[str, Any]]:
    """diffusers' network and the arguments of its call."""
    return their_network(work, folder, dtype).to(device), their_arguments(work, dtype, device)


def their_network(work: Work, folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' network on the CPU."""
    return work.kind.from_pretrained(folder, torch_dtype=dtype).eval()


def their_arguments(work: Work, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The arguments of a call of diffusers' network."""
    latents, text, pooled = work.inputs(dtype, device)
    time = torch.full((work.batch,), TIME, device=device)
    if work.kind is UNet2DConditionModel:
        sizes = torch.tensor([[8.0 * work.size, 8 * work.size, 0, 0, 8 * work.size, 8 * work.size]] * work.batch)
        added = {"text_embeds": pooled, "time_ids": sizes.to(device, dtype)}
        return {
            "sample": latents,
            "timestep": time[0],
            "encoder_hidden_states": text,
            "added_cond_kwargs": added,
        }
    arguments = {"hidden_states": latents, "encoder_hidden_states": text, "pooled_projections": pooled}
    if work.kind is not FluxTransformer2DModel:
        return {**arguments, "timestep": time}
    grid = torch.zeros(work.size, work.size, 3)
    grid[..., 1], grid[..., 2] = torch.arange(work.size)[:, None], torch.arange(work.size)
    return {
        **arguments,
        "timestep": time.to(dtype) / 1000,
        "guidance": torch.full((work.batch,), 3.5, device=device),
        "img_ids": grid.view(-1, 3).to(device, dtype),
        "txt_ids": torch.zeros(work.tokens, 3, device=device, dtype=dtype),
    }


@torch.no_grad()
def check_activations(work: Work, network: Any, arguments: Mapping[str, Any]) -> None:
    """Assert that the output of every block is finite and of order one, as in a trained network.

    `network` is diffusers' network, `arguments` are the arguments of its call.
    """
    sizes: dict[str, float] = {}

    def note(name: str, output: Any) -> None:
        for number, tensor in enumerate(output if isinstance(output, tuple) else (output,)):
            if isinstance(tensor, Tensor):
                sizes[f"{name}[{number}]"] = tensor.float().square().mean().sqrt().item()

    hooks = []
    lists = [(name, module) for name, module in network.named_modules() if isinstance(module, torch.nn.ModuleList)]
    for name, blocks in lists:
        for number, block in enumerate(blocks):
            hooks.append(block.register_forward_hook(lambda _m, _given, out, at=f"{name}.{number}": note(at, out)))
    network(**arguments, return_dict=False)
    for hook in hooks:
        hook.remove()
    assert sizes, f"{work.title} has no blocks"
    odd = {name: size for name, size in sizes.items() if not 0.01 < size < 100}  # includes NaN
    assert not odd, f"{work.title}: root mean squares far from one: {odd}"


def ours(work: Work, folder: Path, dtype: torch.dtype, device: str) -> tuple[Any, Callable[[Any], Any], Tensor]:
    """Our network, a function for its conditioning, and the latents."""
    family = importlib.import_module(f"sglang_gen.families.{work.family}.pipeline")
    network: Any = load(lambda: family.build(work.config), in_folder(folder), family.sources, dtype, device)
    latents, text, pooled = work.inputs(dtype, device)
    return network, partial(conditioning, work, text, pooled), latents


def outline(work: Work, dtype: torch.dtype) -> Any:
    """Our network on the meta device."""
    family = importlib.import_module(f"sglang_gen.families.{work.family}.pipeline")
    with torch.device("meta"):
        return family.build(work.config).to(dtype)


def conditioning(work: Work, text: Tensor, pooled: Tensor, network: Any, meta: bool = False) -> Any:
    """The conditioning of one step, for a network or (with `meta`) for its copy on the meta device."""
    on = "meta" if meta else text.device
    states, vector, times = text.to(on), pooled.to(on), torch.tensor([TIME])
    if work.family == "flux":
        return network.condition(times.to(text.dtype), states, vector, 3500.0, work.size, work.size)
    if work.family == "sd3":
        return network.condition(times, states, vector, work.size, work.size)
    side = 8 * work.size
    sizes = states.new_tensor([side, side, 0, 0, side, side]).expand(len(text), -1)
    return network.condition(times, states, vector, sizes)


def whole(work: Work) -> Split:
    """The layout of a single rank, which has the whole network."""
    family: Any = importlib.import_module(f"sglang_gen.families.{work.family}.pipeline")
    return Split(Mesh(), family.TENSOR, family.SHARDING)


def traced_on_meta(work: Work, regions: tuple[type, ...], network: Any, evaluate: Callable[[Any], Any]) -> Shapes:
    """Trace `evaluate` on a copy of the network on the meta device."""
    meta_copy = whole(work).meta_copy(lambda: type(network)(network.config), next(network.parameters()).dtype)
    return trace_on_meta(meta_copy, regions, evaluate)
