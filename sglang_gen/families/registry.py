"""Finds the model families by their folders. Imports torch only for pipelines, conversions and examples."""

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_gen.families.contract import Spec

if TYPE_CHECKING:
    from torch import Tensor

    from sglang_gen.families.examples_contract import Examples
    from sglang_gen.families.pipeline_contract import Pipeline

    Conversion = Callable[[Mapping[str, Any], dict[str, Tensor]], dict[str, Tensor]]  # (config, tensors by name)


@cache
def specs() -> tuple[Spec, ...]:
    """The specs of all families; those with the most text encoders come first."""
    names = [path.parent.name for path in Path(__file__).parent.glob("*/spec.py")]
    found: list[Spec] = [_module(name, "spec").SPEC for name in names]
    return tuple(sorted(found, key=lambda spec: (-len(spec.text_encoders), spec.name)))


def by_name(name: str) -> Spec:
    """The family in the folder `name`. Raises KeyError if there is none."""
    return {spec.name: spec for spec in specs()}[name]


def by_pipeline_class(name: str) -> Spec | None:
    """The family whose pipeline has this class in model_index.json."""
    return next((spec for spec in specs() if spec.pipeline_class == name), None)


def by_network_class(name: str) -> Spec | None:
    """The first family whose denoising network may have this class in diffusers, whatever the pipeline.

    Families with the same network agree in what they say about it.
    """
    return next((spec for spec in specs() if name in spec.network_classes), None)


def packing(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """`Spec.patch` for a network of this class in diffusers: latents per token in each dimension."""
    like = (spec for spec in specs() if any(part in name for part in spec.packs_like))
    spec = next(like, by_network_class(name))
    return Spec.patch if spec is None else spec.patch


def file_prefixes(component: str) -> tuple[str, ...]:
    """Prefixes of a text encoder's tensors in single files of all families."""
    return tuple(dict.fromkeys(prefix for spec in specs() for prefix in spec.file_prefixes.get(component, ())))


def pipeline(spec: Spec) -> "Pipeline":
    """A new pipeline of this family."""
    created: Pipeline = _module(spec.name, "pipeline").PIPELINE(spec)
    return created


def examples(spec: Spec) -> "Examples":
    """The family's examples, for tests, benchmarks and comparisons."""
    created: Examples = _module(spec.name, "examples").EXAMPLES(spec)
    return created


def conversion(network_class: str) -> "Conversion | None":
    """The family's conversion of its authors' layout to diffusers' tensor names; None if diffusers' is used."""
    spec = by_network_class(network_class)
    if spec is None or not spec.converts_original:
        return None
    convert: Conversion = _module(spec.name, "original").convert
    return convert


def _module(family: str, name: str) -> Any:
    return importlib.import_module(f"sglang_gen.families.{family}.{name}")
