"""What kind of thing a pipeline makes and takes, read from the signature of its call."""

import inspect
from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from sglang_gen import log
from sglang_gen.errors import UserError, nearest


@dataclass(frozen=True)
class Kind:
    """A pipeline class and what its call accepts; `makes` is image, video or audio."""

    pipeline_class: Any
    accepted: frozenset[str]
    required: frozenset[str]
    makes: str


def find(name: str, image: bool, mask: bool, own: Any = None) -> Kind:
    """The class of this name, or its image-to-image or inpainting sister where an image (and a mask) is given.

    `own` is the class that the model itself defines, in place of one of diffusers. Raises UserError when diffusers has
    no such class, or when it has no place for the image.
    """
    found = own or getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        legal = [item for item in dir(diffusers) if item.endswith("Pipeline")]
        raise UserError(f"diffusers {diffusers.__version__} has no pipeline class '{name}'{nearest(name, legal)}")
    kind = _describe(found)
    if (image and "image" not in kind.accepted) or (mask and "mask_image" not in kind.accepted):
        kind = _sister(kind, "inpainting" if mask else "image to video" if kind.makes == "video" else "image to image")
    return kind


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
    """By the length that is asked for, in seconds, or by the output class that the pipeline's module knows."""
    lengths = any(name.startswith("audio_") and name.endswith("_in_s") for name in accepted)
    return lengths or hasattr(inspect.getmodule(pipeline_class), "AudioPipelineOutput")


def _sister(kind: Kind, task: str) -> Kind:
    """The class of the same model for another task, by diffusers' own tables."""
    with log.quieter("transformers"):  # the import of all pipelines brings remarks on packages that none of ours needs
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
