"""PEFT's settings of an adapter: what PEFT itself makes of the same file, and what is refused by name."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sglang_gen.errors import UserError
from sglang_gen.weights.lora import file as lora_file
from sglang_gen.weights.lora import settings as lora_settings

SIZE = ("--prompt", "a cat", "--height", "32", "--width", "32", "--num-inference-steps", "2", "--seed", "7",
        "--dtype", "float32")  # fmt: skip
NARROW_FIRST = {r"attn1\.to_q": 1, r"to_q": 16, r"down.*to_k": 2, "^down.0.attn2.to_v": 8}
UNMATCHED = "ignore:The following .* keys did not match"  # of PEFT, for patterns of no module


class Network(nn.Module):
    """Names as a UNet has them."""

    def __init__(self) -> None:
        super().__init__()
        block = {f"attn{n}": nn.ModuleDict({f"to_{x}": nn.Linear(24, 24) for x in "qkv"}) for n in (1, 2)}
        self.down = nn.ModuleList([nn.ModuleDict(block), nn.ModuleDict({"conv": nn.Conv2d(24, 24, 3)})])


def trained(network: nn.Module, folder: str, **config: object) -> None:
    """An adapter of random factors, saved by PEFT."""
    model = peft.get_peft_model(network, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    model.save_pretrained(folder)


def rewrite(**changes: object) -> None:
    path = Path("peft/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def merged(folder: str) -> dict[str, torch.Tensor]:
    """The weights that PEFT makes of a network and the saved adapter."""
    torch.manual_seed(0)
    return peft.PeftModel.from_pretrained(Network(), folder).merge_and_unload().state_dict()


def ours(folder: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights = dict(Network().state_dict())
    for module, factors in lora_file.read(folder).modules.items():
        name = f"{module.removeprefix(lora_settings.PREFIX)}.weight"
        change = factors.scale * (factors.up.flatten(1) @ factors.down.flatten(1))
        weights[name] = weights[name] + change.reshape(weights[name].shape)
    return weights


@pytest.fixture
def adapter(monkeypatch, tmp_path):
    """A plain adapter of rank 4 in the folder ./peft, whose settings tests change."""
    monkeypatch.chdir(tmp_path)
    trained(Network(), "peft", r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v"])


@pytest.mark.filterwarnings(UNMATCHED)
@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 4, "alpha_pattern": NARROW_FIRST},
        {"r": 4, "lora_alpha": 4, "alpha_pattern": dict(reversed(NARROW_FIRST.items()))},
        {"r": 4, "lora_alpha": 4, "rank_pattern": {r"attn1\.to_q": 2, "to_q": 8}, "alpha_pattern": {"to_[qk]": 3}},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"to_k": 9}, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "alpha_pattern": {"o_q": 100, "attn1.to": 100, "down.1.conv": 3}},
        {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian", "fan_in_fan_out": False, "lora_dropout": 0.5},
        {"r": 4, "lora_alpha": 6, "exclude_modules": ["to_k"]},
    ],
)
def test_a_file_of_peft_changes_weights_as_peft_does(monkeypatch, tmp_path, config):
    monkeypatch.chdir(tmp_path)
    trained(Network(), "peft", target_modules=["to_q", "to_k", "to_v", "conv"], **config)
    expected = merged("peft")
    torch.manual_seed(0)
    plain = Network().state_dict()
    assert any(not torch.equal(plain[name], expected[name]) for name in plain)
    torch.testing.assert_close(ours("peft"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("missing", ["lora_alpha", "r", "alpha_pattern", "use_rslora"])
def test_a_setting_that_is_missing_has_pefts_default(adapter, missing):
    trained(Network(), "peft", r=8, lora_alpha=8, target_modules=["to_q", "to_k"])
    path = Path("peft/adapter_config.json")
    config = json.loads(path.read_text()) | ({} if missing == "lora_alpha" else {"lora_alpha": 20})
    del config[missing]
    path.write_text(json.dumps(config))
    torch.testing.assert_close(ours("peft"), merged("peft"), rtol=1e-5, atol=1e-5)


PATTERNS = [
    "to_q",
    r"attn1\.to_q",
    "attn.*",
    "^down.0.attn2.to_q",
    "down",
    "0.attn1.to_k",
    ".*k",
    "q|k",
    r"o_q",
    "conv",
]


@pytest.mark.filterwarnings(UNMATCHED)
@settings(max_examples=60, deadline=None)
@given(
    alphas=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 40), max_size=4),
    ranks=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 9), max_size=4),
    stabilized=st.booleans(),
)
def test_any_patterns_give_the_scale_that_peft_gives(alphas, ranks, stabilized):
    config = peft.LoraConfig(r=4, lora_alpha=6, alpha_pattern=alphas, rank_pattern=ranks, use_rslora=stabilized,
                             target_modules=["to_q", "to_k", "conv"])  # fmt: skip
    network = peft.inject_adapter_in_model(config, Network())
    values = {"r": 4, "lora_alpha": 6, "alpha_pattern": alphas, "rank_pattern": ranks, "use_rslora": stabilized}
    for part, prefix in (("", lora_settings.PREFIX), ("unet", "unet.")):
        read = lora_settings.Settings("a", "a", {part: values})
        for name, module in network.named_modules():
            if hasattr(module, "scaling"):
                scale = read.scale(prefix + name, module.r["default"])
                assert scale == pytest.approx(module.scaling["default"], rel=1e-12)


@pytest.mark.whole
def test_the_picture_is_that_of_the_network_which_peft_merged(pipelines, sglang):
    import diffusers

    def load() -> diffusers.DiffusionPipeline:
        return diffusers.DiffusionPipeline.from_pretrained(pipelines["sdxl"], dtype=torch.float32)

    pattern = {r"attn1\.to_q": 1, "to_q": 16, "down_blocks.*to_k": 2}
    trained(load().unet, "peft", r=4, lora_alpha=4, alpha_pattern=pattern, target_modules=["to_q", "to_k"])
    done = sglang("generate", "--model-path", pipelines["sdxl"], "--lora-path", "peft", *SIZE)
    assert done.code == 0, done.err
    pipeline = load()
    pipeline.unet = peft.PeftModel.from_pretrained(pipeline.unet, "peft").merge_and_unload()
    image = pipeline("a cat", height=32, width=32, num_inference_steps=2, guidance_scale=7.5,
                     generator=torch.Generator("cpu").manual_seed(7)).images[0]  # fmt: skip
    picture = np.asarray(Image.open("outputs/generated_image_0.png")).astype(int)
    assert np.abs(picture - np.asarray(image).astype(int)).max() <= 1


def test_patterns_in_diffusers_metadata_count_for_their_part_and_in_their_order(tmp_path):
    config = {
        "r": 4,
        "lora_alpha": 4,
        "alpha_pattern": {"^down.attn1.to_q": 1, "to_q": 16},
        "rank_pattern": {"to_k": 2},
    }
    kept = {f"unet.{key}": value for key, value in config.items()} | {
        "text_encoder.r": 4,
        "text_encoder.lora_alpha": 12,
    }
    names = {"unet.down.attn1.to_q": 4, "unet.down.attn2.to_q": 4, "unet.down.attn1.to_k": 2, "text_encoder.a.to_q": 4,
             "transformer.to_q": 3}  # fmt: skip
    weights = {}
    for name, rank in names.items():
        weights |= {f"{name}.lora_A.weight": torch.ones(rank, 6), f"{name}.lora_B.weight": torch.ones(6, rank)}
    save_file(weights, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(kept)})
    found = lora_file.read(str(tmp_path / "a.safetensors")).modules
    assert [found[name].scale for name in names] == [0.25, 4, 2, 3, 1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"r": 8}, "the rank 8 (r, rank_pattern), but its factors have rank 4"),
        ({"rank_pattern": {"attn2.to_k": 2}}, "attn2.to_k the rank 2 (r, rank_pattern), but its factors have rank 4"),
        ({"init_lora_weights": "pissa"}, 'trained from init_lora_weights="pissa"'),
        ({"init_lora_weights": "pissa_niter_16"}, 'trained from init_lora_weights="pissa_niter_16"'),
        ({"init_lora_weights": "OLoRA"}, 'trained from init_lora_weights="OLoRA"'),
        ({"init_lora_weights": "corda"}, 'trained from init_lora_weights="corda"'),
        ({"init_lora_weights": "loftq"}, 'trained from init_lora_weights="loftq"'),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion, which makes it plain"),
        ({"init_lora_weights": "some_new_one"}, 'trained from init_lora_weights="some_new_one"'),
        ({"peft_type": "ADALORA"}, "is an adapter of the kind ADALORA, and only LoRA is applied"),
        ({"use_dora": True}, "is an adapter of the kind DoRA, and only LoRA is applied (use_dora in peft/"),
        ({"use_qalora": True}, "is an adapter of the kind QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "is an adapter of the kind BD-LoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "is an adapter of the kind aLoRA"),
        ({"arrow_config": {"top_k": 3}}, "is an adapter of the kind Arrow"),
        ({"kasa_config": {"beta": 1e-4}}, "is an adapter of the kind KaSA"),
        ({"monteclora_config": {"num_samples": 8}}, "is an adapter of the kind MonteCLoRA"),
        ({"velora_config": {"num_groups": 64}}, "is an adapter of the kind VeLoRA"),
        ({"lora_bias": True}, "(lora_bias=true in peft/adapter_config.json); merge it into its model with PEFT"),
        ({"modules_to_save": ["proj_out"]}, 'needs more than LoRA factors (modules_to_save=["proj_out"]'),
        ({"target_parameters": ["experts.up"]}, 'target_parameters=["experts.up"]'),
        ({"trainable_token_indices": {"embed": [1]}}, "trainable_token_indices="),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication=[[0, 2], [1, 3]]"),
        ({"megatron_config": {"a": 1}}, 'megatron_config={"a": 1}'),
        ({"use_newest": True}, "sets use_newest=true, which is not known here"),
        ({"newest_config": {"a": 1}}, 'sets newest_config={"a": 1}, which is not known here'),
        ({"lora_alpha": "16"}, "the alpha '16' for"),
        ({"lora_alpha": [16]}, "the alpha [16] for"),
        ({"lora_alpha": None}, "the alpha None for"),
        ({"lora_alpha": True}, "the alpha True for"),
        ({"lora_alpha": float("nan")}, "it must be a finite number"),
        ({"lora_alpha": float("inf")}, "it must be a finite number"),
        ({"lora_alpha": 10**400}, "it must be a finite number"),
        ({"alpha_pattern": {"to_q": "1"}}, "the alpha '1' for"),
        ({"alpha_pattern": ["to_q"]}, "alpha_pattern in peft/adapter_config.json is ['to_q'], not a mapping"),
        ({"alpha_pattern": {"to_(q": 1}}, "holds 'to_(q', which is not a regular expression"),
        ({"r": 0}, "the rank 0 for"),
        ({"r": True}, "the rank True for"),
        ({"r": "4"}, "it must be a whole number above 0"),
        ({"r": 4.0}, "it must be a whole number above 0"),
        ({"rank_pattern": {"to_q": -1}}, "the rank -1 for"),
        ({"rank_pattern": 3}, "rank_pattern in peft/adapter_config.json is 3, not a mapping"),
        ({"use_rslora": "false"}, "use_rslora in peft/adapter_config.json is 'false'; it must be true or false"),
    ],
)  # fmt: skip
def test_what_the_settings_ask_and_factors_cannot_give_is_refused_by_name(adapter, changes, sentence):
    lora_file.check_local_file("peft")
    rewrite(**changes)
    with pytest.raises(UserError) as refused:
        lora_file.check_local_file("peft")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"LORA"', "{", "\xff"])
def test_settings_that_are_no_mapping_are_refused_in_one_sentence(adapter, text):
    Path("peft/adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"does not hold a mapping of settings|cannot be read"):
        lora_file.read("peft")


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_weights_alone_are_plain(adapter, start):
    before = ours("peft")
    rewrite(init_lora_weights=start)
    torch.testing.assert_close(ours("peft"), before, rtol=0, atol=0)


def test_every_setting_of_peft_is_known_and_its_defaults_are_accepted(adapter):
    known = {*lora_settings.HONOURED, *lora_settings.NEUTRAL_SETTINGS, *lora_settings.OTHER_PEFT_KINDS,
             *lora_settings.MORE_THAN_FACTORS}  # fmt: skip
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known
    lora_file.check_local_file("peft")


def test_a_number_that_is_not_known_is_named_once_and_off_is_silent(adapter, caplog):
    rewrite(use_newest=False, newest_config=None, newest_group_size=16)
    lora_file.check_local_file("peft")
    lora_file.read("peft")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "newest_group_size=16, which is not known here and has no effect" in line


def test_settings_of_a_part_without_modules_are_named(tmp_path, caplog):
    weights = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(3, 2)}
    kept = {"unet.r": 2, "unet.lora_alpha": 2, "text_encoder.r": 4}
    save_file(weights, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(kept)})
    lora_file.check_local_file(str(tmp_path / "a.safetensors"))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "has settings for text_encoder, of which the file holds no module" in line


@pytest.mark.parametrize("bias", ["lora_B.bias", "base_layer.bias", "bias"])
def test_trained_biases_are_refused_by_their_tensors(tmp_path, bias):
    """As PEFT saves them for lora_bias=true, and for bias=all or lora_only."""
    pair = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(3, 2)}
    save_file(pair | {f"unet.a.{bias}": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"holds unet.a.{bias}, a bias, and only factors are merged; merge it into"):
        lora_file.check_local_file(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_of_the_file_that_is_no_number_is_refused(tmp_path, alpha):
    pair = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(3, 2)}
    save_file(pair | {"unet.a.alpha": torch.tensor(alpha)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"as unet.a.alpha; it must be a finite number"):
        lora_file.read(str(tmp_path / "a.safetensors"))


def test_factors_of_rank_zero_are_refused(tmp_path):
    pair = {"unet.a.lora_A.weight": torch.ones(0, 3), "unet.a.lora_B.weight": torch.ones(3, 0)}
    save_file(pair, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"the factors of unet.a in .* do not match: \[3, 0\] and \[0, 3\]"):
        lora_file.read(str(tmp_path / "a.safetensors"))


def test_settings_are_refused_in_a_dry_run(adapter, pipelines, sglang):
    rewrite(init_lora_weights="pissa")
    done = sglang("generate", "--model-path", pipelines["sdxl"], "--lora-path", "./peft", "dry_run=true", *SIZE)
    assert (done.code, 'init_lora_weights="pissa"' in done.lines[-1]) == (2, True), done.err
