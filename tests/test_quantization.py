"""The quant group: what is quantized, read back from modules and tensors; what cannot be is refused in one sentence."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from cases import mostly_slow
from diffusers.configuration_utils import register_to_config
from networks import CLASSES, effective, picture
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig

from sglang_gen import env
from sglang_gen.backends.diffusers import quantize
from sglang_gen.config.schema import QuantMethod
from sglang_gen.errors import UserError
from sglang_gen.plan import quantization
from sglang_gen.plan.quantization import Facts
from sglang_gen.weights import nunchaku

SIZE = ("--height", "32", "--width", "32", "--seed", "7", "--num-inference-steps", "2", "--dtype", "float32")


@pytest.fixture
def run(pipelines, sglang):
    def generate(name: str, *words: object):
        return sglang("generate", "--model-path", pipelines.get(name, name), "--prompt", "a cat", *SIZE, *words)

    return generate


def int8(folder: Path, kind):
    """What diffusers itself makes of a folder's weights with torchao."""
    config = diffusers.TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    return kind.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def drawn(pipelines, name: str, network) -> np.ndarray:
    kind, _, part = CLASSES[name]
    pipeline = kind.from_pretrained(pipelines[name], dtype=torch.float32, **{part: network})
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", height=32, width=32, num_inference_steps=2, guidance_scale=7.5,
                     generator=torch.Generator("cpu").manual_seed(7)).images[0]  # fmt: skip
    return np.asarray(image).astype(int)


@pytest.mark.whole
@pytest.mark.parametrize("name", mostly_slow(sorted(CLASSES), "flux"))
def test_int8_gives_the_picture_of_diffusers_own_quantizer(pipelines, run, name):
    assert run(name, "--perf-dump-path", "plain.json", "--backend", "diffusers").code == 0
    done = run(name, "quant=int8", "--perf-dump-path", "int8.json")
    assert done.code == 0, done.err
    _, kind, part = CLASSES[name]
    assert np.array_equal(picture(1), drawn(pipelines, name, int8(pipelines[name] / part, kind)))
    plain = kind.from_pretrained(pipelines[name] / part, dtype=torch.float32)
    linears = sum(isinstance(module, nn.Linear) for module in plain.modules())
    size = sum(parameter.numel() * 4 for parameter in plain.parameters())
    found = effective(1)["quantization"]
    assert (found["method"], found["by"], found["layers"]) == ("int8", "torchao", {"Int8Tensor": linears})
    assert (found["linears"], found["plain_bytes"]) == (linears, size)
    assert found["bytes"] < size
    assert (effective(0)["quantization"], effective(1)["dtype"]) == ("none", "float32")
    before, after = (json.loads(Path(f"{kind}.json").read_text()) for kind in ("plain", "int8"))
    work = [dump["work"]["denoising"] for dump in (before, after)]
    assert work[0]["flops"] == work[1]["flops"]
    assert work[0]["bytes"] > work[1]["bytes"]
    assert before["fingerprint"]["hash"] != after["fingerprint"]["hash"]


def test_an_int8_network_is_close_to_the_plain_one_and_not_equal(pipelines):
    torch.manual_seed(0)
    plain = diffusers.SD3Transformer2DModel.from_pretrained(pipelines["sd3"] / "transformer", dtype=torch.float32)
    given = {
        "hidden_states": torch.randn(1, 4, 16, 16), "encoder_hidden_states": torch.randn(1, 7, 64),
        "pooled_projections": torch.randn(1, 64), "timestep": torch.tensor([500.0]),
    }  # fmt: skip
    with torch.no_grad():
        expected = plain(**given).sample
        quantize._quantize("transformer", plain, QuantMethod.int8, "cpu")
        found = plain(**given).sample
    error = float((found - expected).norm() / expected.norm())
    assert 1e-3 < error < 0.2
    weight = plain.transformer_blocks[0].attn.to_q.weight
    assert (type(weight).__name__, weight.qdata.dtype) == ("Int8Tensor", torch.int8)


def test_the_plain_size_of_quantized_weights_is_in_the_dtype_that_the_network_computes_in():
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(torch.bfloat16)
    assert quantize.read_back(network) is None
    network[1].weight = nn.Parameter(torch.zeros(2, 8, dtype=torch.int8), requires_grad=False)
    found = quantize.read_back(network)
    assert (found["layers"], found["linears"]) == ({"int8": 1}, 2)
    assert (found["bytes"], found["plain_bytes"]) == (2 * (32 + 8 + 2) + 16, 2 * (32 + 8 + 16 + 2))


@pytest.mark.whole
def test_int8_takes_the_weights_of_another_file(pipelines, run):
    path = pipelines["sd3"] / "transformer" / "diffusion_pytorch_model.safetensors"
    assert run("sd3", "quant=int8").code == 0
    done = run("sd3", "quant=int8", "--transformer-weights-path", path)
    assert done.code == 0, done.err
    assert np.array_equal(picture(0), picture(1))
    assert effective(0)["quantization"] == effective(1)["quantization"]


@pytest.mark.whole
def test_an_adapter_is_merged_before_the_weights_are_quantized(pipelines, run):
    generator = torch.Generator().manual_seed(5)
    name = "transformer_blocks.1.attn.to_q"
    factors = {"A": torch.randn(2, 32, generator=generator), "B": torch.randn(32, 2, generator=generator)}
    save_file({f"transformer.{name}.lora_{key}.weight": value for key, value in factors.items()}, "a.safetensors")
    done = run("sd3", "--lora-path", "./a.safetensors", "--lora-scale", "0.1", "quant=int8")
    assert done.code == 0, done.err
    shutil.copytree(pipelines["sd3"] / "transformer", "merged")
    weights = load_file("merged/diffusion_pytorch_model.safetensors")
    weights[f"{name}.weight"] += 0.1 * factors["B"] @ factors["A"]
    save_file(weights, "merged/diffusion_pytorch_model.safetensors")
    network = int8(Path("merged"), diffusers.SD3Transformer2DModel)
    assert np.abs(picture() - drawn(pipelines, "sd3", network)).max() <= 1
    assert effective()["lora"][0]["merged"] is True


@pytest.fixture(scope="session")
def saved(pipelines, tmp_path_factory) -> Path:
    """The tiny SD3's network as diffusers saves it after quantizing it with torchao."""
    folder = tmp_path_factory.mktemp("saved") / "int8"
    int8(pipelines["sd3"] / "transformer", diffusers.SD3Transformer2DModel).save_pretrained(folder)
    return folder


@pytest.mark.whole
@pytest.mark.parametrize("words", [(), ("quant=prequantized",)])
def test_a_folder_that_declares_its_quantization_is_loaded_as_declared(pipelines, run, saved, words):
    done = run("sd3", "--transformer-weights-path", saved, *words)
    assert done.code == 0, done.err
    assert "WARNING" not in done.err
    found = effective()["quantization"]
    assert (found["method"], found["by"], set(found["layers"])) == ("prequantized", "torchao", {"Int8Tensor"})
    assert found["layers"]["Int8Tensor"] == found["linears"]
    assert np.array_equal(picture(), drawn(pipelines, "sd3", int8(pipelines["sd3"] / "transformer", CLASSES["sd3"][1])))


@pytest.mark.whole
def test_a_model_whose_own_folder_is_quantized_says_so(pipelines, run, saved):
    shutil.copytree(pipelines["sd3"], "model")
    shutil.rmtree("model/transformer")
    shutil.copytree(saved, "model/transformer")
    done = run(Path("model").resolve(), "quant=prequantized")
    assert done.code == 0, done.err
    assert effective()["quantization"]["by"] == "torchao"
    again = run(Path("model").resolve(), "quant=int8")
    assert (again.code, "is quantized already, by torchao" in again.err) == (2, True), again.err
    lora = run(Path("model").resolve(), "--lora-path", "./a.safetensors")
    assert (lora.code, "cannot be merged into quantized weights" in lora.err) == (2, True), lora.err


def svdq(path: str = "svdq-int4_r32-flux.safetensors", rank: int = 32) -> str:
    declared = {"method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}, "rank": rank}
    save_file({"a.qweight": torch.zeros(4, 4, dtype=torch.int8)}, path,
              metadata={"quantization_config": json.dumps(declared)})  # fmt: skip
    return path


REFUSED = [
    (("quant=prequantized",), "are plain; name quantized ones with --transformer-weights-path"),
    (("quant=fp8",), "quant=fp8 multiplies in fp8, which needs a GPU (sm89 or later); on the CPU run with quant=int8"),
    (("quant=nunchaku",), "quant=nunchaku loads SVDQuant files and does not make them"),
    (("quant=nunchaku", "--transformer-weights-path", "SVDQ"), "needs a GPU with INT4 tensor cores (sm8x, sm12x)"),
    (("--nunchaku-config", "{}", "--transformer-weights-path", "SVDQ"), "needs a GPU with INT4 tensor cores"),
    (("--transformer-weights-path", "SVDQ"), "needs a GPU with INT4 tensor cores"),
    (("--nunchaku-config", '{"rnk": 32}'), "unknown key 'rnk'; did you mean 'rank'?"),
    (("--nunchaku-config", '{"rank": 33}'), "'rank' is 33; legal: 16, 32"),
    (("--nunchaku-config", '{"rank": 32}', "quant=int8"), "quant=int8 and --nunchaku-config exclude each other"),
    (("quant=int8", "--transformer-weights-path", "SAVED"), "is quantized already, by torchao"),
    (("quant=prequantized", "--transformer-weights-path", "PLAIN"), "are plain; run with quant=none"),
    (("--transformer-weights-path", "LONE"), "cannot be read; give diffusers' folder with its config.json"),
    (
        ("--transformer-weights-path", "PLAIN", "--component-paths", '{"transformer": "x"}'),
        "--component-paths 'transformer' and --transformer-weights-path name the same network twice",
    ),
    (
        ("--transformer-weights-path", "SAVED", "--lora-path", "./a.safetensors"),
        "an adapter cannot be merged into quantized weights",
    ),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED)
def test_what_contradicts_or_cannot_run_here_is_refused_in_one_sentence(pipelines, run, saved, words, sentence):
    stem = "diffusion_pytorch_model.safetensors"
    places = {"SVDQ": svdq(), "SAVED": saved, "PLAIN": pipelines["sd3"] / "transformer" / stem, "LONE": saved / stem}
    done = run("sd3", *(places.get(word, word) for word in words))
    assert done.code == 2, done.err
    (error,) = [line for line in done.lines if line.startswith("ERROR")]
    assert sentence in error


def test_nunchaku_config_may_be_a_file(run):
    Path("nunchaku.json").write_text('{"rank": 32}')
    done = run("flux", "--nunchaku-config", "nunchaku.json")
    assert (done.code, "name one with --transformer-weights-path" in done.err) == (2, True), done.err


def test_a_model_that_only_a_gpu_can_run_is_refused_on_the_cpu_and_a_dry_run_says_prequantized(pipelines, run):
    shutil.copytree(pipelines["sd3"], "model")
    for method, words in (("bitsandbytes", ()), ("torchao", ("dry_run=json",))):
        config = json.loads((pipelines["sd3"] / "transformer" / "config.json").read_text())
        declared = {"quant_method": method, "load_in_4bit": True}
        Path("model/transformer/config.json").write_text(json.dumps(config | {"quantization_config": declared}))
        done = run(Path("model").resolve(), *words)
        if words:
            assert json.loads(done.out)["effective"]["quantization"] == "prequantized"
        else:
            assert (done.code, "bitsandbytes, which diffusers runs on a GPU only" in done.err) == (2, True), done.err


def test_fp8_takes_bfloat16_weights(pipelines):
    network = diffusers.SD3Transformer2DModel.from_pretrained(pipelines["sd3"] / "transformer", dtype=torch.float32)
    with pytest.raises(UserError, match="run with --dtype bfloat16"):
        quantize._quantize("transformer", network, QuantMethod.fp8, "cuda")


def test_missing_torchao_names_the_extra(run, monkeypatch):
    monkeypatch.setattr(env, "package_version", lambda name: None)
    done = run("sd3", "quant=int8")
    assert (done.code, "pip install 'sglang-gen[quant]'" in done.err) == (2, True), done.err


def test_a_network_without_linear_layers_is_refused(pipelines):
    class Plain(diffusers.ModelMixin, diffusers.ConfigMixin):
        config_name = "config.json"

        @register_to_config
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

    with pytest.raises(UserError, match="Plain has no linear layer that can be quantized"):
        quantize._quantize("unet", Plain(), QuantMethod.int8, "cpu")
    with pytest.raises(UserError, match="Linear is not a network of diffusers"):
        quantize._quantize("unet", nn.Linear(4, 4), QuantMethod.int8, "cpu")


def test_a_model_without_a_denoising_network_of_these_names_is_refused(pipelines, composed):
    from sglang_gen.hub import resolve

    run = composed("--model-path", pipelines["sd3"], "--prompt", "a", "quant=int8").run
    card = resolve.find(run.model, weights=False)
    decoder = replace(card, components={"decoder": card.components["transformer"]})
    with pytest.raises(UserError, match="has no transformer or transformer_2 or unet"):
        quantization.check_model(run, decoder, Facts())
    run.quant.method, run.quant.transformer_weights_path = QuantMethod.none, "a.safetensors"
    two = replace(card, components=dict.fromkeys(("transformer", "transformer_2"), card.components["transformer"]))
    with pytest.raises(UserError, match="has transformer and transformer_2; name each with --component-paths"):
        quantization.check_model(run, two, Facts())


@pytest.mark.parametrize(
    ("facts", "precision", "words"),
    [
        (Facts(None, True), None, "this run is on the CPU"),
        (Facts((9, 0), True), None, "this GPU is sm90"),
        (Facts((7, 5), True), None, "this GPU is sm75"),
        (Facts((8, 6), False), None, "that wheel is not installed here"),
        (Facts((8, 6), True), "nvfp4", "the weights are nvfp4 and this GPU (sm86) takes int4"),
        (Facts((12, 0), True), "int4", "the weights are int4 and this GPU (sm120) takes nvfp4"),
        (Facts((8, 9), True), "int4", None),
        (Facts((12, 0), True), "nvfp4", None),
    ],
)
def test_nunchaku_is_refused_where_its_kernels_do_not_run(facts, precision, words):
    sentence = quantization.refuse_nunchaku(facts, precision)
    assert sentence is None if words is None else words in sentence


@pytest.mark.parametrize(("capability", "runs"), [(None, False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_needs_a_gpu_that_multiplies_it(capability, runs):
    assert (quantization.refuse_fp8(Facts(capability)) is None) == runs


def test_an_svdquant_file_is_known_by_its_metadata():
    declared = {"method": "svdquant", "weight": {"dtype": "fp4_e2m1_all", "group_size": 16}, "rank": 32}
    metadata = {"quantization_config": json.dumps(declared)}
    assert nunchaku.check_file("a", metadata, {"rank": 32}) == "nvfp4"
    with pytest.raises(UserError, match="'rank' is 64 and a has 32"):
        nunchaku.check_file("a", metadata, {"rank": 64})
    with pytest.raises(UserError, match="is not an SVDQuant file"):
        nunchaku.check_file("a", {"quantization_config": "{"}, {})


def test_the_package_named_nunchaku_on_pypi_is_not_taken_for_it(monkeypatch):
    class Distribution:
        files = ("nunchaku/__init__.py",)

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Distribution)
    assert env.has_nunchaku() is False
    Distribution.files = ("nunchaku/models/transformers/transformer_flux.py",)
    assert env.has_nunchaku() is True
