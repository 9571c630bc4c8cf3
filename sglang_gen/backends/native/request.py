"""The request of a native run: its input files and settings, validated before weights are loaded."""

import torch

from sglang_gen import env, log
from sglang_gen.backends.input_files import read_image, read_noise
from sglang_gen.backends.native import memory_policy, native_cache
from sglang_gen.backends.native.scheduler import build_scheduler
from sglang_gen.backends.scheduler_trial import check_steps, warn_changed
from sglang_gen.engine import attention_kernels
from sglang_gen.engine.denoise import step_numbers
from sglang_gen.errors import UserError
from sglang_gen.families import img2img, registry, watermark
from sglang_gen.families.contract import Request
from sglang_gen.families.pipeline_contract import Pipeline
from sglang_gen.plan import image_size, layout_limits, offloading, step_cache
from sglang_gen.types import Plan


def pipeline_of(plan: Plan) -> Pipeline:
    """The pipeline of the model's family."""
    spec = registry.by_pipeline_class(plan.pipeline_class)
    assert spec is not None  # the plan chose the native engine
    return registry.pipeline(spec)


class NativeRequest:
    """The pipeline of the model's family, the run's input files and its requests."""

    def __init__(self, plan: Plan) -> None:
        """Raises UserError for a file that cannot be read."""
        sampling = plan.run.sampling
        self.plan, self.pipeline = plan, pipeline_of(plan)
        self.spec = self.pipeline.spec
        self.config = plan.card.components[self.spec.network].config
        self.factor = image_size.latent_factor(plan.card) or 1
        self.noise = read_noise(sampling.latents)
        path = sampling.image_path
        self.image = None if path is None else read_image(path, "--image-path")
        self.strength = plan.run.backend.diffusers_kwargs.get("strength", self.spec.strength)

    @property
    def full_request(self) -> Request:
        """The request of a batch with all of the run's steps."""
        return self.request_for(self.plan.run.sampling.num_inference_steps)

    def request_for(self, steps: int) -> Request:
        sampling = self.plan.run.sampling
        if self.image is not None and self.spec.keeps_image_size:
            size = img2img.size(self.image, self.factor)
        else:
            size = image_size.chosen(sampling, self.spec, self.config, self.factor)
        return Request(
            size=size,
            factor=self.factor,
            steps=steps,
            guidance=sampling.guidance_scale,
            text_length=sampling.max_sequence_length,
            skipped=self._skipped(steps),
            watermark=self.plan.card.settings.get("add_watermarker"),
            boundary=self.plan.card.settings.get("boundary_ratio"),
            latent_frames=self.spec.latent_frames(size),
        )

    def _skipped(self, steps: int) -> int | None:
        """Number of steps that the input image skips; a warmup runs all of its steps."""
        if self.image is None:
            return None
        return self.pipeline.skipped(steps, self.strength) if steps == self.plan.run.sampling.num_inference_steps else 0


def check_native_request(plan: Plan) -> NativeRequest:
    """What is native_request. Raises UserError for what the engine cannot do with this model on this machine."""
    if plan.card.file is not None:
        from sglang_gen.backends import single_file_contents

        single_file_contents.check_single_file(plan)
    if any(component.file is not None for component in plan.card.components.values()):
        from sglang_gen.backends import component_file

        component_file.check_component_files(plan)
    native_request, run = NativeRequest(plan), plan.run
    spec, dtype = native_request.spec, getattr(torch, plan.dtype)
    watermark.check_library(plan.card.settings)
    attention_kernels.choose(run.attention, plan.device, dtype, (), spec.masks_text)
    if run.compile.enable_torch_compile:
        env.require_compiler(plan.device)
    if native_request.image is not None:
        skipped = native_request.pipeline.skipped
        img2img.check_strength(native_request.strength, run.sampling.num_inference_steps, skipped)
    request = native_request.full_request
    if native_request.image is not None:  # sized by the input image, which the plan has not seen
        layout_limits.check_size(run, plan.card, plan.layout, plan.stated_degrees, request.size)
    memory_policy.check_guidance_plan(plan, spec.guidance, request)
    _check_scheduler(native_request, request)
    _check_noise(native_request, request)
    if step_cache.wanted(run.cache):
        native_cache.check_native_cache(plan, spec, request, *evaluations(native_request, request))
    return native_request


def _check_scheduler(native_request: NativeRequest, request: Request) -> None:
    """Refuse a scheduler that, by its configuration, cannot sample this model."""
    component = native_request.plan.card.components["scheduler"]
    if component.class_name in native_request.spec.schedulers:
        return  # so that a dry run need not import diffusers
    scheduler = build_scheduler(component)
    check_steps(scheduler, native_request.pipeline.schedule(native_request.config, scheduler, request))
    warn_changed(scheduler, component.config, request.steps)


def evaluations(native_request: NativeRequest, request: Request) -> tuple[torch.Tensor, list[int]]:
    """The timestep and the step of each evaluation of the network, of which some schedulers need several in a step."""
    scheduler = build_scheduler(native_request.plan.card.components["scheduler"])
    timesteps = native_request.pipeline.schedule(native_request.config, scheduler, request)
    return timesteps, step_numbers(len(timesteps), request.steps_run, getattr(scheduler, "order", 1))


def _check_noise(native_request: NativeRequest, request: Request) -> None:
    """Refuse saved noise whose shape is not that of this request."""
    noise, pipeline = native_request.noise, native_request.pipeline
    if noise is None:
        return
    shape = pipeline.draw(native_request.config, request, [torch.Generator("cpu")], torch.float32).shape[1:]
    if noise.shape[1:] != shape:
        raise UserError(
            f"sampling.latents holds noise of shape {list(noise.shape)}, this request starts from {[1, *shape]}"
        )


def warn_ineffective(plan: Plan, pipeline: Pipeline) -> None:
    """Warn about each setting that the user gave and that has no effect on the native engine."""
    spec = pipeline.spec
    for path, reason in spec.ineffective.items():
        if path in plan.given:
            log.warning(f"{path} has no effect: {plan.pipeline_class} {reason}")
    if plan.run.sampling.image_path and spec.keeps_image_size:
        for path in ("sampling.height", "sampling.width"):
            if path in plan.given:
                log.warning(f"{path} has no effect: {plan.pipeline_class} keeps the size of the input image")
    if spec.most_text_tokens is None and "sampling.max_sequence_length" in plan.given:
        log.warning(f"sampling.max_sequence_length has no effect: {plan.pipeline_class} does not take it")
    effective = offloading.effective(plan.run, plan.device, plan.card)
    for option in offloading.active(plan.run, plan.device):
        if option not in effective:
            log.warning(f"{option}: no effect, {plan.pipeline_class} has no such component")
    networks, compiling = spec.networks_of(plan.card), plan.run.compile
    if compiling.warmup and compiling.warmup_steps < len(networks):
        log.warning(
            f"compile.warmup_steps={compiling.warmup_steps} warms up {', '.join(networks[: compiling.warmup_steps])} "
            f"only; this model has {len(networks)} denoising networks, which take {len(networks)} steps"
        )
    memory_policy.warn_ineffective(plan, spec.guidance)
