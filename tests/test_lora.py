"""LoRA files in the layouts that people share: each gives the picture of `W + scale * (alpha / rank) * B A` by hand."""

import json
import pickle
import re
from pathlib import Path

import diffusers
import numpy as np
import original_layout
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from little_hub import LittleHub
from PIL import Image
from safetensors.torch import load_file, save_file

SIZE = ("--prompt", "a cat", "--height", "32", "--width", "32", "--num-inference-steps", "2", "--seed", "7",
        "--dtype", "float32")  # fmt: skip
SCALE = 0.4
ATTENTION = re.compile(r"attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$")

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # (down, up) by `part.module`


def picture(number: int = 0) -> np.ndarray:
    return np.asarray(Image.open(f"outputs/generated_image_{number}.png")).astype(int)


def record(number: int = 0) -> dict:
    return json.loads(Path(f"outputs/generated_image_{number}.json").read_text())


def load(folder: Path) -> diffusers.DiffusionPipeline:
    return diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


def pairs(pipeline: diffusers.DiffusionPipeline, part: str, wanted: re.Pattern[str], rank: int = 4) -> Pairs:
    """Random factors for the modules of one network whose names `wanted` finds."""
    generator, found = torch.Generator().manual_seed(5), {}
    for name, module in getattr(pipeline, part).named_modules():
        if wanted.search(name) and hasattr(module, "weight"):
            out, *rest = module.weight.shape
            down = torch.randn(rank, *rest, generator=generator) / torch.Size(rest).numel() ** 0.5
            up = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator)
            found[f"{part}.{name}"] = (down, up)
    assert found
    return found


def by_hand(folder: Path, factors: Pairs, strength: float) -> np.ndarray:
    """The picture with the changes written into the weights."""
    pipeline = load(folder)
    for name, (down, up) in factors.items():
        part, _, module = name.partition(".")
        weight = getattr(pipeline, part).get_submodule(module).weight.data
        weight += strength * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    image = pipeline("a cat", height=32, width=32, num_inference_steps=2, guidance_scale=7.5,
                     generator=torch.Generator("cpu").manual_seed(7)).images[0]  # fmt: skip
    return np.asarray(image).astype(int)


def kohya(factors: Pairs, alpha: float | None, names: dict[str, str] | None = None) -> dict[str, torch.Tensor]:
    """lora_unet_*, lora_te*_*: module names with underscores; `names` for modules that are named otherwise."""
    prefixes = {"unet": "lora_unet_", "transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2":
                "lora_te2_"}  # fmt: skip
    found = {}
    for name, (down, up) in factors.items():
        part, _, module = name.partition(".")
        if part.startswith("text") and not module.startswith("text_"):
            module = f"text_model.{module}"
        key = prefixes[part] + (names or {}).get(name, module).replace(".", "_")
        found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            found[f"{key}.alpha"] = torch.tensor(alpha)
    return found


def peft(factors: Pairs) -> dict[str, torch.Tensor]:
    found = {}
    for name, (down, up) in factors.items():
        found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return found


@pytest.fixture
def run(pipelines, sglang):
    def generate(name: str, weights: dict[str, torch.Tensor] | str, *words: object, metadata: dict | None = None):
        path = weights
        if not isinstance(weights, str):
            path = "./adapter.safetensors"
            save_file({key: tensor.clone().contiguous() for key, tensor in weights.items()}, path, metadata)
        return sglang("generate", "--model-path", pipelines[name], "--lora-path", path, "--lora-scale", SCALE, *SIZE,
                      *words)  # fmt: skip

    return generate


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("alpha", [2.0, None])
def test_the_kohya_layout_is_merged_in_unet_and_text_encoders(pipelines, run, name, alpha):
    pipeline = load(pipelines[name])
    wanted = re.compile(r"attn\d\.to_|ff\.net\.(0\.proj|2)$|proj_in$|resnets\.0\.conv1$|time_emb_proj$")
    factors = pairs(pipeline, "unet", wanted)
    factors |= pairs(pipeline, "text_encoder", re.compile(r"self_attn\.\w+_proj$|fc1$|fc2$"))
    if name == "sdxl":
        factors |= pairs(pipeline, "text_encoder_2", re.compile(r"self_attn\.\w+_proj$"))
    done = run(name, kohya(factors, alpha))
    assert done.code == 0, done.err
    expected = by_hand(pipelines[name], factors, SCALE * (alpha / 4 if alpha else 1))
    assert np.abs(picture() - expected).max() <= 1
    (entry,) = record()["effective"]["lora"]
    assert entry["modules"] == len(factors)


@pytest.mark.whole
def test_the_kohya_layout_with_the_block_numbers_of_sdxls_authors_is_merged(pipelines, run):
    pipeline = load(pipelines["sdxl"])
    factors = pairs(pipeline, "unet", re.compile(r"attn\d\.to_|proj_out$|conv_shortcut$"))
    names = {}
    for name in factors:
        old = original_layout.unet_name(f"{name.removeprefix('unet.')}.weight", 2, 2)
        names[name] = old.removesuffix(".weight")
    done = run("sdxl", kohya(factors, 2.0, names))
    assert done.code == 0, done.err
    assert np.abs(picture() - by_hand(pipelines["sdxl"], factors, SCALE / 2)).max() <= 1


@pytest.mark.whole
def test_the_kohya_layout_of_flux_with_fused_projections_is_merged(pipelines, run):
    pipeline = load(pipelines["flux"])
    width, generator = pipeline.transformer.config.num_attention_heads * 16, torch.Generator().manual_seed(3)
    down, up = torch.randn(4, width, generator=generator) / 6, torch.randn(3 * width, 4, generator=generator)
    weights, factors = {}, {}
    for block in (0, 1):
        key = f"lora_unet_double_blocks_{block}_img_attn_qkv"
        weights |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(8.0)}
        for index, letter in enumerate("qkv"):
            place = f"transformer.transformer_blocks.{block}.attn.to_{letter}"
            factors[place] = (down, up[index * width : (index + 1) * width])
    text = pairs(pipeline, "text_encoder", re.compile(r"q_proj$"))
    done = run("flux", weights | kohya(text, 8.0))
    assert done.code == 0, done.err
    assert np.abs(picture() - by_hand(pipelines["flux"], factors | text, SCALE * 2)).max() <= 1
    only = run("flux", weights, "--lora-target-modules", "to_k")
    assert only.code == 0, only.err
    keys = {name: pair for name, pair in factors.items() if name.endswith("to_k")}
    assert np.abs(picture(1) - by_hand(pipelines["flux"], keys, SCALE * 2)).max() <= 1


def test_the_last_layers_alpha_counts_in_the_kohya_layout_of_flux(pipelines, run):
    factors = pairs(load(pipelines["flux"]), "transformer", re.compile(r"^proj_out$"))
    done = run("flux", kohya(factors, 1.0, {"transformer.proj_out": "final_layer.linear"}))
    assert done.code == 0, done.err
    assert np.abs(picture() - by_hand(pipelines["flux"], factors, SCALE / 4)).max() <= 1


def test_modules_that_the_conversion_refuses_are_named(pipelines, run):
    """diffusers refuses a whole file of FLUX for one module that it does not know."""
    factors = pairs(load(pipelines["flux"]), "transformer", re.compile(r"^(proj_out|x_embedder)$"))
    names = {"transformer.proj_out": "final_layer.linear", "transformer.x_embedder": "image_in"}
    done = run("flux", kohya(factors, 4.0, names))
    assert (done.code, done.lines[-1]) == (
        2, "ERROR: lora: ./adapter.safetensors was made for another model: 1 of its 2 modules have no place in this "
        "FluxPipeline, such as lora_unet_image_in; --lora-target-modules can choose among them",
    )  # fmt: skip
    only = run("flux", kohya(factors, 4.0, names), "--lora-target-modules", "lora_unet_final_layer_linear")
    assert only.code == 0, only.err
    kept = {name: pair for name, pair in factors.items() if name.endswith("proj_out")}
    assert np.abs(picture() - by_hand(pipelines["flux"], kept, SCALE)).max() <= 1
    unknown = run("flux", kohya(factors, 4.0, {name: f"image.{name}" for name in factors}))
    assert (unknown.code, "2 of its 2 modules have no place" in unknown.lines[-1]) == (2, True), unknown.err


def test_the_xlabs_layout_is_merged(pipelines, run):
    pipeline = load(pipelines["flux"])
    width, generator = pipeline.transformer.config.num_attention_heads * 16, torch.Generator().manual_seed(3)
    weights, factors = {}, {}
    for number, kind in ((1, "to_{}"), (2, "add_{}_proj")):
        down, up = torch.randn(4, width, generator=generator) / 6, torch.randn(3 * width, 4, generator=generator)
        key = f"double_blocks.0.processor.qkv_lora{number}"
        weights |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        for index, letter in enumerate("qkv"):
            place = f"transformer.transformer_blocks.0.attn.{kind.format(letter)}"
            factors[place] = (down, up[index * width : (index + 1) * width])
    done = run("flux", weights)
    assert done.code == 0, done.err
    assert np.abs(picture() - by_hand(pipelines["flux"], factors, SCALE)).max() <= 1


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_the_layout_of_peft_and_ai_toolkit_is_merged(pipelines, run, name):
    pipeline = load(pipelines[name])
    factors = pairs(pipeline, "unet" if name == "sd15" else "transformer", ATTENTION)
    factors |= pairs(pipeline, "text_encoder", re.compile(r"v_proj$"))
    done = run(name, peft(factors))
    assert done.code == 0, done.err
    assert np.abs(picture() - by_hand(pipelines[name], factors, SCALE)).max() <= 1


@pytest.mark.whole
def test_the_files_of_peft_name_one_network_and_their_settings_the_alpha(pipelines, run):
    factors = pairs(load(pipelines["sd3"]), "transformer", ATTENTION)
    weights = {f"base_model.model.{key.removeprefix('transformer.')}": t for key, t in peft(factors).items()}
    Path("peft").mkdir()
    save_file(weights, "peft/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "alpha_pattern": {"to_q": 2}}
    Path("peft/adapter_config.json").write_text(json.dumps(config))
    done = run("sd3", "./peft")
    assert done.code == 0, done.err
    scaled = {name: (a, b * (0.5 if name.endswith(".to_q") else 2)) for name, (a, b) in factors.items()}
    assert np.abs(picture() - by_hand(pipelines["sd3"], scaled, SCALE)).max() <= 1
    Path("peft/adapter_config.json").write_text(json.dumps(config | {"use_rslora": True, "alpha_pattern": {}}))
    assert run("sd3", "./peft").code == 0
    assert np.abs(picture(1) - by_hand(pipelines["sd3"], factors, SCALE * 8 / 4**0.5)).max() <= 1


@pytest.mark.whole
@pytest.mark.parametrize("own", [True, False])
def test_an_alpha_of_the_file_comes_before_that_of_its_metadata(pipelines, run, own):
    factors = pairs(load(pipelines["sd3"]), "transformer", ATTENTION)
    weights = peft(factors)
    if own:
        weights |= {f"{name}.alpha": torch.tensor(2.0) for name in factors}
    kept = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 12, "transformer.r": 4})}
    done = run("sd3", weights, metadata=kept)
    assert done.code == 0, done.err
    assert np.abs(picture() - by_hand(pipelines["sd3"], factors, SCALE * (0.5 if own else 3))).max() <= 1


@pytest.mark.whole
def test_target_modules_choose_among_kohya_names(pipelines, run):
    factors = pairs(load(pipelines["sdxl"]), "unet", ATTENTION)
    for wanted in ("attn2.to_q", "attn2_to_q"):
        done = run("sdxl", kohya(factors, None), "--lora-target-modules", wanted)
        if wanted == "attn2.to_q":
            assert done.code == 0, done.err
        else:
            assert (done.code, "is among the target modules attn2_to_q" in done.err) == (2, True)
    kept = {name: pair for name, pair in factors.items() if name.endswith("attn2.to_q")}
    assert record()["effective"]["lora"][0]["modules"] == len(kept)
    assert np.abs(picture() - by_hand(pipelines["sdxl"], kept, SCALE)).max() <= 1


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_scale_of_zero_leaves_every_bit_of_the_picture(pipelines, run, sglang, name):
    pipeline = load(pipelines[name])
    factors = pairs(pipeline, "unet" if name == "sd15" else "transformer", ATTENTION)
    assert sglang("generate", "--model-path", pipelines[name], *SIZE).code == 0
    weights = {key: 100 * tensor for key, tensor in peft(factors).items()}
    save_file(weights, "zero.safetensors")
    done = sglang("generate", "--model-path", pipelines[name], "--lora-path", "zero.safetensors", "--lora-scale", "0",
                  *SIZE)  # fmt: skip
    assert done.code == 0, done.err
    assert np.array_equal(picture(0), picture(1))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scale=st.floats(-4, 4, width=32), power=st.integers(-20, 20), kind=st.sampled_from(["bfloat16", "float32"]))
def test_a_merge_adds_its_scale_in_float32_and_nothing_at_zero(scale, power, kind):
    from sglang_gen.backends.diffusers.lora import _merge
    from sglang_gen.backends.diffusers.lora_layout import Target

    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(6, 5, dtype=getattr(torch, kind))
    before = layer.weight.detach().clone()
    down, up = torch.randn(2, 6, generator=generator) * 2.0**power, torch.randn(5, 2, generator=generator)
    _merge(layer, Target("unet", "a", down, up), 0.0)
    assert torch.equal(layer.weight, before)
    _merge(layer, Target("unet", "a", down, up), scale)
    assert torch.equal(layer.weight, (before.float() + scale * (up @ down)).to(before.dtype))


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ("lora_unet_a.dora_scale", "DoRA"),
        ("unet.a.lora_magnitude_vector", "DoRA"),
        ("lora_unet_a.lokr_w1", "LoKr"),
        ("lora_unet_a.hada_w1_a", "LoHa"),
        ("lora_unet_a.oft_blocks", "OFT"),
        ("lora_unet_a.lora_mid.weight", "LoCon with a Tucker core"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(pipelines, run, extra, kind):
    factors = pairs(load(pipelines["sd15"]), "unet", re.compile("attn1.to_q$"))
    done = run("sd15", kohya(factors, None) | {extra: torch.zeros(2, 2)})
    assert done.code == 2
    assert f"is an adapter of the kind {kind} ({extra}), and only LoRA is applied" in done.lines[-1]


def test_kinds_that_only_the_settings_tell_are_refused_by_name(pipelines, run):
    Path("peft").mkdir()
    save_file(peft(pairs(load(pipelines["sd3"]), "transformer", ATTENTION)), "peft/adapter_model.safetensors")
    for config, kind in (({"peft_type": "LOHA"}, "LOHA"), ({"peft_type": "LORA", "use_dora": True}, "DoRA")):
        Path("peft/adapter_config.json").write_text(json.dumps(config))
        done = run("sd3", "./peft")
        assert (done.code, f"is an adapter of the kind {kind}, and only LoRA is applied" in done.err) == (2, True)


@pytest.mark.whole
def test_what_is_no_whole_pair_is_refused_by_its_own_name(pipelines, run):
    weights = peft(pairs(load(pipelines["sd3"]), "transformer", re.compile("attn.to_q$")))
    first = next(iter(weights))
    module = first.removesuffix(".lora_A.weight")
    sentences = {
        "holds only one factor of": {key: t for key, t in weights.items() if key != first},
        "which is neither a factor of a LoRA nor its alpha": weights | {"transformer.norm.diff": torch.zeros(3)},
        f"the factors of {module}": weights | {first: torch.zeros(3, 32)},
        "holds an alpha of transformer.b without its factors": weights | {"transformer.b.alpha": torch.tensor(1.0)},
        "holds no LoRA factors": {"a.alpha": torch.tensor(1.0)},
        f"holds quantized factors ({first} is stored as I8)": weights | {first: weights[first].to(torch.int8)},
    }
    for sentence, broken in sentences.items():
        done = run("sd3", broken)
        assert done.code == 2, done.err
        assert sentence in done.lines[-1]


@pytest.mark.whole
def test_an_adapter_is_applied_whole_or_not_at_all(pipelines, run):
    factors = pairs(load(pipelines["sdxl"]), "unet", ATTENTION)
    elsewhere = {f"lora_unet_down_blocks_7_attentions_0_proj_in.{end}": torch.zeros(shape) for end, shape in
                 (("lora_down.weight", (4, 8)), ("lora_up.weight", (8, 4)))}  # fmt: skip
    done = run("sdxl", kohya(factors, None) | elsewhere)
    assert done.code == 2
    assert f"was made for another model: 1 of its {len(factors) + 1} modules have no place" in done.lines[-1]
    assert "such as lora_unet_down_blocks_7_attentions_0_proj_in" in done.lines[-1]
    other = run("sd15", kohya(factors, None))
    assert (other.code, "was made for another model" in other.lines[-1]) == (2, True)


def test_modules_that_the_conversion_drops_are_counted_by_the_files_own_names(pipelines, run):
    """diffusers drops the numbered blocks of a file that also names blocks of its own."""
    pipeline = load(pipelines["sdxl"])
    factors = pairs(pipeline, "unet", re.compile(r"attn1\.to_q$"))
    numbered = original_layout.unet_name("mid_block.attentions.0.proj_in.weight", 2, 2).removesuffix(".weight")
    both = factors | pairs(pipeline, "unet", re.compile(r"mid_block.attentions.0.proj_in$"))
    done = run("sdxl", kohya(both, None, {"unet.mid_block.attentions.0.proj_in": numbered}))
    assert done.code == 2
    assert "such as lora_unet_middle_block_1_proj_in" in done.lines[-1]


@pytest.mark.whole
def test_a_hub_id_gives_the_adapter_of_the_file(pipelines, run, tmp_path, monkeypatch):
    factors = pairs(load(pipelines["sd3"]), "transformer", ATTENTION)
    (tmp_path / "repo").mkdir()
    save_file(peft(factors), tmp_path / "repo" / "style.safetensors")
    hub = LittleHub()
    hub.install(monkeypatch, tmp_path)
    hub.repos["tiny/style"] = {"main": tmp_path / "repo"}
    for name in ("tiny/style", "tiny/style/style.safetensors"):
        done = run("sd3", name)
        assert done.code == 0, done.err
    assert np.abs(picture() - by_hand(pipelines["sd3"], factors, SCALE)).max() <= 1
    assert np.array_equal(picture(0), picture(1))
    missing = run("sd3", "tiny/style/other.safetensors")
    assert (missing.code, "tiny/style on the hub has no file other.safetensors" in missing.err) == (2, True)
    none = run("sd3", "tiny/none")
    assert (none.code, "ERROR: tiny/none is neither a local folder nor a model on the hub" in none.err) == (2, True)
    hub.close()
    assert run("sd3", "tiny/style").code == 0
    assert np.array_equal(picture(0), picture(2))
    gone = run("sd3", "tiny/gone")
    assert (gone.code, "could not be downloaded: the hub cannot be reached" in gone.err) == (1, True)


def test_a_folder_with_several_files_asks_which(pipelines, run):
    weights = peft(pairs(load(pipelines["sd3"]), "transformer", ATTENTION))
    Path("many").mkdir()
    for name in ("one", "two"):
        save_file(weights, f"many/{name}.safetensors")
    done = run("sd3", "./many")
    assert done.code == 2
    assert "holds 2 weight files (one.safetensors, two.safetensors); name one of them: ./many/one" in done.lines[-1]
    save_file(weights, "many/pytorch_lora_weights.safetensors")
    assert run("sd3", "./many").code == 0
    assert record()["effective"]["lora"][0]["file"] == "many/pytorch_lora_weights.safetensors"


@pytest.mark.whole
def test_pickled_and_broken_adapters_are_refused_in_one_sentence(run):
    Path("pickled").mkdir()
    Path("empty").mkdir()
    for name in ("old.bin", "old.pt", "pickled/pytorch_lora_weights.bin"):
        Path(name).write_bytes(pickle.dumps({"a": 1}))
    Path("broken.safetensors").write_bytes(b"\1" * 100)
    sentences = {
        "./old.bin": "is pickled, which can run code, and is refused",
        "./old.pt": "is pickled, which can run code, and is refused",
        "./pickled": "offers no safetensors weights, and pickled weights are refused",
        "./empty": "holds no weights (*.safetensors)",
        "./broken.safetensors": "is corrupt",
        "./none.safetensors": "does not exist",
    }
    for path, sentence in sentences.items():
        done = run("sd3", path)
        assert (done.code, sentence in done.lines[-1]) == (2, True), done.err
        assert [line for line in done.lines if line.startswith("ERROR")] == done.lines[-1:]


def test_two_adapters_need_two_nicknames(pipelines, run):
    weights = peft(pairs(load(pipelines["sd3"]), "transformer", ATTENTION))
    done = run("sd3", weights, "lora.adapters=[{path: ./adapter.safetensors}]")
    assert (done.code, "two adapters are named 'default'; give each its own nickname" in done.err) == (2, True)
    assert load_file("adapter.safetensors").keys() == weights.keys()


@pytest.mark.parametrize("backend", ["auto", "diffusers"])
@pytest.mark.parametrize("dry", [(), ("dry_run=true",)])
def test_kohyas_names_for_sd3_are_refused_by_name(pipelines, sglang, backend, dry):
    modules = ("lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_te1_text_model_encoder_layers_0_mlp_fc1")
    factors = {f"{name}.{side}.weight": torch.zeros(4, 4) for name in modules for side in ("lora_down", "lora_up")}
    save_file(factors, "sd3.safetensors")
    words = ("--prompt", "a", "--lora-path", "sd3.safetensors", "--backend", backend, *dry)
    done = sglang("generate", "--model-path", pipelines["sd3"], *words)
    assert done.code == 2
    assert "sd3.safetensors has the names that kohya's scripts give to networks of joint blocks (" in done.lines[-1]
