"""Components of a diffusers pipeline that wait elsewhere; the GPU that they come to is this CPU under another name."""

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import diffusers
import diffusers.hooks
import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from diffusers.hooks.group_offloading import ModuleGroup
from PIL import Image
from safetensors.torch import save_file
from two_steps import picture, record, two_steps
from uploads import counted_uploads

from sglang_gen.backends.diffusers import offload
from sglang_gen.config.schema import Run
from sglang_gen.engine import residency
from sglang_gen.errors import RunError


@pytest.fixture
def uploads(monkeypatch) -> Counter:
    """The number of uploads of each component, by class."""
    return counted_uploads(monkeypatch)


FLAGS = ("--dit-cpu-offload", "--vae-cpu-offload", "--text-encoder-cpu-offload")


@pytest.fixture
def run(pipelines, sglang):
    return two_steps(pipelines, sglang)


@pytest.fixture
def moves(monkeypatch) -> list[tuple[str, str]]:
    """Offloading from a GPU that is this CPU; every way that a group of modules goes, by the class of its first."""
    found: list[tuple[str, str]] = []
    apply = offload.apply
    monkeypatch.setattr(
        offload, "apply", lambda pipeline, options, _, ending: apply(pipeline, options, "cpu:0", ending)
    )
    for way in ("onload_", "offload_"):
        move = getattr(ModuleGroup, way)

        def noted(group, move=move, way=way) -> None:
            found.append((way, type(group.onload_leader).__name__))
            move(group)

        monkeypatch.setattr(ModuleGroup, way, noted)
    return found


@pytest.mark.whole
@pytest.mark.parametrize("declared", [True, False])
def test_offloaded_components_come_for_their_call_and_draw_the_same_picture(
    run,
    moves,
    uploads,
    monkeypatch,
    declared,
):
    """An autoencoder is called by its halves; not every class declares them to diffusers."""
    if not declared:
        monkeypatch.setattr(AutoencoderKL, "_group_offload_block_modules", None, raising=False)
    assert run("sdxl", "--backend", "diffusers", "--output-path", "outputs").code == 0
    done = run("sdxl", "--backend", "diffusers", *FLAGS, "perf.repeat=2")
    assert done.code == 0, done.err
    assert (picture("outputs/generated_image_0.png") == picture("outputs/generated_image_1.png")).all()
    assert record(1)["effective"]["offload"] == ["dit_cpu_offload", "text_encoder_cpu_offload", "vae_cpu_offload"]
    kinds = ("UNet2DConditionModel", "CLIPTextModel", "CLIPTextModelWithProjection", "AutoencoderKL")
    assert uploads == dict.fromkeys(kinds, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*upcast_vae:FutureWarning")  # diffusers calls what it deprecates
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("words", [("--vae-cpu-offload",), ("offload=model",), ("offload=text_encoder",)])
def test_each_way_of_offloading_a_pipeline_that_casts_its_autoencoder_draws_the_same_picture(
    pipelines, sglang, moves, words, dtype
):
    """SDXL's pipeline decodes in float32 if the autoencoder is in float16, and casts it in place for each call."""
    small = ("--prompt", "a cat", "--height", "32", "--width", "32", "--num-inference-steps", "2", "--seed", "7",
             "--dtype", dtype, "--backend", "diffusers", "--num-samples", "2")  # fmt: skip
    for more in ((), words):
        done = sglang("generate", "--model-path", pipelines["sdxl"], *small, *more)
        assert done.code == 0, done.err
    plain, offloaded = ([picture(f"outputs/generated_image_{first + n}.png") for n in (0, 1)] for first in (0, 2))
    assert np.array_equal(plain, offloaded)
    assert record(2)["effective"]["offload"] != []


@pytest.mark.whole
def test_quantized_weights_are_uploaded_with_their_scales():
    torchao = pytest.importorskip("torchao.quantization")
    plain = torch.nn.Sequential(torch.nn.Linear(64, 64)).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    torchao.quantize_(plain, torchao.Int8DynamicActivationInt8WeightConfig())
    expected = plain(x)
    offloaded = residency.Offloaded(plain, "cpu")
    assert len(offloaded.wrapped) == 1
    host = plain[0].weight
    with residency.on_device([offloaded]):
        assert plain[0].weight is not host
        assert torch.equal(plain(x), expected)
    assert plain[0].weight is host


@pytest.mark.whole
def test_two_networks_of_a_schedule_are_not_on_the_device_together():
    demand = offload.OnDemand()
    names = ("text_encoder", "text_encoder_2", "transformer", "transformer_2", "vae")
    held = {name: residency.Offloaded(torch.nn.Linear(2, 2).requires_grad_(False), "cpu") for name in names}
    seen = []
    for name in (
        "text_encoder",
        "text_encoder_2",
        "text_encoder",
        "transformer",
        "transformer",
        "transformer_2",
        "vae",
    ):
        demand.call(name, held[name])
        seen.append([name for name, each in held.items() if each.on_device])
    both = ["text_encoder", "text_encoder_2"]
    assert seen == [both[:1], both, both, ["transformer"], ["transformer"], ["transformer_2"], ["vae"]]
    demand.drop()
    assert not any(each.on_device for each in held.values())


@pytest.mark.whole
@pytest.mark.parametrize(
    ("words", "effective"),
    [
        pytest.param(("compile=full", "--no-warmup"), {"compile": "full"}, marks=pytest.mark.slow),
        pytest.param(("compile=regional", "--no-warmup"), {"compile": "regional"}, marks=pytest.mark.slow),
        (("cache=dbcache", "cache.Fn_compute_blocks=1", "cache.max_warmup_steps=1"), {}),
        (("quant=int8",), {}),
    ],
)
def test_an_offloaded_network_of_diffusers_is_compiled_cached_and_quantized(
    run, moves, uploads, monkeypatch, words, effective
):
    """The picture is that of the same run without offloading; no code is generated here."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled(function, backend="eager"))
    torch._dynamo.reset()
    for offloading in ((), FLAGS):
        done = run("sd3", "--backend", "diffusers", *words, *offloading)
        assert done.code == 0, done.err
        torch._dynamo.reset()
    assert (picture("outputs/generated_image_0.png") == picture("outputs/generated_image_1.png")).all()
    assert effective.items() <= record(1)["effective"].items()
    assert uploads["SD3Transformer2DModel"] == 1


@pytest.mark.whole
def test_an_adapter_is_merged_into_a_network_that_is_offloaded(pipelines, run, moves, uploads):
    name = "transformer_blocks.0.attn.to_q"
    network = diffusers.SD3Transformer2DModel.from_pretrained(pipelines["sd3"] / "transformer")
    rows, columns = network.get_submodule(name).weight.shape
    torch.manual_seed(0)
    factors = {"lora_A.weight": torch.randn(4, columns), "lora_B.weight": torch.randn(rows, 4)}
    save_file({f"transformer.{name}.{key}": value for key, value in factors.items()}, "adapter.safetensors")
    for words in ((), ("--lora-path", "adapter.safetensors"), ("--lora-path", "adapter.safetensors", *FLAGS)):
        done = run("sd3", "--backend", "diffusers", *words)
        assert done.code == 0, done.err
    plain, adapted, offloaded = (picture(f"outputs/generated_image_{number}.png") for number in range(3))
    assert (plain != adapted).any()
    assert (adapted == offloaded).all()
    assert uploads["SD3Transformer2DModel"] == 1


@pytest.fixture
def streamed(monkeypatch) -> list[bool]:
    """Whether each network that is offloaded asked for streams, which a CPU has not."""
    asked: list[bool] = []

    def without_streams(part, use_stream, **options) -> None:
        asked.append(use_stream)
        group_offloading(part, **options)

    group_offloading = diffusers.hooks.apply_group_offloading
    monkeypatch.setattr(diffusers.hooks, "apply_group_offloading", without_streams)
    return asked


DISK = ("--backend", "diffusers", "--dit-layerwise-offload", "offload.disk_path=disk")


@pytest.mark.whole
@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize(
    ("name", "blocks"),
    [("sdxl", {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D"}), ("sd3", {"JointTransformerBlock"})],
)
def test_a_network_streams_block_by_block_from_memory_or_disk(run, moves, streamed, name, blocks, disk):
    assert run(name, "--backend", "diffusers").code == 0
    moves.clear()
    streamed.clear()
    done = run(name, *(DISK if disk else DISK[:-1]))
    assert done.code == 0, done.err
    assert (picture("outputs/generated_image_0.png") == picture("outputs/generated_image_1.png")).all()
    assert record(1)["effective"]["offload"] == ["dit_layerwise_offload"]
    assert streamed == [True]
    assert {module for way, module in moves if way == "onload_"} >= blocks
    assert Path("disk").exists() is disk


@pytest.mark.whole
def test_a_second_model_of_a_class_does_not_stream_the_first_ones_weights(sglang, moves, streamed, tmp_path):
    """diffusers names files after modules alone, and reads those that it finds."""
    first, second = tiny.sd3(tmp_path / "first"), tiny.sd3(tmp_path / "second")
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(second / "transformer")
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(-1.5)
    transformer.save_pretrained(second / "transformer")
    words = ("--prompt", "a cat", "--height", 32, "--width", 32, "--num-inference-steps", 2, "--seed", 7,
             "--dtype", "float32")  # fmt: skip
    for folder in (first, second):
        for extra in (DISK[:2], DISK):
            done = sglang("generate", "--model-path", folder, *words, *extra)
            assert done.code == 0, done.err
    pictures = [picture(f"outputs/generated_image_{number}.png") for number in range(4)]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[2] == pictures[3]).all()
    assert (pictures[0] != pictures[2]).any()


def test_every_network_of_a_run_has_a_folder_of_its_own_which_the_end_removes(tmp_path, streamed):
    def network() -> torch.nn.Module:
        return diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
            pos_embed_max_size=8,
        )  # fmt: skip

    parts = {"transformer": network(), "transformer_2": network()}
    weights = {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}
    options = Run()
    options.offload.dit_layerwise_offload, options.offload.disk_path = True, str(tmp_path / "new" / "disk")
    with ExitStack() as ending:
        placed = offload.apply(SimpleNamespace(components=parts, **parts), options, "cpu:0", ending)
        assert placed.options == ["dit_layerwise_offload"]
        assert {path.name.rsplit("-", 1)[0] for path in (tmp_path / "new" / "disk").iterdir()} == set(parts)
        for name, part in parts.items():
            for module in part.modules():
                hook = getattr(module, "_diffusers_hook", None) and module._diffusers_hook.get_hook("group_offloading")
                if hook:
                    hook.group.onload_()
            assert all(torch.equal(*pair) for pair in zip(part.parameters(), weights[name], strict=True))
    assert not any((tmp_path / "new" / "disk").iterdir())


@pytest.mark.parametrize("failing", ["compilation.apply", "DiffusersEngine", "DiffusersEngine.sample"])
@pytest.mark.parametrize("error", [RunError("it failed"), KeyboardInterrupt()])
def test_files_of_an_offloaded_network_go_when_the_run_fails(run, moves, streamed, monkeypatch, failing, error):
    def fail(*args: object, **options: object) -> None:
        assert len(list(Path("disk").rglob("*.safetensors"))) > 1
        raise error

    monkeypatch.setattr(f"sglang_gen.backends.diffusers.engine.{failing}", fail)
    done = run("sd3", *DISK)
    assert done.code == (1 if isinstance(error, RunError) else 130), done.err
    assert [*Path("disk").iterdir()] == []


@pytest.mark.whole
def test_a_disk_that_cannot_hold_a_network_is_one_sentence(run, moves, streamed, monkeypatch):
    Path("file").touch()
    done = run("sd3", *DISK[:-1], "offload.disk_path=file")
    assert done.code == 2
    assert "ERROR: offload.disk_path: nothing can be made in " in done.lines[-1]

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    done = run("sd3", *DISK)
    assert done.code == 1
    assert "ERROR: offload.disk_path: " in done.lines[-1]
    assert "cannot hold the network: No space left on device" in done.lines[-1]
    assert [*Path("disk").iterdir()] == []


@pytest.mark.whole
def test_an_image_encoder_comes_for_its_call(sglang, moves, uploads):
    Image.new("RGB", (32, 32), (200, 90, 30)).save("photo.png")
    folder = tiny.wan_i2v(Path("wan"))
    words = ("--num-frames", 5, "--height", 32, "--width", 32, "--num-inference-steps", 1, "--seed", 7)
    done = sglang("generate", "--model-path", folder, "--prompt", "a cat", "--image-path", "photo.png", *words,
                  "--dtype", "float32", "--image-encoder-cpu-offload")  # fmt: skip
    assert done.code == 0, done.err
    assert uploads == {"CLIPVisionModel": 1}
