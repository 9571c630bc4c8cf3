"""Writes the trained components as a diffusers folder in bfloat16."""

import copy
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from tools.landscape.denoiser import Denoiser
from tools.landscape.vocabulary import save_clip_tokenizer


def build_pipeline(model: Denoiser, vae: AutoencoderKL, shift: float) -> StableDiffusion3Pipeline:
    text = model.text
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=text.clip,
        tokenizer=text.clip_tokenizer,
        text_encoder_2=text.clip_2,
        tokenizer_2=copy.deepcopy(text.clip_tokenizer),
        text_encoder_3=text.t5,
        tokenizer_3=text.t5_tokenizer,
    )


def save_pipeline(model: Denoiser, vae_folder: Path, shift: float, out: Path) -> None:
    """Save a copy of `model` in bfloat16; `model` itself is not changed."""
    vae = AutoencoderKL.from_pretrained(vae_folder)
    pipeline = build_pipeline(copy.deepcopy(model).cpu(), vae, shift).to(dtype=torch.bfloat16)
    pipeline.save_pretrained(out)
    for name in ("tokenizer", "tokenizer_2"):
        save_clip_tokenizer(getattr(pipeline, name), out / name)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        load_as_float32(out / name / "config.json")
    forget_origin(out / "vae" / "config.json")


def forget_origin(config: Path) -> None:
    """Remove the path from which diffusers loaded a component, since it is a folder of the training machine."""
    values = {name: value for name, value in json.loads(config.read_text()).items() if name != "_name_or_path"}
    config.write_text(json.dumps(values, indent=2) + "\n")


def load_weights(model: Denoiser, folder: Path) -> None:
    """Load the weights from a folder that `save_pipeline` wrote."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    model.transformer.load_state_dict(pipeline.transformer.state_dict())
    for ours, saved in zip(
        (model.text.clip, model.text.clip_2, model.text.t5),
        (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3),
        strict=True,
    ):
        ours.load_state_dict(saved.state_dict())


def load_as_float32(config: Path) -> None:
    """Set the config's dtype to float32: transformers' default is this entry, and diffusers' default is float32."""
    values = json.loads(config.read_text()) | {"dtype": "float32"}
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
