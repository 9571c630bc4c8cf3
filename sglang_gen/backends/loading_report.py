"""Loads components from folders with their own libraries, and checks that all weights were found.

The libraries initialize missing tensors randomly and ignore unexpected ones, at most with a log line. Here missing
tensors are an error and unexpected ones a warning, with the same sentences for all components and both backends.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_gen import log
from sglang_gen.errors import UserError
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.hub.safetensors_header import header
from sglang_gen.hub.weight_files import few

# Tensors of other networks in the same checkpoint (a CLIP text model is often saved with its vision model, a T5 encoder
# with its decoder), and buffers that a module computes itself.
WITHOUT_EFFECT = re.compile(
    r"(^|\.)(position_ids|num_batches_tracked|num_updates)$"
    r"|(^|\.)(text_projection\.weight|logit_scale)$|(^|\.)(vision_model|visual_projection|lm_head)\.|^decoder\."
)


def is_reported(kind: type) -> bool:
    """Whether a class is a network of diffusers or transformers, which report on loading; imports neither."""
    return any(base.__name__ in ("ModelMixin", "PreTrainedModel") for base in kind.__mro__)


def read(kind: Any, folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Load a network from its folder, on the CPU.

    Raises UserError for tensors that are missing or have another shape, and the library's own exceptions.
    """
    declared = "quantization_config" in config  # packed tensors have other shapes, which their library checks
    try:
        network, report = kind.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=not declared,
        )  # fmt: skip
    except NotImplementedError:  # transformers compares both copies of a shared tensor; one without a place is on meta
        require_complete((), _other_shapes(kind, folder, config), kind.__name__, str(folder))
        raise
    judge(report, kind.__name__, str(folder))
    return network


def _other_shapes(kind: Any, folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Clauses about tensors whose shape in the files is not that of the network, found by headers alone."""
    network = without_weights(kind, config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: shape for file in in_folder(folder) for name, shape in header(file).items()}
    return [
        shape_clause(name, given[name], expected[name])
        for name in sorted(given)
        if given[name] != expected.get(name, given[name])
    ]


def without_weights(kind: Any, config: Mapping[str, Any]) -> Any:
    """A network of diffusers or transformers on the meta device, with real buffers."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        network = kind(kind.config_class.from_dict(dict(config))) if hasattr(kind, "config_class") else None
        network = kind.from_config(dict(config)) if network is None else network
    if hasattr(network, "tie_weights"):  # each assignment of a parameter to an empty network made a new one
        network.tie_weights()
    return network


def shape_clause(name: str, actual: Sequence[int], expected: Sequence[int]) -> str:
    return f"{name} has the shape {list(actual)} in place of {list(expected)}"


def judge(report: Mapping[str, Any], class_name: str, where: str) -> None:
    """Raises UserError for missing tensors and shape mismatches in a loading report; warns of unexpected tensors."""
    missing = sorted(map(str, report.get("missing_keys") or ()))
    shapes = [
        shape_clause(name, actual, expected)
        for name, actual, expected in sorted(report.get("mismatched_keys") or (), key=str)
    ]
    require_complete(missing, shapes, class_name, where)
    warn_unused(map(str, report.get("unexpected_keys") or ()), class_name, where)


def require_complete(missing: Sequence[str], shapes: Sequence[str], class_name: str, where: str) -> None:
    """Raises UserError naming tensors that are missing or have another shape."""
    if missing:
        raise UserError(
            f"{where} is not a checkpoint of {class_name}: it lacks {len(missing)} of its tensors, such as {missing[0]}"
        )
    if shapes:
        raise UserError(
            f"{where} is not a checkpoint of this {class_name}: {len(shapes)} of its tensors "
            f"have another shape; {shapes[0]}"
        )


def warn_unused(names: Iterable[str], class_name: str, where: str) -> None:
    """Warn of unexpected tensors, except for those that are known to have no effect on the network."""
    unused = sorted(name for name in names if not WITHOUT_EFFECT.search(name))
    if unused:
        log.warn_once(
            f"{where}: {class_name} has no place for {len(unused)} tensors ({few(unused)}); they are left out, and the "
            "result can differ from the one that the weights were made for"
        )
