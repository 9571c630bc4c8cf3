"""Whole runs of the command: seconds of a step by kind of offloading, and memory beside the dry run's estimate."""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.dry_run.estimate import estimate
from sglang_gen.hub import resolve
from sglang_gen.plan import checks, make
from tools.bench import folders, pictures, works
from tools.gpu_first.sections import FAILED, Settings, table

STEPS = 4
OFFLOADS = {"none": (), "component": ("offload=model",), "layerwise": ("offload=layerwise",)}
LEAST = 30.0  # seconds that must be left to begin a run


def measure(settings: Settings) -> str:
    """A table with one line per kind of offloading."""
    generation = chosen(settings)
    dtype = "bfloat16" if settings.gpu else "float32"
    common = (
        *(word for word in generation.words if not word.startswith("sampling.num_inference_steps=")),
        f"sampling.num_inference_steps={STEPS}", f"device={settings.device}", f"dtype={dtype}", "sampling.seed=1",
        "sampling.prompt=a lake", "perf=light",
    )  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = folders.write(generation.preset, Path(temporary) / "model", settings.device, generation.changes)
        words = (*common, f"model.path={folder}")
        predicted = _predicted(words)
        for name, offload in OFFLOADS.items():
            if offload and not settings.gpu:
                rows.append((name, "skipped: a CPU offloads nothing", "", "", "", ""))
            elif settings.seconds_left < LEAST and settings.size == "full":
                rows.append((name, "skipped: too little time left", "", "", "", ""))
            else:
                rows.append(
                    (name, *_run((*words, *offload), Path(temporary) / name, predicted if not offload else None))
                )
    columns = ("offload", "backend", "s a step", "load, s", "peak memory, GiB", "predicted, GiB")
    return f"{generation.title}; {STEPS} steps here.\n\n{table(columns, rows)}"


def chosen(settings: Settings) -> pictures.Generation:
    """The published model with the smallest network, or the tiny one."""
    if settings.size == "tiny":
        return pictures.WORKS["tiny"]
    published = [each for each in pictures.WORKS.values() if each.work is not None and not each.changes]
    return min(published, key=_parameters)


def _parameters(generation: pictures.Generation) -> int:
    assert generation.work is not None
    return sum(each.numel() for each in works.outline(generation.work(), torch.bfloat16).parameters())


def _predicted(words: Sequence[str]) -> float | None:
    """GiB that the dry run estimates for the run without offloading."""
    composed = compose(Choices(tuple(words)))
    checks.check_request(composed)
    plan = make.make_plan(composed, resolve.find(composed.run.model, weights=False))
    memory = estimate(plan).get("memory")
    return None if memory is None else memory["total"] / 2**30


def _run(words: Sequence[str], place: Path, predicted: float | None) -> tuple[Any, ...]:
    """The cells of one run behind its name."""
    dump_path = place / "perf.json"
    failure = pictures.generate((*words, f"output.path={place}", f"output.perf_dump_path={dump_path}"), place)
    if failure is not None:
        return f"{FAILED}: {failure}", "", "", "", ""
    dump = json.loads(dump_path.read_text())
    steps = [step["duration_ms"] / 1000 for step in dump["denoise_steps_ms"]][1:]  # the first one warms up
    said = "" if predicted is None else f"{predicted:.2f}"
    load = dump["load"]["duration_ms"] / 1000
    backend = dump["effective"]["backend"]
    return backend, f"{statistics.median(steps):.3f}", f"{load:.1f}", f"{pictures.peak(dump):.2f}", said
