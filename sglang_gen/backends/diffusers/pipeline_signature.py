"""The output and the arguments of a pipeline, read from the signature of its call."""

import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from sglang_gen.config.schema import BackendName
from sglang_gen.errors import UserError, nearest
from sglang_gen.families import registry
from sglang_gen.hub import component_classes
from sglang_gen.plan import backend_choice
from sglang_gen.types import Plan


@dataclass(frozen=True)
class Kind:
    """A pipeline class and the arguments that its call accepts and requires; `makes` is image, video or audio."""

    pipeline_class: Any
    accepted: frozenset[str]
    required: frozenset[str]
    makes: str


def check_class(plan: Plan) -> None:
    """Raises UserError if only the native engine has the model's pipeline, with the reason why it does not run it."""
    name = plan.pipeline_class
    if registry.by_pipeline_class(name) is None or component_classes.in_diffusers(name):
        return
    lack = f"diffusers {diffusers.__version__} has no {name}"
    if plan.run.backend.name is BackendName.diffusers:
        raise UserError(f"{lack}; run with --backend sglang or auto")
    _, reason = backend_choice.choose(plan.run, plan.card, plan.device)
    raise UserError(f"The native engine cannot run this: {reason}; and {lack}")


def find(name: str, image: bool, mask: bool, own: Any = None) -> Kind:
    """The class of this name, or its image-to-image or inpainting variant if an image (and a mask) is given.

    `own` is the class that the model's code defines, used instead of one of diffusers. Raises UserError if diffusers
    has no such class, or if no variant accepts the image.
    """
    pipeline_class = own or getattr(diffusers, name, None)
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, DiffusionPipeline)):
        legal = [item for item in dir(diffusers) if item.endswith("Pipeline")]
        raise UserError(f"diffusers {diffusers.__version__} has no pipeline class '{name}'{nearest(name, legal)}")
    kind = _describe(pipeline_class)
    if (image and "image" not in kind.accepted) or (mask and "mask_image" not in kind.accepted):
        kind = _variant(kind, "inpainting" if mask else "image to video" if kind.makes == "video" else "image to image")
    return kind


def source_of_call(kind: Kind) -> str:
    """Source code of the pipeline's call; empty if it is not available."""
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(kind.pipeline_class.__call__)))
    except (OSError, TypeError):
        return ""


def _describe(pipeline_class: Any) -> Kind:
    parameters = inspect.signature(pipeline_class.__call__).parameters
    accepted = frozenset(parameters) - {"self"}
    required = frozenset(
        name
        for name, parameter in parameters.items()
        if name != "self" and parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    )
    makes = "video" if "num_frames" in accepted else "audio" if _makes_audio(pipeline_class, accepted) else "image"
    return Kind(pipeline_class, accepted, required, makes)


def _makes_audio(pipeline_class: Any, accepted: frozenset[str]) -> bool:
    """Whether the call accepts a length in seconds, or the pipeline's module has an AudioPipelineOutput."""
    lengths = any(name.startswith("audio_") and name.endswith("_in_s") for name in accepted)
    return lengths or hasattr(inspect.getmodule(pipeline_class), "AudioPipelineOutput")


def _variant(kind: Kind, task: str) -> Kind:
    """The class of the same model for another task, from diffusers' auto pipeline tables."""
    from diffusers.pipelines import auto_pipeline

    tables = {
        "image to image": auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        "inpainting": auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
        "image to video": getattr(auto_pipeline, "AUTO_IMAGE2VIDEO_PIPELINES_MAPPING", {}),  # since diffusers 0.42
    }
    name = kind.pipeline_class.__name__
    sources = (
        auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        getattr(auto_pipeline, "AUTO_TEXT2VIDEO_PIPELINES_MAPPING", {}),
    )
    for table in sources:
        for model, member in table.items():
            if member.__name__ == name and model in tables[task]:
                return _describe(tables[task][model])
    raise UserError(f"{name} takes no input image, and diffusers has no {task} pipeline for the same weights")
