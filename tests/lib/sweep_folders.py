"""Folders of sweeps as jobs leave them, with images, notes and perf dumps, made without running anything."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PROMPT = "a lake"
MACHINE = {"cpu": "A processor", "cpu_count": 8, "threads": 4, "gpus": [], "versions": {"python": "3.11", "torch": "2"}}


def dump(seconds: Sequence[float], images: int = 1, prompt: str = PROMPT, **changes: Any) -> dict[str, Any]:
    """A perf dump of one repeat per number in `seconds`, the first of which also saves its images."""
    repeats = [_repeat(1000 * value, saves=not index) for index, value in enumerate(seconds)]
    return {
        **repeats[0],
        "steps": [{"name": "load", "duration_ms": 300.0}, *repeats[0]["steps"]],
        "repeats": repeats,
        "meta": {"prompt": prompt, "model": "landscape"},
        "commit_hash": "0123456789",
        "samples": [
            {"prompt": prompt, "negative_prompt": None, "seed": 7 + index, "file": f"generated_image_{index}.png"}
            for index in range(images)
        ],
        "memory_checkpoints": {"denoising": {"peak_allocated_mb": None, "peak_host_anon_mb": 400 - 100 * seconds[0]}},
        "requested": {"attention": "auto", "dtype": "auto", "cache": "none"},
        "effective": {"attention": "sdpa", "dtype": "bfloat16", "cache": "none", "width": 24, "height": 16,
                      "scheduler_config": {"shift": 3.0}},
        "fingerprint": {"fields": {"steps": 4}},
        "machine": MACHINE,
        "cache": None,
        "quality": None,
        **changes,
    }  # fmt: skip


def _repeat(milliseconds: float, saves: bool) -> dict[str, Any]:
    stages = {"text_encoding": 0.1, "denoising": 0.8, "decoding": 0.1}
    steps = [{"name": name, "duration_ms": share * milliseconds} for name, share in stages.items()]
    saving = [{"name": "saving", "duration_ms": 5000.0}] if saves else []
    return {
        "total_duration_ms": milliseconds + 5000.0 * saves,
        "steps": [*steps, *saving],
        "denoise_steps_ms": [{"step": step, "duration_ms": 0.2 * milliseconds, "batch": 0} for step in range(4)],
    }


def pixels(brightness: int = 0, width: int = 24, height: int = 16) -> "np.ndarray[Any, Any]":
    """A gradient, brighter by so many of 255 levels."""
    ramp = np.linspace(20, 180, width * height * 3).reshape(height, width, 3)
    return (ramp + brightness).clip(0, 255).astype(np.uint8)


def job(
    sweep: Path,
    *overrides: str,
    content: dict[str, Any] | None = None,
    images: Sequence[Any] = (),
    **note: Any,
) -> Path:
    """Add the next job. `images` are arrays, which are saved as PNG, or bytes, saved under names in `note["files"]`."""
    place = sweep / str(sum(1 for path in sweep.iterdir() if path.is_dir()) if sweep.is_dir() else 0)
    place.mkdir(parents=True)
    names = note.pop("files", [f"generated_image_{index}.png" for index in range(len(images))])
    for name, image in zip(names, images, strict=True):
        if isinstance(image, bytes):
            (place / name).write_bytes(image)
        else:
            Image.fromarray(image).save(place / name)
    status = "completed" if content else "failed"
    whole = {"schema_version": 1, "overrides": overrides, "status": status, "error": None, "seconds": 2.5,
             "files": names, "dump": "perf.json", **note}  # fmt: skip
    (place / "job.json").write_text(json.dumps(whole), "utf-8")
    if content:
        (place / "perf.json").write_text(json.dumps(content), "utf-8")
    return place


def cache_and_guidance(sweep: Path) -> Path:
    """Two caches by two guidance scales; the cache is twice as fast and changes the image a little; the last fails."""
    job(sweep, "cache=none", "guidance=3", content=dump([1.0, 1.01, 0.99]), images=[pixels()])
    job(sweep, "cache=none", "guidance=7.5", content=dump([1.02, 1.0, 1.01]), images=[pixels(20)])
    trace = {"steps": ["compute", "reuse", "compute", "reuse"], "reused": 2, "residual_diffs": {"1": 0.05}}
    fast = dump([0.5, 0.505, 0.495], cache=trace)
    fast["requested"]["cache"] = fast["effective"]["cache"] = {"fn": 1}
    job(sweep, "cache=dbcache", "guidance=3", content=fast, images=[pixels(4)])
    job(sweep, "cache=dbcache", "guidance=7.5", error="memory ran out")
    return sweep
