"""Three tiny text encoders, and the text sequence that StableDiffusion3Pipeline builds from their outputs."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tools.landscape.presets import Denoiser
from tools.landscape.vocabulary import CLIP_LENGTH, build_clip_tokenizer, build_t5_tokenizer

CLIP_MERGES = 800
CORPUS_SEED = 0  # fixed, so that the vocabulary does not depend on the seed of the training


def clip_config(spec: Denoiser, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.text_width,
        intermediate_size=4 * spec.text_width,
        projection_dim=spec.text_width,
        num_hidden_layers=spec.text_layers,
        num_attention_heads=spec.text_width // 32,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_config(spec: Denoiser, tokenizer: T5TokenizerFast) -> T5Config:
    width = 2 * spec.text_width  # the width of both CLIP encoders' concatenated states
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_ff=2 * width,
        d_kv=32,
        num_layers=spec.text_layers,
        num_heads=width // 48,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        is_encoder_decoder=False,
        use_cache=False,
    )


class TextEncoders(nn.Module):
    """Two CLIP encoders and a T5 encoder, used as in StableDiffusion3Pipeline.encode_prompt."""

    def __init__(self, spec: Denoiser) -> None:
        super().__init__()
        self.clip_tokenizer = build_clip_tokenizer(CORPUS_SEED, CLIP_MERGES)
        self.t5_tokenizer = build_t5_tokenizer(CORPUS_SEED, self.clip_tokenizer)
        self.clip = CLIPTextModelWithProjection(clip_config(spec, self.clip_tokenizer))
        self.clip_2 = CLIPTextModelWithProjection(clip_config(spec, self.clip_tokenizer))
        self.t5 = T5EncoderModel(t5_config(spec, self.t5_tokenizer))

    def tokens(self, texts: list[str], t5_length: int) -> tuple[Tensor, Tensor]:
        """CLIP ids [B, 32] and T5 ids [B, t5_length]."""
        fixed = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip = self.clip_tokenizer(texts, max_length=CLIP_LENGTH, **fixed).input_ids
        return clip, self.t5_tokenizer(texts, max_length=t5_length, **fixed).input_ids

    def forward(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Sequence [B, 32 + L, 2 W] and pooled projections [B, 2 W]."""
        outputs = [encoder(clip_ids, output_hidden_states=True) for encoder in (self.clip, self.clip_2)]
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        t5 = self.t5(t5_ids).last_hidden_state
        return torch.cat([pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1), pooled
