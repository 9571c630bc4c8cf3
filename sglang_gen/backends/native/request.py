"""What a run asks of the native engine: read from its files and found possible before a weight is loaded."""

import importlib
from typing import Any

import torch

from sglang_gen import env, log
from sglang_gen.backends.input_files import read_image, read_noise
from sglang_gen.backends.native import memory_policy
from sglang_gen.backends.native.scheduler import build_scheduler
from sglang_gen.engine import attention_kernels
from sglang_gen.errors import UserError
from sglang_gen.families import img2img, watermark
from sglang_gen.families.contract import Request
from sglang_gen.plan import image_size, layout_limits
from sglang_gen.plan.backend_choice import NATIVE
from sglang_gen.plan.supported_configs import NEEDS
from sglang_gen.types import Plan

# Schedulers that sample every diffusion model in any number of steps: a dry run does not import diffusers for these.
SURE = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")


class Asked:
    """The pipeline's glue and needs, the files that a run starts from, and its requests."""

    def __init__(self, plan: Plan) -> None:
        """Raises UserError for a file that cannot be read."""
        name, sampling = NATIVE[plan.pipeline_class], plan.run.sampling
        self.plan, self.needs = plan, NEEDS[name]
        self.glue: Any = importlib.import_module(f"sglang_gen.families.{name}.pipeline")
        self.config = plan.card.components[self.glue.NETWORK].config
        self.factor = image_size.latent_factor(plan.card) or 1
        self.noise = read_noise(sampling.latents)
        path = sampling.image_path
        self.image = None if path is None else read_image(path, "--image-path")
        self.strength = plan.run.backend.diffusers_kwargs.get("strength", self.glue.STRENGTH)

    @property
    def whole(self) -> Request:
        """The request of a batch in all of the run's steps."""
        return self.request(self.plan.run.sampling.num_inference_steps)

    def request(self, steps: int) -> Request:
        sampling = self.plan.run.sampling
        if self.image is not None and self.glue.SIZED_BY_IMAGE:
            height, width = img2img.size(self.image, self.factor)
        else:
            height, width = image_size.chosen(sampling, self.glue.default_size, self.config, self.factor)
        return Request(
            height=height,
            width=width,
            factor=self.factor,
            steps=steps,
            guidance=sampling.guidance_scale,
            text_length=sampling.max_sequence_length,
            skipped=self._skipped(steps),
            watermark=self.plan.card.settings.get("add_watermarker"),
        )

    def _skipped(self, steps: int) -> int | None:
        """Steps that the input picture spares; a warmup does all of its few."""
        if self.image is None:
            return None
        return self.glue.skipped(steps, self.strength) if steps == self.plan.run.sampling.num_inference_steps else 0


def check(plan: Plan) -> Asked:
    """What is asked. Raises UserError for what the engine cannot do with this model on this machine."""
    if plan.card.file is not None:
        from sglang_gen.backends import single_file_contents

        single_file_contents.check(plan)
    asked, run = Asked(plan), plan.run
    glue, length, dtype = asked.glue, run.sampling.max_sequence_length, getattr(torch, plan.dtype)
    if length is not None and glue.MOST_TOKENS is not None and length > glue.MOST_TOKENS:
        most = f"{plan.pipeline_class} takes at most {glue.MOST_TOKENS}"
        raise UserError(f"sampling.max_sequence_length is {length}; {most}")
    watermark.check_library(plan.card.settings)
    attention_kernels.choose(run.attention, plan.device, dtype, ())
    if run.compile.enable_torch_compile:
        env.require_compiler(plan.device)
    if asked.image is not None:
        img2img.check_strength(asked.strength, run.sampling.num_inference_steps, glue.skipped)
    request = asked.whole
    if asked.image is not None:  # of the size of a picture that the plan did not see
        layout_limits.check_size(run, plan.card, plan.layout, plan.stated_degrees, request.height, request.width)
    memory_policy.check(plan, glue, request)
    _check_scheduler(asked, request)
    _check_noise(asked, request)
    return asked


def _check_scheduler(asked: Asked, request: Request) -> None:
    """Refuse a scheduler that cannot sample this model, by its configuration alone."""
    component = asked.plan.card.components["scheduler"]
    if asked.glue.NETWORK == "unet" and component.class_name in SURE:
        return
    asked.glue.schedule(asked.config, build_scheduler(component), request)


def _check_noise(asked: Asked, request: Request) -> None:
    """Refuse saved noise of another shape than that of this request."""
    if asked.noise is None:
        return
    shape = asked.glue.draw(asked.config, request, [torch.Generator("cpu")], torch.float32).shape[1:]
    if asked.noise.shape[1:] != shape:
        raise UserError(
            f"sampling.latents holds noise of shape {list(asked.noise.shape)}, this request starts from {[1, *shape]}"
        )


def warn_ineffective(plan: Plan, glue: Any) -> None:
    """One warning for each setting that the user gave and that changes nothing here."""
    for path in ("sampling.num_frames", "output.fps"):
        if path in plan.given:
            log.warning(f"{path} has no effect: {plan.pipeline_class} makes no video")
    if plan.run.sampling.image_path and glue.SIZED_BY_IMAGE:
        for path in ("sampling.height", "sampling.width"):
            if path in plan.given:
                log.warning(f"{path} has no effect: {plan.pipeline_class} keeps the size of the input picture")
    if glue.MOST_TOKENS is None and "sampling.max_sequence_length" in plan.given:
        log.warning(f"sampling.max_sequence_length has no effect: {plan.pipeline_class} does not take it")
    memory_policy.warn_ineffective(plan, glue)
