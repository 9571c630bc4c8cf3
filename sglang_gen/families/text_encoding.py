"""Encodes prompts with the text encoders of transformers, as diffusers' pipelines do."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sglang_gen import log


def tokens(encoder: Any, tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Token ids `[B, length]` on the encoder's device, padded and truncated; truncated text is logged as a warning."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    warn_of_truncated(encoder, tokenizer, tokenizer(texts, verbose=False).input_ids, length)
    return ids.to(encoder.device)


def warn_of_truncated(encoder: Any, tokenizer: Any, whole: list[list[int]], length: int) -> None:
    """Warn of the end of each text that `length` tokens do not hold; `whole` has all tokens, the last ends the text."""
    decoded = [
        tokenizer.decode(text[length - 1 : -1], skip_special_tokens=True) for text in whole if len(text) > length
    ]
    if any(decoded):
        truncated = log.shorten(" | ".join(filter(None, decoded)))
        log.warn_once(f'{type(encoder).__name__} takes {length} tokens and does not see: "{truncated}"')


def expanded(tokenizer: Any, texts: list[str]) -> list[str]:
    """Replace each textual inversion token that has several vectors by all of its tokens (Gal et al. 2022).

    The first token has the learned word's name, the others append `_1`, `_2`, ... (diffusers' convention).
    """
    learned = tokenizer.added_tokens_encoder

    def whole(word: str) -> str:
        count = next(number for number in itertools.count(1) if f"{word}_{number}" not in learned)
        return " ".join([word, *(f"{word}_{number}" for number in range(1, count))])

    replaced = []
    for text in texts:
        for word in set(tokenizer.tokenize(text)) & learned.keys():
            text = text.replace(word, whole(word))
        replaced.append(text)
    return replaced


def encoder_inputs(components: Mapping[str, Any], which: str, texts: list[str]) -> tuple[Any, Any, list[str]]:
    """(text encoder, tokenizer, texts with textual inversion tokens expanded) for the suffix `which`: "", "_2", ..."""
    tokenizer = components[f"tokenizer{which}"]
    return components[f"text_encoder{which}"], tokenizer, expanded(tokenizer, texts)


def clip(encoder: Any, tokenizer: Any, texts: list[str], layer: int = -2) -> tuple[Tensor, Tensor]:
    """Hidden states `[B, T, C]` of a `layer` counted from the end, and the pooled, projected output `[B, P]`."""
    ids = tokens(encoder, tokenizer, texts, tokenizer.model_max_length)
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[layer], output[0]


def clip_last(encoder: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Hidden states `[B, T, C]` after the last layer and the final norm."""
    ids = tokens(encoder, tokenizer, texts, tokenizer.model_max_length)
    states: Tensor = encoder(ids).last_hidden_state
    return states


def clip_pooled(encoder: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Pooled output `[B, P]`, the hidden state of the end token, of an encoder without projection."""
    pooled: Tensor = encoder(tokens(encoder, tokenizer, texts, tokenizer.model_max_length)).pooler_output
    return pooled


def t5(encoder: Any, tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Hidden states `[B, length, C]`."""
    states: Tensor = encoder(tokens(encoder, tokenizer, texts, length))[0]
    return states


def pad_channels(states: Tensor, width: int) -> Tensor:
    """Pad `[B, T, C]` with zeros to `width` channels."""
    return torch.nn.functional.pad(states, (0, width - states.shape[-1]))
