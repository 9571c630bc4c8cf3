"""Runs a plan on its ranks; rank 0's result comes back. This version has one rank, in this process."""

import time
from pathlib import Path
from typing import Any

from sglang_gen import env, log, output
from sglang_gen.errors import RunError, UserError
from sglang_gen.perf import dump, quality
from sglang_gen.perf.flops import CallLog
from sglang_gen.perf.memory import Memory
from sglang_gen.perf.record import Clock, synchroniser
from sglang_gen.schema import SCHEMA_VERSION, plain
from sglang_gen.sweep import tracking
from sglang_gen.types import Decoded, Engine, Plan, Result, Sample


def launch(plan: Plan, started: float) -> Result:
    """Build the engine, generate every batch, save as they come. `started` is when the command turned to the model."""
    import torch

    if plan.run.deterministic:
        env.deterministic_cublas()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(plan.run.deterministic)
    try:
        with Memory(plan.device) as memory:
            return _run(plan, memory, started)
    finally:
        torch.use_deterministic_algorithms(before)


def _run(plan: Plan, memory: Memory, started: float) -> Result:
    wait = synchroniser(plan.device)
    phases = dump.Phases(load=Clock(wait, memory), generate=Clock(wait, memory), calls=CallLog())
    from sglang_gen.backends import diffusers  # the import itself takes seconds and is told apart from loading

    reference = _reference(plan)
    phases.imports_ms = 1000 * (time.perf_counter() - started)
    phases.load.enter("load")
    engine: Engine = diffusers.load(plan, phases.calls)
    phases.load.leave()
    if reference is not None and engine.effective()["makes"] != "image":
        raise UserError("quality.reference compares pictures; this pipeline makes none")
    log.info("Model loaded successfully")
    try:
        if plan.run.compile.warmup:
            phases.warmup = Clock(wait, memory)
            engine.sample(plan.batches[0], plan.run.compile.warmup_steps, phases.warmup)
        saved = _generate(plan, engine, phases)
        decisions = engine.cache_decisions()
        phases.repeats = [_repeat(plan, engine, Clock(wait, memory), saved) for _ in range(plan.run.perf.repeat - 1)]
    finally:
        engine.close()
    log.info(f"Total generation time: {phases.generate.total_ms / 1000:.2f}s")
    report = dump.build(plan, phases, saved.effective, saved.samples) | {"cache": decisions}
    if reference is not None:
        report["quality"] = quality.compare(str(plan.run.quality.reference), saved.samples, saved.frames, reference)
        log.info(f"Quality against {plan.run.quality.reference}: {quality.sentence(report['quality'])}")
    if plan.run.output.perf_dump_path:
        dump.add_measurements(report, plan, phases)
        output.save_json(Path(plan.run.output.perf_dump_path), report)
        log.info(f"Performance metrics saved to: {plan.run.output.perf_dump_path}")
    tracking.track(plan.run, report, saved.paths, env.wandb_mode())
    return Result(tuple(saved.paths), tuple(saved.frames), tuple(saved.seeds), report)


def _reference(plan: Plan) -> list[Path] | None:
    """The pictures of quality.reference that belong to the samples, found before any work is done."""
    if plan.run.quality.reference is None:
        return None
    return quality.counterparts(
        plan.run.quality.reference, [plain(sample) for batch in plan.batches for sample in batch]
    )


class _Saved:
    """What the batches have left so far."""

    def __init__(self, effective: dict[str, Any]) -> None:
        self.effective = effective
        self.paths: list[Path] = []
        self.frames: list[Any] = []
        self.seeds: list[int] = []
        self.samples: list[dict[str, Any]] = []


def _generate(plan: Plan, engine: Engine, phases: dump.Phases) -> _Saved:
    clock, phases.calls.on = phases.generate, True
    saved = _Saved({**plan.effective, **engine.effective()})
    for number, batch in enumerate(plan.batches):
        clock.batch = number
        for prompt in dict.fromkeys(sample.prompt for sample in batch):
            log.info(f'Generating with prompt: "{log.shorten(prompt)}"')
        decoded = engine.sample(batch, plan.run.sampling.num_inference_steps, clock)
        saved.effective |= _size(plan, decoded)
        clock.enter("saving")
        for row, sample in enumerate(batch):
            path = _save(plan, saved.effective, sample, decoded, row)
            log.info(f"Generated {decoded.kind} saved to: {path}")
            saved.paths.append(path)
            saved.frames.append(decoded.frames[row])
            saved.seeds.append(sample.seed)
            saved.samples.append({**plain(sample), "batch": number, "file": path.name})
        clock.leave()
    return saved


def _repeat(plan: Plan, engine: Engine, clock: Clock, saved: _Saved) -> Clock:
    """Generate everything once more, saving nothing; a frame that differs from the first time is a warning."""
    made: list[Any] = []
    for number, batch in enumerate(plan.batches):
        clock.batch = number
        made += list(engine.sample(batch, plan.run.sampling.num_inference_steps, clock).frames)
    for index, (first, again) in enumerate(zip(saved.frames, made, strict=True)):
        if not (first == again).all():
            log.warning(f"Sample {index} is not the same when it is generated again in this process")
    return clock


def _save(plan: Plan, effective: dict[str, Any], sample: Sample, decoded: Decoded, row: int) -> Path:
    def record(name: str) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "file": name,
            "sample": plain(sample),
            "run": plain(plan.run),
            "sources": dict(plan.sources),
            "requested": dict(plan.requested),
            "effective": effective,
            "versions": dict(env.versions()),
            "commit_hash": env.commit_hash(),
        }

    latents = None
    if plan.run.output.latents:
        if decoded.noise is None or decoded.latents is None:
            raise RunError(f"{plan.card.pipeline_class} does not show its latents, so output.latents cannot be met")
        latents = {"noise": decoded.noise[row], "latents": decoded.latents[row]}
    folder, data = Path(plan.run.output.path), decoded.frames[row]
    if decoded.kind == "image":
        return output.save_picture(folder, data, record, latents)
    from sglang_gen import media

    if decoded.kind == "video":
        return media.save_video(folder, data, effective["fps"], record, latents)
    return media.save_sound(folder, data, effective["sampling_rate"], record, latents)


def _size(plan: Plan, decoded: Decoded) -> dict[str, Any]:
    """What the result is like: pixels, frames, rates."""
    if decoded.kind == "audio":
        return {"sampling_rate": decoded.rate, "samples": decoded.frames.shape[-1]}
    height, width = decoded.frames.shape[-3:-1]
    size = {"height": height, "width": width}
    if decoded.kind == "video":
        from sglang_gen.media import FRAMES_PER_SECOND

        size |= {"num_frames": decoded.frames.shape[1], "fps": plan.run.output.fps or FRAMES_PER_SECOND}
    return size
