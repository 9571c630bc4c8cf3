"""Compares tokenizers with the embedding tables of their text encoders: a token beyond the table cannot be encoded."""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError
from sglang_gen.hub.safetensors_header import is_pointer
from sglang_gen.types import Component

VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")


def check_tokenizers(components: Mapping[str, Component]) -> None:
    """Raises UserError for a tokenizer with token ids that its text encoder has no embedding for.

    `tokenizer_2` belongs to `text_encoder_2`. Vocabularies in SentencePiece's own format are not read.
    """
    for name, component in components.items():
        encoder = components.get(name.replace("tokenizer", "text_encoder")) if name.startswith("tokenizer") else None
        rows = _rows(encoder.config) if encoder is not None else None
        if rows is None or component.folder is None:
            continue
        last = max((_last(path, path.stat().st_mtime_ns) for path in _files(component.folder)), default=-1)
        if last >= rows:
            raise UserError(
                f"{component.folder} has token ids up to {last}, and the {name.replace('tokenizer', 'text_encoder')} "
                f"embeds ids below {rows} (vocab_size): the tokenizer belongs to another text encoder"
            )


def _rows(config: Mapping[str, Any]) -> int | None:
    """Rows of a text encoder's embedding table; None if its config does not say."""
    inner = config.get("text_config")
    size = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) else None


def _files(folder: Path) -> list[Path]:
    """The files that the tokenizer is loaded from: tokenizer.json replaces the others."""
    found = [folder / name for name in VOCABULARIES if (folder / name).is_file()]
    return found[:1] if found and found[0].name == VOCABULARIES[0] else found


@cache
def _last(path: Path, changed: int) -> int:
    """The largest token id in a file that was `changed` at this time; -1 if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if path.is_file() and is_pointer(path):
            raise UserError(f"{path} is a Git LFS pointer: run 'git lfs pull'") from None
        raise UserError(f"{path} cannot be read as the vocabulary of a tokenizer") from error
    if not isinstance(content, dict):
        return -1
    if path.name != VOCABULARIES[0]:
        return max(_whole(content.values()), default=-1)
    model, added = content.get("model"), content.get("added_tokens")
    words = model.get("vocab") if isinstance(model, dict) else None
    ids = list(_whole(words.values())) if isinstance(words, dict) else [len(words) - 1] if words else []
    ids += _whole(token.get("id") for token in (added if isinstance(added, list) else ()) if isinstance(token, dict))
    return max(ids, default=-1)


def _whole(values: Iterable[Any]) -> Iterable[int]:
    return (value for value in values if isinstance(value, int))
