"""Tiny pipelines as their authors would have saved them: the whole model in one safetensors file."""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
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


def save(folder: Path, file: Path) -> Path:
    """The SD 1.5 or SDXL pipeline in `folder` as one file."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    layers, levels = pipeline.unet.config.layers_per_block, len(pipeline.unet.config.block_out_channels)
    weights = {
        f"model.diffusion_model.{unet_name(name, layers, levels)}": weight
        for name, weight in pipeline.unet.state_dict().items()
    } | vae(pipeline.vae)
    if hasattr(pipeline, "text_encoder_2"):
        prefixes = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
        weights |= {prefixes[1] + name: weight for name, weight in open_clip(pipeline.text_encoder_2).items()}
    else:
        prefixes = ("cond_stage_model.transformer.",)
    weights |= {prefixes[0] + name: weight for name, weight in clip(pipeline.text_encoder).items()}
    save_file({name: weight.clone().contiguous() for name, weight in weights.items()}, file)
    return file
