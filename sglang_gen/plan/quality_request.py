"""Checks of the group quality: what a manifest decides, and for which runs a reference can be made."""

from collections.abc import Iterator

from sglang_gen import env
from sglang_gen.config import manifest
from sglang_gen.config.schema import QuantMethod, Run
from sglang_gen.errors import UserError
from sglang_gen.hub import weight_files
from sglang_gen.perf import attributes, metrics, objective
from sglang_gen.plan import quantization
from sglang_gen.types import ModelCard

AUTO = "auto"  # value of quality.reference


def check_quality(run: Run, sources: dict[str, str]) -> None:
    """Raises UserError for settings of the group that exclude each other or name nothing."""
    wanted = run.quality
    if wanted.manifest is not None:
        for path in _prompts_beside(run, sources):
            raise UserError(
                f"{manifest.SETTING} decides the samples of the run, and {path} is set too; leave one of the two out"
            )
        manifest.pin(run)
    metrics.check_names(wanted.metrics)
    drawn = run.sampling.seed is None and not (run.sampling.prompts or run.sampling.prompts_file)
    if wanted.reference == AUTO and drawn:
        raise UserError(
            "quality.reference=auto keeps the reference of certain samples, and the seed of this run is drawn; set "
            "--seed or quality.manifest"
        )


def _prompts_beside(run: Run, sources: dict[str, str]) -> Iterator[str]:
    """Settings that decide samples too. The record of a run with a manifest repeats its prompts."""
    sampling, number = run.sampling, sources.get("sampling.num_samples")
    found = {
        "sampling.prompt": sampling.prompt is not None,
        "sampling.prompts": bool(sampling.prompts) and sources.get("sampling.prompts") != "file",
        "sampling.prompts_file": bool(sampling.prompts_file) and sources.get("sampling.prompts_file") != "file",
        "sampling.num_samples": sampling.num_samples != 1 or number in ("flag", "override"),
    }
    yield from (path for path, is_set in found.items() if is_set)


def about_images(run: Run) -> str | None:
    """A clause for the setting that asks for the quality of images; None if none does."""
    quality = run.quality
    if quality.reference is not None:
        return "quality.reference compares images"
    if quality.metrics:
        return "quality.metrics measures images"
    return None if quality.manifest is None else "quality.manifest is for the quality of images"


def check_exact(run: Run, card: ModelCard) -> None:
    """Raises UserError for quality.reference=auto with a model whose own weights are approximations, or under torchrun.

    `run` is the run whose images are compared.
    """
    if run.quality.reference != AUTO:
        return
    own = [name for name in quantization.denoisers(card) if weight_files.declared(card.components[name].config, {})]
    if own and run.quant.transformer_weights_path is None:
        raise UserError(
            f"quality.reference=auto: the {own[0]} of {card.name} is quantized already, so a reference without "
            "quantization cannot be made from it; name the folder of a run with the original weights"
        )
    place = env.torchrun()
    if place is not None and place.ranks > 1:
        raise UserError(
            "quality.reference=auto makes the reference in one process, and torchrun has started "
            f"{place.ranks}; name a folder, such as that of a run in one process"
        )


def check_attributes(run: Run, card: ModelCard) -> None:
    """Raises UserError for an objective that needs a classifier of attributes, if the model's folder has none."""
    key = run.perf.objective
    if key is not None and objective.is_about_attributes(key) and attributes.folder_in(card) is None:
        raise UserError(
            f"perf.objective: '{key}' needs a classifier in the model's folder ({attributes.VOCABULARY_FILE} and "
            f"{attributes.CLASSIFIER_FILE}), and {card.name} has none; choose another number"
        )


def seed_warnings(run: Run, gave_seed: bool) -> list[str]:
    """Warns about a seed that no sample has."""
    if run.quality.manifest is None or not gave_seed:
        return []
    if all("seed" in entry for entry in manifest.read(run.quality.manifest).entries):
        return [f"--seed has no effect: every line of {manifest.SETTING}={run.quality.manifest} has a seed"]
    return []


def is_replaced_by_quantized(run: Run) -> bool:
    """Whether the denoising network is replaced by quantized weights."""
    if run.quant.transformer_weights_path is None:
        return False
    located = weight_files.locate(run.quant.transformer_weights_path)
    quantized = located.is_gguf or weight_files.declared(located.config, {}) is not None
    return bool(quantized or quantization.wants_nunchaku(run) or run.quant.method is QuantMethod.prequantized)
