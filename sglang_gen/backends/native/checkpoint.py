"""The weights of a denoising network: where a plan's model has them, opened for reading."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sglang_gen.backends import random_components
from sglang_gen.config.schema import Weights
from sglang_gen.errors import UserError, in_our_words
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.hub.weight_files import locate
from sglang_gen.types import Component, Plan
from sglang_gen.weights import load, original_layout


@dataclass(frozen=True)
class OpenCheckpoint:
    """Tensors by their names in a diffusers folder; `where` names the files in errors."""

    tensors: load.Tensors
    where: str
    plan: Plan
    is_single_file: bool = False

    def check(self, network: nn.Module, sources: load.Sources) -> None:
        """Raises UserError for missing or unexpected tensors, or one of another shape."""
        try:
            load.check(network, self.tensors, sources, self.where)
        except UserError as error:
            if not self.is_single_file:
                raise
            from sglang_gen.backends.diffusers.pipeline_loading import misfit

            raise UserError(misfit(self.plan, str(error))) from error


@contextmanager
def open_checkpoint(plan: Plan, name: str) -> Iterator[OpenCheckpoint]:
    """The model's own weights of the network `name`, those of --transformer-weights-path, or random ones.

    Raises UserError for a file of another model, and the errors of safetensors for an unreadable one.
    """
    component, path = plan.card.components[name], plan.run.quant.transformer_weights_path
    with ExitStack() as stack:
        if plan.run.model.weights is Weights.random:
            drawn = random_components.tensors(name, component, getattr(torch, plan.dtype))
            yield OpenCheckpoint(drawn, "model.weights=random", plan)
        elif path is None and plan.card.file is not None and name not in plan.run.model.component_paths:
            tensors = load.InMemoryTensors(_from_single_file(plan, plan.card.file, component))
            yield OpenCheckpoint(tensors, load.where([plan.card.file]), plan, is_single_file=True)
        elif path is None:
            assert component.folder is not None  # the plan's card was read from a folder with weights
            yield _in_files(plan, in_folder(component.folder), stack)
        else:
            from sglang_gen.weights import replacement

            files = locate(path)
            if replacement.in_diffusers_layout(plan, name, files):
                yield _in_files(plan, files.paths, stack)
            else:
                converted = original_layout.read(component.class_name, component.config, files.paths)
                yield OpenCheckpoint(load.InMemoryTensors(converted), load.where(files.paths), plan)


def _in_files(plan: Plan, files: Sequence[Path], stack: ExitStack) -> OpenCheckpoint:
    opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
    return OpenCheckpoint(load.Checkpoint(opened), load.where(files), plan)


def _from_single_file(plan: Plan, file: Path, component: Component) -> dict[str, Tensor]:
    from sglang_gen.backends.diffusers.pipeline_loading import misfit

    try:
        return original_layout.read(component.class_name, component.config, [file])
    except UserError as error:
        raise UserError(misfit(plan, str(error))) from error
    except original_layout.CONVERSION_ERRORS as error:
        raise UserError(misfit(plan, f"its {component.class_name} differs: {in_our_words(error)}")) from error
