"""Loads a diffusers pipeline from a folder or from a single file; the class may come from the repository's code."""

import contextlib
import inspect
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging

from sglang_gen.backends import loading_report, random_components
from sglang_gen.backends.diffusers import file_text_encoders
from sglang_gen.config.schema import Weights
from sglang_gen.errors import UserError, in_our_words
from sglang_gen.families import registry
from sglang_gen.hub import component_classes, remote_code
from sglang_gen.hub.safetensors_header import PICKLES
from sglang_gen.types import Plan
from sglang_gen.weights.original_layout import CONVERSION_ERRORS
from sglang_gen.weights.replacement import load_original

# Raised by diffusers' conversion of a single file that is not of the expected model.
MISMATCH = (KeyError, ValueError, RuntimeError, IndexError, AttributeError, TypeError)

WEIGHTS = (".safetensors", ".gguf", ".onnx", ".msgpack", ".h5")


def own_class(plan: Plan) -> Any:
    """The pipeline class that the model's own code defines; None for a class of diffusers. Raises UserError."""
    try:
        own = remote_code.pipeline_class(plan.card)
    except (OSError, ImportError, SyntaxError, AttributeError) as error:
        raise UserError(
            f"{plan.card.name}: its own code {plan.card.code[0]} cannot be loaded: {in_our_words(error)}"
        ) from error
    if own is not None and plan.run.model.pipeline_class_name:
        raise UserError(
            f"--pipeline-class-name cannot replace {own.__name__}, which the code of {plan.card.name} defines"
        )
    return own


def read(plan: Plan, pipeline_class: Any, dtype: torch.dtype, replaced: dict[str, Any]) -> Any:
    """Load the pipeline on the CPU; components in `replaced` are used unchanged. Raises UserError.

    With model.weights=random all components are built from their configs.
    """
    diffusers_logging.disable_progress_bar()
    taken = inspect.signature(pipeline_class.__init__).parameters
    replaced = {**dict.fromkeys(name for name in plan.card.absent if name in taken), **replaced}
    if plan.run.model.weights is Weights.random:
        names = [name for name in plan.card.components if name in taken]
        replaced = {name: random_components.build_component(plan, name, dtype) for name in names} | replaced
        return pipeline_class.from_pretrained(str(plan.card.folder), dtype=dtype, **replaced)
    if plan.card.file is None:
        replaced = _networks(plan, pipeline_class, dtype, replaced) | replaced
        return pipeline_class.from_pretrained(
            str(plan.card.folder), dtype=dtype, use_safetensors=True,
            trust_remote_code=plan.run.model.trust_remote_code, **replaced,
        )  # fmt: skip
    return _read_file(plan, pipeline_class, dtype, replaced)


def _read_file(plan: Plan, pipeline_class: Any, dtype: torch.dtype, replaced: dict[str, Any]) -> Any:
    """Load the pipeline from a single file. Raises UserError if the file is of another model."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    if not hasattr(pipeline_class, "from_single_file"):
        raise UserError(f"--model-path: diffusers does not read {pipeline_class.__name__} from a single file")
    if (scheduler := plan.card.components.get("scheduler")) and "scheduler" not in replaced:
        kind = component_classes.named(scheduler)
        replaced = {**replaced, "scheduler": kind.from_config(dict(scheduler.config))}  # adjusted to the file's markers
    replaced = {**_converted(plan, dtype, replaced), **file_text_encoders.load(plan, dtype, replaced), **replaced}
    try:
        with _configs_only(plan) as configs:
            pipeline = pipeline_class.from_single_file(
                str(plan.card.file), config=str(configs), dtype=dtype, local_files_only=True, **replaced
            )
    except (OSError, SingleFileComponentError) as error:  # neither in the file nor in the folder of configs
        reason = "it lacks the tensors by which a component is recognized, or has them under other names"
        raise UserError(misfit(plan, reason)) from error
    except MISMATCH as error:
        raise UserError(misfit(plan, in_our_words(error))) from error
    for component, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            module.eval()  # diffusers leaves a T5 from a single file in training mode, with dropout
            empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
            if empty:
                reason = f"it lacks {len(empty)} weights of {component}, such as {empty[0]}"
                raise UserError(misfit(plan, reason))
    return pipeline


def _converted(plan: Plan, dtype: torch.dtype, replaced: Collection[str]) -> dict[str, Any]:
    """Networks whose original layout this package converts itself."""
    assert plan.card.file is not None
    converted = {}
    for name, component in plan.card.components.items():
        if name not in replaced and registry.conversion(component.class_name):
            kind = component_classes.named(component)
            try:
                converted[name] = load_original(kind, component, [plan.card.file], dtype)
            except UserError as error:
                raise UserError(misfit(plan, str(error))) from error
            except CONVERSION_ERRORS as error:
                raise UserError(misfit(plan, in_our_words(error))) from error
    return converted


@contextlib.contextmanager
def _configs_only(plan: Plan) -> Iterator[Path]:
    """A temporary folder with links to the component configs and tokenizers, without weights.

    diffusers loads from this folder what it does not find in the file; weights there would be of another model.
    """
    assert plan.card.folder is not None  # a card with weights
    with tempfile.TemporaryDirectory() as name:
        for path in plan.card.folder.glob("**/*"):
            if path.is_file() and path.suffix.lower() not in (*WEIGHTS, *PICKLES):
                link = Path(name) / path.relative_to(plan.card.folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
        yield Path(name)


def _networks(plan: Plan, pipeline_class: Any, dtype: torch.dtype, replaced: Collection[str]) -> dict[str, Any]:
    """The pipeline's networks from their folders, loaded one by one so that each loading report is checked."""
    taken = inspect.signature(pipeline_class.__init__).parameters.keys() - replaced
    own_code = {file.partition("/")[0] for file in plan.card.code}
    networks = {}
    for name, component in plan.card.components.items():
        if name not in taken or name in own_code or component.folder is None:
            continue
        kind = component_classes.named(component)
        if loading_report.is_reported(kind):
            folder = component.folder if component.folder.is_dir() else component.folder.parent  # diffusers' rule
            networks[name] = loading_report.read(kind, folder, component.config, dtype)
    return networks


def misfit(plan: Plan, reason: str) -> str:
    """Error message for a single file that does not match the component configs."""
    kind = plan.pipeline_class
    where = f"the component configs of {plan.run.model.configs or plan.run.model.preset}"
    return (
        f"--model-path: {plan.card.file} does not fit {where} ({kind}): {reason}; name the right preset with --model-id"
    )
