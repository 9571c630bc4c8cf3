"""Standard error has lines of the command only, whatever its libraries have to say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[1])
OURS = re.compile(
    "INFO: (Backend|Loading model|Model loaded|Seed|Generating with prompt|Progress|Generated (image|video)|"
    "Total generation time|Performance metrics|dtype|The settings of the preset|Attention|Compil|"
    "Generating a batch once more|Profiler trace saved)|"
    "WARNING: (compile|attention|parallel|quant|lora|sampling|--)"
)
RUNS = [
    ("sd15", ["--backend", "diffusers", "quant=int8"]),
    *[
        pytest.param(name, words, marks=pytest.mark.slow)
        for name, words in (
            ("sdxl", ["--backend", "sglang"]),
            ("sd3", ["--backend", "diffusers"]),
            ("flux", ["--backend", "diffusers"]),
            ("flux", ["parallel=tp2"]),
            ("sd15", ["parallel=dp2", "--num-samples", "2"]),
            ("sd3", ["perf.trace=true"]),
            ("sd3", ["parallel=tp2", "perf.trace=true"]),
            ("sd15", ["compile=regional"]),
            ("sd15", ["compile=regional", "--backend", "diffusers"]),
        )
    ],
]


@pytest.mark.whole
@pytest.mark.parametrize(("name", "words"), RUNS)
def test_every_line_of_a_run_is_ours(pipelines, name, words):
    """The first run has a cold cache."""
    command = [sys.executable, "-m", "sglang_gen", "generate", "--model-path", str(pipelines[name]), "--prompt", "a",
               "--height", "32", "--width", "32", "--num-inference-steps", "2", *words]  # fmt: skip
    variables = {**os.environ, "PYTHONPATH": ROOT, "SGLANG_GEN_CACHE": "cache"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert (done.returncode, done.stdout) == (0, "")
    assert "INFO: Model loaded successfully" in done.stderr
    assert [line for line in done.stderr.splitlines() if not OURS.match(line)] == []
