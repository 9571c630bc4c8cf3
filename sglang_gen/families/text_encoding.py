"""Prompts through the text encoders of transformers, as diffusers' pipelines use them."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sglang_gen import log


def tokens(encoder: Any, tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Ids `[B, length]` on the encoder's device, padded and cut; what is cut is a warning."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    whole = tokenizer(texts, padding="longest", return_tensors="pt", verbose=False).input_ids
    if whole.shape[-1] > length:
        cut = [text for text in tokenizer.batch_decode(whole[:, length - 1 : -1], skip_special_tokens=True) if text]
        unseen = log.shorten(" | ".join(cut))
        log.warn_once(f'{type(encoder).__name__} takes {length} tokens and does not see: "{unseen}"')
    return ids.to(encoder.device)


def expanded(tokenizer: Any, texts: list[str]) -> list[str]:
    """Texts in which a learned word of several vectors (textual inversion) stands as all of its tokens.

    The first has the word's name, the others that name with `_1`, `_2`, ... (Gal et al. 2022; diffusers' convention).
    """
    learned = tokenizer.added_tokens_encoder

    def whole(word: str) -> str:
        count = next(number for number in itertools.count(1) if f"{word}_{number}" not in learned)
        return " ".join([word, *(f"{word}_{number}" for number in range(1, count))])

    found = []
    for text in texts:
        for word in set(tokenizer.tokenize(text)) & learned.keys():
            text = text.replace(word, whole(word))
        found.append(text)
    return found


def learned(parts: Mapping[str, Any], which: str, texts: list[str]) -> tuple[Any, Any, list[str]]:
    """An encoder of the pipeline ("", "_2", ...), its tokenizer, and the texts with learned words expanded for it."""
    tokenizer = parts[f"tokenizer{which}"]
    return parts[f"text_encoder{which}"], tokenizer, expanded(tokenizer, texts)


def clip(encoder: Any, tokenizer: Any, texts: list[str], layer: int = -2) -> tuple[Tensor, Tensor]:
    """Hidden states `[B, T, C]` of a layer counted from the end, and the pooled (projected) text `[B, P]`."""
    ids = tokens(encoder, tokenizer, texts, tokenizer.model_max_length)
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[layer], output[0]


def clip_last(encoder: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Hidden states `[B, T, C]` behind the last layer and the final norm."""
    ids = tokens(encoder, tokenizer, texts, tokenizer.model_max_length)
    states: Tensor = encoder(ids).last_hidden_state
    return states


def clip_pooled(encoder: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """The state of the end token `[B, P]`, of an encoder without projection."""
    pooled: Tensor = encoder(tokens(encoder, tokenizer, texts, tokenizer.model_max_length)).pooler_output
    return pooled


def t5(encoder: Any, tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Hidden states `[B, length, C]`."""
    states: Tensor = encoder(tokens(encoder, tokenizer, texts, length))[0]
    return states


def pad_channels(states: Tensor, width: int) -> Tensor:
    """`[B, T, C]` with zeros up to `width` channels."""
    return torch.nn.functional.pad(states, (0, width - states.shape[-1]))
