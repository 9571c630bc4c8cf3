"""Runs of a loaded native engine for `sglang tune cache`: calibration, exact images, and images of a schedule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_gen.backends.native import engine as native
from sglang_gen.backends.native import planned_request
from sglang_gen.backends.native.plan_bindings import bindings
from sglang_gen.backends.native.request import evaluations
from sglang_gen.config import prompts
from sglang_gen.engine.caching.cached_chain import CachedChain
from sglang_gen.engine.caching.calibration_chain import CalibrationChain
from sglang_gen.models.chain import Block, Chain, State
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.perf import quality
from sglang_gen.perf.clock import Clock, timer
from sglang_gen.perf.flops import CallLog
from sglang_gen.perf.memory import Memory
from sglang_gen.tune.plan_calibration import Calibrator
from sglang_gen.tune.plan_schedule import PlannedSchedule, Planner
from sglang_gen.tune.plan_search import PlanMeasurement
from sglang_gen.types import Decoded, Plan, Sample

SPAN = 8  # largest number of steps from a computed step to one that reuses it
DEPTH_FRACTIONS = (0, 0.25, 0.5, 0.75)  # of the blocks, or of a UNet's skip connections; depth 1 is tried too

Batches = tuple[tuple[Sample, ...], ...]


@dataclass(frozen=True)
class ExactImages:
    """Frames of the exact run and the time of its generations in ms, by batch."""

    frames: list["np.ndarray[Any, Any]"]
    milliseconds: list[float]


class PlanBench:
    """A native engine in this process, whose step cache is exchanged between generations."""

    def __init__(self, plan: Plan) -> None:
        """Load the model. Raises UserError and RunError as `native.load` does."""
        self.plan, self.engine = plan, native.load(plan, Mesh(), CallLog())
        request, spec = self.engine.native_request.full_request, self.engine.pipeline.spec
        timesteps, numbers = evaluations(self.engine.native_request, request)
        self.bound_to = bindings(plan, spec, request, timesteps)
        self.guided = planned_request.is_guided(plan, request, numbers)
        self.exact_loop = self.engine.loop
        self.plain = CountingChain()

    @property
    def steps(self) -> int:
        """Number of evaluations of the network."""
        return len(self.guided)

    @property
    def blocks(self) -> int:
        """Number of blocks of the network, once it has generated."""
        return self.plain.blocks

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths at which steps are reused, ascending."""
        most = planned_request.skip_connections(self.plan, self.engine.pipeline.spec) or self.blocks
        return tuple(sorted({*(int(fraction * most) for fraction in DEPTH_FRACTIONS), min(1, most - 1)}))

    def batches(self, samples: Sequence[Sample]) -> Batches:
        return prompts.batches(list(samples), self.plan.run.sampling.batch_size)

    def warm_up(self, sample: Sample) -> None:
        """Generate once, so that nothing is compiled or allocated for the first time while times are measured."""
        self._use(None)
        self._generate((sample,) * self.plan.run.sampling.batch_size)

    def calibrate(self, samples: Sequence[Sample]) -> Planner:
        """The planner of schedules with the errors of reusing each step, averaged over the samples."""
        chain = CalibrationChain(planned_request.planned_chain(self.plan, ()), self.depths, SPAN)
        calibrator = Calibrator(chain, self.guided)
        self._use(chain)
        self.engine.loop = calibrator.loop
        try:
            for batch in self.batches(samples):
                self._generate(batch)
        finally:
            self.engine.loop = self.exact_loop
        return Planner(calibrator.errors, self.steps, self.blocks, chain.costs)

    def exact(self, batches: Batches) -> ExactImages:
        self._use(None)
        pairs = [self._generate(batch) for batch in batches]
        return ExactImages([decoded.frames for decoded, _ in pairs], [time for _, time in pairs])

    def measure(self, schedule: PlannedSchedule, batches: Batches, exact: ExactImages) -> PlanMeasurement:
        """The images of a schedule against the exact ones."""
        self._use(planned_request.planned_chain(self.plan, schedule.depths))
        found: list[tuple[float, str]] = []
        times = []
        for batch, frames in zip(batches, exact.frames, strict=True):
            decoded, time = self._generate(batch)
            times.append(time)
            values = [quality.psnr(_flat(own), _flat(other)) for own, other in zip(decoded.frames, frames, strict=True)]
            found += list(zip(values, [sample.prompt for sample in batch], strict=True))
        worst, prompt = min(found)
        mean = math.fsum(value for value, _ in found) / len(found)
        return PlanMeasurement(worst, mean, sum(times) / sum(exact.milliseconds), prompt)

    def _generate(self, batch: tuple[Sample, ...]) -> tuple[Decoded, float]:
        """A generation and its time in ms: of the processor on a CPU, where other programs take turns."""
        with Memory(self.plan.device) as memory:
            clock = Clock(timer(self.plan.device), memory)
            decoded = self.engine.sample(batch, self.plan.run.sampling.num_inference_steps, clock)
        assert decoded is not None  # one rank decodes
        return decoded, clock.cpu_ms if self.plan.device == "cpu" else clock.total_ms

    def _use(self, chain: CachedChain | None) -> None:
        """Let the network run its blocks through `chain`; None computes all of them."""
        built = self.engine.execution.built
        built.network.chain = chain or self.plain
        built.cache = chain
        self.engine.caches = {} if chain is None else {built.name: chain}


class CountingChain(Chain):
    """Computes all blocks, and counts them."""

    blocks = 0

    def forward(self, blocks: Sequence[Block], state: State, conditions: Sequence[Any], *shared: Any) -> State:
        self.blocks = len(blocks)
        return super().forward(blocks, state, conditions, *shared)


def _flat(frames: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """All frames of a video below one another, `[F H, W, 3]`."""
    return frames.reshape(-1, *frames.shape[-2:])
