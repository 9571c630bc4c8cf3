"""Tiny pipelines as their authors would have saved them: the whole model in one safetensors file."""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import save_file

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
TOP = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in":
       "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
       "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
OPEN_CLIP = {"text_model.encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
             ".fc1.": ".c_fc.", ".fc2.": ".c_proj.", ".self_attn.": ".attn.", "text_model.final_layer_norm": "ln_final",
             "text_model.embeddings.token_embedding": "token_embedding",
             "text_model.embeddings.position_embedding.weight": "positional_embedding"}  # fmt: skip


def unet_name(name: str, layers: int, levels: int) -> str:
    """The name that a UNet weight has in the layout of the first latent diffusion code."""
    for new, old in TOP.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    side, _, rest = name.partition(".")
    if side == "mid_block":
        kind, index, inner = rest.split(".", 2)
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
    else:
        level, kind, index, inner = rest.split(".", 3)
        per_level = layers + 1
        if side == "down_blocks":
            block = 1 + int(level) * per_level + (layers if kind == "downsamplers" else int(index))
            place = f"input_blocks.{block}.{1 if kind == 'attentions' else 0}"
            inner = inner.replace("conv.", "op.") if kind == "downsamplers" else inner
        else:
            last = kind == "upsamplers"
            block = int(level) * per_level + (layers if last else int(index))
            where = 1 + has_attention[int(level)] if last else int(kind == "attentions")
            place = f"output_blocks.{block}.{where}"
    if kind == "resnets":
        part, _, end = inner.partition(".")
        inner = f"{RESNET[part]}.{end}"
    return f"{place}.{inner}"


has_attention = (True, False)  # of the up blocks of the tiny UNets


def vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
        return name.replace("to_out.0", "proj_out").replace("to_", "")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda found: f"up.{levels - 1 - int(found[1])}.block.", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", name)


def vae(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    levels, found = len(module.config.block_out_channels), {}
    for name, weight in module.state_dict().items():
        old = vae_name(name, levels)
        is_projection = ".attn_1." in old and old.endswith("weight") and weight.dim() == 2
        found[f"first_stage_model.{old}"] = weight[:, :, None, None] if is_projection else weight
    return found


def clip(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights under their names with `text_model.`, whichever way this version of transformers spells them."""
    weights = module.state_dict()
    return {name if name.startswith("text_") else f"text_model.{name}": weight for name, weight in weights.items()}


def open_clip(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, weight in clip(module).items():
        if name == "text_projection.weight":
            found["text_projection"] = weight.T
            continue
        for new, old in OPEN_CLIP.items():
            name = name.replace(new, old)
        found[name] = weight
    for name in [name for name in found if ".q_proj." in name]:
        end = name.rpartition(".")[2]
        parts = [found.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        found[name.replace(f".q_proj.{end}", f".in_proj_{end}")] = torch.cat(parts)
    return found


class Renamed:
    """Weights under other names: `put` joins weights and biases of modules, row after row."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights, self.found = weights, {}

    def put(self, theirs: str, *ours: str, swap: bool = False) -> None:
        for end in (".weight", ".bias"):
            if all(f"{name}{end}" in self.weights for name in ours):
                parts = [self.weights[f"{name}{end}"] for name in ours]
                self.found[f"{theirs}{end}"] = torch.cat(parts[0].chunk(2)[::-1] if swap else parts)


def original_sd3(weights: dict[str, torch.Tensor], layers: int = 3) -> dict[str, torch.Tensor]:
    """SD3 weights in the names of the original project; scale and shift of the last norms are the other way round."""
    new = Renamed(weights)
    new.found["pos_embed"] = weights["pos_embed.pos_embed"]
    new.put("x_embedder.proj", "pos_embed.proj")
    new.put("context_embedder", "context_embedder")
    for theirs, ours in (("t_embedder", "timestep"), ("y_embedder", "text")):
        for index, part in ((0, "linear_1"), (2, "linear_2")):
            new.put(f"{theirs}.mlp.{index}", f"time_text_embed.{ours}_embedder.{part}")
    for i in range(layers):
        here, last = f"transformer_blocks.{i}", i == layers - 1
        for side, qkv, out, norms, ff, norm in (
            ("x_block", "to_{}", "to_out.0", "norm_{}", "ff", "norm1"),
            ("context_block", "add_{}_proj", "to_add_out", "norm_added_{}", "ff_context", "norm1_context"),
        ):
            there = f"joint_blocks.{i}.{side}"
            new.put(f"{there}.attn.qkv", *(f"{here}.attn.{qkv.format(part)}" for part in "qkv"))
            new.put(f"{there}.attn.proj", f"{here}.attn.{out}")
            for part in "qk":
                new.put(f"{there}.attn.ln_{part}", f"{here}.attn.{norms.format(part)}")
            new.put(f"{there}.mlp.fc1", f"{here}.{ff}.net.0.proj")
            new.put(f"{there}.mlp.fc2", f"{here}.{ff}.net.2")
            new.put(f"{there}.adaLN_modulation.1", f"{here}.{norm}.linear", swap=last and side == "context_block")
        new.put(f"joint_blocks.{i}.x_block.attn2.qkv", *(f"{here}.attn2.to_{part}" for part in "qkv"))
        new.put(f"joint_blocks.{i}.x_block.attn2.proj", f"{here}.attn2.to_out.0")
        for part in "qk":
            new.put(f"joint_blocks.{i}.x_block.attn2.ln_{part}", f"{here}.attn2.norm_{part}")
    new.put("final_layer.linear", "proj_out")
    new.put("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    return new.found


def original_flux(weights: dict[str, torch.Tensor], double: int, single: int) -> dict[str, torch.Tensor]:
    """FLUX weights in the names of the original project."""
    new = Renamed(weights)
    new.put("img_in", "x_embedder")
    new.put("txt_in", "context_embedder")
    for theirs, ours in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        new.put(f"{theirs}.in_layer", f"time_text_embed.{ours}_embedder.linear_1")
        new.put(f"{theirs}.out_layer", f"time_text_embed.{ours}_embedder.linear_2")
    norms = {}
    for i in range(double):
        here = f"transformer_blocks.{i}"
        for side, qkv, out, norm, end in (
            ("img", "to_{}", "to_out.0", "norm_{}", ""),
            ("txt", "add_{}_proj", "to_add_out", "norm_added_{}", "_context"),
        ):
            there = f"double_blocks.{i}.{side}"
            new.put(f"{there}_mod.lin", f"{here}.norm1{end}.linear")
            new.put(f"{there}_attn.qkv", *(f"{here}.attn.{qkv.format(part)}" for part in "qkv"))
            new.put(f"{there}_attn.proj", f"{here}.attn.{out}")
            new.put(f"{there}_mlp.0", f"{here}.ff{end}.net.0.proj")
            new.put(f"{there}_mlp.2", f"{here}.ff{end}.net.2")
            norms |= {f"{there}_attn.norm.{word}_norm": f"{here}.attn.{norm.format(word[0])}" for word in WORDS}
    for i in range(single):
        there, here = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        new.put(f"{there}.modulation.lin", f"{here}.norm.linear")
        new.put(f"{there}.linear1", *(f"{here}.attn.to_{part}" for part in "qkv"), f"{here}.proj_mlp")
        new.put(f"{there}.linear2", f"{here}.proj_out")
        norms |= {f"{there}.norm.{word}_norm": f"{here}.attn.norm_{word[0]}" for word in WORDS}
    new.put("final_layer.linear", "proj_out")
    new.put("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    return new.found | {f"{theirs}.scale": weights[f"{ours}.weight"] for theirs, ours in norms.items()}


WORDS = ("query", "key")


def save(folder: Path, file: Path, network: bool = True) -> Path:
    """The SD 1.5, SDXL, SD3 or FLUX pipeline in `folder` as one file; without `network` with a token of one alone."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    weights = _denoiser(pipeline) if network else {"double_blocks.0.img_mod.lin.bias": torch.zeros(1)}
    weights = {f"model.diffusion_model.{name}": weight for name, weight in weights.items()} | vae(pipeline.vae)
    for prefix, part, convert in TEXT_ENCODERS[type(pipeline).__name__]:
        weights |= {prefix + name: weight for name, weight in convert(getattr(pipeline, part)).items()}
    save_file({name: weight.clone().contiguous() for name, weight in weights.items()}, file)
    return file


def _denoiser(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    if not hasattr(pipeline, "unet"):
        weights, config = pipeline.transformer.state_dict(), pipeline.transformer.config
        if isinstance(pipeline.transformer, FluxTransformer2DModel):
            return original_flux(weights, config.num_layers, config.num_single_layers)
        return original_sd3(weights)
    config = pipeline.unet.config
    layers, levels = config.layers_per_block, len(config.block_out_channels)
    return {unet_name(name, layers, levels): weight for name, weight in pipeline.unet.state_dict().items()}


L, G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
TEXT_ENCODERS = {
    "StableDiffusionPipeline": [("cond_stage_model.transformer.", "text_encoder", clip)],
    "StableDiffusionXLPipeline": [
        ("conditioner.embedders.0.transformer.", "text_encoder", clip),
        ("conditioner.embedders.1.model.", "text_encoder_2", open_clip),
    ],
    "StableDiffusion3Pipeline": [
        (L, "text_encoder", clip),
        (G, "text_encoder_2", clip),
        (T5, "text_encoder_3", torch.nn.Module.state_dict),
    ],
    "FluxPipeline": [(L, "text_encoder", clip), (T5, "text_encoder_2", torch.nn.Module.state_dict)],
}
