"""Perf dumps with values that a test chooses, of this program and of SGLang."""

import copy
import datetime
import json
from pathlib import Path

FIELDS = {"steps": 4, "dtype": "float32", "parallel": {"tp": 1, "ring": 1}, "versions": {"torch": "2.13.0"}}
STAGES = {"load": 2000.0, "text_encoding": 300.0, "denoising": 8000.0, "decoding": 1500.0, "saving": 20.0}
MACHINE = {"cpu": "AMD EPYC 7B13", "cpu_count": 2, "threads": 1, "gpus": []}


def stamp(number: int) -> str:
    """The time of a dump, one hour after the one before it."""
    return (datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(hours=number)).isoformat()


def times(factor: float = 1.0, stages: dict[str, float] = STAGES) -> dict:
    """What one repeat holds."""
    scaled = {name: value * factor for name, value in stages.items()}
    return {
        "total_duration_ms": sum(scaled.values()) - scaled.get("load", 0.0),
        "steps": [{"name": name, "duration_ms": value} for name, value in scaled.items()],
        "denoise_steps_ms": [{"step": step, "duration_ms": 2000.0 * factor} for step in range(4)],
    }


def ours(
    factor: float = 1.0,
    number: int = 0,
    commit: str | None = None,
    hash_: str = "aaaa",
    fields: dict | None = None,
) -> dict:
    """The dump of one run; `number` sets its time, `commit` is by default one of its own."""
    return {
        "schema_version": 1,
        "timestamp": stamp(number),
        "request_id": f"run {number}",
        "commit_hash": commit or f"{number:040x}",
        **times(factor),
        "memory_checkpoints": {
            "denoising": {"peak_allocated_mb": None, "peak_reserved_mb": None, "peak_host_anon_mb": 1000.0}
        },
        "meta": {"prompt": "a lake", "model": "landscape"},
        "samples": [{"seed": 1}, {"seed": 2}],
        "fingerprint": {"hash": hash_, "fields": copy.deepcopy(fields or FIELDS)},
        "machine": MACHINE,
    }


def upstreams(factor: float = 1.0, number: int = 0) -> dict:
    """A dump with the fields that SGLang's PerformanceLogger writes, whose requests all have one id offline."""
    stages = {"TextEncodingStage": 300.0, "DenoisingStage": 8000.0}
    return {
        "timestamp": stamp(number),
        "request_id": "mocked_fake_id_for_offline_generate",
        "commit_hash": f"{number:040x}",
        "tag": "benchmark_dump",
        **times(factor, stages),
        "meta": {"prompt": "a lake", "model": "a/model"},
    }


def save(path: str | Path, content: object) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content), encoding="utf-8")
    return str(path)
