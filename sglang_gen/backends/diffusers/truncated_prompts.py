"""Warns of the end of a prompt that a text encoder of a diffusers pipeline does not see."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from sglang_gen.families.text_encoding import warn_of_truncated


@contextmanager
def noticed(pipeline: Any) -> Iterator[None]:
    """Within this context a tokenizer of the pipeline that truncates a text logs a warning, as on the native engine.

    Not every pipeline of diffusers logs one. The method of the class is replaced, because Python looks up `__call__`
    there.
    """
    encoders = {}
    for name, component in pipeline.components.items():
        if isinstance(component, PreTrainedTokenizerBase):
            encoders[id(component)] = pipeline.components.get(name.replace("tokenizer", "text_encoder"))
    original = PreTrainedTokenizerBase.__call__

    def call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        length, texts = kwargs.get("max_length"), [text] if isinstance(text, str) else text
        if id(self) in encoders and kwargs.get("truncation") is True and length and texts:
            whole = original(self, texts, verbose=False).input_ids
            warn_of_truncated(encoders[id(self)], self, whole, length)
        return original(self, text, *args, **kwargs)

    PreTrainedTokenizerBase.__call__ = call
    try:
        yield
    finally:
        PreTrainedTokenizerBase.__call__ = original
