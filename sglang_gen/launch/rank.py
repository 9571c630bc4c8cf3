"""Carries out a plan on one rank: builds the engine and generates its batches. Rank 0 also saves and reports."""

import gc
import importlib
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sglang_gen import env, files, log, signals
from sglang_gen.config.schema import Tracker
from sglang_gen.errors import UserError
from sglang_gen.launch import judging, numerics
from sglang_gen.launch.kept_weights import KeptWeights
from sglang_gen.outputs import decoded_bytes, trace_path, tracking
from sglang_gen.outputs.save import Saved, kept_latents
from sglang_gen.parallel import bandwidth
from sglang_gen.parallel.guidance_split import rounds
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.perf import cache_trace, calibration, dump, energy, trace
from sglang_gen.perf.clock import Clock, timer
from sglang_gen.perf.flops import CallLog
from sglang_gen.perf.memory import Memory, host_anon_mb
from sglang_gen.types import Decoded, Engine, Plan, Result, Sample

BACKENDS = {"sglang": "sglang_gen.backends.native.engine", "diffusers": "sglang_gen.backends.diffusers.engine"}
TRAFFIC, PREDICTIONS = "sglang_gen.dry_run.traffic", "sglang_gen.dry_run.predictions"


def run(plan: Plan, mesh: Mesh, started: float, kept: KeptWeights | None = None) -> Result | None:
    """Carry out the plan. Returns the result on rank 0, else None.

    `started` is the time at which loading began, `kept` what the process has loaded before and is to keep.
    """
    kept = kept or KeptWeights()
    kept.start(plan, mesh)
    switches = numerics.settled(plan.dtype, plan.run.deterministic)
    compiles = plan.run.compile.enable_torch_compile or plan.run.attention.backend == "flex"
    with switches, _released(plan.device, compiles), Memory(plan.device) as memory:
        return _run(plan, mesh, memory, started, kept)


@contextmanager
def _released(device: str, compiled: bool) -> Iterator[None]:
    """Context that releases memory and compiled graphs on exit, so that the next run of the process has the same state.

    torch caches compiled code per function, not per network, and counts it against the recompilation limit.
    """
    before = sys.exception()  # an exception that the caller is handling
    try:
        yield
    except BaseException as error:
        _clear_frames(error, before)
        raise
    finally:
        if compiled:
            torch.compiler.reset()
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _clear_frames(error: BaseException, before: BaseException | None) -> None:
    """Clear the frames of an error, its causes and contexts, which would otherwise keep the engine alive.

    The error `before` and those behind it are left unchanged.
    """
    chain = [error]
    for item in chain:
        traceback.clear_frames(item.__traceback__)
        behind = (item.__cause__, item.__context__)
        chain += [other for other in behind if other is not None and other not in (before, *chain)]


def _run(plan: Plan, mesh: Mesh, memory: Memory, started: float, kept: KeptWeights) -> Result | None:
    times = timer(plan.device)
    phases = dump.Phases(
        load=Clock(times, memory), generate=Clock(times, memory), calls=CallLog(), replays=plan.run.compile.cuda_graphs
    )
    backend = importlib.import_module(BACKENDS[plan.backend])  # takes seconds and is timed separately from loading
    backend.import_classes(plan)
    judge = judging.prepared(plan) if mesh.rank == 0 else None
    phases.imports_ms = 1000 * (time.perf_counter() - started)
    phases.loading_mb = host_anon_mb()
    phases.load.enter("load")
    engine: Engine = backend.load(plan, mesh, phases.calls, kept)
    phases.load.leave()
    phases.reused = kept.reused
    try:
        log.info("Model loaded successfully")
        if plan.run.compile.warmup:
            phases.warmup = Clock(times, memory)
            _warm_up(plan, mesh, engine, phases.warmup)
        mesh.barrier()
        phases.calls.on = True
        is_shown = plan.run.perf.calibrate and plan.run.output.perf_dump_path is not None
        calibrated = calibration.calibration(is_shown, plan.dtype)
        with energy.metered(plan.device, _first_here(mesh)) as meter:
            with calibrated.generation(), meter.generation():
                saved = _generate(plan, mesh, engine, phases.generate)
            phases.calls.on = False
            decisions, blocks = engine.cache_trace() if mesh.leads else None, engine.block_timings()
            for _ in range(plan.run.perf.repeat - 1):
                with calibrated.generation(), meter.generation():
                    phases.repeats.append(_repeat(plan, mesh, engine, Clock(times, memory), saved))
        traced = _trace(plan, mesh, engine, trace.TracedClock(times, memory)) if plan.run.perf.trace else None
    finally:
        engine.close()
    (sent, predicted), rate = _predicted(plan, mesh, engine, phases, saved), _link(plan, mesh)
    ranks = mesh.gather_all(
        dump.describe_rank(mesh.rank, phases)
        | {"comm": sent, "predicted": predicted, "energy_j": meter.generations, "trace": traced}
    )
    traces = mesh.gather_all(decisions)
    if ranks is None or traces is None:
        return None
    cached = cache_trace.merged(traces)
    for line in cache_trace.lines(cached or ()):
        log.info(line)
    if warning := cache_trace.idle(cached or ()):
        log.warning(warning)
    log.info(f"Total generation time: {phases.generate.total_ms / 1000:.2f}s")
    report = dump.build(plan, phases, saved.effective, saved.samples)
    report |= {"cache": None if cached is None else cache_trace.dumped(cached)}
    report |= {"block_timings_ms": blocks, "ranks": ranks, "trace": traced, "comm": sent, "predicted": predicted}
    energy.add(report, plan.device)
    calibration.add(report, calibrated)
    return _finish(plan, phases, saved, report, rate, judge)


def _first_here(mesh: Mesh) -> bool:
    """Whether this rank has the lowest number on its machine, whose processors it measures."""
    place = env.torchrun()
    return (place.local if place and place.ranks > 1 else mesh.rank) == 0


def _trace(plan: Plan, mesh: Mesh, engine: Engine, clock: Clock) -> str | None:
    """Generate this data parallel group's first batch once more under the profiler. Returns the name of the trace.

    Returns None if the group has no batch. Raises RunError if the trace cannot be written.
    """
    batches = list(enumerate(plan.batches))[mesh.index("dp") :: mesh.size("dp")]
    mesh.barrier()
    if not batches:
        return None
    log.info("Generating a batch once more for the profiler trace")
    clock.batch, batch = batches[0]
    path = trace_path.trace_path(plan.run.output.path, mesh.rank)

    def sample() -> None:
        engine.sample(batch, plan.run.sampling.num_inference_steps, clock)

    trace.record(path, plan.device, engine.named_blocks(), sample)
    log.info(f"Profiler trace saved to: {path} (open it in https://ui.perfetto.dev)")
    return path.name


def _warm_up(plan: Plan, mesh: Mesh, engine: Engine, clock: Clock) -> None:
    """Generate a batch of each kind in few steps. Raises UserError if the scheduler does not support so few steps."""
    steps = plan.run.compile.warmup_steps
    try:
        for batch in _kinds(plan, mesh):
            engine.sample(batch, steps, clock)
    except UserError as error:
        raise UserError(f"The warm-up with compile.warmup_steps={steps} is not possible: {error}") from error


def _predicted(
    plan: Plan, mesh: Mesh, engine: Engine, phases: dump.Phases, saved: Saved
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """This rank's measured traffic by stage next to the predicted traffic, and all predictions of a run with a dump."""
    log, dumped = engine.traffic(), plan.run.output.perf_dump_path
    if dumped and plan.run.perf.work:
        measured = dump.measured(plan, phases, saved.effective)
        traffic, predicted = importlib.import_module(PREDICTIONS).compare(plan, mesh, log, measured)
        return log.report(traffic), predicted
    if (dumped or plan.run.tracking.name is Tracker.wandb) and plan.layout.ranks > 1:
        return log.report(importlib.import_module(TRAFFIC).predict(plan, mesh, log)), None
    return log.report({}), None


def _link(plan: Plan, mesh: Mesh) -> float | None:
    """Measured bandwidth between ranks in GB/s; None if the dump does not need it. A collective call."""
    wanted = plan.run.output.perf_dump_path and plan.run.perf.machine_rates and plan.run.machine.name == "auto"
    return bandwidth.gb_per_s(mesh, plan.device) if wanted and mesh.layout.ranks > 1 else None


def _kinds(plan: Plan, mesh: Mesh) -> list[tuple[Sample, ...]]:
    """One batch for each length, with and without a negative prompt, among those of this data parallel group."""
    group = plan.batches[mesh.index("dp") :: mesh.size("dp")]
    return list({(len(batch), batch[0].negative_prompt is None): batch for batch in group}.values())


def _finish(
    plan: Plan,
    phases: dump.Phases,
    saved: Saved,
    report: dict[str, Any],
    rate: float | None,
    judge: judging.Judge | None,
) -> Result:
    """Judge quality, write the perf dump and report to trackers, in this order, after the last image is saved."""
    failure = None if judge is None else judging.judged(judge, saved, report)
    if plan.run.output.perf_dump_path:
        dump.add_measurements(report, plan, phases, rate)
        files.save_json(Path(plan.run.output.perf_dump_path), report, stream=True)
        log.info(f"Performance metrics saved to: {plan.run.output.perf_dump_path}")
    tracking.track(plan.run, report, saved.paths, env.wandb_mode())
    if failure is not None:
        raise failure
    return Result(tuple(saved.paths), tuple(saved.frames), tuple(saved.seeds), report)


def _generate(plan: Plan, mesh: Mesh, engine: Engine, clock: Clock) -> Saved:
    saved = Saved(plan, {**plan.effective, **engine.effective()})
    for number, decoded in _generated(plan, mesh, engine, clock):
        clock.enter("saving")
        saved.add(number, decoded)
        clock.leave()
    return saved


def _repeat(plan: Plan, mesh: Mesh, engine: Engine, clock: Clock, saved: Saved) -> Clock:
    """Generate all samples again without saving them. Warns about every sample that is not bitwise identical."""
    made = [
        (decoded.saved(row), kept_latents(plan, decoded, row))
        for _, decoded in _generated(plan, mesh, engine, clock)
        for row in range(len(decoded.frames))
    ]
    first = zip(saved.frames, saved.latents, strict=True)
    for index, ((frame, latents), (frame_again, latents_again)) in enumerate(zip(first, made, strict=True)):
        same = latents is None or bool((latents == latents_again).all())
        if not (same and (frame == frame_again).all()):
            log.warning(f"Sample {index} differs when it is generated again in this process")
    return clock


def _generated(plan: Plan, mesh: Mesh, engine: Engine, clock: Clock) -> Iterator[tuple[int, Decoded]]:
    """Generate all batches. Yields (number, result) of every batch, in order, on rank 0 and nothing on other ranks."""
    group = mesh.index("dp")
    for turn in rounds(plan.batches, mesh.size("dp")):
        signals.check()
        for prompt in dict.fromkeys(sample.prompt for _, batch in turn for sample in batch):
            log.info(f'Generating with prompt: "{log.shorten(prompt)}"')
        decoded = None
        if group < len(turn):
            clock.batch, batch = turn[group]
            decoded = engine.sample(batch, plan.run.sampling.num_inference_steps, clock)
        if not mesh.leads:
            continue
        results = [decoded] if decoded else []
        if mesh.size("dp") > 1:
            clock.enter("gathering")  # includes the wait for slower groups
            gathered = mesh.gather(decoded_bytes.encode(plan, decoded), "dp") or []
            results = [decoded_bytes.decode(data) for data in gathered if data]
        clock.leave()
        if mesh.rank == 0:
            for (number, _), result in zip(turn, results, strict=True):
                yield number, result
