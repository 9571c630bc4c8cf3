"""model.weights=random: models without their weight files, from configs alone, on both backends."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from little_hub import LittleHub
from PIL import Image
from published import NETWORKS
from torch import nn

from sglang_gen import env
from sglang_gen.backends import loading_report, random_components, stand_in_tokenizer
from sglang_gen.config import presets
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.hub import component_classes, download, resolve
from sglang_gen.plan import make
from sglang_gen.types import DENOISERS, Component
from sglang_gen.weights.random_weights import CHUNK, Draw, RandomTensors, drawn

SIZE = ("--height", 32, "--width", 32, "--seed", 7)
SHORT = ("--num-inference-steps", 2, "--dtype", "float32")
PROMPT = ("--prompt", "a fox")
RANDOM = ("model.weights=random", *PROMPT, *SIZE, *SHORT)
PRESETS = [preset.name for preset in presets.load() if preset.name not in ("custom", "landscape")]


def without_weights(folder: Path, target: Path, tokenizers: bool = True) -> Path:
    """A copy of a model's folder without its weight files, and with `tokenizers=False` without those."""
    left_out = ("*.safetensors", *(() if tokenizers else ("tokenizer*",)))
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*left_out)))


def card_of(preset: str):
    return resolve.read_card(env.preset_configs(preset), preset, weights=False)


def saved(folder: str) -> np.ndarray:
    return np.asarray(Image.open(f"{folder}/generated_image_0.png"), dtype=int)


@pytest.fixture
def no_hub(monkeypatch) -> None:
    def fetch(*_, **__):
        raise AssertionError("a hub was asked")

    monkeypatch.setattr(download, "fetch", fetch)


# The tensors


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.single = nn.Linear(400, 300), nn.Linear(200, 1)
        self.convolution, self.norm = nn.Conv2d(40, 60, 3), nn.LayerNorm(300)
        self.table, self.again = nn.Embedding(500, 300), nn.Embedding(500, 300)
        self.again.weight = self.table.weight
        self.gamma = nn.Parameter(torch.empty(300, 1, 1, 1))
        self.register_buffer("positions", torch.arange(5.0))


def test_weights_have_the_variance_of_their_fan_in_and_biases_are_small():
    tensors = RandomTensors("part", Layers(), torch.float32)
    found = {name: tensors.take(name) for name in tensors.names()}
    deviations = {"linear.weight": 400**-0.5, "convolution.weight": 360**-0.5, "table.weight": 1.0, "linear.bias": 0.02}
    for name, deviation in deviations.items():
        assert found[name].std().item() == pytest.approx(deviation, rel=0.2 if name.endswith("bias") else 0.02)
        assert abs(found[name].mean().item()) < 0.25 * deviation
    assert found["single.weight"].std().item() == pytest.approx(200**-0.5, rel=0.2)
    assert bool((found["norm.weight"] == 1).all())
    assert bool((found["gamma"] == 1).all())
    assert found["positions"].tolist() == [0, 1, 2, 3, 4]
    assert "again.weight" not in found


def test_a_parameter_depends_on_its_component_and_name_alone(monkeypatch):
    draw = Draw((3, CHUNK), 0.0, 0.5)
    first = drawn("unet/a", draw, torch.float32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.manual_seed(5)
    assert torch.equal(first, drawn("unet/a", draw, torch.float32))
    assert torch.equal(first.bfloat16(), drawn("unet/a", draw, torch.bfloat16))
    others = [drawn(key, draw, torch.float32) for key in ("unet/b", "vae/a")]
    rows = [*first, *(row for other in others for row in other)]
    assert len({row.sum().item() for row in rows}) == 9
    assert first.std().item() == pytest.approx(0.5, rel=0.01)


def test_a_tensor_that_modules_share_stays_shared(pipelines):
    card = resolve.read_card(pipelines["flux"], "flux", weights=False)
    component = card.components["text_encoder_2"]
    encoder = random_components.network("text_encoder_2", component, torch.float32, "cpu")
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight
    assert not any(parameter.is_meta for parameter in encoder.parameters())


def test_parts_that_a_library_keeps_in_float32_are_drawn_in_float32(tmp_path):
    network = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12,
               "text_dim": 32, "freq_dim": 64, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32}  # fmt: skip
    component = Component("diffusers", "WanTransformer3DModel", tmp_path, network)
    built = random_components.network("transformer", component, torch.bfloat16, "cpu")
    (tmp_path / "saved").mkdir()
    built.save_pretrained(tmp_path / "saved")
    read = type(built).from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in read.named_parameters()}
    assert {name: tensor.dtype for name, tensor in built.named_parameters()} == dtypes
    assert {torch.float32, torch.bfloat16} == set(dtypes.values())
    buffers = {name: tensor.dtype for name, tensor in read.named_buffers()}
    assert {name: tensor.dtype for name, tensor in built.named_buffers()} == buffers


# Whole runs


@pytest.mark.whole
@pytest.mark.parametrize("name", [*tiny.BUILDERS, pytest.param("landscape", marks=pytest.mark.slow)])
def test_both_backends_give_the_same_image_without_weight_files(pipelines, sglang, tmp_path, name):
    folder = without_weights(pipelines.get(name, env.embedded_model()), tmp_path / "model")
    for backend in ("sglang", "diffusers"):
        done = sglang("generate", "--model-path", folder, *RANDOM, "--backend", backend, "--output-path", backend)
        assert done.code == 0, done.err
        assert "with random weights: speed and memory are real, images are noise" in done.err
    assert np.abs(saved("sglang") - saved("diffusers")).max() <= 1
    assert saved("sglang").std() > 10


@pytest.mark.whole
def test_every_output_says_that_weights_were_random(pipelines, sglang, tmp_path):
    folder = without_weights(pipelines["flux"], tmp_path / "model")
    done = sglang("generate", "--model-path", folder, *RANDOM, "--output-path", "out", "--perf-dump-path", "perf.json",
                  "perf.machine_rates=false", "perf.work=false")  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(Path("out/generated_image_0.json").read_text())
    within = json.loads(Image.open("out/generated_image_0.png").text["sglang_gen"])
    dump = json.loads(Path("perf.json").read_text())
    for entry in (record, within, dump):
        assert entry["requested"]["model"] == entry["effective"]["model"] == {"weights": "random"}
    assert dump["fingerprint"]["fields"]["weights"] == "random"
    assert record["run"]["model"]["weights"] == within["run"]["model"]["weights"] == "random"
    assert done.lines[0].startswith(f"INFO: Loading model: {folder} with random weights")


def test_weights_of_the_model_are_pretrained_by_default(pipelines, sglang):
    done = sglang("generate", "--model-path", pipelines["flux"], "--prompt", "a", *SIZE, *SHORT)
    assert done.lines[0] == f"INFO: Loading model: {pipelines['flux']}"
    record = json.loads(Path("outputs/generated_image_0.json").read_text())
    assert record["effective"]["model"] == record["requested"]["model"] == {"weights": "pretrained"}


@pytest.mark.whole
def test_a_model_without_vocabulary_gets_a_tokenizer_that_its_encoder_takes(pipelines, sglang, tmp_path):
    folder = without_weights(pipelines["sd3"], tmp_path / "model", tokenizers=False)
    assert not (folder / "tokenizer").exists()
    seen = []
    for prompt in ("a fox", "a dog"):
        done = sglang("generate", "--model-path", folder, "model.weights=random", *SIZE, *SHORT, "--prompt", prompt,
                      "--output-path", prompt)  # fmt: skip
        assert done.code == 0, done.err
        seen.append(saved(prompt))
    assert np.abs(seen[0] - seen[1]).max() > 10


@pytest.mark.parametrize("preset", PRESETS)
def test_a_stand_in_tokenizer_has_the_length_and_the_ids_of_the_encoder(preset):
    encoders = {name: part for name, part in card_of(preset).components.items() if name.startswith("text_encoder")}
    assert encoders
    for component in encoders.values():
        tokenizer = stand_in_tokenizer.build(component)
        size = component.config.get("vocab_size") or component.config["text_config"]["vocab_size"]
        texts = ["a fox in snow", "ein Fuchs, 狐", ""]
        ids = tokenizer(texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt").input_ids
        assert ids.shape == (3, 64)
        assert 0 <= ids.min() <= ids.max() < size
        assert len({tuple(row) for row in ids.tolist()}) == 3
        assert tokenizer.model_max_length == 77 or tokenizer.model_max_length >= 512
        assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
        first_end = (ids == tokenizer.eos_token_id).int().argmax(-1)
        if component.class_name.startswith("CLIP"):  # its pooled output is that of the largest id
            assert torch.equal(ids.argmax(-1), first_end)


def test_a_stand_in_tokenizer_fits_an_encoder_with_few_ids():
    tokenizer = stand_in_tokenizer.build(Component("transformers", "T5EncoderModel", None, {"vocab_size": 40}))
    ids = tokenizer(["a fox"], padding="max_length", max_length=16).input_ids[0]
    assert max(ids) < 40
    assert len(set(ids)) > 4


# Presets


@pytest.mark.parametrize("preset", [*PRESETS, "landscape"])
def test_every_preset_is_planned_without_a_hub(no_hub, preset):
    composed = compose(Choices(overrides=(f"model={preset}", "model.weights=random"), flags={"prompt": "a"}, file=None))
    expected = make.make_plan(composed, resolve.find(composed.run.model, weights=False))
    plan = make.complete(composed, expected, resolve.find_weights(expected.run))
    assert plan.card.folder == (env.embedded_model() if preset == "landscape" else env.preset_configs(preset))
    assert plan.effective["model"] == {"weights": "random"}
    assert any(name in plan.card.components for name in DENOISERS)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_network_of_a_preset_is_built_from_its_config(preset):
    networks = {}
    for name, component in card_of(preset).components.items():
        if loading_report.is_reported(component_classes.named(component)):
            tensors = random_components.tensors(name, component, torch.bfloat16)
            networks[name] = sum(torch.Size(draw.shape).numel() for draw in tensors.draws.values())
            assert all(0 <= draw.deviation <= 1 for draw in tensors.draws.values())
    assert networks == {name: count for name, (_, count) in NETWORKS[preset].items()}


def shrunk(preset: str, folder: Path, changes: dict[str, dict]) -> Path:
    """A preset's configs with `changes`, as a folder without weights and tokenizers."""
    shutil.copytree(env.preset_configs(preset), folder)
    for name, values in changes.items():
        path = folder / name / "config.json"
        path.write_text(json.dumps(_merged(json.loads(path.read_text()), values)))
    return folder


def _merged(config: dict, changes: dict) -> dict:
    return config | {
        key: _merged(config[key], value) if isinstance(value, dict) else value for key, value in changes.items()
    }


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 64}
QWEN = {
    "transformer": {"num_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 64},
    "text_encoder": {
        "text_config": {**HEADS, "num_hidden_layers": 1,
                        "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"}},
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
                          "out_hidden_size": 64, "fullatt_block_indexes": [0]},
    },
    "vae": {"base_dim": 8, "num_res_blocks": 1},
}  # fmt: skip
WAN = {
    "transformer": {"num_layers": 1, "num_attention_heads": 1, "ffn_dim": 32, "text_dim": 32, "freq_dim": 32},
    "text_encoder": {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 32},
    "vae": {"base_dim": 8, "num_res_blocks": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("preset", "changes"), [("qwen_image", QWEN), ("wan21_t2v_1_3b", WAN)])
def test_presets_of_the_diffusers_backend_run_with_the_stand_in_tokenizer(sglang, tmp_path, preset, changes, dtype):
    folder = shrunk(preset, tmp_path / "model", changes)
    frames = ("--num-frames", 5) if "wan" in preset else ()
    done = sglang("generate", f"model={preset}", "--model-path", folder, "model.weights=random", *PROMPT, *SIZE,
                  "--num-inference-steps", 2, "--dtype", dtype, *frames)  # fmt: skip
    assert done.code == 0, done.err
    assert [path.stat().st_size > 500 for path in Path("outputs").glob("generated_*_0.*")] == [True, True]


# Layouts


LAYOUTS = [("flux", "parallel=tp2"), ("sd3", "parallel=sp2"), ("sd3", "parallel=cfg2"), ("flux", "parallel=dp2")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"), [LAYOUTS[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in LAYOUTS[1:])]
)
def test_ranks_give_the_image_of_one_process(run_on_ranks, name, layout):
    from rank_runs import assert_same

    words = ("model.weights=random", "--num-samples", "2", "--guidance-scale", "3")
    assert run_on_ranks(name, *words, "--output-path", "one").code == 0
    done = run_on_ranks(name, *words, layout, "--output-path", "many")
    assert done.code == 0, done.err
    assert_same("many", "one", 2)


# Activations at full width


def sizes_of_blocks(network: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Root mean square of the output of each block."""
    sizes = {}

    def note(name: str, output) -> None:
        for number, tensor in enumerate(output if isinstance(output, tuple) else (output,)):
            if isinstance(tensor, torch.Tensor):
                sizes[f"{name}[{number}]"] = tensor.float().square().mean().sqrt().item()

    for name, blocks in network.named_modules():
        if isinstance(blocks, nn.ModuleList):
            for number, block in enumerate(blocks):
                block.register_forward_hook(lambda _m, _given, out, at=f"{name}.{number}": note(at, out))
    network.register_forward_hook(lambda _m, _given, out: note("network", out))
    with torch.no_grad():
        run()
    return sizes


@pytest.mark.slow
def test_a_block_of_each_kind_of_a_large_transformer_keeps_activations_of_order_one():
    component = card_of("flux_dev").components["transformer"]
    config = dict(component.config) | {"num_layers": 1, "num_single_layers": 1}
    component = Component(component.library, component.class_name, component.folder, config)
    network = random_components.network("transformer", component, torch.bfloat16, "cpu")

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()

    def run() -> object:
        return network(
            hidden_states=noise(1, 16, 64), encoder_hidden_states=noise(1, 8, 4096), pooled_projections=noise(1, 768),
            timestep=torch.tensor([0.5]), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(8, 3),
            guidance=torch.tensor([3.5]), return_dict=False,
        )  # fmt: skip

    sizes = sizes_of_blocks(network, run)
    assert len(sizes) > 4
    assert all(0.1 < size < 10 for size in sizes.values()), sizes
    assert 0.5 < sizes["network[0]"] < 2


@pytest.mark.slow
def test_a_wide_block_of_a_large_unet_keeps_activations_of_order_one():
    component = card_of("sdxl").components["unet"]
    config = dict(component.config) | {
        "block_out_channels": [320, 1280], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1,
        "transformer_layers_per_block": [1, 1], "attention_head_dim": [5, 20],
    }  # fmt: skip
    component = Component(component.library, component.class_name, component.folder, config)
    network = random_components.network("unet", component, torch.bfloat16, "cpu")

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()

    conditions = {"text_embeds": noise(1, 1280), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).bfloat16()}

    def run() -> object:
        return network(
            noise(1, 4, 16, 16), torch.tensor([500.0]), noise(1, 77, 2048), added_cond_kwargs=conditions,
            return_dict=False,
        )  # fmt: skip

    sizes = sizes_of_blocks(network, run)
    assert len(sizes) > 10
    assert all(0.1 < size < 10 for size in sizes.values()), sizes
    assert 0.3 < sizes["network[0]"] < 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_fifty_steps_in_bfloat16_stay_finite(pipelines, sglang, name):
    done = sglang("generate", "--model-path", pipelines[name], "model.weights=random", *PROMPT, *SIZE,
                  "--num-inference-steps", 50, "--dtype", "bfloat16", "--output-path", "out")  # fmt: skip
    assert done.code == 0, done.err
    assert saved("out").std() > 10


# With other settings, and what is refused


@pytest.mark.whole
def test_of_a_hub_id_only_configs_and_tokenizers_are_downloaded(sglang, pipelines, monkeypatch, tmp_path):
    hub = LittleHub()
    hub.repos["tiny/flux"] = {"main": pipelines["flux"]}
    hub.install(monkeypatch, tmp_path)
    try:
        done = sglang("generate", "--model-path", "tiny/flux", *RANDOM)
        fetched = hub.files_fetched()
    finally:
        hub.close()
    assert done.code == 0, done.err
    assert {"model_index.json", "tokenizer/tokenizer.json", "transformer/config.json"} <= {*fetched}
    assert not any(name.endswith(".safetensors") for name in fetched)


@pytest.mark.slow
def test_int8_quantizes_random_weights_and_adapters_merge_into_them(sglang, pipelines, tmp_path):
    from diffusers import FluxPipeline

    layer = "transformer_blocks.0.attn.to_q"
    config = tiny.config("flux")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    factors = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}
    FluxPipeline.save_lora_weights(tmp_path / "adapter", transformer_lora_layers=factors)
    folder = without_weights(pipelines["flux"], tmp_path / "model")
    runs = {"plain": (), "int8": ("quant=int8",), "adapted": ("--lora-path", tmp_path / "adapter")}
    for name, words in runs.items():
        done = sglang("generate", "--model-path", folder, *RANDOM, "--backend", "diffusers", *words,
                      "--output-path", name)  # fmt: skip
        assert done.code == 0, done.err
    records = {name: json.loads(Path(f"{name}/generated_image_0.json").read_text())["effective"] for name in runs}
    assert records["int8"]["quantization"]["method"] == "int8"
    assert len(records["adapted"]["lora"]) == 1
    assert 0 < np.abs(saved("int8") - saved("plain")).mean() < 20
    assert np.abs(saved("adapted") - saved("plain")).max() > 0


def test_a_safety_checker_with_random_weights_flags_no_image():
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"projection_dim": 16, "vision_config": {**small, "image_size": 28, "patch_size": 14}}
    component = Component("stable_diffusion", "StableDiffusionSafetyChecker", None, config)
    checker = random_components.network("safety_checker", component, torch.float32, "cpu")
    pixels = torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    _, flags = checker(clip_input=pixels, images=np.zeros((8, 4, 4, 3), dtype=np.float32))
    assert not any(flags)


@pytest.mark.whole
def test_parity_compares_both_backends_with_random_weights(pipelines, sglang, tmp_path):
    folder = without_weights(pipelines["sd3"], tmp_path / "model")
    done = sglang("debug", "parity", "--model-path", folder, *RANDOM)
    assert done.code == 0, done.err


REFUSED = [
    (("--component-paths", '{"vae": "vae"}'), "--component-paths replaces components by pretrained ones"),
    (("--transformer-weights-path", "other.safetensors"), "names pretrained weights"),
    (("quant=prequantized",), "quant=prequantized reads weights that are quantized already"),
    (("--nunchaku-config", '{"rank": 32}', "--transformer-weights-path", "x.safetensors"), "leave one of the two out"),
    (("--disable-autocast",), "--disable-autocast computes in the dtype of the stored weights"),
    (("quality.reference=reference",), "quality.reference compares images, and these are noise"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
@pytest.mark.parametrize("more", [(), ("dry_run=true",)])
def test_what_needs_pretrained_weights_is_refused(pipelines, sglang, words, said, more):
    done = sglang("generate", "--model-path", pipelines["flux"], *RANDOM, *words, *more)
    assert done.code == 2
    assert done.lines[-1].startswith("ERROR: model.weights=random: ")
    assert said in done.lines[-1]


def test_a_single_file_is_refused_with_random_weights(sglang):
    Path("model.safetensors").write_bytes(b"")
    done = sglang("generate", "--model-path", "model.safetensors", *RANDOM)
    assert (done.code, "is a single file, which has no configs" in done.lines[-1]) == (2, True), done.err


def test_a_model_whose_config_declares_quantized_weights_is_refused(pipelines, sglang, tmp_path):
    folder = without_weights(pipelines["flux"], tmp_path / "model")
    path = folder / "transformer" / "config.json"
    declared = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | declared))
    done = sglang("generate", "--model-path", folder, *RANDOM)
    assert (done.code, "declares weights quantized by bitsandbytes" in done.lines[-1]) == (2, True), done.err


def test_a_class_that_its_library_does_not_list_is_found(monkeypatch):
    listed = component_classes._names

    def without(library) -> frozenset[str]:
        return listed(library) - {"T5TokenizerFast"}

    monkeypatch.setattr(component_classes, "_names", without)
    component_classes.check(Component("transformers", "T5TokenizerFast"))
