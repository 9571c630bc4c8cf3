"""Tensors that a component's files lack, have in another shape or have too many, on both backends."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from native import record
from original_layout import save
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from sglang_gen import log
from sglang_gen.backends import loading_report

SMALL = ("--prompt", "a cat", "--height", "32", "--width", "32", "--num-inference-steps", "2", "--seed", "7",
         "--dtype", "float32")  # fmt: skip
BACKENDS = ("sglang", "diffusers")
PARTS = [("sd15", "text_encoder"), ("sd15", "unet"), ("sd15", "vae"), ("sdxl", "text_encoder_2"),
         ("sd3", "text_encoder_3"), ("sd3", "transformer"), ("flux", "text_encoder_2")]  # fmt: skip


@pytest.fixture
def generate(sglang):
    def run(*words: object):
        log._warned.clear()
        return sglang("generate", *SMALL, *words)

    return run


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(folder, "model"))


def weights_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def rewrite(file: Path, change) -> None:
    save_file(change(load_file(file)), file, {"format": "pt"})


def refused(done, *words: str) -> None:
    """One sentence with exit code 2 that holds the words, and no image."""
    errors = [line for line in done.lines if line.startswith("ERROR")]
    assert (done.code, errors) == (2, done.lines[-1:]), done.err
    assert all(word in errors[0] for word in words), errors[0]
    assert not list(Path("outputs").glob("*.png"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_component_that_lacks_a_tensor_is_refused(pipelines, generate, name, part, backend):
    model = copied(pipelines[name])
    lost = [""]

    def without_one(tensors):
        lost[0] = [key for key in tensors if tensors[key].dim() > 1 and key != "shared.weight"][-1]
        return {key: tensor for key, tensor in tensors.items() if key != lost[0]}

    rewrite(weights_of(model / part), without_one)
    done = generate("--model-path", model, "--backend", backend)
    refused(done, f"model/{part}", "lacks", lost[0].removeprefix("text_model."))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_component_whose_tensors_have_other_names_is_refused(pipelines, generate, name, part, backend):
    model = copied(pipelines[name])
    rewrite(weights_of(model / part), lambda tensors: {f"model.inner.{key}": t for key, t in tensors.items()})
    refused(generate("--model-path", model, "--backend", backend), f"model/{part}", "lacks")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "part"), [("sd15", "text_encoder"), ("sd15", "vae"), ("sd3", "text_encoder_3")])
def test_a_component_with_a_tensor_of_another_shape_is_refused(pipelines, generate, name, part, backend):
    model = copied(pipelines[name])
    changed = [""]

    def with_another(tensors):
        changed[0] = [key for key in tensors if tensors[key].dim() > 1][-1]
        return {**tensors, changed[0]: tensors[changed[0]][:-1].clone()}

    rewrite(weights_of(model / part), with_another)
    refused(generate("--model-path", model, "--backend", backend), f"model/{part}", "shape")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shared_tensor_of_another_shape_is_refused_in_our_own_words(pipelines, generate, backend):
    """T5 stores its token embedding under one of two names; a file may hold both."""
    model = copied(pipelines["flux"])
    rewrite(
        weights_of(model / "text_encoder_2"),
        lambda tensors: tensors | {"encoder.embed_tokens.weight": torch.zeros(3)},
    )
    done = generate("--model-path", model, "--backend", backend)
    refused(done, "model/text_encoder_2 is not a checkpoint of this T5EncoderModel", "shape")
    assert "aten" not in done.err


def test_another_failure_while_loading_is_not_taken_for_one_of_shapes(pipelines, monkeypatch):
    """Only a shared tensor of another shape ends loading without a report."""

    def fails(*_, **__):
        raise RuntimeError("unable to mmap")

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", fails)
    monkeypatch.setattr(loading_report, "header", lambda file: pytest.fail("the shapes were compared"))
    folder = pipelines["flux"] / "text_encoder_2"
    with pytest.raises(RuntimeError, match="unable to mmap"):
        loading_report.read(T5EncoderModel, folder, json.loads((folder / "config.json").read_text()), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_a_text_encoder_has_no_place_for_are_reported(pipelines, generate, backend):
    model = copied(pipelines["sd15"])
    more = {"encoder.layers.9.mlp.fc1.weight": torch.ones(2, 2), "logit_scale": torch.ones(())}
    rewrite(weights_of(model / "text_encoder"), lambda tensors: tensors | more)
    done = generate("--model-path", model, "--backend", backend)
    assert done.code == 0, done.err
    (warning,) = [line for line in done.lines if "has no place for" in line]
    assert "CLIPTextModel has no place for 1 tensors (encoder.layers.9.mlp.fc1.weight)" in warning


def test_tensors_that_a_network_has_no_place_for_are_refused_or_reported(pipelines, generate):
    model = copied(pipelines["sd15"])
    rewrite(weights_of(model / "unet"), lambda tensors: tensors | {"class_embedding.weight": torch.ones(2, 2)})
    refused(generate("--model-path", model, "--backend", "sglang"), "class_embedding.weight")
    done = generate("--model-path", model, "--backend", "diffusers")
    assert done.code == 0, done.err
    assert "UNet2DConditionModel has no place for 1 tensors (class_embedding.weight)" in done.err


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replaced_component_is_judged_alike(pipelines, generate, backend):
    part = Path(shutil.copytree(pipelines["sd15"] / "text_encoder", "encoder"))
    rewrite(weights_of(part), lambda tensors: dict(list(tensors.items())[1:]))
    paths = json.dumps({"text_encoder": "encoder"})
    refused(generate("--model-path", pipelines["sd15"], "--component-paths", paths, "--backend", backend), "encoder")


@pytest.fixture
def single(pipelines):
    def make(name: str, change) -> tuple[object, ...]:
        file = save(pipelines[name], Path(f"{name}.safetensors"))
        save_file(change(load_file(file)), file)
        return "--model-path", file, f"model.configs={pipelines[name]}"

    return make


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("sd15", "first_stage_model.decoder.conv_in.weight"),
        ("sd15", "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"),
        ("sd15", "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"),
        ("sd3", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("sd3", "text_encoders.t5xxl.transformer.shared.weight"),
    ],
)
def test_a_single_file_that_lacks_a_tensor_of_a_component_is_refused(single, generate, name, lost, backend):
    words = single(name, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != lost})
    refused(generate(*words, "--backend", backend), "does not fit the component configs", "lacks")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_file_never_takes_weights_from_the_folder_of_its_configs(single, generate, backend):
    """The tensor by which diffusers recognises a text encoder is misnamed, and the folder has a text encoder."""
    old, new = "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.other_model."
    words = single("sd15", lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()})
    refused(generate(*words, "--backend", backend), "does not fit the component configs")


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_of_a_single_file_that_nothing_takes_are_reported(single, generate, backend):
    more = {"model_ema.decay": torch.ones(()), "alphas_cumprod": torch.ones(3), "control_model.x": torch.ones(2),
            "first_stage_model.extra.weight": torch.ones(2),
            "cond_stage_model.transformer.text_model.encoder.layers.9.mlp.fc1.weight": torch.ones(2),
            "cond_stage_model.logit_scale": torch.ones(()),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}  # fmt: skip
    done = generate(*single("sd15", lambda tensors: tensors | more), "--backend", backend)
    assert done.code == 0, done.err
    warnings = [line for line in done.lines if line.startswith("WARNING")]
    assert len(warnings) == 3, done.err
    assert (
        "CLIPTextModel has no place for 1 tensors (cond_stage_model.transformer.text_model.encoder.layers.9" in done.err
    )
    assert "AutoencoderKL has no place for 1 tensors (first_stage_model.extra.weight)" in done.err
    assert "holds 1 tensors that belong to no component of StableDiffusionPipeline (control_model.x)" in done.err


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_declare_or_show_a_quantization_are_refused_in_every_component(pipelines, generate, backend):
    model = copied(pipelines["sd15"])

    def scaled(tensors):
        name = next(key for key in tensors if tensors[key].dim() == 2)
        module = name.removesuffix(".weight")
        return tensors | {name: tensors[name].to(torch.float8_e4m3fn), f"{module}.scale_weight": torch.ones(())}

    for part in ("text_encoder", "unet", "vae"):
        before = load_file(weights_of(model / part))
        rewrite(weights_of(model / part), scaled)
        refused(generate("--model-path", model, "--backend", backend), f"model/{part}", "scaled fp8")
        save_file(before, weights_of(model / part), {"format": "pt"})


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_in_place_of_floats_are_refused(pipelines, generate, backend):
    model = copied(pipelines["sd15"])
    rewrite(
        weights_of(model / "text_encoder"),
        lambda tensors: {key: (t * 9).to(torch.int8) if "fc1" in key else t for key, t in tensors.items()},
    )
    refused(generate("--model-path", model, "--backend", backend), "text_encoder", "is stored as I8")


def index(folder: Path, stem: str, files: dict[str, str]) -> None:
    content = {"metadata": {}, "weight_map": files}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_an_index_that_names_a_pickle_is_refused_before_it_is_opened(pipelines, generate, part, backend):
    model = copied(pipelines["sd15"])
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    file = weights_of(model / part)
    torch.save(load_file(file), model / part / "weights.bin")
    index(model / part, stem, dict.fromkeys(load_file(file), "weights.bin"))
    file.rename(file.with_name("decoy.safetensors"))
    refused(generate("--model-path", model, "--backend", backend), "weights.bin", "only safetensors files are read")


def test_a_configuration_that_names_a_pickle_or_an_adapter_is_refused(pipelines, generate):
    model = copied(pipelines["sd15"])
    config = model / "text_encoder" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"transformers_weights": "adapter_model.bin"}))
    for backend in BACKENDS:
        refused(generate("--model-path", model, "--backend", backend), "adapter_model.bin")
    config.write_text(json.dumps(content))
    (model / "text_encoder" / "adapter_config.json").write_text("{}")
    for backend in BACKENDS:
        refused(generate("--model-path", model, "--backend", backend), "adapter_config.json", "--lora-path")


def test_an_index_cannot_lead_out_of_its_folder(pipelines, generate):
    model = copied(pipelines["sd15"])
    shutil.copy(weights_of(model / "unet"), "outside.safetensors")
    index(model / "unet", "diffusion_pytorch_model", {"conv_in.weight": "../../outside.safetensors"})
    refused(generate("--model-path", model), "../../outside.safetensors", "is not in model/unet")


@pytest.mark.parametrize("backend", BACKENDS)
def test_stable_diffusion_3_runs_without_its_t5(pipelines, generate, backend):
    """Zeros stand for its tokens; `[null, null]` is how diffusers writes that a component is absent."""
    model = copied(pipelines["sd3"])
    entries = json.loads((model / "model_index.json").read_text())
    absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (model / "model_index.json").write_text(json.dumps(entries | absent))
    for part in absent:
        shutil.rmtree(model / part)
    done = generate("--model-path", model, "--backend", backend, "output.latents=true", "--guidance-scale", "2")
    assert done.code == 0, done.err
    assert "text_encoder_3" not in record("outputs")["effective"]["components"]
    import diffusers

    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline("a cat", height=32, width=32, num_inference_steps=2, guidance_scale=2.0, output_type="latent",
                       generator=torch.Generator().manual_seed(7)).images  # fmt: skip
    found = load_file("outputs/generated_image_0.safetensors")["latents"]
    assert float((found - latents).abs().max() / latents.abs().max()) <= 1e-5
