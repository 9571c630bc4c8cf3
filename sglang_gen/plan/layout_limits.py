"""Limits of a run's parallel layout: heads and channels bound tp and Ulysses, the image size bounds sp.

A layout that exceeds them is refused with one sentence that names the degree to change and the nearest legal layouts
with the same number of ranks.
"""

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace

from sglang_gen import env
from sglang_gen.config.schema import Run
from sglang_gen.errors import UserError
from sglang_gen.families import registry
from sglang_gen.families.contract import Limits, Spec, configured_heads
from sglang_gen.plan import backend_choice, image_size, step_cache
from sglang_gen.types import DENOISERS, Layout, ModelCard, Sample, Size


def common_heads(card: ModelCard) -> int | None:
    """Greatest common divisor of the attention head counts of the denoising networks; None if they are unknown."""
    heads: list[int] = []
    for network in (card.components[name] for name in DENOISERS if name in card.components):
        spec = registry.by_network_class(network.class_name)
        heads += (spec.heads if spec else configured_heads)(network.config)
    return math.gcd(*heads) if heads else None


def obstacle(network: Limits, layout: Layout) -> tuple[str, str] | None:
    """Return (field of the parallel group to change, reason) if the network does not support the layout, else None."""
    tp, ulysses = layout.tp, layout.ulysses
    for count in network.heads:
        if count % tp:
            return "tp_size", f"tp_size is {tp} and this network has layers of {count} heads"
    for count, what in network.channels:
        if count % tp:
            return "tp_size", f"tp_size is {tp} and this network has {what.format(count)}"
    for count in network.heads:
        if count // tp % ulysses:
            left = f", {count // tp} on each of {tp} tensor parallel ranks" if tp > 1 else ""
            why = f"ulysses_degree is {ulysses} and this network has layers of {count} heads{left}"
            return "ulysses_degree", why
    if layout.ring * ulysses > max(network.units, 1):  # a single rank takes an image of any size
        sp = f"sp_degree is {layout.ring * ulysses} (ring_degree {layout.ring} x ulysses_degree {ulysses})"
        return "sp_degree", f"{sp} and this image has {network.units} {network.unit}"
    return None


def nearest(network: Limits, layout: Layout) -> list[Layout]:
    """Legal layouts with the most ranks not above those of `layout`, in the order of the size of the change.

    The degrees of data and guidance parallelism are kept.
    """

    def distance(other: Layout) -> float:
        return sum(abs(math.log2(getattr(other, axis) / getattr(layout, axis))) for axis in ("ring", "ulysses", "tp"))

    legal = list(_largest(network, layout))
    most = max((other.ranks for other in legal), default=0)
    return sorted(
        (other for other in legal if other.ranks == most),
        key=lambda other: (distance(other), other.ring, other.ulysses),
    )


def _largest(network: Limits, layout: Layout) -> Iterator[Layout]:
    """For each legal pair of tensor parallel and Ulysses degrees, the largest ring within the ranks of `layout`."""
    ranks = layout.ring * layout.ulysses * layout.tp
    divided = math.gcd(*network.heads, *(count for count, _ in network.channels)) or 1
    for tp in (degree for degree in range(1, divided + 1) if divided % degree == 0):
        for ulysses in range(1, min(ranks // tp, max(network.units, 1)) + 1):
            ring = min(ranks // tp, max(network.units, 1)) // ulysses
            other = replace(layout, ring=ring, ulysses=ulysses, tp=tp)
            if obstacle(network, other) is None:
                yield other


def overrides(layout: Layout, requested: Layout, stated: Set[str]) -> str:
    """The overrides that change the layout `requested`, given by the fields in `stated`, to `layout`.

    They set the stated fields, and every other degree above 1.
    """
    axes = {"ring_degree": layout.ring, "ulysses_degree": layout.ulysses, "tp_size": layout.tp}
    values = {"sp_degree": layout.ring * layout.ulysses, **axes}
    if layout.ranks != requested.ranks:
        values = {"num_gpus": layout.ranks, "dp_degree": layout.ranks // layout.dp, **values}
    shown = [name for name, value in values.items() if name in stated or (name in axes and value > 1)]
    return " ".join(f"parallel.{name}={values[name]}" for name in shown)


def check_network(network: Limits, layout: Layout, stated: Set[str]) -> None:
    """Raises UserError for a layout that the network does not support."""
    refused = obstacle(network, layout)
    if refused is None:
        return
    field, why = refused
    others = nearest(network, layout)
    shown = " or ".join(overrides(other, layout, stated) for other in others[:2])
    degrees = sorted({_degree(other, field) for other in others})
    raise UserError(f"parallel.{why}: take {field} {_listed(degrees)}, such as {shown}")


def _degree(layout: Layout, field: str) -> int:
    values = {"tp_size": layout.tp, "ulysses_degree": layout.ulysses, "sp_degree": layout.ring * layout.ulysses}
    return values[field]


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def check_layout(
    run: Run,
    card: ModelCard,
    backend: str,
    reason: str | None,
    layout: Layout,
    stated: Set[str],
    batches: Sequence[Sequence[Sample]],
) -> None:
    """Raises UserError for a layout that the backend, the network or the request does not support.

    `reason` says why backend=auto did not choose the native engine.
    """
    if backend == "diffusers" and layout.ring * layout.ulysses * layout.tp > 1:
        if reason:
            raise UserError(
                f"This layout ({_degrees(layout)}) needs the native engine, which cannot run this: {reason}; "
                "diffusers supports only parallel.dp_size and parallel.enable_cfg_parallel"
            )
        raise UserError(
            f"The diffusers backend does not split a network over ranks (requested: {_degrees(layout)}); it supports "
            "parallel.dp_size and parallel.enable_cfg_parallel, the native engine (backend=sglang) supports the others"
        )
    if layout.dp > len(batches):
        have = "1 batch" if len(batches) == 1 else f"{len(batches)} batches"
        raise UserError(
            f"parallel.dp_size is {layout.dp} and the run has {have} of images to distribute; "
            "raise --num-samples or lower sampling.batch_size or dp_size"
        )
    if layout.cfg > 1:
        _check_branches(run, backend, backend_choice.family(run, card), batches)
    if backend == "sglang" and layout.ring * layout.ulysses * layout.tp > 1:
        _check_split(run, card, layout, stated)


def _degrees(layout: Layout) -> str:
    return f"dp {layout.dp}, cfg {layout.cfg}, ring {layout.ring}, ulysses {layout.ulysses}, tp {layout.tp}"


def _check_branches(run: Run, backend: str, spec: Spec | None, batches: Sequence[Sequence[Sample]]) -> None:
    """Raises UserError for guidance parallelism without a second branch."""
    if backend == "sglang" and spec and spec.guidance.embedded:
        scale = run.backend.diffusers_kwargs.get("true_cfg_scale", 1.0)
        negative = any(sample.negative_prompt is not None for batch in batches for sample in batch)
        if not negative or (isinstance(scale, (int, float)) and scale <= 1):
            reason = spec.guidance.unguided.format(scale=run.sampling.guidance_scale)
            raise UserError(f"parallel.enable_cfg_parallel: {reason}; run with parallel=single or another axis")
    elif run.sampling.guidance_scale <= 1:
        raise UserError(
            f"parallel.enable_cfg_parallel: without guidance (--guidance-scale {run.sampling.guidance_scale}) "
            "there is one branch; raise the scale or run with parallel=single"
        )
    if backend == "diffusers" and step_cache.wanted(run.cache):
        raise UserError(
            "parallel.enable_cfg_parallel and a step cache exclude each other on the diffusers backend: cache-dit "
            "decides for both branches together; use one of them, or the native engine (backend=sglang)"
        )


def _check_split(run: Run, card: ModelCard, layout: Layout, stated: Set[str]) -> None:
    """Raises UserError for a layout on which the native engine cannot split this network."""
    spec = _family(run, card)
    if layout.ring * layout.ulysses > 1 and spec.video is not None:
        raise UserError(
            f"Sequence parallelism ({_degrees(layout)}) does not split the frames of a video yet, and "
            f"{spec.pipeline_class} makes video; use tp_size, dp_size or enable_cfg_parallel"
        )
    if layout.ring * layout.ulysses > 1 and run.attention.backend == "flex":
        raise UserError(
            "attention=flex depends on the positions of tokens in the image, and sequence parallelism "
            f"({_degrees(layout)}) splits them over ranks; use another kernel, or only tp_size, dp_size or "
            "enable_cfg_parallel"
        )
    if run.sampling.image_path and spec.keeps_image_size:
        check_size(run, card, layout, stated, None)  # the size of the input image is not known yet
    else:
        config, factor = card.components[spec.network].config, image_size.latent_factor(card) or 1
        check_size(run, card, layout, stated, image_size.chosen(run.sampling, spec, config, factor))


def _family(run: Run, card: ModelCard) -> Spec:
    spec = backend_choice.family(run, card)
    assert spec is not None  # the native engine was chosen
    return spec


def check_size(run: Run, card: ModelCard, layout: Layout, stated: Set[str], size: Size | None) -> None:
    """Raises UserError for a layout that the network does not support at this size in pixels; None: an unknown size."""
    spec = _family(run, card)
    for name in spec.networks_of(card):
        network = spec.limits(card.components[name].config, size or Size(0, 0), image_size.latent_factor(card) or 1)
        check_network(network if size else replace(network, units=layout.ranks), layout, stated)


def check_machine(ranks: int, device: str) -> None:
    """Raises UserError for more ranks on this machine than it has GPUs."""
    if (count := _too_few_gpus(ranks, device)) is not None:
        raise UserError(f"{ranks} ranks need {ranks} GPUs and torch sees {count}; device=cpu runs them as processes")


def machine_warnings(ranks: int, device: str) -> list[str]:
    """Warns of a dry run that plans for more GPUs than this machine has, which a run is refused for."""
    if (count := _too_few_gpus(ranks, device)) is None:
        return []
    return [
        f"{ranks} ranks need {ranks} GPUs and torch sees {count}: this machine can plan such a run, not carry it out"
    ]


def _too_few_gpus(ranks: int, device: str) -> int | None:
    """Number of GPUs that torch sees, if the ranks of this machine need more; else None.

    If a launcher started several processes and this one sees one GPU, the GPU is assumed to be its own. If it is not,
    NCCL reports an error when the process group is formed.
    """
    if device != "cuda" or ranks <= (count := env.gpu_count()):
        return None
    place = env.torchrun()
    return count if place is None or place.here == 1 or count != 1 else None
