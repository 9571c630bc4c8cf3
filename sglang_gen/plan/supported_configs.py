"""Whether the native engine supports a model: its components, and the settings of their configs."""

from sglang_gen.families.accepted import ABSENT, AUTOENCODER
from sglang_gen.families.contract import Spec
from sglang_gen.types import ModelCard


def unsupported(spec: Spec, card: ModelCard) -> str | None:
    """A clause that says why the native engine cannot run this model; None if it can."""
    for name, classes in spec.required(card).items():
        if name not in card.components:
            return f"this model has no {name}"
        class_name = card.components[name].class_name
        if classes and class_name not in classes:
            return f"its {name} has the class {class_name} in place of {' or '.join(classes)}"
    if card.file is not None and len(spec.networks_of(card)) > 1:
        return "it reads no single file with several denoising networks"
    if "safety_checker" in card.components and "safety_checker" not in spec.optional:
        return "it does not support a safety checker in this pipeline, and this model has one"
    if card.components["text_encoder"].config.get("use_attention_mask"):
        return "it does not support a text encoder that masks the padding of prompts (use_attention_mask)"
    networks = [(name, spec.settings) for name in spec.networks_of(card)]
    for name, settings in (*networks, ("vae", AUTOENCODER)):
        for key, value in card.components[name].config.items():
            if not (key.startswith("_") or settings.get(key, ABSENT)(value)):
                return f"its {name} does not support {key}={value}"
    return None
