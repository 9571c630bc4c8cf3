"""The pipeline as its authors left it: out of a folder, out of one file, or out of the repository's own code."""

from typing import Any

import torch

from sglang_gen import log, remote_code
from sglang_gen.errors import UserError, first_line
from sglang_gen.types import Plan

# What a file that is not the expected model makes diffusers' conversion trip over.
MISMATCH = (KeyError, ValueError, RuntimeError, IndexError, AttributeError, TypeError)


def own_class(plan: Plan) -> Any:
    """The pipeline class that the model's own code defines; None where it is one of diffusers. Raises UserError."""
    try:
        found = remote_code.pipeline_class(plan.card)
    except (OSError, ImportError, SyntaxError, AttributeError) as error:
        raise UserError(
            f"{plan.card.name}: its own code {plan.card.code[0]} cannot be loaded: {first_line(error)}"
        ) from error
    if found is not None and plan.run.model.pipeline_class_name:
        raise UserError(
            f"--pipeline-class-name cannot replace {found.__name__}, which the code of {plan.card.name} defines"
        )
    return found


def read(plan: Plan, pipeline_class: Any, dtype: torch.dtype, replaced: dict[str, Any]) -> Any:
    """The pipeline with its weights, on the CPU; components in `replaced` are taken as they are. Raises UserError."""
    if plan.card.file is None:
        return pipeline_class.from_pretrained(
            str(plan.card.folder), dtype=dtype, use_safetensors=True,
            trust_remote_code=plan.run.model.trust_remote_code, **replaced,
        )  # fmt: skip
    if not hasattr(pipeline_class, "from_single_file"):
        raise UserError(f"--model-path: diffusers does not read {pipeline_class.__name__} from a single file")
    try:
        with log.quieter("diffusers.models.modeling_utils"):  # its remark on a list of modules that is empty
            pipeline = pipeline_class.from_single_file(
                str(plan.card.file), config=str(plan.card.folder), dtype=dtype, local_files_only=True, **replaced
            )
    except MISMATCH as error:
        missing = isinstance(error, NotImplementedError) and "meta tensor" in str(error)  # a place that stayed empty
        reason = "it lacks weights that those name" if missing else first_line(error)
        raise UserError(misfit(plan, reason)) from error
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            module.eval()  # diffusers leaves a T5 out of a file in training, with its dropout
            empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
            if empty:
                reason = f"it lacks {len(empty)} weights of {part}, such as {empty[0]}"
                raise UserError(misfit(plan, reason))
    return pipeline


def misfit(plan: Plan, reason: str) -> str:
    """The sentence for a single file that is not the model of the component configs."""
    kind = plan.pipeline_class
    where = f"the component configs of {plan.run.model.configs or plan.run.model.preset}"
    return (
        f"--model-path: {plan.card.file} does not fit {where} ({kind}): {reason}; name the right preset with --model-id"
    )
