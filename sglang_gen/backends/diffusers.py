"""The model's own diffusers pipeline as an engine: any text-to-image pipeline that diffusers can load.

The pipeline's call is one piece; its stages are seen from outside: `encode_prompt` is text encoding, the progress bar
that every pipeline keeps spans denoising and counts its steps, and what follows is decoding.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline

from sglang_gen import log
from sglang_gen.errors import RunError, UserError, first_line, nearest
from sglang_gen.perf.flops import CallLog
from sglang_gen.perf.record import Clock
from sglang_gen.types import Component, Decoded, Plan, Sample

# Arguments of a pipeline's call that a documented flag, or this engine, sets.
OWNED = {
    "prompt": "--prompt", "negative_prompt": "--negative-prompt", "num_inference_steps": "--num-inference-steps",
    "guidance_scale": "--guidance-scale", "height": "--height", "width": "--width", "generator": "--seed",
    "num_images_per_prompt": "--num-samples", "image": "--image-path", "num_frames": "--num-frames",
    "max_sequence_length": "sampling.max_sequence_length", "latents": "sampling.latents",
    "output_type": "nothing", "return_dict": "nothing", "callback_on_step_end": "nothing",
    "callback_on_step_end_tensor_inputs": "nothing", "callback": "nothing", "callback_steps": "nothing",
}  # fmt: skip
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError)


def load(plan: Plan, calls: CallLog) -> "DiffusersEngine":
    """The plan's pipeline on its device. Raises UserError for a request that it cannot take, RunError if loading fails.

    Arguments are checked against the pipeline's class before a weight is read.
    """
    pipeline_class = _pipeline_class(plan)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    log.adopt_libraries()
    accepted = inspect.signature(pipeline_class.__call__).parameters
    call_kwargs, scheduler_kwargs = _split_kwargs(plan, set(accepted))
    _check_kind(pipeline_class, accepted)
    dtype = getattr(torch, plan.dtype)
    try:
        components = {name: _load_component(plan, name, dtype) for name in plan.run.model.component_paths}
        pipeline = pipeline_class.from_pretrained(
            str(plan.card.folder), dtype=dtype, use_safetensors=True, **components
        )
        _configure_scheduler(pipeline, scheduler_kwargs)
        pipeline.to(plan.device)
    except UserError:
        raise
    except LOADING_ERRORS as error:
        if _is_out_of_memory(error):
            raise RunError(f"Out of memory while loading {plan.card.name}") from error
        raise RunError(f"Loading {plan.card.name} failed: {first_line(error)}") from error
    _warn_ineffective(plan, pipeline, set(accepted), call_kwargs)
    return DiffusersEngine(plan, pipeline, set(accepted), call_kwargs, calls)


def _pipeline_class(plan: Plan) -> Any:
    name = plan.run.model.pipeline_class_name or plan.card.pipeline_class
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        legal = [item for item in dir(diffusers) if item.endswith("Pipeline")]
        raise UserError(f"diffusers {diffusers.__version__} has no pipeline class '{name}'{nearest(name, legal)}")
    return found


def _check_kind(pipeline_class: Any, accepted: Any) -> None:
    """Text to image only, so far."""
    name = pipeline_class.__name__
    if "num_frames" in accepted:
        raise UserError(f"{name} makes videos; this version makes images only")
    if "audio_length_in_s" in accepted or "audio_end_in_s" in accepted:
        raise UserError(f"{name} makes audio; this version makes images only")
    image = accepted.get("image")
    if (image is not None and "strength" in accepted) or "mask_image" in accepted:
        raise UserError(f"{name} needs an input image; this version takes text only")
    if "prompt" not in accepted:
        raise UserError(f"{name} takes no prompt; this version generates from text only")


def _split_kwargs(plan: Plan, accepted: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """--diffusers-kwargs as (arguments of the call, settings of the scheduler)."""
    scheduler = plan.card.components.get("scheduler")
    scheduler_class = getattr(diffusers, scheduler.class_name, None) if scheduler else None
    settings = set(inspect.signature(scheduler_class.__init__).parameters) - {"self"} if scheduler_class else set()
    call, configure = {}, {}
    for name, value in plan.run.backend.diffusers_kwargs.items():
        if name in OWNED:
            owner = OWNED[name]
            raise UserError(
                f"--diffusers-kwargs: '{name}' is set by {owner if owner != 'nothing' else 'sglang-gen itself'}"
            )
        if name in accepted:
            call[name] = value
        elif name in settings:
            configure[name] = value
        else:
            where = f"{plan.card.pipeline_class} nor {scheduler.class_name if scheduler else 'its scheduler'}"
            raise UserError(
                f"--diffusers-kwargs: neither {where} takes '{name}'{nearest(name, accepted - set(OWNED) | settings)}"
            )
    return call, configure


def _load_component(plan: Plan, name: str, dtype: torch.dtype) -> Any:
    """One component of --component-paths: a component folder, or a model folder or hub id that has it."""
    path = plan.run.model.component_paths[name]
    if name not in plan.card.components:
        raise UserError(f"--component-paths: {plan.card.name} has no component '{name}'"
                        f"{nearest(name, plan.card.components)}")  # fmt: skip
    folder = Path(path).expanduser()
    if not folder.is_dir() and (path.startswith(("/", ".", "~")) or path.count("/") != 1):
        raise UserError(f"--component-paths: the folder {path} of '{name}' does not exist")
    inside = not folder.is_dir() or (folder / name).is_dir()
    component = plan.card.components[name]
    arguments: dict[str, Any] = {"subfolder": name} if inside else {}
    kind = _component_class(component)
    if issubclass(kind, torch.nn.Module):
        arguments |= {"dtype": dtype, "use_safetensors": True}
    try:
        return kind.from_pretrained(str(folder) if folder.is_dir() else path, **arguments)
    except LOADING_ERRORS as error:
        raise UserError(f"--component-paths: '{name}' cannot be loaded from {path}: {first_line(error)}") from error


def _component_class(component: Component) -> Any:
    import importlib

    return getattr(importlib.import_module(component.library), component.class_name)


def _configure_scheduler(pipeline: Any, settings: dict[str, Any]) -> None:
    if settings:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **settings)


def _warn_ineffective(plan: Plan, pipeline: Any, accepted: set[str], call_kwargs: dict[str, Any]) -> None:
    """One warning for each setting that the user gave and that this pipeline cannot use."""
    name, sampling = type(pipeline).__name__, plan.run.sampling
    for argument in ("negative_prompt", "guidance_scale", "num_inference_steps", "height", "width",
                     "max_sequence_length"):  # fmt: skip
        if plan.user_gave(f"sampling.{argument}") and argument not in accepted:
            log.warning(f"sampling.{argument} has no effect: {name} does not take it")
    step = inspect.signature(pipeline.scheduler.step).parameters if hasattr(pipeline, "scheduler") else {}
    if call_kwargs.get("eta") and "eta" not in step:
        log.warning(f"eta has no effect with {type(pipeline.scheduler).__name__}")
    negative = any(sample.negative_prompt for batch in plan.batches for sample in batch)
    scale = call_kwargs.get("true_cfg_scale", sampling.guidance_scale) if "true_cfg_scale" in accepted else None
    if scale is None:
        scale = sampling.guidance_scale
    elif negative and "true_cfg_scale" not in call_kwargs:
        log.warning(f"The negative prompt has no effect: {name} uses it only with "
                    """--diffusers-kwargs '{"true_cfg_scale": 4.0}'""")  # fmt: skip
    if negative and scale <= 1:
        log.warning(f"The negative prompt has no effect at a guidance scale of {scale}")


class DiffusersEngine:
    """A loaded pipeline; see `types.Engine`."""

    def __init__(
        self, plan: Plan, pipeline: Any, accepted: set[str], call_kwargs: dict[str, Any], calls: CallLog
    ) -> None:
        self.plan, self.pipeline, self.accepted, self.call_kwargs = plan, pipeline, accepted, call_kwargs
        self.noise = _read_noise(plan)
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if isinstance(getattr(pipeline, name, None), torch.nn.Module):
                calls.watch("text_encoding", name, getattr(pipeline, name))
        for name in ("unet", "transformer"):
            if isinstance(getattr(pipeline, name, None), torch.nn.Module):
                calls.watch("denoising", name, getattr(pipeline, name))
        if hasattr(getattr(pipeline, "vae", None), "decode"):
            calls.watch("decoding", "vae", pipeline.vae, "decode")

    def effective(self) -> dict[str, Any]:
        """Classes and dtypes of what was built."""
        parts = {name: part for name, part in self.pipeline.components.items() if part is not None}
        return {
            "pipeline": type(self.pipeline).__name__,
            "components": {name: type(part).__name__ for name, part in parts.items()},
            "scheduler_config": _plain_config(self.pipeline.scheduler) if "scheduler" in parts else None,
        }

    def sample(self, batch: tuple[Sample, ...], steps: int, clock: Clock) -> Decoded:
        """One call of the pipeline. Raises RunError when it fails or gives numbers that are not finite."""
        seen = _Seen(self.noise, batch)
        arguments = self._arguments(batch, steps, seen)
        clock.enter("text_encoding")
        try:
            with torch.no_grad(), _observed(self.pipeline, clock, seen):
                result = self.pipeline(**arguments)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise RunError("Out of memory while generating; try smaller batches or a smaller picture") from error
        except ValueError as error:
            raise UserError(f"{type(self.pipeline).__name__} refuses the request: {first_line(error)}") from error
        finally:
            clock.leave()
        if not hasattr(result, "images"):
            raise RunError(f"{type(self.pipeline).__name__} returned no images")
        _check_finite(seen.latents, "The latents", batch)
        frames = np.asarray(result.images)
        _check_finite(torch.from_numpy(frames), "The decoded picture", batch)
        flagged = getattr(result, "nsfw_content_detected", None) or []
        for sample, flag in zip(batch, flagged, strict=False):
            if flag:
                log.warning(f"The model's safety checker blanked sample {sample.index} (seed {sample.seed})")
        return Decoded(np.rint(frames * 255).astype(np.uint8), seen.noise, seen.latents)

    def _arguments(self, batch: tuple[Sample, ...], steps: int, seen: "_Seen") -> dict[str, Any]:
        """What the pipeline's call is given: only what it takes, and of the optional only what is set."""
        sampling = self.plan.run.sampling
        negatives = [sample.negative_prompt for sample in batch]
        wanted: dict[str, Any] = {
            "prompt": [sample.prompt for sample in batch],
            "negative_prompt": None if negatives[0] is None else negatives,
            "num_inference_steps": steps,
            "guidance_scale": sampling.guidance_scale,
            "height": sampling.height,
            "width": sampling.width,
            "max_sequence_length": sampling.max_sequence_length,
            "generator": [torch.Generator("cpu").manual_seed(sample.seed) for sample in batch],
            "output_type": "np",
            "callback_on_step_end": seen.after_step,
        }
        given = {name: value for name, value in wanted.items() if name in self.accepted and value is not None}
        return given | self.call_kwargs


def _is_out_of_memory(error: Exception) -> bool:
    """On the GPU torch has a class for it, on the CPU only its allocator's words."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _plain_config(part: Any) -> dict[str, Any]:
    keep = (bool, int, float, str, type(None), list)
    return {key: value for key, value in part.config.items() if not key.startswith("_") and isinstance(value, keep)}


def _check_finite(values: torch.Tensor | None, what: str, batch: tuple[Sample, ...]) -> None:
    """Refuse NaN and infinity, which would be saved as a black picture."""
    if values is None or values.shape[0] != len(batch):
        return
    for row, sample in zip(values, batch, strict=True):
        if not bool(torch.isfinite(row).all()):
            raise RunError(
                f"{what} of sample {sample.index} (seed {sample.seed}) are not finite numbers, so the picture would be "
                "black; try --dtype float32 (or bfloat16 in place of float16)"
            )


class _Seen:
    """The first and the last latents of one call, and a replacement for the first."""

    def __init__(self, noise: torch.Tensor | None, batch: tuple[Sample, ...]) -> None:
        self.replacement = None if noise is None else noise.expand(len(batch), *noise.shape[1:])
        self.noise: torch.Tensor | None = None
        self.latents: torch.Tensor | None = None

    def start(self, prepared: Any) -> Any:
        """Take note of what `prepare_latents` gives, or put the loaded noise in its place."""
        latents = prepared[0] if isinstance(prepared, tuple) else prepared
        if self.replacement is not None:
            if self.replacement.shape != latents.shape:
                raise ValueError(
                    f"sampling.latents holds noise of shape {list(self.replacement.shape)}, "
                    f"this request starts from {list(latents.shape)}"
                )
            latents = self.replacement.to(latents)
        self.noise = latents
        return (latents, *prepared[1:]) if isinstance(prepared, tuple) else latents

    def after_step(self, _pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.latents = tensors.get("latents")
        return {}


def _read_noise(plan: Plan) -> torch.Tensor | None:
    """The `noise` of a latents file, [1, ...]. Raises UserError when the file is not one of ours."""
    if plan.run.sampling.latents is None:
        return None
    from safetensors import SafetensorError, safe_open

    path = plan.run.sampling.latents
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if "noise" not in names:
                raise UserError(f"sampling.latents: {path} holds no tensor 'noise'")
            noise: torch.Tensor = file.get_tensor("noise")
            return noise.unsqueeze(0)
    except (OSError, SafetensorError) as error:
        raise UserError(f"sampling.latents: {path} cannot be read: {first_line(error)}") from None


@contextmanager
def _observed(pipeline: Any, clock: Clock, seen: _Seen) -> Iterator[None]:
    """Report stages and steps of the calls inside to the clock, and first latents to `seen`."""
    replaced = {"progress_bar": _progress_bar(clock)}
    if hasattr(pipeline, "encode_prompt"):
        replaced["encode_prompt"] = _timed_encoding(pipeline.encode_prompt, clock)
    if hasattr(pipeline, "prepare_latents"):
        prepare = pipeline.prepare_latents
        replaced["prepare_latents"] = lambda *args, **kwargs: seen.start(prepare(*args, **kwargs))
    for name, function in replaced.items():
        setattr(pipeline, name, function)
    try:
        yield
    finally:
        for name in replaced:
            delattr(pipeline, name)


def _timed_encoding(encode: Any, clock: Clock) -> Any:
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        clock.enter("text_encoding")
        encoded = encode(*args, **kwargs)
        clock.enter("latents")
        return encoded

    return encode_prompt


def _progress_bar(clock: Clock) -> Any:
    """A stand-in for `DiffusionPipeline.progress_bar`: denoising lasts from its making to its end."""

    def progress_bar(iterable: Any = None, total: int | None = None) -> _Bar:
        return _Bar(clock, iterable, total if total is not None else len(iterable))

    return progress_bar


class _Bar:
    def __init__(self, clock: Clock, iterable: Any, total: int) -> None:
        self.clock, self.iterable, self.progress = clock, iterable, log.Progress(total)

    def __enter__(self) -> "_Bar":
        self.clock.enter("denoising")
        self.progress.__enter__()
        return self

    def update(self, count: int = 1) -> None:
        for _ in range(count):
            self.clock.step()
            self.progress.step()

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)
        self.clock.enter("decoding")

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable:
                yield item
                self.update()
