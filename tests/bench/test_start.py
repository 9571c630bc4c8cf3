"""How long the command takes before it computes: help, composition, the first picture of a cold process.

`make bench` prints the tables of pytest-benchmark. Nothing here fails because a machine is slow.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose

pytestmark = pytest.mark.bench
PROMPT = "A serene landscape with mountains and a lake at sunset"


def _command(*words: str) -> None:
    code = "import sys; from sglang_gen.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


def test_help(benchmark):
    benchmark.pedantic(_command, args=("generate", "--help"), rounds=10, warmup_rounds=1)


def test_composition(benchmark):
    choices = Choices(overrides=("model=sdxl", "parallel=sp2_tp2"), flags={"sampling.prompt": "a"})
    composed = benchmark(compose, choices)
    assert composed.run.parallel.num_gpus == 4


def test_cold_picture(benchmark, tmp_path: Path):
    words = ("generate", "--prompt", PROMPT, "--seed", "42", "--output-path", str(tmp_path))
    benchmark.pedantic(_command, args=words, rounds=5, warmup_rounds=1)
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_warm_picture(benchmark, tmp_path: Path):
    from sglang_gen import generate

    def run() -> None:
        generate(prompt=PROMPT, seed=42, output_path=str(tmp_path), log_level="error")

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
