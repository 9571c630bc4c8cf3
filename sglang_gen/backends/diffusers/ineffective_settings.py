"""Warnings for settings of a request that have no effect on its diffusers pipeline."""

import ast
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers

from sglang_gen import log
from sglang_gen.backends.diffusers.pipeline_signature import Kind, source_of_call
from sglang_gen.backends.diffusers.roles import denoisers
from sglang_gen.backends.diffusers.scheduler_settings import Trial
from sglang_gen.types import Plan

FROM_FLAGS = ("negative_prompt", "guidance_scale", "num_inference_steps", "height", "width", "max_sequence_length",
              "num_frames")  # fmt: skip
# Arguments of a call that have an effect only together with another one.
PAIRED_SETTINGS = {
    "negative_original_size": "negative_target_size", "negative_target_size": "negative_original_size",
    "skip_layer_guidance_scale": "skip_guidance_layers", "skip_layer_guidance_start": "skip_guidance_layers",
    "skip_layer_guidance_stop": "skip_guidance_layers",
}  # fmt: skip
GUIDING = ("guidance_rescale", "skip_guidance_layers")  # and all arguments that start with negative_
UNGUIDED_ARGUMENTS = "there is no guidance without a negative prompt and a true_cfg_scale above 1.0"


def warn(plan: Plan, kind: Kind, call: Mapping[str, Any], configure: Mapping[str, Any]) -> None:
    """Warn about each setting that the user gave and that has no effect on this pipeline or its scheduler."""
    for sentence in (*_flags(plan, kind), *_eta(plan, call), *_negative_prompt(plan, kind, call)):
        log.warning(sentence)
    for name, reason in (_arguments(plan, kind, call) | _scheduler(plan, kind, configure)).items():
        log.warning(f"--diffusers-kwargs: {name} has no effect: {reason}")


def _flags(plan: Plan, kind: Kind) -> Iterator[str]:
    name = kind.pipeline_class.__name__
    for argument in FROM_FLAGS:
        if f"sampling.{argument}" in plan.given and argument not in kind.accepted:
            yield f"sampling.{argument} has no effect: {name} does not take it"
    if "output.fps" in plan.given and kind.makes != "video":
        yield f"output.fps has no effect: {name} makes no video"


def _eta(plan: Plan, call: Mapping[str, Any]) -> Iterator[str]:
    scheduler = _class(plan)
    if call.get("eta") and scheduler and "eta" not in inspect.signature(scheduler.step).parameters:
        yield f"eta has no effect with {scheduler.__name__}"


def _negative_prompt(plan: Plan, kind: Kind, call: Mapping[str, Any]) -> Iterator[str]:
    negative = any(sample.negative_prompt for batch in plan.batches for sample in batch)
    true_cfg = "true_cfg_scale" in kind.accepted
    scale = _value(kind, call, "true_cfg_scale") if true_cfg else plan.run.sampling.guidance_scale
    if negative and "negative_prompt" in kind.accepted and scale <= 1:
        which = "true_cfg_scale" if true_cfg else "guidance scale"
        raise_it = """; raise it with --diffusers-kwargs '{"true_cfg_scale": 4.0}'""" if true_cfg else ""
        yield f"The negative prompt has no effect at a {which} of {scale}{raise_it}"


def _value(kind: Kind, call: Mapping[str, Any], name: str) -> Any:
    """An argument of the call, or the pipeline's default."""
    return call.get(name, inspect.signature(kind.pipeline_class.__call__).parameters[name].default)


def _arguments(plan: Plan, kind: Kind, call: Mapping[str, Any]) -> dict[str, str]:
    """Arguments of the call that this pipeline does not read, or that need another setting; each with the reason."""
    ineffective = dict.fromkeys(_unread(kind) & call.keys(), f"{kind.pipeline_class.__name__} ignores it")
    for name, other in PAIRED_SETTINGS.items():
        if name in call and other not in call:
            ineffective[name] = f"it needs {other}"
    reason = _unguided(plan, kind, call)
    for name, value in call.items() if reason else ():
        if value and (name.startswith("negative_") or name in GUIDING):
            ineffective[name] = str(reason)
    if "true_cfg_scale" in call and not _has_negative(plan):
        ineffective["true_cfg_scale"] = UNGUIDED_ARGUMENTS
    zeros = plan.card.settings.get("force_zeros_for_empty_prompt") and not _has_negative(plan)
    if "negative_prompt_2" in call and zeros:
        reason = "without a negative prompt the embeddings are zeros (force_zeros_for_empty_prompt)"
        ineffective["negative_prompt_2"] = reason
    return ineffective | _schedule(plan, kind, call)


def warn_attention_arguments(pipeline: Any, call: Mapping[str, Any]) -> None:
    """Warn of entries of `joint_attention_kwargs` and its like that no attention processor takes.

    Their `scale` is that of adapters which are not merged; ours are.
    """
    given = [
        (f"{argument}.{name}", name)
        for argument, entries in call.items()
        for name in (entries if argument.endswith("attention_kwargs") and isinstance(entries, Mapping) else ())
    ]
    for path, name in given:
        if name == "scale":
            log.warning(f"--diffusers-kwargs: {path} has no effect: adapters are merged with lora.scale")
        elif not any(_takes(network, name) for network in denoisers(pipeline).values()):
            log.warning(f"--diffusers-kwargs: {path} has no effect: no attention processor takes it")


def _takes(network: Any, name: str) -> bool:
    """Whether a network or one of its attention processors reads this entry; True if its processors are not known."""
    kinds = {type(processor) for processor in getattr(network, "attn_processors", {}).values()}
    taken = any(name in inspect.signature(kind.__call__).parameters for kind in kinds)
    return not kinds or taken or f'"{name}"' in inspect.getsource(type(network))


def _schedule(plan: Plan, kind: Kind, call: Mapping[str, Any]) -> dict[str, str]:
    """Arguments of the schedule that the scheduler's config overrides; each with the reason."""
    component = plan.card.components.get("scheduler")
    config = {} if component is None else {**component.config, **plan.run.backend.diffusers_kwargs}
    ineffective = {}
    if "mu" in call and not config.get("use_dynamic_shifting"):
        ineffective["mu"] = "use_dynamic_shifting is false"
    if "sigmas" in call and config.get("use_flow_sigmas") and "use_flow_sigmas" in source_of_call(kind):
        ineffective["sigmas"] = "use_flow_sigmas is true"
    return ineffective


def _has_negative(plan: Plan) -> bool:
    return any(sample.negative_prompt is not None for batch in plan.batches for sample in batch)


def _unguided(plan: Plan, kind: Kind, call: Mapping[str, Any]) -> str | None:
    """Why the call uses no classifier-free guidance, as far as its arguments show; None if it may."""
    if "true_cfg_scale" in kind.accepted:
        return UNGUIDED_ARGUMENTS if not _has_negative(plan) or _value(kind, call, "true_cfg_scale") <= 1 else None
    scale = plan.run.sampling.guidance_scale
    return f"there is no guidance at a scale of {scale}" if "guidance_scale" in kind.accepted and scale <= 1 else None


def _unread(kind: Kind) -> set[str]:
    """Arguments that the pipeline's call declares and does not read."""
    source = source_of_call(kind)
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    return set(kind.accepted) - names if source else set()


def _class(plan: Plan) -> Any:
    component = plan.card.components.get("scheduler")
    return None if component is None else getattr(diffusers, component.class_name, None)


def _scheduler(plan: Plan, kind: Kind, configure: Mapping[str, Any]) -> dict[str, str]:
    if not configure:
        return {}
    config, steps = plan.card.components["scheduler"].config, plan.run.sampling.num_inference_steps
    shifts = hasattr(inspect.getmodule(kind.pipeline_class), "calculate_shift")
    return Trial(_class(plan), config, steps, shifts).idle(configure)
