"""Our own engine: our networks and loop, with the text encoders and scheduler of the model's folder."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from sglang_gen import log
from sglang_gen.backends.diffusers.stages import plain_config
from sglang_gen.backends.finite import require_finite
from sglang_gen.backends.native import components as parts
from sglang_gen.backends.native import memory_policy, safety_checker, vae_parallel
from sglang_gen.backends.native.comm_log import Sent
from sglang_gen.backends.native.execution import Execution
from sglang_gen.backends.native.request import Asked, check, warn_ineffective
from sglang_gen.engine.cfg import Encoded, Guidance, guided, kinds
from sglang_gen.engine.denoise import Predict, denoise, step_numbers
from sglang_gen.errors import LOADING_ERRORS, RunError, UserError, first_line, is_out_of_memory
from sglang_gen.families import img2img
from sglang_gen.families.contract import Request
from sglang_gen.parallel.collectives import Traffic
from sglang_gen.parallel.mesh import SEQUENCE, Mesh
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.perf.clock import Clock
from sglang_gen.perf.flops import CallLog, stored_bytes
from sglang_gen.types import Decoded, Plan, Sample

OFFLOAD = (
    "; the GPU has to hold network and text encoders at once; --text-encoder-cpu-offload (on diffusers) spares it these"
)


def load(plan: Plan, mesh: Mesh, calls: CallLog) -> "NativeEngine":
    """The plan's components on this rank's device. Raises UserError naming what does not fit, RunError if it fails."""
    asked = check(plan)
    glue = asked.glue
    transformers.utils.logging.disable_progress_bar()
    log.adopt_libraries()
    try:
        split = Split(mesh, glue.TENSOR, glue.SHARDING)
        network, components = parts.read(plan, asked.needs, glue, split)
    except UserError:
        raise
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            hint = OFFLOAD if plan.device == "cuda" else ""
            raise RunError(f"Out of memory while loading {plan.card.name}{hint}") from error
        raise RunError(f"Loading {plan.card.name} failed: {first_line(error)}") from error
    warn_ineffective(plan, glue)
    return NativeEngine(asked, Execution(plan, split, glue, network), components, calls)


class NativeEngine:
    """A loaded pipeline; see `types.Engine`."""

    def __init__(self, asked: Asked, execution: Execution, parts: Mapping[str, Any], calls: CallLog) -> None:
        plan, glue = asked.plan, asked.glue
        self.plan, self.glue, self.asked = plan, glue, asked
        self.parts, self.execution, self.calls = parts, execution, calls
        self.mesh, self.sent = execution.mesh, Sent()
        self.text_sends: dict[int, Traffic] = {}  # by the number of texts
        self.network: Any = execution.network
        self.entrance: Any = execution.placed.entrance
        self.text_parts = [name for name in glue.TEXT_ENCODER_NAMES if name in parts]
        encoders = sum(stored_bytes(each) for name in self.text_parts for each in parts[name].parameters())
        self.room = memory_policy.room(plan, glue, asked.config, asked.whole, encoders, self.mesh)
        self.zero_negative = plan.card.settings.get("force_zeros_for_empty_prompt", glue.ZERO_WITHOUT_NEGATIVE)
        for name in self.text_parts:
            calls.watch("text_encoding", name, parts[name], twin=self._encoder_twin(parts[name]))
        for method in ("forward", "condition"):
            calls.watch("denoising", glue.NETWORK, self.entrance, method, self.network, execution.countable)
        self.sp = self.mesh.axis(SEQUENCE)
        vae = vae_parallel.split(parts["vae"], self.sp)
        calls.watch("decoding", "vae", vae, "decode", twin=partial(self._vae_twin, glue.decoding_dtype))
        if safety_checker.CHECKER in parts:
            calls.watch("decoding", safety_checker.CHECKER, parts[safety_checker.CHECKER].vision_model)
        if self.asked.image is not None:
            calls.watch("latents", "vae", vae, "encode", twin=partial(self._vae_twin, glue.encoding_dtype))

    def _encoder_twin(self, encoder: Any) -> Callable[[], Any] | None:
        """Gives this rank's part of a text encoder without memory, where it has a part."""
        tp = self.mesh.axis("tp")
        if tp.size == 1 or type(encoder) is not transformers.T5EncoderModel:
            return None
        from sglang_gen.families import text_encoder_parallel

        return (
            partial(text_encoder_parallel.meta_copy, encoder, self.execution.dtype, tp)
            if text_encoder_parallel.is_sharded(encoder)
            else None
        )

    def _vae_twin(self, dtype_at_work: Callable[[Any, torch.dtype], torch.dtype]) -> Any:
        vae = self.parts["vae"]
        return vae_parallel.twin(vae, self.sp, dtype_at_work(vae.config, self.execution.dtype))

    def effective(self) -> dict[str, Any]:
        """What took effect, and the classes that were built."""
        classes = {name: type(part).__name__ for name, part in self.parts.items()}
        return {
            **self.execution.effective(),
            "offload": [],
            "lora": [],
            "cache": "none",
            **memory_policy.of_run(self.plan, self.glue, self.asked.whole, self.room.batched),
            "released": list(self.text_parts) if self.room.released else [],
            "pipeline": self.plan.pipeline_class,
            "makes": "image",
            "components": {self.glue.NETWORK: type(self.network).__name__, **classes},
            "scheduler_config": plain_config(self.parts["scheduler"]),
        }

    @torch.no_grad()
    def sample(self, batch: tuple[Sample, ...], steps: int, clock: Clock) -> Decoded | None:
        """One batch from its prompts to frames; None on ranks that leave decoding to another.

        Raises RunError when memory runs out, or when the numbers are not finite.
        """
        try:
            return self._sample(batch, steps, clock)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError("Out of memory while generating; try smaller batches or a smaller picture") from error
        finally:
            clock.leave()

    def _sample(self, batch: tuple[Sample, ...], steps: int, clock: Clock) -> Decoded | None:
        request, scheduler = self.asked.request(steps), self.parts["scheduler"]
        negative = batch[0].negative_prompt is not None  # batches are of one kind
        guidance = memory_policy.guidance(self.plan, self.glue, request, negative, self.room.batched)
        self.sent.on = self.calls.on
        sends = self._text_sends(batch, guidance, request)
        clock.enter("text_encoding")
        self._place_encoders(self.plan.device)
        with self.sent.during("text_encoding", sends):
            encoded = self._encode(batch, guidance, request)
        self._place_encoders("cpu")
        clock.enter("latents")
        generators = [torch.Generator("cpu").manual_seed(sample.seed) for sample in batch]
        timesteps = self.glue.schedule(self.asked.config, scheduler, request)
        noise = self._noise(request, timesteps, generators)
        numbers = step_numbers(len(timesteps), request.steps_run, getattr(scheduler, "order", 1))

        def predictor(network: Any, texts: Encoded) -> Predict:
            prepare, cfg = partial(self.glue.prepare, network, timesteps, request), self.mesh.axis("cfg")
            return guided(prepare, texts, guidance, numbers, cfg)

        clock.leave()  # what follows happens once, and is no stage
        alike = kinds(guidance, numbers)
        expected = self.execution.settle(predictor, sorted(set(alike)), request, encoded, noise)
        clock.enter("denoising")
        with self.sent.during("conditioning", [expected.conditioning]):
            predict = predictor(self.entrance, encoded)
        sends = [expected.evaluations.get(kind, Traffic()) for kind in alike]
        with (
            self.execution.limits(),
            self.sent.during("denoising", sends),
            log.Progress(request.steps_run) as progress,
        ):

            def after_step() -> None:
                clock.step()
                progress.step()

            latents = denoise(predict, scheduler, timesteps, numbers, noise, generators, after_step)
        clock.enter("decoding")
        require_finite(latents, "the latents", batch)
        if self.mesh.index("cfg") or self.mesh.index("tp"):
            return None  # ranks with the same rows decode them
        own = memory_policy.effective(self.plan, guidance, request)
        return Decoded(self._decode(latents, request, batch), noise, latents, effective=own)

    def _place_encoders(self, device: str) -> None:
        """Where the device has no room for them beside the denoising, text encoders are on it only while they work."""
        for name in self.text_parts if self.room.released else ():
            self.parts[name].to(device)

    def _text_sends(self, batch: tuple[Sample, ...], guidance: Guidance, request: Request) -> list[Traffic]:
        """What is expected to be sent for each list of texts that is encoded: T5 may be spread over ranks."""
        rows, tp = len(batch), self.mesh.axis("tp")
        if rows not in self.text_sends:
            self.text_sends[rows] = Traffic()
            for name in self.text_parts if tp.size > 1 else ():
                from sglang_gen.families import text_encoder_parallel

                if text_encoder_parallel.is_sharded(self.parts[name]):
                    length = request.text_length or self.glue.T5_LENGTH
                    sends = text_encoder_parallel.expected(self.parts[name], self.execution.dtype, tp, rows, length)
                    self.text_sends[rows] = sends
        return [self.text_sends[rows]] * (2 if guidance.on and not self._zeros(batch) else 1)

    def _zeros(self, batch: tuple[Sample, ...]) -> bool:
        """Whether zeros stand for the negative prompts that are not there."""
        return bool(self.zero_negative and batch[0].negative_prompt is None)

    def _encode(self, batch: tuple[Sample, ...], guidance: Guidance, request: Request) -> list[tuple[Tensor, ...]]:
        """Encoded texts: of the negative prompts, where there is guidance, and of the prompts."""

        def encode(texts: list[str]) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = self.glue.encode(self.parts, self.asked.config, texts, request.text_length)
            return found

        prompts = encode([sample.prompt for sample in batch])
        if not guidance.on:
            return [prompts]
        if self._zeros(batch):
            return [tuple(torch.zeros_like(part) for part in prompts), prompts]
        negatives = [sample.negative_prompt or "" for sample in batch]
        return [encode(negatives), prompts]

    def _noise(self, request: Request, timesteps: Tensor, generators: list[torch.Generator]) -> Tensor:
        """What the first step starts from `[B, ...]`, in the pipeline's own layout: drawn per sample, or loaded."""
        dtype = getattr(torch, self.plan.dtype)
        source = None
        if self.asked.image is not None:  # draws before the noise does, from the same generators
            pixels = img2img.pixels(self.asked.image, request.factor, request.height, request.width)
            source = self.glue.encode_image(self.parts["vae"], pixels, generators, dtype)
        noise = self.glue.draw(self.asked.config, request, generators, dtype).to(self.plan.device)
        drawn: Tensor = self.glue.start(self.parts["scheduler"], timesteps, noise, source)
        if self.asked.noise is not None:
            drawn = self.asked.noise.expand(drawn.shape).to(drawn)
        return drawn

    def _decode(self, latents: Tensor, request: Request, batch: tuple[Sample, ...]) -> "np.ndarray[Any, Any]":
        """Frames `[B, H, W, 3]` uint8."""
        vae = self.parts["vae"]
        dtype = self.glue.decoding_dtype(vae.config, self.execution.dtype)
        sends = [vae_parallel.expected(vae, self.sp, dtype, len(latents), request.latent_size)]
        with self.sent.during("decoding", sends):
            decoded: Tensor = self.glue.decode(vae, latents, request)
        values = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        require_finite(torch.from_numpy(values), "the decoded image", batch)
        frames: np.ndarray[Any, Any] = np.rint(values * 255).astype(np.uint8)
        safety_checker.blank(self.parts, frames, self.execution.dtype, batch, said=self.calls.on)
        return frames

    def cache_decisions(self) -> dict[str, Any] | None:
        return None

    def traffic(self) -> dict[str, Any]:
        return self.sent.report()

    def close(self) -> None:
        """Nothing reaches beyond this engine."""
