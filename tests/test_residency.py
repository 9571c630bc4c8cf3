"""Component offload on the native engine; the GPU is a stand-in: copies of the weights on this CPU."""

from collections import Counter

import pytest
import torch
from cases import mostly_slow
from native import assert_same, record, runner
from PIL import Image
from torch import nn
from uploads import counted_uploads

from sglang_gen.engine import residency
from sglang_gen.plan import offloading

ALL = ("--dit-cpu-offload", "--vae-cpu-offload", "--text-encoder-cpu-offload")


@pytest.fixture
def uploads(monkeypatch) -> Counter:
    """Offloading has an effect on this CPU; the number of uploads of each module, by class."""
    monkeypatch.setattr(offloading, "OFFLOADING", ("cuda", "cpu"))
    return counted_uploads(monkeypatch)


@pytest.fixture
def downloads(monkeypatch) -> list:
    """Copies of weights to the host."""
    made: list = []
    on_host = residency._on_host
    monkeypatch.setattr(residency, "_on_host", lambda tensor, device: made.append(1) or on_host(tensor, device))
    return made


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


ENCODERS = {
    "sd3": {"CLIPTextModelWithProjection": 2, "T5EncoderModel": 1},
    "flux": {"CLIPTextModel": 1, "T5EncoderModel": 1},
    "sdxl": {"CLIPTextModel": 1, "CLIPTextModelWithProjection": 1},
    "sd15": {"CLIPTextModel": 1},
}
NETWORK = {"sd3": "SD3", "flux": "Flux", "sdxl": "UNet", "sd15": "UNet"}


@pytest.mark.whole
@pytest.mark.parametrize("name", mostly_slow(["sd3", "flux", "sdxl", "sd15"], "sd3", "sdxl"))
def test_each_component_is_uploaded_once_in_a_generation_and_never_copied_back(run, uploads, downloads, name):
    assert run(name, folder="plain", steps=2).code == 0
    assert not uploads
    done = run(name, *ALL, "--backend", "sglang", folder="offloaded", steps=2)
    assert done.code == 0, done.err
    assert uploads == {**ENCODERS[name], NETWORK[name]: 1, "Autoencoder": 1}
    made = len(downloads)
    assert_same("offloaded", "plain", 1)
    assert record("offloaded")["effective"]["offload"] == [
        "dit_cpu_offload",
        "text_encoder_cpu_offload",
        "vae_cpu_offload",
    ]
    downloads.clear()
    uploads.clear()
    assert run(name, *ALL, "perf.repeat=2", folder="twice", steps=2).code == 0
    once = {**ENCODERS[name], NETWORK[name]: 1, "Autoencoder": 1}
    assert uploads == {kind: 2 * count for kind, count in once.items()}
    assert len(downloads) == made  # of loading: the second generation copied nothing to the host


@pytest.mark.whole
def test_an_autoencoder_comes_once_to_encode_an_input_image_and_once_to_decode(run, uploads):
    Image.new("RGB", (48, 32), (200, 90, 30)).save("photo.png")
    done = run("sdxl", "--vae-cpu-offload", "--image-path", "photo.png", "--backend", "sglang", steps=4)
    assert done.code == 0, done.err
    assert uploads == {"Autoencoder": 2}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["regional", "full"])
def test_a_compiled_network_is_offloaded_without_another_graph(run, uploads, traced, mode):
    words = (f"compile={mode}", "--no-warmup", "--dit-cpu-offload", "--backend", "sglang")
    assert run("sd3", *words, "perf.repeat=3").code == 0
    assert uploads == {"SD3": 3}
    graphs = len(traced)
    traced.clear()
    torch._dynamo.reset()
    assert run("sd3", *words[:2]).code == 0
    assert len(traced) == graphs


def test_a_network_without_fixed_addresses_is_not_captured(sglang):
    done = sglang("generate", "--prompt", "a", "--dit-cpu-offload", "compile.cuda_graphs=true", "dry_run=true")
    assert done.code == 2
    assert "--dit-cpu-offload moves the denoising network to other addresses in each generation" in done.lines[-1]


def test_a_comparison_of_networks_refuses_to_have_them_on_the_host(pipelines, sglang, uploads):
    done = sglang("debug", "parity", "--model-path", pipelines["sd3"], "--prompt", "a", "--dit-cpu-offload")
    assert done.code == 2
    assert done.lines[-1].endswith("when offloaded ones are on the host; leave out the options of offload")


def test_an_option_without_a_component_is_named(run, uploads):
    done = run("sd15", "--image-encoder-cpu-offload", "--backend", "sglang", steps=1)
    assert done.code == 0, done.err
    assert "image_encoder_cpu_offload: no effect, StableDiffusionPipeline has no such component" in done.err
    assert record("outputs")["effective"]["offload"] == []


def test_tied_and_strided_weights_come_back_as_they_were():
    module = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(4, 4), nn.Linear(4, 4))
    module[2].weight = module[1].weight
    module.register_buffer("table", torch.arange(3))
    module.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    offloaded = residency.Offloaded(module, "cpu")
    addresses = [tensor.data_ptr() for tensor in module.parameters()]
    with residency.on_device([offloaded]):
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert module[2].weight is module[1].weight
        assert not {tensor.data_ptr() for tensor in module.parameters()} & {*addresses}
    assert [tensor.data_ptr() for tensor in module.parameters()] == addresses


def test_an_autoencoder_that_decodes_in_float32_is_uploaded_in_it():
    """diffusers' pipeline converts the autoencoder while it is on the host, and back while it is on the device."""
    module = nn.Sequential(nn.Linear(4, 4)).to(torch.float16).requires_grad_(False)
    module.register_buffer("scale", torch.ones(3, dtype=torch.float16))
    offloaded = residency.Offloaded(module, "cpu")
    for _ in range(2):
        module.to(torch.float32)
        with residency.on_device([offloaded]):
            assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}
            module.to(torch.float16)
        assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float16}
    with residency.on_device([offloaded]):
        assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float16}


def test_a_device_that_runs_out_of_memory_keeps_no_weights(monkeypatch):
    module = nn.Linear(4, 4).requires_grad_(False)
    offloaded = residency.Offloaded(module, "cpu")
    addresses, copied = [tensor.data_ptr() for tensor in module.parameters()], residency._copied

    def full(master, device):
        if master.ndim == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copied(master, device)

    monkeypatch.setattr(residency, "_copied", full)
    with pytest.raises(torch.OutOfMemoryError), residency.on_device([offloaded]):
        raise AssertionError
    assert [tensor.data_ptr() for tensor in module.parameters()] == addresses
