"""Facts about kinds of text encoders, by their class in transformers. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from sglang_gen.families.accepted import CLIP, CLIP_PROJECTED, T5
from sglang_gen.types import Component

# Prefixes of an encoder's tensors in single files, for classes that have the same prefix in all families.
FILE_PREFIXES: Mapping[str, tuple[str, ...]] = dict.fromkeys(T5, ("text_encoders.t5xxl.",))
# Classes whose tensors are named `text_model.` in single files, except by some trainers.
UNDER_TEXT_MODEL = (*CLIP, *CLIP_PROJECTED)


def ranks(component: Component, dtype: str, tp: int) -> int:
    """Ranks that share the weights of a text encoder: T5 where its layers divide by `tp`, otherwise one.

    In float16 transformers keeps some layers of T5 in float32, and it is not sharded.
    """
    divides = component.class_name in T5 and dtype != "float16"
    return tp if divides and not any(component.config[key] % tp for key in ("num_heads", "d_ff")) else 1


def takes_length(component: Component) -> bool:
    """Whether a family chooses the number of tokens of this encoder; those of CLIP are in its config."""
    return component.class_name in T5


def bytes_kept_in_float32(component: Component, dtype: str) -> int:
    """Bytes by which the weights exceed those in `dtype`, because transformers keeps some layers in float32."""
    if component.class_name not in T5 or dtype != "float16":
        return 0
    c = component.config
    return int(2 * c["num_layers"] * c["d_model"] * c["d_ff"])  # `wo`


def special_ids(component: Component) -> tuple[int | None, int, int]:
    """Token ids that begin (None: nothing does), end and pad a text, from the config of its encoder.

    Old configs of CLIP say that a text ends with 2, while its pooled output is that of the largest id.
    """
    config = text_config(component)
    last, end = config["vocab_size"] - 1, config.get("eos_token_id")
    if component.class_name in UNDER_TEXT_MODEL:
        end = last if end in (None, 2) else end
        return (last - 1 if end == last else last), end, end
    end = 1 if end is None else end
    pad = config.get("pad_token_id")
    return None, end, 0 if pad is None else pad


def text_config(component: Component) -> Mapping[str, Any]:
    """The config of the text model, which a model of several modalities has within its own."""
    inner: Mapping[str, Any] = component.config.get("text_config") or component.config
    return inner
