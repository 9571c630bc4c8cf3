"""The model's own diffusers pipeline as an engine: any pipeline that diffusers can load and that accepts a prompt.

The pipeline is called as a whole; its stages are observed from outside (`stages.observed`): `encode_prompt` is text
encoding, the progress bar of every pipeline spans denoising and counts its steps, and the rest is decoding.
"""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from sglang_gen import env, log
from sglang_gen.backends import component_file, ignored_keys
from sglang_gen.backends.comm_log import CommLog
from sglang_gen.backends.diffusers import (
    attention_backend,
    block_ranges,
    cache,
    call_arguments,
    clip_skip,
    ineffective_settings,
    lora,
    offload,
    pipeline_signature,
    quantize,
    replaced_components,
    truncated_prompts,
)
from sglang_gen.backends.diffusers import pipeline_loading as original
from sglang_gen.backends.diffusers import torch_compile as compilation
from sglang_gen.backends.diffusers.roles import denoisers, dtype_of, modules, repeated_blocks
from sglang_gen.backends.diffusers.seeding import argument, seeded
from sglang_gen.backends.diffusers.stages import Latents, observed, plain_config
from sglang_gen.backends.finite import require_finite
from sglang_gen.backends.input_files import read_image, read_noise
from sglang_gen.backends.memory_error import memory_explained, out_of_memory
from sglang_gen.config.schema import Run
from sglang_gen.errors import LOADING_ERRORS, RunError, UserError, in_our_words, is_out_of_memory
from sglang_gen.families import registry
from sglang_gen.hub import component_classes
from sglang_gen.launch.kept_weights import KeptWeights
from sglang_gen.parallel.guidance_split import GuidanceSplit
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.perf.clock import Clock
from sglang_gen.perf.flops import CallLog, Watched
from sglang_gen.plan import image_size
from sglang_gen.plan.quality_request import about_images
from sglang_gen.plan.step_cache import wanted
from sglang_gen.types import TEXT_ENCODERS, Decoded, Plan, Sample
from sglang_gen.weights import gguf, replacement

TEXTS = re.compile("(negative_)?prompt_[0-9]")  # arguments for further text encoders


def import_classes(plan: Plan) -> None:
    """Import the classes of text encoders and of the scheduler, so that loading is timed alone."""
    for name, component in plan.card.components.items():
        if component.library == "transformers" or name == "scheduler":
            component_classes.named(component)


def load(plan: Plan, mesh: Mesh, calls: CallLog, kept: KeptWeights | None = None) -> "DiffusersEngine":
    """Load the plan's pipeline or take it from `kept`, apply all options, and place it on this rank's device.

    Arguments are checked against the pipeline's class before weights are read. Raises UserError for a request that the
    pipeline does not support, RunError if loading fails.
    """
    kind, call, scheduler = check_pipeline_call(plan, own=original.own_class(plan), warn=True)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    log.adopt_libraries()
    with ExitStack() as ending:
        try:
            pipeline = (kept or KeptWeights()).load("pipeline", partial(_read, plan, kind))
            if scheduler:
                configured = call_arguments.configured(type(pipeline.scheduler), pipeline.scheduler.config, scheduler)
                pipeline.scheduler = configured
            built = _transform(plan, pipeline, ending)
        except (UserError, RunError):
            raise
        except LOADING_ERRORS as error:
            if is_out_of_memory(error):
                raise out_of_memory(plan, mesh.rank, f"loading {plan.card.name}", error) from error
            raise RunError(f"Loading {plan.card.name} failed: {in_our_words(error)}") from error
        ineffective_settings.warn_attention_arguments(built.pipeline, call)
        engine = DiffusersEngine(plan, mesh, built, PipelineCall(kind, call), calls)
        engine.ending = ending.pop_all()
    return engine


def check_pipeline_call(
    plan: Plan, own: Any = None, warn: bool = False
) -> tuple[pipeline_signature.Kind, dict[str, Any], dict[str, Any]]:
    """The pipeline's class, the arguments of its call and the settings of its scheduler, before a weight is read.

    `own` is the class that the model's own code defines; `warn` also logs settings without effect. Raises UserError
    for a request that the pipeline cannot take.
    """
    run = plan.run
    if plan.card.file is not None:
        from sglang_gen.backends import single_file_contents

        single_file_contents.check_single_file(plan)
    component_file.check_component_files(plan)
    if own is None:
        pipeline_signature.check_class(plan)
    if not plan.card.code:
        for component in plan.card.components.values():
            component_classes.check(component)
    kind = pipeline_signature.find(
        plan.pipeline_class,
        image=run.sampling.image_path is not None,
        mask="mask_image" in run.backend.diffusers_kwargs,
        own=own,
    )
    if kind.makes != "image" and (clause := about_images(run)):
        raise UserError(f"{clause}, and {kind.pipeline_class.__name__} makes {kind.makes}")
    call, scheduler = call_arguments.split(plan, kind)
    call_arguments.check_complete(kind, plan, call)
    call_arguments.check_scheduler(plan, kind, call, scheduler)
    clip_skip.check_clip_skip(plan, kind, call)
    read_noise(run.sampling.latents)
    _image(run)
    if run.compile.enable_torch_compile:
        env.require_compiler(plan.device)
    attention_backend.own(run.attention, plan.device, getattr(torch, plan.dtype))
    lora.check_local_adapters(run.lora)
    gguf.check_file(run.quant.transformer_weights_path)
    cache.check_cache_support(run.cache, plan.card, kind.pipeline_class, call_arguments.network_calls(plan, kind, call))
    if warn:
        ineffective_settings.warn(plan, kind, call, scheduler)
        for name, component in plan.card.components.items():
            ignored_keys.warn(component, name)
    return kind, call, scheduler


def _image(run: Run) -> Any:
    path = run.sampling.image_path
    return None if path is None else read_image(path, "--image-path")


def _read(plan: Plan, kind: pipeline_signature.Kind) -> Any:
    """Load the pipeline with replaced components, on the CPU."""
    dtype = getattr(torch, plan.dtype)
    replaced = replaced_components.load(plan, dtype) | replacement.load(plan, dtype)
    return original.read(plan, kind.pipeline_class, dtype, replaced)


@dataclass(frozen=True)
class Built:
    """A pipeline with all options applied: what took effect, its attention kernel, its step cache, its offloading."""

    pipeline: Any
    effective: Mapping[str, Any]
    kernel: attention_backend.Kernel
    step_cache: "cache.StepCache | None"
    offloaded: offload.OnDemand


def _transform(plan: Plan, pipeline: Any, ending: ExitStack) -> Built:
    """Apply everything that changes how the pipeline computes, in the only possible order.

    Adapters come first, because merging changes weights, which must be unquantized and on the CPU; then quantization;
    then the attention kernel, which later steps compile or hook; then placement on the device; then the step cache,
    which wraps blocks in place; and last compilation of the resulting blocks.
    """
    run = plan.run
    adapters = lora.apply(pipeline, run.lora)
    quantization = quantize.apply(pipeline, run.quant.method, plan.device)
    kernel = attention_backend.apply(pipeline, run.attention, plan.device, getattr(torch, plan.dtype))
    placed = offload.apply(pipeline, run, plan.device, ending)
    step_cache = cache.StepCache(pipeline, run.cache) if wanted(run.cache) else None
    if step_cache:
        ending.callback(step_cache.close)
    compiled = compilation.apply(pipeline, run.compile, plan.device, run.deterministic)
    effective = {
        **dtype_of(pipeline),
        "quantization": quantization,
        "lora": adapters,
        "attention": kernel.name,
        "offload": placed.options,
        "compile": compiled,
    }
    return Built(pipeline, effective, kernel, step_cache, placed)


@dataclass(frozen=True)
class PipelineCall:
    """How a pipeline is called: what its class accepts, and the arguments that the user gave."""

    kind: pipeline_signature.Kind
    arguments: dict[str, Any]


class DiffusersEngine:
    """A loaded pipeline; see `types.Engine`."""

    def __init__(self, plan: Plan, mesh: Mesh, built: Built, call: PipelineCall, calls: CallLog) -> None:
        self.plan, self.kind, self.call = plan, call.kind, call.arguments
        pipeline = self.pipeline = built.pipeline
        self.kernel, self.step_cache, self.offloaded = built.kernel, built.step_cache, built.offloaded
        self.trace: list[dict[str, Any]] = []  # decisions of the step cache in the timed generation
        self.noise = read_noise(plan.run.sampling.latents)
        self.image = _image(plan.run)
        self._effective = built.effective
        self.ending = ExitStack()
        self.rank, self.leads, self.calls, self.comm_log = mesh.rank, mesh.leads, calls, CommLog()
        self.guidance = GuidanceSplit(denoisers(pipeline), mesh) if mesh.size("cfg") > 1 else None
        for name, network in modules(pipeline, TEXT_ENCODERS).items():
            calls.watch(Watched("text_encoding", name, network))
        for name, network in denoisers(pipeline).items():
            calls.watch(Watched("denoising", name, network))

    def effective(self) -> dict[str, Any]:
        """The settings that took effect, and the classes of the components."""
        components = {name: item for name, item in self.pipeline.components.items() if item is not None}
        return {
            **self._effective,
            "cache": self._cache(generated=False),
            "pipeline": type(self.pipeline).__name__,
            "makes": self.kind.makes,
            "components": {name: type(item).__name__ for name, item in components.items()},
            "scheduler_config": plain_config(self.pipeline.scheduler) if "scheduler" in components else None,
        }

    def _cache(self, generated: bool) -> Any:
        """The step cache's settings, and if `generated` the number of steps that the last generation reused."""
        return self.step_cache.effective(generated) if self.step_cache else "none"

    def sample(self, batch: tuple[Sample, ...], steps: int, clock: Clock) -> Decoded | None:
        """One call of the pipeline; None on ranks that do not decode.

        Raises RunError if it fails or if the latents or the output are not finite.
        """
        latents = Latents(self.noise, len(batch))
        if self.guidance:
            self.guidance.start(len(batch))
        generators = [torch.Generator("cpu").manual_seed(sample.seed) for sample in batch]
        given = self._arguments(batch, steps, latents, generators)
        name = type(self.pipeline).__name__
        self.comm_log.on = self.calls.on
        watched = observed(self.pipeline, clock, latents, self._note_decode)
        draws = seeded(self.pipeline, generators, self.plan.device)
        clock.enter("text_encoding")
        try:
            kernel = attention_backend.chosen(self.pipeline, self.kernel)
            explained, logged = memory_explained(self.plan, self.rank), self.comm_log.during("denoising")
            texts = truncated_prompts.noticed(self.pipeline)
            with torch.no_grad(), explained, kernel, watched, draws, logged, texts:
                result = self.pipeline(**given)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{name} refuses the request: {in_our_words(error)}") from error
        finally:
            self.offloaded.drop()
            clock.leave()
        require_finite(latents.last, "the latents", batch)
        if self.step_cache and self.calls.on:  # a warmup has too few steps, and a repeat reuses the same steps
            steps = self.plan.run.sampling.num_inference_steps
            self.trace += self.step_cache.trace(steps, [sample.index for sample in batch])
        if not self.leads:
            return None
        _warn_blanked(result, batch)
        return replace(self._decoded(result, latents, batch), effective={"cache": self._cache(generated=True)})

    def _note_decode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.note(Watched("decoding", "vae", self.pipeline.vae), "decode", args, kwargs)

    def _decoded(self, result: Any, latents: Latents, batch: tuple[Sample, ...]) -> Decoded:
        """Frames or audio from the pipeline's result. Raises RunError if they are missing or not finite."""
        field = {"image": "images", "video": "frames", "audio": "audios"}[self.kind.makes]
        if not hasattr(result, field):
            raise RunError(f"{type(self.pipeline).__name__} returned no {field}")
        if self.kind.makes == "video" and getattr(result, "audio", None) is not None:
            log.warning(f"{type(self.pipeline).__name__} also generated audio, which is not saved with the video")
        values = np.asarray(getattr(result, field), dtype=np.float32)
        if self.kind.makes != "audio":
            self._warn_resized(values)
        require_finite(torch.from_numpy(values), f"the decoded {self.kind.makes}", batch)
        if self.kind.makes == "audio":
            audio = values.reshape(len(batch), -1, values.shape[-1])  # [B, C, T]
            return Decoded(audio, latents.noise, latents.last, "audio", _sampling_rate(self.pipeline))
        if self.kind.makes == "image":
            values = values[:, None]  # [B, 1, H, W, 3]
        return Decoded(np.rint(values * 255).astype(np.uint8), latents.noise, latents.last, self.kind.makes)

    def _warn_resized(self, values: np.ndarray) -> None:
        """Warn of a size that the pipeline rounded; `values` is [B, H, W, 3], or [B, F, H, W, 3] for a video."""
        made = dict(zip(("width", "height", "num_frames"), values.shape[-2:0:-1], strict=False))
        for name, number in made.items():
            requested = getattr(self.plan.run.sampling, name)
            if name in self.kind.accepted and requested is not None and requested != number:
                log.warn_once(f"sampling.{name} is {requested}, and {type(self.pipeline).__name__} made {number}")

    def _arguments(
        self, batch: tuple[Sample, ...], steps: int, latents: Latents, generators: list[torch.Generator]
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call: those that it accepts, without optional ones that are not set."""
        sampling = self.plan.run.sampling
        negatives = [sample.negative_prompt for sample in batch]
        height, width = self._size()
        wanted: dict[str, Any] = {
            "prompt": [sample.prompt for sample in batch],
            "negative_prompt": None if negatives[0] is None else negatives,
            "image": self.image,
            "num_inference_steps": steps,
            "guidance_scale": sampling.guidance_scale,
            "height": height,
            "width": width,
            "max_sequence_length": sampling.max_sequence_length,
            "num_frames": sampling.num_frames,
            "generator": argument(generators),
            "output_type": "np" if self.leads else "latent",
            "callback_on_step_end": latents.after_step,
        }
        given = {name: value for name, value in wanted.items() if name in self.kind.accepted and value is not None}
        warmup = steps != sampling.num_inference_steps and "strength" in self.kind.accepted
        all_steps = {"strength": 1.0} if warmup else {}  # an input image skips none of a warmup's few steps
        return self._for_each(len(batch), given | self.call | all_steps)

    def _size(self) -> tuple[int | None, int | None]:
        """Requested height and width. Some pipelines ignore a single side, so the other one is filled in."""
        sampling, card = self.plan.run.sampling, self.plan.card
        spec = registry.by_pipeline_class(type(self.pipeline).__name__)
        if spec is None or (sampling.height is None) == (sampling.width is None):
            return sampling.height, sampling.width
        config, factor = card.components[spec.network].config, image_size.latent_factor(card) or 1
        size = image_size.chosen(sampling, spec, config, factor)
        return size.height, size.width

    def _for_each(self, count: int, given: dict[str, Any]) -> dict[str, Any]:
        """Repeat further prompts for each sample of the batch, and the input image if the pipeline transforms it.

        For a single image some pipelines draw the latents once, from the first generator, so that a sample would depend
        on its batch. In other pipelines several images may be several references for one prompt.
        """
        if count == 1:
            return given
        texts = {name: [text] * count for name, text in given.items() if TEXTS.match(name) and isinstance(text, str)}
        if not call_arguments.transforms(self.kind):
            return given | texts
        images = {name: given[name] for name in ("image", "mask_image") if name in given}
        return given | texts | {name: [image] * count for name, image in images.items()}

    def traffic(self) -> CommLog:
        return self.comm_log

    def block_timings(self) -> None:
        return None  # perf.blocks chooses the native engine

    def named_blocks(self) -> AbstractContextManager[None]:
        """A network that is compiled as a whole is left out: hooks inside would have it compiled again."""
        settings, networks = self.plan.run.compile, denoisers(self.pipeline)
        if settings.enable_torch_compile:
            regional = {name: network for name, network in networks.items() if repeated_blocks(network)}
            networks = regional if settings.regional else {}
        return block_ranges.named_blocks(networks)

    def cache_trace(self) -> list[dict[str, Any]] | None:
        return self.trace if self.step_cache else None

    def close(self) -> None:
        """Undo changes outside this pipeline: the class that a step cache patches, files of an offloaded network."""
        self.ending.close()


def _sampling_rate(pipeline: Any) -> int:
    """Sampling rate in Hz of the pipeline's audio, from the config of the component that decodes it."""
    for name in ("vocoder", "vae"):
        config = getattr(getattr(pipeline, name, None), "config", None)
        if rate := getattr(config, "sampling_rate", None):
            return int(rate)
    raise RunError(f"No component of {type(pipeline).__name__} has a sampling_rate in its config")


def _warn_blanked(result: Any, batch: tuple[Sample, ...]) -> None:
    flagged = getattr(result, "nsfw_content_detected", None) or []
    for sample, flag in zip(batch, flagged, strict=False):
        if flag:
            log.warning(f"The model's safety checker blanked sample {sample.index} (seed {sample.seed})")
