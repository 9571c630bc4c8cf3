"""The perf dump: one JSON document per run, with the field names of upstream SGLang and additional ones."""

import datetime
import hashlib
import json
import statistics
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sglang_gen import env
from sglang_gen.config.schema import SCHEMA_VERSION, Weights
from sglang_gen.perf.clock import STAGES, Clock
from sglang_gen.perf.flops import CallLog, total_flops, work
from sglang_gen.perf.machine import describe, rates
from sglang_gen.perf.memory import Checkpoint
from sglang_gen.types import Plan


@dataclass
class Phases:
    """The clocks of one run: loading, the untimed warmup if there was one, and the timed generation."""

    load: Clock
    generate: Clock
    warmup: Clock | None = None
    calls: CallLog = field(default_factory=CallLog)
    imports_ms: float = 0.0
    repeats: list[Clock] = field(default_factory=list)
    replays: bool = False  # whether CUDA graphs are replayed
    loading_mb: float | None = None  # anonymous host memory when loading began, after all imports
    reused: bool = False  # whether the weights were in memory since an earlier job of the sweep

    def checkpoints(self) -> dict[str, Checkpoint]:
        """Memory at the end of each timed stage, and its peak.

        The memory of a CUDA graph is allocated when it is captured, mostly in the warmup. The peak of the warmup's
        denoising therefore counts for denoising too, as it does without graphs, where every evaluation allocates.
        """
        checkpoints = {**self.load.checkpoints, **self.generate.checkpoints}
        if self.replays and self.warmup is not None:
            captured = self.warmup.checkpoints["denoising"].peak_allocated_mb
            checkpoints["denoising"] = checkpoints["denoising"].allocating(captured)
        return checkpoints


def build(plan: Plan, phases: Phases, effective: Mapping[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The dump as a dict. `total_duration_ms` covers the generation, without loading and warmup."""
    total = phases.generate.total_ms
    warmup = phases.warmup
    return {
        "schema_version": SCHEMA_VERSION,
        "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "request_id": uuid.uuid4().hex,
        "commit_hash": env.commit_hash(),
        "tag": plan.run.perf.tag,
        **_times(plan, phases.generate, {**phases.load.stages_ms, **phases.generate.stages_ms}, total),
        "repeats": [
            _times(
                plan, clock, clock.stages_ms, clock.total_ms - clock.stages_ms.get("saving", 0.0)
            )  # only the first saves
            for clock in (phases.generate, *phases.repeats)
        ],
        "memory_checkpoints": {name: asdict(checkpoint) for name, checkpoint in phases.checkpoints().items()},
        "meta": {"prompt": samples[0]["prompt"], "model": plan.card.name},
        "samples": samples,
        "images_per_second": round(len(samples) / (total / 1000), 4) if total else None,
        "warmup": None
        if warmup is None
        else {"steps": plan.run.compile.warmup_steps, "duration_ms": _rounded(warmup.total_ms)},
        "load": {
            "duration_ms": _rounded(phases.load.total_ms),
            "imports_ms": _rounded(phases.imports_ms),
            "reused": phases.reused,
        },
        "requested": dict(plan.requested),
        "effective": dict(effective),
        "fingerprint": fingerprint(plan, effective),
        "machine": describe(plan.device),
        "work": None,
        "energy_j": None,
        "comm": {},
        "predicted": None,
        "cache": None,
        "block_timings_ms": None,
        "ranks": [],
        "trace": None,
        "quality": None,
    }


def describe_rank(rank: int, phases: Phases) -> dict[str, Any]:
    """The times and memory peaks of one rank: an entry of `ranks` in the dump."""
    checkpoints = phases.checkpoints()
    peaks = {
        name: max(
            (value for point in checkpoints.values() if (value := getattr(point, name)) is not None), default=None
        )
        for name in ("peak_allocated_mb", "peak_reserved_mb", "peak_host_anon_mb")
    }
    stages = {**phases.load.stages_ms, **phases.generate.stages_ms}
    before = phases.load.memory.before_mb  # of a process that has run jobs before: what they have left
    return {
        "rank": rank,
        "stages_ms": {name: _rounded(value) for name, value in stages.items()},
        "host_anon_before_mb": before and round(before, 2),
        "host_anon_loading_mb": phases.loading_mb and round(phases.loading_mb, 2),
        **peaks,
    }


PREDICTED_STAGES = ("text_encoding", "denoising", "decoding")


def measured(plan: Plan, phases: Phases, effective: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured on this rank of all that is predicted; see `dry_run.predictions.Measured`."""
    import torch

    described = describe_rank(0, phases)
    steps = [duration for _, _, duration in phases.generate.steps_ms]
    return {
        "base_mb": phases.loading_mb,
        "peak_mb": described["peak_host_anon_mb" if plan.device == "cpu" else "peak_allocated_mb"],
        "flops": total_flops(phases.calls),
        "step_ms": statistics.median(steps) if steps else None,
        "total_ms": sum(phases.generate.stages_ms.get(name, 0.0) for name in PREDICTED_STAGES),
        "threads": torch.get_num_threads(),
        "reused": phases.reused,
        "effective": dict(effective),
    }


def _times(plan: Plan, clock: Clock, stages_ms: Mapping[str, float], total_ms: float) -> dict[str, Any]:
    return {
        "total_duration_ms": _rounded(total_ms),
        "cpu_duration_ms": _rounded(clock.cpu_ms) if plan.device == "cpu" else None,  # a GPU's time is not in it
        "steps": [{"name": name, "duration_ms": _rounded(stages_ms[name])} for name in STAGES if name in stages_ms],
        "denoise_steps_ms": [
            {"step": step, "duration_ms": _rounded(duration), "batch": batch}
            for batch, step, duration in clock.steps_ms
        ],
    }


def add_measurements(dump: dict[str, Any], plan: Plan, phases: Phases, link: float | None) -> None:
    """Add machine rates and the work of each stage to the dump; runs after the generation, outside all timed stages.

    `link` is the measured bandwidth between ranks in 10^9 bytes per second.
    """
    if plan.run.perf.machine_rates or plan.run.machine.name != "auto":
        machine_rates = rates(plan.device, plan.dtype, plan.run.machine)
        dump["machine"]["rates"] = machine_rates if link is None else machine_rates | {"link_gb_per_s": link}
    if plan.run.perf.work:
        sent = _sent(dump["comm"])
        dump["work"] = work(phases.calls, phases.generate.stages_ms, dump["machine"].get("rates", {}), sent)


def _sent(comm: Mapping[str, Any]) -> Counter[str]:
    """Bytes that this rank sent in each timed stage; conditioning counts as denoising."""
    sent: Counter[str] = Counter()
    for stage, traffic in comm.items():
        name = "denoising" if stage == "conditioning" else stage
        sent[name] += sum(collective["bytes"] for collective in traffic["collectives"].values())
    return sent


def fingerprint(plan: Plan, effective: Mapping[str, Any]) -> dict[str, Any]:
    """Exactly the settings and facts that affect speed, as readable fields and as one hash."""
    sampling, facts = plan.run.sampling, describe(plan.device)
    kwargs = plan.run.backend.diffusers_kwargs
    negatives = sum(sample.negative_prompt is not None for batch in plan.batches for sample in batch)
    networks = {
        name: {key: value for key, value in component.config.items() if not key.startswith("_")}
        for name, component in plan.card.components.items()
        if component.library in ("diffusers", "transformers")
    }
    fields = {
        "pipeline": effective.get("pipeline", plan.card.pipeline_class),
        "networks": _hash(networks),
        "components": effective.get("components"),
        "steps": sampling.num_inference_steps,
        "guided": sampling.guidance_scale > 1,
        "true_cfg": negatives if "true_cfg_scale" in kwargs else 0,  # a second branch for a negative prompt
        "size": [effective.get("height"), effective.get("width")],
        **({"num_frames": effective["num_frames"]} if "num_frames" in effective else {}),
        "batches": [len(batch) for batch in plan.batches],
        "max_sequence_length": sampling.max_sequence_length,
        "diffusers_kwargs": _hash(kwargs),
        **({"input_picture": True} if sampling.image_path else {}),  # encoding takes time, and steps are skipped
        **({"guidance_interval": sampling.guidance_interval} if sampling.guidance_interval else {}),
        **({"guidance_batching": "sequential"} if effective.get("guidance_batching") == "sequential" else {}),
        **({"cuda_graphs": True} if effective.get("cuda_graphs") else {}),
        **({"float32_matmul": plan.matmul} if plan.matmul != "torch" else {}),
        **({"disable_autocast": True} if plan.run.compile.disable_autocast else {}),
        **({"weights": "random"} if plan.run.model.weights is Weights.random else {}),
        "latents_saved": plan.run.output.latents,
        "warmup_steps": plan.run.compile.warmup_steps if plan.run.compile.warmup else 0,
        "deterministic": plan.run.deterministic,
        **{
            name: effective[name]
            for name in ("backend", "attention", "dtype", "device", "parallel", "quantization", "offload", "compile")
        },
        "cache": _settings(effective["cache"]),
        "hardware": [facts["gpus"] or facts["cpu"], facts["cpu_count"], facts["threads"]],
        "versions": {name: facts["versions"][name] for name in ("python", "torch", "diffusers", "transformers")},
    }  # fmt: skip
    return {"hash": _hash(fields), "fields": fields}


def _settings(cache: Any) -> Any:
    """A step cache's settings without the number of reused steps, which depends on seed and prompt."""
    return {key: value for key, value in cache.items() if key != "reused_steps"} if isinstance(cache, dict) else cache


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _rounded(milliseconds: float) -> float:
    return round(milliseconds, 3)
