"""Tiny diffusers pipelines with random weights, saved as ordinary folders: SD 1.5, SDXL, SD3 and FLUX.

The weights make every part matter: linear and convolution weights are scaled up, biases and norms are random, and
layers that are initialised to zero are filled. With plain initialisation a network whose attention is removed would
still give nearly the same picture.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableDiffusion3Pipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sglang_gen.families import registry

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"-:;()"


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Discriminating weights: linear x3, biases and norms random around their usual value."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                if name == "weight" and parameter.dim() >= 2:
                    fan_in = parameter[0].numel()
                    scale = 3.0 if isinstance(child, nn.Linear) else 1.0
                    parameter.copy_(noise * (scale / fan_in**0.5 / 3**0.5))
                elif name == "weight":
                    parameter.copy_(1 + 0.2 * noise)
                else:
                    parameter.copy_(0.2 * noise)
    return module.eval()


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def t5_tokenizer(length: int | None = None) -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, **({"model_max_length": length} if length else {}))


def _clip(seed: int, hidden: int, projected: bool) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=hidden, max_position_embeddings=77,
        bos_token_id=len(clip_tokenizer()) - 2, eos_token_id=len(clip_tokenizer()) - 1,
    )  # fmt: skip
    return fill((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed)


def _t5(seed: int, width: int = 32) -> nn.Module:
    config = T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
    return fill(T5EncoderModel(config), seed)


def _vae(latent_channels: int, seed: int, scaling: float, shift: float | None = None) -> nn.Module:
    return fill(
        AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=latent_channels, layers_per_block=1,
            scaling_factor=scaling, shift_factor=shift, sample_size=32, use_quant_conv=shift is None,
            use_post_quant_conv=shift is None,
        ),
        seed,
    )  # fmt: skip


def config(family: str) -> dict:
    """The denoising network of a family's tiny pipeline."""
    return dict(registry.examples(registry.by_name(family)).tiny)


def sd15(folder: Path) -> Path:
    unet = UNet2DConditionModel(**config("sd"))
    pipeline = StableDiffusionPipeline(
        unet=fill(unet, 11), vae=_vae(4, 12, 0.18215), text_encoder=_clip(13, 32, False), tokenizer=clip_tokenizer(),
        scheduler=PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True,
                                steps_offset=1, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def sdxl(folder: Path, widths: tuple[int, int] = (32, 32)) -> Path:
    unet = UNet2DConditionModel(**config("sdxl") | {"projection_class_embeddings_input_dim": 48 + widths[1]})
    pipeline = StableDiffusionXLPipeline(
        unet=fill(unet, 1), vae=_vae(4, 2, 0.13025), text_encoder=_clip(3, widths[0], False),
        tokenizer=clip_tokenizer(), text_encoder_2=_clip(4, widths[1], True), tokenizer_2=clip_tokenizer(),
        add_watermarker=False,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                         steps_offset=1, timestep_spacing="leading"),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def sd3(folder: Path, widths: tuple[int, int] = (32, 32)) -> Path:
    transformer = SD3Transformer2DModel(**config("sd3"))
    pipeline = StableDiffusion3Pipeline(
        transformer=fill(transformer, 21), vae=_vae(4, 22, 1.5305, 0.0609),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=_clip(23, widths[0], True), tokenizer=clip_tokenizer(),
        text_encoder_2=_clip(24, widths[1], True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(25, 64), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def flux(folder: Path, guidance_embeds: bool = True) -> Path:
    transformer = FluxTransformer2DModel(**config("flux") | {"guidance_embeds": guidance_embeds})
    pipeline = FluxPipeline(
        transformer=fill(transformer, 31), vae=_vae(4, 32, 0.3611, 0.1159), text_encoder=_clip(33, 32, False),
        tokenizer=clip_tokenizer(), text_encoder_2=_t5(34), tokenizer_2=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def wan(folder: Path) -> Path:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipeline = WanPipeline(
        transformer=fill(transformer, 41), vae=fill(vae, 42), text_encoder=_t5(43), tokenizer=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def pix2pix(folder: Path) -> Path:
    """Editing by instruction: a UNet that sees the noisy latents beside those of the picture."""
    unet = UNet2DConditionModel(**config("sd") | {"in_channels": 8, "out_channels": 4})
    pipeline = StableDiffusionInstructPix2PixPipeline(
        unet=fill(unet, 51), vae=_vae(4, 52, 0.18215), text_encoder=_clip(53, 32, False), tokenizer=clip_tokenizer(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def wan_i2v(folder: Path) -> Path:
    """A picture and a text to a video, with an image encoder."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, rope_max_seq_len=32, image_dim=4,
    )  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=4, projection_dim=4, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, intermediate_size=16, patch_size=1)  # fmt: skip
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipeline = WanImageToVideoPipeline(
        transformer=fill(transformer, 61), vae=fill(vae, 62), text_encoder=_t5(63), tokenizer=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), image_encoder=fill(CLIPVisionModel(vision), 64),
        image_processor=CLIPImageProcessorPil(crop_size=32, size=32),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def stable_audio(folder: Path) -> Path:
    """Text to stereo sound, 16 samples of sound a latent, 1000 samples a second."""
    transformer = StableAudioDiTModel(
        sample_size=64, in_channels=4, num_layers=2, attention_head_dim=4, num_key_value_attention_heads=2,
        num_attention_heads=2, out_channels=4, cross_attention_dim=4, time_proj_dim=8, global_states_input_dim=8,
        cross_attention_input_dim=4,
    )  # fmt: skip
    vae = AutoencoderOobleck(encoder_hidden_size=6, downsampling_ratios=[4, 4], decoder_channels=3, audio_channels=2,
                             decoder_input_channels=4, channel_multiples=[2, 4], sampling_rate=1000)  # fmt: skip
    pipeline = StableAudioPipeline(
        transformer=fill(transformer, 71), vae=fill(vae, 72), text_encoder=_t5(73, 32), tokenizer=t5_tokenizer(32),
        projection_model=fill(StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=4, min_value=0,
                                                         max_value=32), 74),
        scheduler=EDMDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction", sigma_data=1.0,
                                                 sigma_schedule="exponential"),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


BUILDERS = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux}
# Those in which a guidance scale of 7.5 leaves less than 1e-5 of rounding.
CALM = ("sd15", "sd3", "flux")
