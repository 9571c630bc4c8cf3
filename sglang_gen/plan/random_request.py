"""Checks of model.weights=random: what needs the model's own weights, or is about the quality of images, is refused."""

from collections.abc import Callable
from pathlib import Path

from sglang_gen.config.schema import QuantMethod, Run, Weights
from sglang_gen.errors import UserError
from sglang_gen.hub import component_classes, weight_files
from sglang_gen.plan import quantization
from sglang_gen.types import ModelCard

# Settings that name weights, or need those of the model: a clause for each, and whether a run sets it.
EXCLUDED: tuple[tuple[str, Callable[[Run], object]], ...] = (
    ("--component-paths replaces components by pretrained ones", lambda run: run.model.component_paths),
    (f"{weight_files.FLAG} names pretrained weights", lambda run: run.quant.transformer_weights_path),
    (
        "quant=prequantized reads weights that are quantized already",
        lambda run: run.quant.method is QuantMethod.prequantized,
    ),
    ("quant=nunchaku reads weights that are quantized already", quantization.wants_nunchaku),
    ("--disable-autocast computes in the dtype of the stored weights", lambda run: run.compile.disable_autocast),
    ("quality.reference compares images, and these are noise", lambda run: run.quality.reference),
    ("quality.manifest is for the quality of images, and these are noise", lambda run: run.quality.manifest),
    ("quality.metrics measures images, and these are noise", lambda run: run.quality.metrics),
)


def check_random_weights(run: Run) -> None:
    """Raises UserError for a setting that random weights exclude."""
    if run.model.weights is not Weights.random:
        return
    for clause, is_set in EXCLUDED:
        if is_set(run):
            raise UserError(f"model.weights=random: {clause}; leave one of the two out")
    if run.model.path is not None and Path(run.model.path).expanduser().is_file():
        raise UserError(
            f"model.weights=random: {run.model.path} is a single file, which has no configs of components; name a "
            "preset, a folder or a hub id"
        )


def check_random_model(run: Run, card: ModelCard) -> None:
    """Raises UserError for a model whose networks are not built from their configs alone."""
    if run.model.weights is not Weights.random:
        return
    if card.code:
        raise UserError(
            f"model.weights=random builds the networks of diffusers and transformers, and {card.name} has its own "
            "code; run with model.weights=pretrained"
        )
    for name, component in card.components.items():
        if component.library == "diffusers" and not component_classes.in_diffusers(component.class_name):
            raise UserError(
                f"model.weights=random builds the networks of diffusers and transformers, and the {name} of "
                f"{card.name} has the class {component.class_name}, which diffusers does not have; run with "
                "model.weights=pretrained"
            )
        if declaration := weight_files.declared(component.config, {}):
            raise UserError(
                f"model.weights=random draws plain weights, and the config of the {name} of {card.name} declares "
                f"weights quantized by {declaration['method']}; run with model.weights=pretrained"
            )
