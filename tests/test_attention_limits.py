"""Attention kernels that a run on a GPU cannot take, by what the plan knows; a stand-in takes the GPU's place."""

import pytest
import torch
from native import edited, runner

from sglang_gen.engine import attention_kernels
from sglang_gen.families import registry
from sglang_gen.families.unet_spec import head_widths


@pytest.fixture
def run(pipelines, sglang, monkeypatch):
    """A run on a GPU, which a dry run plans only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(attention_kernels, "runs", lambda *_: True)
    generate = runner(pipelines, sglang)
    return lambda name, *words, **more: generate(name, *words, "device=cuda", **{"dtype": "bfloat16", **more})


@pytest.mark.parametrize("more", [(), ("dry_run=true",)])
@pytest.mark.parametrize(
    ("words", "dtype", "sentence"),
    [
        ((), "float32", "'sage' computes in half precision, and this run is float32; add --dtype bfloat16"),
        (("compile=regional",), "bfloat16", "torch.compile cannot trace 'sage'"),
        (("compile=full",), "float16", "torch.compile cannot trace 'sage'"),
    ],
)
def test_sage_is_refused_where_it_cannot_compute(run, words, dtype, sentence, more):
    done = run("sd3", "attention=sage", *words, *more, "--backend", "sglang", dtype=dtype)
    assert done.code == 2
    assert f"attention.backend: {sentence}" in done.lines[-1]


@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_sage_is_refused_for_heads_that_are_too_wide(pipelines, run, backend):
    folder = edited(pipelines["flux"], "wide", "transformer/config.json", attention_head_dim=256)
    done = run(folder, "attention=sage", "--backend", backend)
    assert done.code == 2
    assert (
        "attention.backend: 'sage' takes heads of at most 128 channels, and this network has heads of 256; "
        "run with attention=sdpa" in done.lines[-1]
    )


def test_what_sage_can_compute_gets_as_far_as_its_package(run):
    done = run("sd3", "attention=sage", "dry_run=true", "--backend", "sglang")
    assert done.code == 2
    assert "'sage' needs the package sageattention" in done.lines[-1]


@pytest.mark.parametrize(
    ("config", "widths"),
    [
        ({"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8}, (40, 80, 160)),
        ({"block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20],
          "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
          "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}, (64,)),
    ],
)  # fmt: skip
def test_heads_of_a_unet_have_the_channels_of_their_level(config, widths):
    assert head_widths(config) == widths


def test_every_family_knows_the_width_of_its_heads():
    for spec in registry.specs():
        assert spec.head_widths(registry.examples(spec).tiny), spec.name
