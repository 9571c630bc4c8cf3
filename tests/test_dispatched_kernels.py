"""Every name of diffusers' attention dispatcher works on the diffusers backend or is refused before loading."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers.models.attention_dispatch import AttentionBackendName
from native import picture

from sglang_gen.engine.attention_kernels import SDPA_KERNELS

SMALL = ("--prompt", "a", "--height", 32, "--width", 32, "--num-inference-steps", 1, "--seed", 7, "--dtype", "float32",
         "--backend", "diffusers")  # fmt: skip
ON_CPU = {"native": "sdpa", "_native_flash": "flash", "_native_math": "math", "flash": "flash"}
NAMES = [name.value for name in AttentionBackendName]


@pytest.mark.whole
@pytest.mark.parametrize("name", [name for name in ON_CPU if name in NAMES])
@pytest.mark.parametrize("model", ["flux", "sd15"])
def test_a_name_of_torchs_kernels_is_that_kernel(pipelines, sglang, name, model):
    for kernel in (name, ON_CPU[name]):
        done = sglang("generate", "--model-path", pipelines[model], *SMALL, "--attention-backend", kernel)
        assert done.code == 0, done.err
    record = json.loads(Path("outputs/generated_image_0.json").read_text())
    assert record["effective"]["attention"] == ON_CPU[name]
    assert np.array_equal(picture("outputs/generated_image_0.png"), picture("outputs/generated_image_1.png"))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*ON_CPU, "flex")])
@pytest.mark.parametrize("dry", [True, False])
def test_every_other_name_is_refused_on_a_cpu_with_what_it_needs(pipelines, sglang, name, dry):
    assert len(NAMES) > 15
    words = ("dry_run=true",) if dry else ()
    done = sglang("generate", "--model-path", pipelines["flux"], *SMALL, "--attention-backend", name, *words)
    assert done.code == 2
    if name.removeprefix("_native_") in SDPA_KERNELS:
        assert "does not run here; legal: auto, sdpa, " in done.lines[-1]
    else:
        assert f"attention.backend: '{name}' cannot be used here: it needs " in done.lines[-1]
        assert "; legal: auto, sdpa, " in done.lines[-1]
