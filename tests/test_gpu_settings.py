"""Settings of a GPU that change no result beyond rounding: which are on, and where they are off."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sglang_gen.backends.diffusers import torch_compile
from sglang_gen.backends.native import components
from sglang_gen.config.schema import Compile
from sglang_gen.engine import compile as compiling
from sglang_gen.engine.memory_format import to_bytes
from sglang_gen.families import autoencoder, registry
from sglang_gen.launch import numerics


@pytest.mark.parametrize(
    ("dtype", "deterministic", "timed"),
    [("bfloat16", False, True), ("float16", False, True), ("float32", False, False), ("bfloat16", True, False)],
)
def test_cudnn_times_its_convolutions_in_half_precision_unless_the_run_is_deterministic(dtype, deterministic, timed):
    assert torch.backends.cudnn.benchmark is False
    with numerics.settled(dtype, deterministic):
        assert torch.backends.cudnn.benchmark is timed
    assert torch.backends.cudnn.benchmark is False


def test_a_program_that_times_convolutions_does_so_again_after_a_deterministic_run(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with numerics.settled("bfloat16", True):
        assert torch.backends.cudnn.benchmark is False
    assert torch.backends.cudnn.benchmark is True


@pytest.mark.parametrize(
    ("device", "deterministic", "options"),
    [
        ("cuda", False, {"epilogue_fusion": True, "coordinate_descent_tuning": True}),
        ("cuda", True, {"epilogue_fusion": True, "coordinate_descent_tuning": False}),
        ("cpu", False, {}),
    ],
)
def test_inductor_searches_the_kernels_of_a_gpu_by_options_of_the_call(monkeypatch, device, deterministic, options):
    """Options of a call do not stay for other code of the process."""
    given = []
    monkeypatch.setattr(compiling.env, "require_compiler", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda function, **words: given.append(words.get("options")) or function)
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compiling.Compiled(network, (nn.Linear,), device, 1, deterministic)
    compiling.Compiled(network, (nn.Linear,), device, 2, deterministic)
    pipeline = SimpleNamespace(transformer=nn.Linear(2, 2))
    assert torch_compile.apply(pipeline, Compile(True, regional=False), device, deterministic) == "full"
    assert given[:2] == [options or None] * 2
    assert given[2:4] == [{**options, "reorder_for_locality": False}] * 2
    assert given[4:] == [options or None]


def test_inductor_knows_these_options():
    from torch._inductor import config

    assert {*compiling.gpu_options("cuda", False)} <= {*config.get_config_copy()}


def halves(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a 16-bit type."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    return values[values.isfinite()]


def near_halves() -> torch.Tensor:
    """float32 values around those that lie between two levels, where rounding decides."""
    ties = (torch.arange(256, dtype=torch.float64) + 0.5) / 255
    close = [ties.float()]
    for end in (0.0, 2.0):
        step = ties.float()
        for _ in range(4):
            step = torch.nextafter(step, torch.tensor(end))
            close.append(step)
    return torch.cat([*close, torch.arange(256) / 255, torch.linspace(0, 1, 100_001)])


@pytest.mark.parametrize("values", [halves(torch.bfloat16), halves(torch.float16), near_halves()])
def test_bytes_made_on_the_device_are_those_that_the_host_makes(values):
    clamped = values.clamp(0, 1).float()
    expected = np.rint(clamped.numpy() * 255).astype(np.uint8)
    made = to_bytes(clamped)
    assert made.dtype == torch.uint8
    assert np.array_equal(made.numpy(), expected)
    assert len(set(expected.tolist())) > 100


@pytest.mark.parametrize(
    ("name", "device", "dtype", "last"),
    [
        ("sd3", "cuda", torch.bfloat16, True),
        ("sdxl", "cuda", torch.bfloat16, True),
        ("sdxl", "cuda", torch.float16, False),  # decodes in float32
        ("sd3", "cuda", torch.float32, False),
        ("sd3", "cpu", torch.bfloat16, False),
    ],
)
def test_an_autoencoder_is_in_channels_last_where_a_gpu_decodes_in_half_precision(name, device, dtype, last):
    pipeline = next(registry.pipeline(spec) for spec in registry.specs() if spec.name == name)
    vae = autoencoder.build({"block_out_channels": (8, 8), "norm_num_groups": 2, "force_upcast": True}).to(dtype)
    components.format_autoencoder(vae, pipeline, dtype, device)
    wide = [each.weight for each in vae.modules() if isinstance(each, nn.Conv2d) and each.kernel_size != (1, 1)]
    assert wide
    assert {weight.is_contiguous(memory_format=torch.channels_last) for weight in wide} == {last}
