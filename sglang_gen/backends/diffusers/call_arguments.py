"""The arguments of a pipeline's call: the setting that owns each one, and how --diffusers-kwargs are distributed."""

import inspect
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from sglang_gen.backends.diffusers import schedule_trial
from sglang_gen.backends.diffusers.pipeline_signature import Kind
from sglang_gen.backends.diffusers.scheduler_settings import CANNOT_RUN
from sglang_gen.backends.input_files import read_image
from sglang_gen.backends.scheduler_trial import check_steps, warn_changed
from sglang_gen.errors import UserError, in_our_words, nearest
from sglang_gen.families.img2img import no_steps_left
from sglang_gen.hub import component_classes
from sglang_gen.plan.backend_choice import check_start
from sglang_gen.types import Plan

# Arguments that a documented flag or config key sets; None if sglang-gen sets them itself.
OWNED: dict[str, str | None] = {
    "prompt": "--prompt", "negative_prompt": "--negative-prompt", "num_inference_steps": "--num-inference-steps",
    "guidance_scale": "--guidance-scale", "height": "--height", "width": "--width", "generator": "--seed",
    "num_images_per_prompt": "--num-samples", "num_videos_per_prompt": "--num-samples", "image": "--image-path",
    "noise_sampler_seed": "--seed", "num_frames": "--num-frames", "max_sequence_length": "sampling.max_sequence_length",
    "latents": "sampling.latents", "output_type": None, "return_dict": None, "callback_on_step_end": None,
    "callback_on_step_end_tensor_inputs": None, "callback": None, "callback_steps": None,
}  # fmt: skip
IMAGES = ("mask_image", "control_image", "ip_adapter_image", "last_image", "padding_mask_crop_image")


def split(plan: Plan, kind: Kind) -> tuple[dict[str, Any], dict[str, Any]]:
    """--diffusers-kwargs as (arguments of the call, settings of the scheduler); image arguments are read from files.

    Raises UserError for a name that neither accepts, or that a flag owns.
    """
    scheduler = plan.card.components.get("scheduler")
    scheduler_class = getattr(diffusers, scheduler.class_name, None) if scheduler else None
    settings = set(inspect.signature(scheduler_class.__init__).parameters) - {"self"} if scheduler_class else set()
    call, configure = {}, {}
    for name, value in plan.run.backend.diffusers_kwargs.items():
        if name in OWNED:
            raise UserError(f"--diffusers-kwargs: '{name}' is set by {OWNED[name] or 'sglang-gen itself'}")
        if name in kind.accepted:
            is_image = name in IMAGES and isinstance(value, str)
            call[name] = read_image(value, f"--diffusers-kwargs: '{name}'") if is_image else value
        elif name in settings:
            configure[name] = value
        else:
            where = f"{kind.pipeline_class.__name__} nor {scheduler.class_name if scheduler else 'its scheduler'}"
            raise UserError(
                f"--diffusers-kwargs: neither {where} takes '{name}'"
                f"{nearest(name, kind.accepted - set(OWNED) | settings)}"
            )
    return call, configure


def configured(kind: Any, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A scheduler of this class with the model's config and these settings on top. Raises UserError."""
    try:
        return kind.from_config(config, **settings)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"--diffusers-kwargs: {kind.__name__} refuses {dict(settings)}: {in_our_words(error)}"
        ) from error


def check_scheduler(plan: Plan, kind: Kind, call: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse settings that the model's scheduler does not accept, or with which it cannot make its steps.

    Raises UserError.
    """
    component = plan.card.components.get("scheduler")
    if component is None or not hasattr(diffusers, component.class_name):
        return
    scheduler_class, steps = component_classes.named(component), plan.run.sampling.num_inference_steps
    if settings:
        configured(scheduler_class, component.config, settings)
    try:
        scheduler = scheduler_class.from_config(component.config, **settings)
    except CANNOT_RUN:
        return  # it needs what only its pipeline gives
    if not call.keys() & {"sigmas", "timesteps", "mu"}:
        schedule_trial.check_schedule(kind, scheduler, steps)
    try:
        scheduler.set_timesteps(steps)
    except CANNOT_RUN:
        return
    warn_changed(scheduler, {**component.config, **settings}, steps)
    check_steps(scheduler, scheduler.timesteps)


def check_complete(kind: Kind, plan: Plan, call: dict[str, Any]) -> None:
    """Refuse a request that lacks arguments which the pipeline requires. Raises UserError."""
    name = kind.pipeline_class.__name__
    if "prompt" not in kind.accepted:
        raise UserError(f"{name} takes no prompt; sglang generate needs a pipeline that does")
    if plan.run.sampling.image_path is None and _needs_image(kind):
        raise UserError(f"{name} needs an input image: --image-path FILE")
    if "mask_image" in kind.accepted and "mask_image" not in call:
        raise UserError(f"""{name} needs a mask: --diffusers-kwargs '{{"mask_image": "FILE"}}'""")
    if "strength" in kind.accepted and "mask_image" not in kind.accepted:
        check_start(plan.run)
    _check_strength(kind, plan.run.sampling.num_inference_steps, call)
    _check_steps(plan.run.sampling.num_inference_steps, call)
    missing = sorted(kind.required - set(OWNED) - set(call))
    if missing:
        raise UserError(f"{name} needs {', '.join(missing)}: give it with --diffusers-kwargs")


def _check_strength(kind: Kind, steps: int, call: dict[str, Any]) -> None:
    """Refuse a strength at which no step would run; pipelines fail for it with unrelated errors."""
    if "strength" not in kind.accepted:
        return
    default = inspect.signature(kind.pipeline_class.__call__).parameters["strength"].default
    strength = call.get("strength", default)
    if isinstance(strength, (int, float)) and 0 <= strength <= 1 and _steps_left(kind, steps, strength) < 1:
        raise no_steps_left(strength, steps)


def _steps_left(kind: Kind, steps: int, strength: float) -> int:
    """Steps that run at a noise strength: the pipeline's own rule, because some round up and some down."""
    rule = getattr(kind.pipeline_class, "get_timesteps", None)
    scheduler = SimpleNamespace(timesteps=torch.arange(steps), order=1, set_begin_index=lambda index: None)
    try:
        timesteps, _ = rule(SimpleNamespace(scheduler=scheduler), steps, strength, "cpu")  # type: ignore[misc]
        return len(timesteps)
    except (TypeError, ValueError, AttributeError):  # another signature, or none
        return int(steps * strength)


def network_calls(plan: Plan, kind: Kind, call: dict[str, Any]) -> tuple[int, int]:
    """Least and largest number of network calls per sample, not counting a separate call for a guidance branch.

    A second-order scheduler calls the network twice in every step except the last. `strength` skips steps at the
    start; some pipelines round their number up and some down.
    """
    scheduler = plan.card.components.get("scheduler")
    order = getattr(getattr(diffusers, scheduler.class_name, None), "order", 1) if scheduler else 1
    steps = float(plan.run.sampling.num_inference_steps)
    if plan.run.sampling.image_path is not None and "strength" in kind.accepted:
        default = inspect.signature(kind.pipeline_class.__call__).parameters["strength"].default
        strength = call.get("strength", default)
        steps *= min(max(strength, 0.0), 1.0) if isinstance(strength, (int, float)) else 1.0
    return 1 + order * (math.floor(steps) - 1), 1 + order * (math.ceil(steps) - 1)


def _check_steps(steps: int, call: dict[str, Any]) -> None:
    """Refuse a custom schedule whose length is not --num-inference-steps: the schedule would decide."""
    for name in ("sigmas", "timesteps"):
        given = call.get(name)
        if isinstance(given, list) and len(given) != steps:
            raise UserError(
                f"--diffusers-kwargs: '{name}' has {len(given)} values, and --num-inference-steps is {steps}"
            )


def _needs_image(kind: Kind) -> bool:
    """Whether the pipeline needs an input image; some declare `image=None` although they do."""
    if "image" not in kind.accepted:
        return False
    return "image" in kind.required or transforms(kind)


def transforms(kind: Kind) -> bool:
    """Whether the pipeline transforms its input image (it has a strength, a mask or an image guidance scale)."""
    return bool(kind.accepted & {"strength", "mask_image", "image_guidance_scale"})
