"""Which layouts a run can have: what divides by which degree, how many parts there are to share out, and for whom.

Pure facts for the plan. A layout that cannot be is refused in one sentence that names the number to change and the
nearest layouts of as many ranks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from sglang_gen import env
from sglang_gen.config.schema import CacheMethod, Run
from sglang_gen.errors import UserError
from sglang_gen.plan import image_size
from sglang_gen.plan.backend_choice import NATIVE
from sglang_gen.plan.supported_configs import NEEDS, UNET_DEFAULTS, for_each_level
from sglang_gen.types import DENOISERS, Component, Layout, ModelCard, Sample


@dataclass(frozen=True)
class Limits:
    """What of a network, and of the picture that it makes, limits how it is spread over ranks."""

    heads: tuple[int, ...]  # of its attention layers, each number once
    channels: tuple[tuple[int, str], ...] = ()  # what tensor parallelism divides beside them, and its name
    units: int = 1  # parts of the picture that sequence parallelism shares out
    unit: str = "parts"  # what they are


def attention_heads(config: Mapping[str, Any], is_unet: bool) -> tuple[int, ...]:
    """Heads of every kind of attention layer, smallest first; of a UNet those of its middle and of levels that attend.

    `attention_head_dim` of a UNet is the number of its heads, a mistake that diffusers keeps for its checkpoints.
    """
    if not is_unet:
        found = {config.get("num_attention_heads")}
    else:
        c = {**UNET_DEFAULTS, **config}
        heads = for_each_level(c.get("num_attention_heads") or c["attention_head_dim"], len(c["block_out_channels"]))
        levels = [*zip(heads, c["down_block_types"], strict=False), (heads[-1], "CrossAttn")]
        levels += zip(reversed(heads), c["up_block_types"], strict=False)
        found = {count for count, kind in levels if "Attn" in kind}
    return tuple(sorted(count for count in found if isinstance(count, int) and count > 0))


def encoder_ranks(component: Component, dtype: str, tp: int) -> int:
    """Ranks that share the weights of a text encoder: T5 where its layers divide by `tp`, otherwise one.

    In float16 transformers keeps some layers of T5 in float32, and it is not sharded.
    """
    divides = component.class_name == "T5EncoderModel" and dtype != "float16"
    return tp if divides and not any(component.config[key] % tp for key in ("num_heads", "d_ff")) else 1


def common_heads(card: ModelCard) -> int | None:
    """Greatest common divisor of the attention head counts of the denoising network; None where they are not known."""
    for name in DENOISERS:
        if name in card.components:
            part = card.components[name]
            heads = attention_heads(part.config, part.class_name == "UNet2DConditionModel")
            return math.gcd(*heads) if heads else None
    return None


def limits(pipeline: str, config: Mapping[str, Any], height: int, width: int, factor: int) -> Limits:
    """Of a network of the native engine's module `pipeline`, for pictures of so many pixels, `factor` of them a latent.

    A network that is cut along tokens has nothing to divide beside heads: its layers are multiples of them wide.
    """
    is_unet = NEEDS[pipeline].network == "unet"
    heads = attention_heads(config, is_unet)
    if pipeline == "flux":
        return Limits(heads, (), (height // factor // 2) * (width // factor // 2), "tokens")
    if pipeline == "sd3":
        return Limits(heads, (), height // factor // config["patch_size"], "rows of patches")
    c = {**UNET_DEFAULTS, **config}
    channels = [(c["norm_num_groups"], "group norms of {} groups")]
    channels += [(count, "residual blocks of {} channels") for count in sorted(set(c["block_out_channels"]))]
    band = factor * 2 ** (len(c["block_out_channels"]) - 1)  # the coarsest level has a row for each
    return Limits(heads, tuple(channels), height // band, f"bands of {band} rows of pixels")


def obstacle(found: Limits, layout: Layout) -> tuple[str, str] | None:
    """(field of the parallel group to change, why) of a layout that the network cannot have; None where it can."""
    tp, ulysses = layout.tp, layout.ulysses
    for count in found.heads:
        if count % tp:
            return "tp_size", f"tp_size is {tp} and this network has layers of {count} heads"
    for count, what in found.channels:
        if count % tp:
            return "tp_size", f"tp_size is {tp} and this network has {what.format(count)}"
    for count in found.heads:
        if count // tp % ulysses:
            left = f", {count // tp} on each of {tp} tensor parallel ranks" if tp > 1 else ""
            why = f"ulysses_degree is {ulysses} and this network has layers of {count} heads{left}"
            return "ulysses_degree", why
    if layout.ring * ulysses > max(found.units, 1):  # one rank has the whole picture, however small
        sp = f"sp_degree is {layout.ring * ulysses} (ring_degree {layout.ring} x ulysses_degree {ulysses})"
        return "sp_degree", f"{sp} and this picture has {found.units} {found.unit}"
    return None


def nearest(found: Limits, layout: Layout) -> list[Layout]:
    """Legal layouts of as many ranks, or else of as many fewer as it takes; those that change the least come first.

    Data and guidance parallelism stay as they are.
    """

    def distance(other: Layout) -> float:
        return sum(abs(math.log2(getattr(other, axis) / getattr(layout, axis))) for axis in ("ring", "ulysses", "tp"))

    legal = list(_longest(found, layout))
    most = max((each.ranks for each in legal), default=0)
    return sorted(
        (each for each in legal if each.ranks == most), key=lambda each: (distance(each), each.ring, each.ulysses)
    )


def _longest(found: Limits, layout: Layout) -> Iterator[Layout]:
    """For each legal degree of tensor parallelism and Ulysses the longest ring within the ranks of `layout`."""
    asked = layout.ring * layout.ulysses * layout.tp
    divided = math.gcd(*found.heads, *(count for count, _ in found.channels)) or 1
    for tp in (degree for degree in range(1, divided + 1) if divided % degree == 0):
        for ulysses in range(1, min(asked // tp, max(found.units, 1)) + 1):
            ring = min(asked // tp, max(found.units, 1)) // ulysses
            each = replace(layout, ring=ring, ulysses=ulysses, tp=tp)
            if obstacle(found, each) is None:
                yield each


def words(layout: Layout, asked: Layout, stated: Set[str]) -> str:
    """The overrides that make `layout` of a request for `asked` that stated those fields.

    What was stated is stated again where it changes; of the rest what is more than one.
    """
    axes = {"ring_degree": layout.ring, "ulysses_degree": layout.ulysses, "tp_size": layout.tp}
    values = {"sp_degree": layout.ring * layout.ulysses, **axes}
    if layout.ranks != asked.ranks:
        values = {"num_gpus": layout.ranks, "dp_degree": layout.ranks // layout.dp, **values}
    shown = [name for name, value in values.items() if name in stated or (name in axes and value > 1)]
    return " ".join(f"parallel.{name}={values[name]}" for name in shown)


def check_network(found: Limits, layout: Layout, stated: Set[str]) -> None:
    """Raises UserError for a layout that the network cannot have."""
    refused = obstacle(found, layout)
    if refused is None:
        return
    field, why = refused
    others = nearest(found, layout)
    shown = " or ".join(words(other, layout, stated) for other in others[:2])
    degrees = sorted({_degree(other, field) for other in others})
    raise UserError(f"parallel.{why}: take {field} {_listed(degrees)}, such as {shown}")


def _degree(layout: Layout, field: str) -> int:
    values = {"tp_size": layout.tp, "ulysses_degree": layout.ulysses, "sp_degree": layout.ring * layout.ulysses}
    return values[field]


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def check(
    run: Run,
    card: ModelCard,
    backend: str,
    reason: str | None,
    layout: Layout,
    stated: Set[str],
    batches: Sequence[Sequence[Sample]],
) -> None:
    """Refuse a layout that the backend, the network or the request cannot fill. Raises UserError.

    `reason` is why the native engine was not taken, where the choice was ours.
    """
    if backend == "diffusers" and layout.ring * layout.ulysses * layout.tp > 1:
        if reason:
            raise UserError(
                f"This layout ({_degrees(layout)}) needs the native engine, which cannot run this: {reason}; "
                "diffusers runs parallel.dp_size and parallel.enable_cfg_parallel alone"
            )
        raise UserError(
            f"The diffusers backend does not split a network over ranks (asked: {_degrees(layout)}); it runs "
            "parallel.dp_size and parallel.enable_cfg_parallel, the native engine (backend=sglang) runs the others"
        )
    if layout.dp > len(batches):
        have = "1 batch" if len(batches) == 1 else f"{len(batches)} batches"
        raise UserError(
            f"parallel.dp_size is {layout.dp} and the run has {have} of pictures to share out; "
            "raise --num-samples or lower sampling.batch_size or dp_size"
        )
    if layout.cfg > 1:
        _check_branches(run, backend, NATIVE.get(run.model.pipeline_class_name or card.pipeline_class), batches)
    if backend == "sglang" and layout.ring * layout.ulysses * layout.tp > 1:
        _check_split(run, card, layout, stated)


def _degrees(layout: Layout) -> str:
    return f"dp {layout.dp}, cfg {layout.cfg}, ring {layout.ring}, ulysses {layout.ulysses}, tp {layout.tp}"


def _check_branches(run: Run, backend: str, pipeline: str | None, batches: Sequence[Sequence[Sample]]) -> None:
    """Refuse two ranks for the branches of guidance where there is one branch."""
    if backend == "sglang" and pipeline == "flux":
        scale = run.backend.diffusers_kwargs.get("true_cfg_scale", 1.0)
        negative = any(sample.negative_prompt is not None for batch in batches for sample in batch)
        if not negative or (isinstance(scale, (int, float)) and scale <= 1):
            raise UserError(
                "parallel.enable_cfg_parallel: there is no guidance without a negative prompt and a true_cfg_scale "
                "above 1.0; run with parallel=single or another axis"
            )
    elif run.sampling.guidance_scale <= 1:
        raise UserError(
            f"parallel.enable_cfg_parallel: without guidance (--guidance-scale {run.sampling.guidance_scale}) "
            "there is one branch; raise the scale or run with parallel=single"
        )
    if run.cache.method is not CacheMethod.none or run.cache.cache_dit_config:
        raise UserError(
            "parallel.enable_cfg_parallel and a step cache exclude each other: the cache decides on both branches "
            "together; give one"
        )


def _check_split(run: Run, card: ModelCard, layout: Layout, stated: Set[str]) -> None:
    """Refuse what the native engine cannot make of this network on these ranks."""
    if layout.ring * layout.ulysses > 1 and run.attention.backend == "flex":
        raise UserError(
            "attention=flex looks at where tokens stand in the picture, and sequence parallelism "
            f"({_degrees(layout)}) gives each rank some of them; take another kernel, or tp_size, dp_size or "
            "enable_cfg_parallel alone"
        )
    pipeline = _pipeline(run, card)
    config = card.components[NEEDS[pipeline].network].config
    if run.sampling.image_path and NEEDS[pipeline].network == "unet":
        check_size(run, card, layout, stated, None, None)  # that of the picture, which is read later
    else:
        height, width = image_size.chosen(
            run.sampling, image_size.DEFAULT[pipeline], config, image_size.latent_factor(card) or 1
        )
        check_size(run, card, layout, stated, height, width)


def _pipeline(run: Run, card: ModelCard) -> str:
    return NATIVE[run.model.pipeline_class_name or card.pipeline_class]


def check_size(
    run: Run, card: ModelCard, layout: Layout, stated: Set[str], height: int | None, width: int | None
) -> None:
    """Raises UserError for a layout that the network cannot have, making pictures of this size if it is known."""
    pipeline = _pipeline(run, card)
    config = card.components[NEEDS[pipeline].network].config
    found = limits(pipeline, config, height or 0, width or 0, image_size.latent_factor(card) or 1)
    if not (height and width):
        found = replace(found, units=layout.ranks)
    check_network(found, layout, stated)


def check_machine(ranks: int, device: str) -> None:
    """Raises UserError for more ranks on this machine than it has GPUs.

    Where a launcher has started several processes and this one sees one GPU, that is taken for its own; if it is not,
    NCCL says so when the ranks meet.
    """
    if device != "cuda" or ranks <= (count := env.gpu_count()):
        return
    place = env.torchrun()
    if place is None or place.here == 1 or count != 1:
        raise UserError(f"{ranks} ranks need {ranks} GPUs and torch sees {count}; device=cpu runs them as processes")
