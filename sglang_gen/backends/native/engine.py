"""The native engine: this project's networks and denoising loop with the model's own text encoders and scheduler."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from sglang_gen import log, signals
from sglang_gen.backends.comm_log import CommLog, GeneratedBatch, described
from sglang_gen.backends.diffusers.stages import plain_config
from sglang_gen.backends.finite import require_finite
from sglang_gen.backends.memory_error import memory_explained, out_of_memory
from sglang_gen.backends.native import memory_policy, native_cache, safety_checker, vae_parallel
from sglang_gen.backends.native.build import build
from sglang_gen.backends.native.component_offload import ComponentOffload
from sglang_gen.backends.native.components import read_components
from sglang_gen.backends.native.execution import Execution, limits, share_graphs
from sglang_gen.backends.native.request import NativeRequest, check_native_request, warn_ineffective
from sglang_gen.backends.native.scheduler import has_own_scheduler
from sglang_gen.engine import block_names
from sglang_gen.engine.block_timing import TimedChain
from sglang_gen.engine.caching import cached_chain
from sglang_gen.engine.cfg import Encoded, Guidance, guided, kinds
from sglang_gen.engine.denoise import Predict, denoise, step_numbers
from sglang_gen.engine.memory_format import pixel_values, to_bytes
from sglang_gen.errors import LOADING_ERRORS, RunError, UserError, in_our_words, is_out_of_memory
from sglang_gen.families import img2img, prediction
from sglang_gen.families.contract import Request
from sglang_gen.families.prediction import NetworkSchedule
from sglang_gen.hub import component_classes
from sglang_gen.launch.kept_weights import KeptWeights
from sglang_gen.parallel.mesh import SEQUENCE, Mesh
from sglang_gen.perf.clock import Clock
from sglang_gen.perf.flops import CallLog, Watched, stored_bytes
from sglang_gen.types import Decoded, Plan, Sample


def import_classes(plan: Plan) -> None:
    """Import the classes of text encoders, and that of the scheduler unless it is our own.

    This takes more time and memory than loading a small model, so it is done before loading is measured.
    """
    for name, component in plan.card.components.items():
        if component.library == "transformers" or (name == "scheduler" and not has_own_scheduler(component)):
            component_classes.named(component)


def load(plan: Plan, mesh: Mesh, calls: CallLog, kept: KeptWeights | None = None) -> "NativeEngine":
    """Load the plan's components onto this rank's device, or take them from `kept`.

    Raises UserError for weights that do not fit the model, RunError if loading fails.
    """
    native_request = check_native_request(plan)
    pipeline = native_request.pipeline
    kept = kept or KeptWeights()
    transformers.utils.logging.disable_progress_bar()
    log.adopt_libraries()
    try:
        built = {name: build(plan, mesh, name, kept=kept) for name in pipeline.spec.networks_of(plan.card)}
        components = kept.load("components", partial(read_components, plan, pipeline, mesh))
    except UserError:
        raise
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            raise out_of_memory(plan, mesh.rank, f"loading {plan.card.name}", error) from error
        raise RunError(f"Loading {plan.card.name} failed: {in_our_words(error)}") from error
    warn_ineffective(plan, pipeline)
    executions = {name: Execution(each) for name, each in built.items()}
    share_graphs(executions.values())
    engine = NativeEngine(native_request, executions, components, calls)
    if engine.released:
        kept.forget("components")  # text encoders leave a GPU that is short of memory
    return engine


def _weight_bytes(modules: Iterable[Any]) -> int:
    return sum(stored_bytes(parameter) for module in modules for parameter in module.parameters())


class NativeEngine:
    """A loaded pipeline; see `types.Engine`."""

    def __init__(
        self,
        native_request: NativeRequest,
        executions: Mapping[str, Execution],
        components: Mapping[str, Any],
        calls: CallLog,
    ) -> None:
        """`executions` are those of the denoising networks, by name and in the order of the spec."""
        plan, pipeline = native_request.plan, native_request.pipeline
        self.plan, self.pipeline, self.native_request = plan, pipeline, native_request
        self.components, self.executions, self.calls = components, executions, calls
        self.execution = executions[pipeline.spec.network]  # of the first network
        self.mesh, self.comm_log = self.execution.mesh, CommLog()
        self.network: Any = self.execution.network
        self.text_components = [name for name in pipeline.spec.text_encoders if name in components]
        offloaded = [execution.built.offloaded for execution in executions.values()]
        caches = {name: execution.built.cache for name, execution in executions.items()}
        self.caches = {name: cache for name, cache in caches.items() if cache is not None}
        self.trace: list[dict[str, Any]] = []  # decisions of the step cache in the timed generation
        self.loop = denoise  # which a calibration replaces
        self.offload = ComponentOffload(plan, pipeline.spec, offloaded, components)
        resident = [components[name] for name in self.text_components if name not in self.offload.others]
        coming = [execution.network for execution in executions.values() if execution.built.offloaded]
        self.memory_policy = memory_policy.choose(
            plan, pipeline, native_request.full_request, _weight_bytes(resident), _weight_bytes(coming), self.mesh
        )
        self.released = self.offload.add(self.text_components) if self.memory_policy.released else []
        self.zero_negative = plan.card.settings.get("force_zeros_for_empty_prompt", pipeline.spec.zero_without_negative)
        self.sp = self.mesh.axis(SEQUENCE)
        self._observe(vae_parallel.split(components["vae"], self.sp))

    def _observe(self, vae: Any) -> None:
        """Have the calls of networks recorded: those of other libraries by hooks, ours where the engine calls them."""
        calls, components, pipeline = self.calls, self.components, self.pipeline
        for name in self.text_components:
            calls.watch(Watched("text_encoding", name, components[name], self._encoder_meta_copy(components[name])))
        if safety_checker.CHECKER in components:
            vision = components[safety_checker.CHECKER].vision_model
            calls.watch(Watched("decoding", safety_checker.CHECKER, vision))
        self.observed_networks = {
            name: calls.observed(
                Watched("denoising", name, execution.network, execution.countable, self._variant(name)),
                execution.parallel_network.entrance,
                "condition",
            )
            for name, execution in self.executions.items()
        }
        decoder = Watched("decoding", "vae", vae, partial(self._vae_meta_copy, pipeline.decoding_dtype))
        self.decoder = calls.observed(decoder, vae, "decode")
        encoder = Watched("latents", "vae", vae, partial(self._vae_meta_copy, pipeline.encoding_dtype))
        self.encoder = calls.observed(encoder, vae, "encode")

    def _variant(self, name: str) -> Callable[[], Hashable] | None:
        """What tells how the network's last call was computed: the choice of its step cache."""
        cache = self.caches.get(name)
        return None if cache is None else lambda: cache.choice

    def _encoder_meta_copy(self, encoder: Any) -> Callable[[], Any] | None:
        """Return a function that builds this rank's shard of a text encoder on meta; None if it is not sharded."""
        tp = self.mesh.axis("tp")
        if tp.size == 1:
            return None
        from sglang_gen.families import text_encoder_parallel

        return (
            partial(text_encoder_parallel.meta_copy, encoder.config, self.execution.dtype, tp)
            if text_encoder_parallel.is_sharded(encoder)
            else None
        )

    def _vae_meta_copy(self, compute_dtype: Callable[[Any, torch.dtype], torch.dtype]) -> Any:
        vae = self.components["vae"]
        return vae_parallel.meta_copy(vae, self.sp, compute_dtype(vae.config, self.execution.dtype))

    def effective(self) -> dict[str, Any]:
        """The settings that take effect, and the classes of the components. Collective where kernels are timed."""
        with memory_explained(self.plan, self.mesh.rank):
            self._time_kernels()
        networks = {name: execution.network for name, execution in self.executions.items()}
        classes = {name: type(part).__name__ for name, part in {**networks, **self.components}.items()}
        return {
            **self.execution.effective(),  # the same for all networks
            "offload": self.offload.options,
            "lora": [],
            "cache": native_cache.effective(self.plan),
            **memory_policy.of_run(
                self.plan, self.pipeline.spec.guidance, self.native_request.full_request, self.memory_policy.batched
            ),
            "released": self.released,
            "pipeline": self.plan.pipeline_class,
            "makes": self.pipeline.spec.makes,
            "components": classes,
            "scheduler_config": plain_config(self.components["scheduler"]),
        }

    @torch.no_grad()
    def sample(self, batch: tuple[Sample, ...], steps: int, clock: Clock) -> Decoded | None:
        """Generate one batch, from prompts to frames; None on ranks that do not decode.

        Raises RunError if memory runs out or if the latents or frames are not finite.
        """
        try:
            with memory_explained(self.plan, self.mesh.rank):
                self._time_kernels()  # happens once and belongs to no stage
                return self._sample(batch, steps, clock)
        finally:
            clock.leave()

    def _sample(self, batch: tuple[Sample, ...], steps: int, clock: Clock) -> Decoded | None:
        request, scheduler = self.native_request.request_for(steps), self.components["scheduler"]
        negative = batch[0].negative_prompt is not None  # the same for all samples of a batch
        guidance = memory_policy.guidance(
            self.plan, self.pipeline.spec.guidance, request, negative, self.memory_policy.batched
        )
        self.comm_log.on = self.calls.on
        for timed in self._timed_chains().values():
            timed.on = self.calls.on
        lists = 2 if guidance.on and not self._zeros(batch) else 1
        clock.enter("text_encoding")
        with self.comm_log.during("text_encoding", lists), self.offload.stage(self.text_components):
            encoded = self._encode(batch, guidance, request)
        clock.enter("latents")
        generators = [torch.Generator("cpu").manual_seed(sample.seed) for sample in batch]
        timesteps = self.pipeline.schedule(self.native_request.config, scheduler, request)
        noise = self._noise(request, timesteps, generators)
        numbers = step_numbers(len(timesteps), request.steps_run, getattr(scheduler, "order", 1))

        names = self._network_names(timesteps, request)

        def predictor(networks: Mapping[str, Any], texts: Encoded) -> Predict:
            prepare: Callable[[Encoded], Predict] = partial(
                self.pipeline.prepare, NetworkSchedule(networks, names), timesteps, request
            )
            if self.caches and networks is self.observed_networks:
                split = self.mesh.size("cfg") > 1
                prepare = cached_chain.observed(prepare, texts, guidance, numbers, names, self.caches, split)
            return guided(prepare, texts, guidance, numbers, self.mesh.axis("cfg"))

        clock.leave()  # settling happens once for a shape and belongs to no stage
        different = sorted(set(kinds(guidance, numbers, names)))
        for name, execution in self.executions.items():
            own = [kind for kind in different if names[kind] == name]
            execution.settle(predictor, own, request, encoded, noise)
        texts = tuple(tuple(map(described, text)) for text in encoded)
        clock.enter("denoising", request.steps_run)
        warming = request.steps != self.plan.run.sampling.num_inference_steps
        with cached_chain.generation(list(self.caches.values()), warming), self.offload.denoising():
            with self.comm_log.during("conditioning", 1):
                predict = predictor(self.observed_networks, encoded)
            with (
                limits(self.executions.values()),
                self.comm_log.during("denoising", len(numbers)),
                log.Progress(request.steps_run) as progress,
            ):

                def after_step() -> None:
                    clock.step()
                    progress.step()
                    signals.check()

                latents = self.loop(predict, scheduler, timesteps, numbers, noise, generators, after_step)
        clock.enter("decoding")
        choices = native_cache.choices(self.caches.values(), len(numbers))
        self.comm_log.note(
            GeneratedBatch(request, guidance, tuple(numbers), names, texts, lists, described(noise), choices)
        )
        cached = self._note_cache(batch, len(numbers))
        require_finite(latents, "the latents", batch)
        if self.mesh.index("cfg") or self.mesh.index("tp"):
            return None  # another rank decodes the same rows
        effective = memory_policy.effective(self.plan, guidance, request) | cached
        frames = self._decode(latents, request, batch)
        return Decoded(frames, noise, latents, self.pipeline.spec.makes, effective=effective)

    def _network_names(self, timesteps: Tensor, request: Request) -> tuple[str, ...]:
        """Name of the network that computes each timestep; in the few steps of a warmup the networks take turns."""
        if request.steps == self.plan.run.sampling.num_inference_steps:
            return self.pipeline.network_names(timesteps, request)
        return tuple(islice(cycle(self.executions), len(timesteps)))

    def _time_kernels(self) -> None:
        """With attention=auto choose the kernel on the shapes of the run's first batch, unless it is chosen."""
        if self.execution.timed:
            return
        batch, request = self.plan.batches[0], self.native_request.full_request
        negative = batch[0].negative_prompt is not None
        guidance = memory_policy.guidance(
            self.plan, self.pipeline.spec.guidance, request, negative, self.memory_policy.batched
        )
        others = [execution for execution in self.executions.values() if execution is not self.execution]
        self.execution.time_kernels(guidance, request, len(batch), others)

    def _zeros(self, batch: tuple[Sample, ...]) -> bool:
        """Whether the unconditional branch gets zeros because no negative prompt was given."""
        return bool(self.zero_negative and batch[0].negative_prompt is None)

    def _encode(self, batch: tuple[Sample, ...], guidance: Guidance, request: Request) -> list[tuple[Tensor, ...]]:
        """Encoded prompts, preceded by the encoded negative prompts if guidance is on."""

        def encode(texts: list[str]) -> tuple[Tensor, ...]:
            return self.pipeline.encode(self.components, self.native_request.config, texts, request.text_length)

        prompts = encode([sample.prompt for sample in batch])
        if not guidance.on:
            return [prompts]
        if self._zeros(batch):
            return [prediction.without_text(prompts), prompts]
        negatives = [sample.negative_prompt or "" for sample in batch]
        return [encode(negatives), prompts]

    def _noise(self, request: Request, timesteps: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Initial latents `[B, ...]` in the pipeline's layout: drawn per sample, or loaded from a file."""
        dtype = getattr(torch, self.plan.dtype)
        source = None
        if self.native_request.image is not None:  # encoding draws first, then the noise, from the same generators
            pixels = img2img.pixels(self.native_request.image, request.factor, request.size)
            with self.offload.stage(["vae"]):
                source = self.pipeline.encode_image(self.encoder, pixels, generators, dtype)
        noise = self.pipeline.draw(self.native_request.config, request, generators, dtype).to(self.plan.device)
        drawn = self.pipeline.start(self.components["scheduler"], timesteps, noise, source)
        if self.native_request.noise is not None:
            drawn = self.native_request.noise.expand(drawn.shape).to(drawn)
        return drawn

    def _decode(self, latents: Tensor, request: Request, batch: tuple[Sample, ...]) -> "np.ndarray[Any, Any]":
        """Frames `[B, F, H, W, 3]` uint8."""
        with self.comm_log.during("decoding", 1), self.offload.stage(["vae"]):
            decoded = self.pipeline.decode(self.decoder, latents, request)
        values = pixel_values(decoded)
        require_finite(values, f"the decoded {self.pipeline.spec.makes}", batch)
        frames: np.ndarray[Any, Any] = to_bytes(values).cpu().numpy()
        safety_checker.blank(self.components, frames, self.execution.dtype, batch, warn=self.calls.on)
        return frames

    def block_timings(self) -> list[dict[str, Any]] | None:
        chains = self._timed_chains()
        rows = [(name, row) for name, timed in chains.items() for row in timed.report()]
        several = len(self.executions) > 1
        named = [{**row, "name": f"{name}.{row['name']}"} if several else row for name, row in rows]
        return named if chains else None

    def _timed_chains(self) -> dict[str, TimedChain]:
        """The chains of the networks whose blocks are timed."""
        chains = {name: execution.built.timed for name, execution in self.executions.items()}
        return {name: timed for name, timed in chains.items() if timed is not None}

    @contextmanager
    def named_blocks(self) -> Iterator[None]:
        """Compilation of the whole network and CUDA graphs leave no blocks that run on their own."""
        settings = self.plan.run.compile
        several = len(self.executions) > 1
        with ExitStack() as ranges:
            if not settings.cuda_graphs and (settings.regional or not settings.enable_torch_compile):
                for name, execution in self.executions.items():
                    ranges.enter_context(block_names.named_blocks(execution.network, f"{name}." if several else ""))
            yield

    def _note_cache(self, batch: tuple[Sample, ...], steps: int) -> dict[str, Any]:
        """Keep the decisions of the timed generation; `effective` of the batch, if there is a step cache."""
        if not self.caches:
            return {}
        trace = [row for cache in self.caches.values() for row in cache.trace([sample.index for sample in batch])]
        if self.calls.on:
            self.trace += trace
        return {"cache": native_cache.effective(self.plan, trace)}

    def cache_trace(self) -> list[dict[str, Any]] | None:
        return self.trace if self.caches else None

    def traffic(self) -> CommLog:
        return self.comm_log

    def close(self) -> None:
        """Nothing outside this engine was changed, so there is nothing to undo."""
