"""No setting is accepted and ignored: every key of the schema is read during a generation, or refused by name."""

import dataclasses
import sys
import typing

import pytest

from sglang_gen.config import schema
from sglang_gen.plan.checks import UNAVAILABLE

COPYING = (
    "dataclasses",
    "sglang_gen.config.schema",
    "copy",
    "omegaconf",
)  # modules that read every key without using it
# Read only under conditions that these two commands do not have; the test that has them.
ELSEWHERE = {
    "model.id": "test_config.py",
    "sweep.resume": "test_resumed_sweep.py",
    "sweep.skip_refused": "test_resumed_sweep.py",
    "sweep.fresh": "test_kept_weights.py",
    "perf.interleave": "test_interleaved_sweep.py",
    "model.example_prompt": "test_config.py",
    "model.revision": "test_hub.py",
    "model.preset": "test_hub.py",
    "model.configs": "test_single_file.py",
    "tracking.project": "test_tracking.py",
    "compile.regional": "test_diffusers_options.py",
    "output.fps": "test_media.py",
    "machine.link_gb_per_s": "test_estimate.py",
    "machine.link_latency_us": "test_estimate.py",
    "machine.attention_tflops": "test_estimate.py",
    "parallel.timeout_minutes": "test_failing_ranks.py",
}


@pytest.fixture
def read(monkeypatch) -> set[str]:
    """Config paths whose value some code looks at."""
    seen: set[str] = set()

    def trace(cls: type, prefix: str) -> None:
        names = {field.name for field in dataclasses.fields(cls)}

        def traced(self, name):
            if not sys._getframe(1).f_globals["__name__"].startswith(COPYING):
                seen.update(f"{prefix}{each}" for each in (names if name == "__dict__" else names & {name}))
            return object.__getattribute__(self, name)

        monkeypatch.setattr(cls, "__getattribute__", traced)

    trace(schema.Run, "")
    for name, kind in typing.get_type_hints(schema.Run).items():
        if dataclasses.is_dataclass(kind):
            trace(typing.cast(type, kind), f"{name}.")
    return seen


@pytest.mark.whole
def test_every_key_is_read_during_a_generation_or_refused(pipelines, sglang, read):
    degrees = ("num_gpus", "tp_size", "sp_degree", "ulysses_degree", "ring_degree", "dp_size", "dp_degree")
    done = sglang(
        "generate", "--model-path", pipelines["sdxl"], "--prompt", "a", "--height", "32", "--width", "32",
        "--num-inference-steps", "1", "--warmup", "--perf-dump-path", "perf.json", "machine=h100",
        "--backend", "diffusers", "--dtype", "bfloat16",
        *(f"parallel.{name}=1" for name in degrees),
    )  # fmt: skip
    assert done.code == 0, done.err
    cached = sglang(
        "generate", "--model-path", pipelines["sd3"], "--prompt", "a", "--height", "32", "--width", "32",
        "--num-inference-steps", "1", "--lora-path", "./missing.safetensors",
    )  # fmt: skip
    assert "./missing.safetensors does not exist" in cached.err
    again = sglang(
        "generate", "--model-path", pipelines["sd3"], "--prompt", "a", "--height", "32", "--width", "32",
        "--num-inference-steps", "2", "cache=dbcache", "cache.Fn_compute_blocks=1", "cache.max_warmup_steps=1",
        "attention=math",
    )  # fmt: skip
    assert again.code == 0, again.err
    refused = tuple(prefix for prefixes, _ in UNAVAILABLE for prefix in prefixes)
    ignored = {path for path in schema.leaves() if not path.startswith(refused)} - read
    assert ignored - set(ELSEWHERE) == set()
