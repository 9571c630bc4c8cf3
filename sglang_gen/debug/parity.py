"""Compares both backends on the same inputs, stage by stage, in the order of computation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from sglang_gen import log
from sglang_gen.backends.diffusers import engine as diffusers
from sglang_gen.backends.native import engine as native
from sglang_gen.debug import compared_stages, decoders, networks
from sglang_gen.debug.correspondence import correspond
from sglang_gen.debug.native_runs import Free, Led, predict_once, run_free, run_led
from sglang_gen.debug.networks import Networks
from sglang_gen.debug.recording import Call, Recording, recorded
from sglang_gen.debug.verdict import Cause, Report, Row, Tolerance, Verdict, first_difference
from sglang_gen.families import registry
from sglang_gen.launch import numerics
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.perf.clock import Clock, timer
from sglang_gen.perf.flops import CallLog
from sglang_gen.perf.memory import Memory
from sglang_gen.types import Decoded, Plan


@dataclass(frozen=True)
class Engines:
    """The model loaded in both backends, and the pairs of its denoising networks and autoencoders."""

    plan: Plan
    ours: Any
    theirs: Any
    networks: Networks
    autoencoders: Networks


@dataclass
class Denoising:
    """The rows of all steps, the modules compared and left out, and the cause of the first difference."""

    rows: list[Row]
    compared: int = 0
    left_out: tuple[str, ...] = ()
    cause: Cause | None = None


def run(ours: Plan, theirs: Plan, tolerance: Tolerance) -> Report:
    """Load the model once for each backend and compare them on the first batch.

    Raises the exceptions of a generation if the model cannot be loaded or diffusers cannot run it.
    """
    with numerics.settled(ours.dtype, ours.run.deterministic):
        log.info(f"Loading model: {ours.card.name}")
        our_engine = native.load(ours, Mesh(), CallLog())
        their_engine = diffusers.load(theirs, Mesh(), CallLog())
        try:
            return compare(beside(ours, our_engine, their_engine, tolerance), tolerance)
        finally:
            their_engine.close()


def beside(plan: Plan, ours: Any, theirs: Any, tolerance: Tolerance) -> Engines:
    """Two loaded engines with their networks matched."""
    network = getattr(theirs.pipeline, ours.pipeline.spec.network)
    pairs = correspond(ours.network, network, ours.pipeline.sources)
    autoencoders = decoders.beside(ours.components["vae"], theirs.pipeline.vae, tolerance.module)
    return Engines(plan, ours, theirs, Networks(ours.network, network, pairs, tolerance.module), autoencoders)


def compare(engines: Engines, tolerance: Tolerance) -> Report:
    """Run one generation per backend and compare them; the engines can be compared again."""
    log.info("Generating with diffusers")
    recording = _record(engines)
    log.info("Generating with the native engine")
    free = run_free(engines.ours, partial(_generate, engines.plan, engines.ours))
    begin = [*compared_stages.texts(free, recording, tolerance), *compared_stages.starts(free, recording, tolerance)]
    log.info("Comparing the networks on the same inputs")
    led = _lead(engines, free, recording)
    denoising = _denoising(engines, free, led, recording, tolerance)
    decoder, cause = decoders.compare(engines.autoencoders, recording.scaled)
    end = [*decoder.rows, *([compared_stages.decoding(led.decoded, recording, tolerance)] if led.decoded else [])]
    left_out = denoising.left_out + decoder.left_out
    return Report(
        model=engines.plan.card.name,
        dtype=engines.plan.dtype,
        device=engines.plan.device,
        tolerance=tolerance,
        rows=(*begin, *denoising.rows, *end, *compared_stages.ends(free, recording, tolerance)),
        compared=denoising.compared + len(decoder.rows),
        modules=denoising.compared + len(decoder.rows) + len(left_out),
        left_out=left_out,
        cause=_first_cause([(begin, None), (denoising.rows, denoising.cause), (decoder.rows, cause)]),
    )


def _first_cause(stages: Sequence[tuple[Sequence[Row], Cause | None]]) -> Cause | None:
    """The cause of the first stage with a difference."""
    return next((cause for rows, cause in stages if first_difference(rows)), None)


def _generate(plan: Plan, engine: Any) -> Decoded:
    with Memory(plan.device) as memory:
        clock = Clock(timer(plan.device), memory)
        decoded: Decoded = engine.sample(plan.batches[0], plan.run.sampling.num_inference_steps, clock)
    return decoded


def _record(engines: Engines) -> Recording:
    pipeline = engines.theirs.pipeline
    encoded = registry.examples(engines.ours.pipeline.spec).encoded
    with recorded(engines.networks.theirs, pipeline.scheduler, pipeline.vae, encoded) as recording:
        recording.decoded = _generate(engines.plan, engines.theirs)
    return recording


def _lead(engines: Engines, free: Free, recording: Recording) -> Led:
    """The led run; empty if the backends differ in the number of steps or the shape of latents, which rows report."""
    if not compared_stages.fits(free, recording):
        return Led()
    return run_led(engines.ours, partial(_generate, engines.plan, engines.ours), recording)


@torch.no_grad()
def _denoising(engines: Engines, free: Free, led: Led, recording: Recording, tolerance: Tolerance) -> Denoising:
    """Compare all modules at the first step; report later steps by their first difference or their largest error."""
    denoising = Denoising([])
    with engines.theirs.kernel.context():
        for index, calls in enumerate(recording.evaluations()):
            for call in calls:
                runs = _runs(engines, free, recording, call, index)
                compared = networks.compare(engines.networks, *runs, step=index + 1)
                rows = compared.rows
                if not denoising.rows:
                    denoising.compared, denoising.left_out = len(rows), compared.left_out
                if first_difference(denoising.rows) is None:
                    denoising.cause = networks.cause(engines.networks, *runs, rows=rows)
                denoising.rows += rows if index == 0 else _summary(rows)
            if led.steps:
                denoising.rows += compared_stages.step(led.steps[index], recording.steps[index], index + 1, tolerance)
    return denoising


def _runs(
    engines: Engines, free: Free, recording: Recording, call: Call, index: int
) -> tuple[networks.Run, networks.Run]:
    """Functions that evaluate our network and diffusers' with the arguments of a recorded call."""
    timestep = recording.schedule["timesteps"][index]
    ours = partial(predict_once, engines.ours, free.request, timestep, call.texts, call.latents)
    return ours, partial(engines.networks.theirs, **call.arguments)


def _summary(rows: list[Row]) -> list[Row]:
    first = first_difference(rows)
    row = first or max(rows, key=lambda row: row.error or 0.0)
    note = "" if row.verdict is Verdict.different else f"the worst of {len(rows)} modules"
    return [replace(row, note=note, outer=True)]
