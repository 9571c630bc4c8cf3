"""Tokenizer for a model with random weights whose vocabulary is not on this machine.

It has a token for each byte and no merges, so texts have more tokens than with the model's own vocabulary. Most
pipelines pad texts to a fixed length, and then the computation is the same.
"""

from collections.abc import Mapping
from typing import Any

from sglang_gen.families import text_encoders
from sglang_gen.types import Component

SMALL_LETTERS = "abcdefghijklmnopqrstuvwxyz\u0120"  # and the space, as `ByteLevel` writes it
LENGTH = 512  # of encoders whose config states no largest length


def build(encoder: Component) -> Any:
    """A byte-level tokenizer for this text encoder, with ids that the encoder embeds and its largest length."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    config = text_encoders.text_config(encoder)
    begin, end, pad = text_encoders.special_ids(encoder)
    names = {end: "<end>", pad: "<pad>"} | {end: "<end>"} | ({} if begin is None else {begin: "<begin>"})
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(names, config), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    around = [(names[index], index) for index in (begin, end) if index is not None]
    template = " ".join([*(name for name, _ in around[:-1]), "$A", around[-1][0]])
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=config.get("max_position_embeddings") or config.get("n_positions") or LENGTH,
        eos_token=names[end],
        pad_token=names[pad],
        **({} if begin is None else {"bos_token": names[begin]}),
    )


def _vocabulary(names: Mapping[int, str], config: Mapping[str, Any]) -> dict[str, int]:
    """Ids of the special tokens and, as far as the encoder's table has room, of all bytes, small letters first."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (letter not in SMALL_LETTERS, letter))
    free = (index for index in range(config["vocab_size"]) if index not in names)
    return {**{name: index for index, name in names.items()}, **dict(zip(letters, free))}  # noqa: B905
