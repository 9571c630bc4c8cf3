"""Options of the diffusers backend: each is seen in tensors, processors, steps or graphs, not in the parser."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from two_steps import picture, record, two_steps

from sglang_gen.backends.input_files import read_image
from sglang_gen.engine import attention_kernels
from sglang_gen.errors import RunError

BLACK = Image.new("RGB", (8, 8))


@pytest.fixture
def run(pipelines, sglang):
    return two_steps(pipelines, sglang)


@pytest.fixture(scope="session")
def adapter(pipelines, tmp_path_factory):
    """A LoRA of rank 2 on the attention projections of the tiny SD3, in diffusers' layout."""
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("adapter")
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(pipelines["sd3"], dtype=torch.float32)
    pipeline.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    )
    from peft.utils import get_peft_model_state_dict

    weights = get_peft_model_state_dict(pipeline.transformer)
    generator = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    diffusers.StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=weights)
    return folder / "pytorch_lora_weights.safetensors"


def merged(pipelines, adapter: Path, scale: float, only: str = "") -> np.ndarray:
    """The picture with `W + scale * alpha / rank * B A` written into the weights by hand; alpha is rank here."""
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(pipelines["sd3"], dtype=torch.float32)
    weights = load_file(adapter)
    for name in weights:
        if name.endswith("lora_A.weight") and only in name:
            module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            delta = weights[name.replace("lora_A", "lora_B")] @ weights[name]
            pipeline.transformer.get_submodule(module).weight.data += scale * delta
    image = pipeline("a cat", height=32, width=32, num_inference_steps=2, guidance_scale=7.5,
                     generator=torch.Generator("cpu").manual_seed(7)).images[0]  # fmt: skip
    return np.asarray(image).astype(int)


@pytest.mark.whole
def test_a_lora_is_merged_with_its_scale(pipelines, run, adapter):
    assert run("sd3").code == 0
    done = run("sd3", "--lora-path", adapter, "--lora-scale", "0.05", "--lora-nickname", "cats")
    assert done.code == 0, done.err
    assert np.abs(picture("outputs/generated_image_1.png") - merged(pipelines, adapter, 0.05)).max() <= 1
    assert np.abs(picture("outputs/generated_image_1.png") - picture("outputs/generated_image_0.png")).max() > 5
    (entry,) = record(1)["effective"]["lora"]
    assert (entry["nickname"], entry["scale"], entry["merged"]) == ("cats", 0.05, True)
    assert entry["modules"] > 0


def test_lora_target_modules_keep_the_others_as_they_are(pipelines, run, adapter):
    done = run("sd3", "--lora-path", adapter, "--lora-scale", "0.05", "--lora-target-modules", "to_q")
    assert done.code == 0, done.err
    assert np.abs(picture("outputs/generated_image_0.png") - merged(pipelines, adapter, 0.05, "to_q")).max() <= 1


@pytest.mark.whole
def test_two_adapters_add_up(pipelines, run, adapter):
    both = f"[{{path: {adapter}, nickname: a, scale: 0.02}}, {{path: {adapter}, nickname: b, scale: 0.03}}]"
    done = run("sd3", f"lora.adapters={both}")
    assert done.code == 0, done.err
    assert np.abs(picture("outputs/generated_image_0.png") - merged(pipelines, adapter, 0.05)).max() <= 1


@pytest.mark.whole
def test_a_lora_that_fits_nothing_is_refused(run, adapter):
    other = run("flux", "--lora-path", adapter)
    assert other.code == 2, other.err
    none = run("sd3", "--lora-path", adapter, "--lora-target-modules", "to_nothing")
    assert (none.code, "is among the target modules" in none.err) == (2, True)
    save_file({"transformer.nowhere.lora_A.weight": torch.zeros(2, 4), "transformer.nowhere.lora_B.weight":
               torch.zeros(4, 2)}, "nowhere.safetensors")  # fmt: skip
    nowhere = run("sd3", "--lora-path", "./nowhere.safetensors")
    assert nowhere.code == 2, nowhere.err
    assert run("sd3", "--lora-path", "./missing.safetensors").code == 2


@pytest.mark.parametrize("name", ["math", "flash"])
def test_an_sdpa_kernel_is_the_one_that_runs_in_the_network_and_any_elsewhere(run, monkeypatch, name):
    """On a GPU flash takes neither the single wide head of an autoencoder nor a text encoder's mask."""
    assert attention_kernels.runs(name, "cpu", torch.float32)
    seen, inside = {True: set(), False: set()}, []
    attend, forward = torch.nn.functional.scaled_dot_product_attention, diffusers.UNet2DConditionModel.forward

    def noted(*args, **kwargs):
        cuda = torch.backends.cuda
        seen[bool(inside)].add((cuda.math_sdp_enabled(), cuda.flash_sdp_enabled()))
        return attend(*args, **kwargs)

    def denoise(self, *args, **kwargs):
        inside.append(True)
        try:
            return forward(self, *args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", denoise)
    assert run("sdxl", "--attention-backend", name, "--backend", "diffusers", "perf.work=false").code == 0
    assert seen == {True: {(name == "math", name == "flash")}, False: {(True, True)}}
    assert record()["effective"]["attention"] == name
    assert record()["requested"]["attention"] == name


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--attention-backend", "cudnn"), "'cudnn' does not run here; legal: auto, sdpa, flash, math"),
        (
            ("--attention-backend", "flesh"),
            "unknown kernel 'flesh'; did you mean 'flash'? (legal: auto, sdpa, flash",
        ),
        (("--attention-backend", "flex"), "'flex' has no effect on UNet2DConditionModel"),
        (("--attention-backend", "math", "--attention-backend-config", '{"a": 1}'), "'math' takes no settings"),
        (("--attention-backend-config", '{"prioritty": []}'), "did you mean 'priority'?"),
        (("--cache-dit-config", '{"Fn_compute_blocks": "x"}'), "'Fn_compute_blocks' is 'x'; it must be a whole number"),
        (("--cache-dit-config", '{"residual_diff_threshold": true}'), "is True; it must be a number"),
        (
            ("--diffusers-kwargs", '{"timesteps": [900, 500, 100]}'),
            "'timesteps' has 3 values, and --num",
        ),
        (
            ("--diffusers-kwargs", '{"num_train_timesteps": "x"}'),
            "num_train_timesteps is x; it must be an integer above 0",
        ),
        (("--attention-backend-config", '{"priority": ["cudnn"]}'), "a list of kernels that run here: flash, math"),
    ],
)
def test_a_kernel_that_cannot_act_is_refused(run, words, sentence):
    done = run("sdxl", *words, "--backend", "diffusers")
    assert done.code == 2
    assert sentence in done.err


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_kernel_of_the_dispatcher_acts_on_networks_that_dispatch_and_ends_with_the_run(run):
    from diffusers.models import attention_dispatch

    before = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    assert run("flux", "--backend", "diffusers").code == 0
    done = run("flux", "--attention-backend", "flex", "--backend", "diffusers")
    assert done.code == 0, done.err
    assert record(1)["effective"]["attention"] == "flex"
    assert np.abs(picture("outputs/generated_image_0.png") - picture("outputs/generated_image_1.png")).max() <= 1
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend() == before
    assert run("sdxl", "--attention-backend", "flex", "--backend", "diffusers").code == 2
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend() == before


def test_the_priority_of_sdpa_is_recorded(run):
    priority = ("--attention-backend-config", '{"priority": ["math", "flash"]}')
    assert run("sdxl", *priority, "--backend", "diffusers").code == 0
    assert record()["effective"]["attention"] == "sdpa(math, flash)"


@pytest.mark.whole
def test_a_step_cache_reuses_steps_and_says_which(run):
    settings = '{"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 10.0}'
    done = run("sd3", "--cache-dit-config", settings, "--perf-dump-path", "perf.json", steps=8)
    assert done.code == 0, done.err
    cache = json.loads(Path("perf.json").read_text())["cache"]
    assert cache["steps"] == ["compute"] * 2 + ["reuse"] * 6
    assert record()["effective"]["cache"]["residual_diff_threshold"] == 10.0
    assert run("sd3", steps=8).code == 0
    assert run("sd3", "--cache-dit-config", settings, steps=8).code == 0
    assert np.array_equal(picture("outputs/generated_image_0.png"), picture("outputs/generated_image_2.png"))
    assert not np.array_equal(picture("outputs/generated_image_0.png"), picture("outputs/generated_image_1.png"))


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_taylorseer_extrapolates_what_is_reused(run, name):
    settings = '{"Fn_compute_blocks": 1, "max_warmup_steps": 5, "residual_diff_threshold": 10.0, %s}'
    for extra in ('"enable_taylorseer": false', '"enable_taylorseer": true'):
        done = run(name, "--cache-dit-config", settings % extra, steps=9)
        assert done.code == 0, done.err
    assert record(1)["effective"]["cache"]["calibrator"] == "taylorseer"
    assert not np.array_equal(picture("outputs/generated_image_0.png"), picture("outputs/generated_image_1.png"))


def test_a_step_cache_is_undone_when_loading_fails_after_it(run, monkeypatch):
    """It patches the pipeline's class, which a later run of the process would find."""

    def fail(*args: object) -> None:
        raise RunError("it failed")

    call = diffusers.StableDiffusion3Pipeline.__call__
    with monkeypatch.context() as patched:
        patched.setattr("sglang_gen.backends.diffusers.engine.compilation.apply", fail)
        settings = '{"Fn_compute_blocks": 1, "max_warmup_steps": 1}'
        done = run("sd3", "--cache-dit-config", settings, "--backend", "diffusers", steps=3)
    assert (done.code, done.lines[-1]) == (1, "ERROR: it failed")
    assert diffusers.StableDiffusion3Pipeline.__call__ is call


def test_a_cache_file_in_the_librarys_layout_is_taken(run):
    Path("cache.yaml").write_text("cache_config:\n  Fn_compute_blocks: 1\n  max_warmup_steps: 1\n")
    assert run("sd3", "--cache-dit-config", "cache.yaml", steps=3).code == 0
    assert record()["effective"]["cache"]["max_warmup_steps"] == 1


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("sd3", '{"Fn_compute_block": 1}', "unknown key 'Fn_compute_block'; did you mean 'Fn_compute_blocks'?"),
        ("sd3", '{"parallelism_config": {"ulysses_size": 2}}', "'parallelism_config' is set by the group parallel"),
        ("sd3", '{"quantize_config": {}}', "'quantize_config' is set by the group quant"),
        ("sd3", '{"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}', "covers all 3 blocks, so nothing would be reused"),
        (
            "sdxl",
            '{"Fn_compute_blocks": 1}',
            "DBCache works on the blocks of a transformer, and Stable",
        ),
    ],
)
def test_cache_settings_that_cannot_act_are_refused(run, name, settings, sentence):
    done = run(name, "--cache-dit-config", settings)
    assert done.code == 2
    assert sentence in done.err


def test_offloading_on_a_cpu_is_a_warning_and_effective_none(run):
    done = run("sdxl", "--dit-cpu-offload", "--vae-cpu-offload", "--text-encoder-cpu-offload")
    assert done.code == 0, done.err
    assert sum("no effect, the run computes on the CPU" in line for line in done.lines) == 1
    assert record()["effective"]["offload"] == []
    assert record()["requested"]["offload"] == ["dit_cpu_offload", "text_encoder_cpu_offload", "vae_cpu_offload"]


def test_contradicting_offload_options_are_refused(run):
    assert run("sdxl", "--dit-cpu-offload", "--dit-layerwise-offload").code == 2


@pytest.mark.slow  # a minute of compilation
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
def test_regional_compilation_compiles_one_block_and_keeps_the_picture(run):
    import torch._dynamo.utils as counting

    counting.counters.clear()
    assert run("sd3").code == 0
    done = run("sd3", "compile=regional", "--backend", "diffusers")
    assert done.code == 0, done.err
    assert counting.counters["stats"]["unique_graphs"] >= 1
    assert record(1)["effective"]["compile"] == "regional"
    assert np.abs(picture("outputs/generated_image_0.png") - picture("outputs/generated_image_1.png")).max() <= 2


def test_compilation_without_a_compiler_is_one_sentence(run, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = run("sd3", "--enable-torch-compile", "--backend", "diffusers")
    assert (done.code, "needs a C++ compiler" in done.err) == (2, True)


@pytest.mark.whole
def test_an_input_image_makes_image_to_image_of_a_text_to_image_model(pipelines, run):
    Image.new("RGB", (32, 32), (200, 30, 30)).save("red.png")
    done = run(
        "sdxl", "--image-path", "red.png", "--diffusers-kwargs", '{"strength": 0.5}', "--backend", "diffusers", steps=4
    )
    assert done.code == 0, done.err
    assert record()["effective"]["pipeline"] == "StableDiffusionXLImg2ImgPipeline"
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(pipelines["sdxl"], dtype=torch.float32)
    expected = pipeline("a cat", image=Image.open("red.png"), strength=0.5, num_inference_steps=4, guidance_scale=7.5,
                        generator=torch.Generator("cpu").manual_seed(7)).images[0]  # fmt: skip
    assert np.array_equal(picture("outputs/generated_image_0.png"), np.asarray(expected))


def test_a_mask_makes_inpainting(run):
    Image.new("RGB", (32, 32), (200, 30, 30)).save("red.png")
    Image.new("RGB", (32, 32), (255, 255, 255)).save("mask.png")
    done = run("sdxl", "--image-path", "red.png", "--diffusers-kwargs", '{"mask_image": "mask.png", "strength": 0.9}')
    assert done.code == 0, done.err
    assert record()["effective"]["pipeline"] == "StableDiffusionXLInpaintPipeline"


@pytest.mark.whole
def test_a_second_prompt_is_that_of_every_sample_of_a_batch(run):
    words = ("--diffusers-kwargs", '{"prompt_2": "a forest"}', "--num-samples", "2")
    assert run("sdxl", *words, "sampling.batch_size=2").code == 0
    both = [picture(f"outputs/generated_image_{number}.png") for number in range(2)]
    assert run("sdxl", *words, "--output-path", "apart").code == 0
    for number in range(2):
        assert np.abs(both[number] - picture(f"apart/generated_image_{number}.png")).max() <= 1


def test_an_input_picture_is_what_a_viewer_shows_of_it():
    sideways, tags = Image.new("RGB", (60, 40), (200, 30, 30)), Image.Exif()
    tags[274] = 6  # orientation: turned by the camera
    sideways.save("phone.jpg", exif=tags)
    assert read_image("phone.jpg", "").size == diffusers.utils.load_image("phone.jpg").size == (40, 60)
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(grey.astype(np.uint16) * 257).save("deep.png")
    assert np.array_equal(np.asarray(read_image("deep.png", ""))[..., 0], grey)


@pytest.mark.parametrize(
    ("save", "sentence"),
    [
        (lambda path: Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(path), "has transparent pixels"),
        (lambda path: BLACK.save(path, save_all=True, append_images=[BLACK.point(lambda _: 255)]),
         "has 2 frames; the first one is used"),
    ],
)  # fmt: skip
def test_what_is_lost_of_an_input_picture_is_said_once(run, save, sentence):
    save("odd.gif" if "frames" in sentence else "odd.png")
    (path,) = Path().glob("odd.*")
    done = run("sdxl", "--image-path", path, steps=4)
    assert done.code == 0, done.err
    assert len([line for line in done.lines if f"--image-path: {path} {sentence}" in line]) == 1


def test_a_picture_that_does_not_say_what_is_white_is_refused(run):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save("float.tiff")
    done = run("sdxl", "--image-path", "float.tiff")
    assert (done.code, done.lines[-1].split("; ")[0]) == (
        2, "ERROR: --image-path: float.tiff has values that are neither 8-bit nor 16-bit integers",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "sentence"),
    [("none.png", "the image none.png does not exist"), ("text.png", "text.png is not a readable image")],
)
def test_an_image_that_cannot_be_read_is_refused(run, path, sentence):
    Path("text.png").write_text("not a picture")
    done = run("sdxl", "--image-path", path, steps=4)
    assert (done.code, sentence in done.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("model=sdxl", "cache=dbcache", "--backend", "diffusers"),
            "cache: cache-dit works on transformers; StableDiffusionXLPipeline has a UNet",
        ),
        (
            ("model=sdxl", "cache=deepcache", "--backend", "diffusers"),
            "cache=deepcache is supported only by the",
        ),
        (("model=sdxl", "--attention-backend", "flesh"), "unknown kernel 'flesh'; did you mean 'flash'?"),
        (("--diffusers-kwargs", '{"shfit": 2.0}'), "takes 'shfit'; did you mean 'shift'?"),
        (("--dit-cpu-offload", "--dit-layerwise-offload"), "exclude each other; give one"),
        (("--pipeline-class-name", "NoSuchPipeline"), "has no pipeline class 'NoSuchPipeline'"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(sglang, words, sentence):
    done = sglang("generate", "--prompt", "a", *words, "dry_run=true")
    assert (done.code, sentence in done.err) == (2, True), done.err
