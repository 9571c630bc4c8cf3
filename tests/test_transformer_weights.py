"""--transformer-weights-path: the weights of a file or a folder in the model's own denoising network, or a sentence."""

import json
import shutil
from pathlib import Path

import diffusers
import gguf
import numpy as np
import pytest
import torch
from cases import mostly_slow
from native import assert_same, record
from networks import CLASSES, effective, picture
from original_layout import original_flux, original_sd3, unet_name
from safetensors.torch import load_file, save_file
from tiny import fill

from sglang_gen import env
from sglang_gen.errors import UserError
from sglang_gen.hub import resolve
from sglang_gen.hub.safetensors_header import Tensor
from sglang_gen.hub.weight_files import WeightFiles, read_headers, stored_dtype
from sglang_gen.weights import replacement

SIZE = ("--height", "32", "--width", "32", "--seed", "7", "--num-inference-steps", "2")
STEM = "diffusion_pytorch_model"


@pytest.fixture
def run(pipelines, sglang):
    def generate(name: str, *words: object, dtype: str = "float32"):
        model = pipelines.get(name, name)
        return sglang("generate", "--model-path", model, "--prompt", "a cat", *SIZE, "--dtype", dtype, *words)

    return generate


@pytest.fixture(scope="session")
def others(pipelines, tmp_path_factory):
    """For each pipeline a network of the same shape with other weights, saved by diffusers in a folder."""
    root = tmp_path_factory.mktemp("others")
    for name, (_, kind, part) in CLASSES.items():
        fill(kind.from_pretrained(pipelines[name] / part, dtype=torch.float32), 99).save_pretrained(root / name)
    return {name: root / name for name in CLASSES}


def stored(others, name: str) -> dict[str, torch.Tensor]:
    return load_file(others[name] / f"{STEM}.safetensors")


def reference(pipelines, name: str, network) -> np.ndarray:
    """What plain diffusers draws with this denoising network."""
    kind, _, part = CLASSES[name]
    pipeline = kind.from_pretrained(pipelines[name], dtype=torch.float32, **{part: network})
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(7)
    image = pipeline(
        "a cat", height=32, width=32, num_inference_steps=2, generator=generator, guidance_scale=7.5
    ).images[0]
    return np.asarray(image).astype(int)


@pytest.mark.whole
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_weights_of_a_file_are_those_that_compute(pipelines, others, run, name):
    plain = run(name)
    assert plain.code == 0, plain.err
    done = run(name, "--transformer-weights-path", others[name] / f"{STEM}.safetensors")
    assert done.code == 0, done.err
    network = CLASSES[name][1].from_pretrained(others[name], dtype=torch.float32)
    assert np.array_equal(picture(1), reference(pipelines, name, network))
    assert np.abs(picture(1) - picture(0)).max() > 5
    assert effective(1)["quantization"] == "none"


@pytest.mark.whole
def test_a_folder_of_shards_is_read_with_or_without_its_config(others, run):
    network = diffusers.SD3Transformer2DModel.from_pretrained(others["sd3"], dtype=torch.float32)
    network.save_pretrained("shards", max_shard_size="60KB")
    assert len(list(Path("shards").glob("*.safetensors"))) > 1
    for words in ((others["sd3"],), ("shards",)):
        assert run("sd3", "--transformer-weights-path", *words).code == 0
    Path("shards/config.json").unlink()
    assert run("sd3", "--transformer-weights-path", "shards").code == 0
    assert np.array_equal(picture(0), picture(1))
    assert np.array_equal(picture(0), picture(2))


def test_the_models_own_weights_need_not_be_there(pipelines, others, run):
    shutil.copytree(pipelines["flux"], "bare")
    for path in Path("bare/transformer").glob("*.safetensors*"):
        path.unlink()
    assert run(Path("bare").resolve()).code == 2
    done = run(Path("bare").resolve(), "--transformer-weights-path", others["flux"])
    assert done.code == 0, done.err


def _shards(folder: Path, kind) -> str:
    kind.from_pretrained(folder, dtype=torch.float32).save_pretrained("shards", max_shard_size="60KB")
    return "shards"


def _half(folder: Path, kind) -> str:
    kind.from_pretrained(folder, dtype=torch.float16).save_pretrained("half")
    return f"half/{STEM}.safetensors"


def _original(folder: Path, kind) -> str:
    network = kind.from_pretrained(folder, dtype=torch.float32)
    if kind is diffusers.SD3Transformer2DModel:
        tensors = original_sd3(network.state_dict())
    else:
        layers, levels = network.config.layers_per_block, len(network.config.block_out_channels)
        named = network.state_dict().items()
        tensors = {f"model.diffusion_model.{unet_name(name, layers, levels)}": tensor for name, tensor in named}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, "original.safetensors")
    return "original.safetensors"


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "make"),
    mostly_slow(
        [("flux", _shards), ("sdxl", _shards), ("sd3", _half), ("sd3", _original), ("sdxl", _original)],
        ("flux", _shards),
        ("sdxl", _original),
    ),
)
def test_both_backends_compute_with_the_same_weights(others, run, name, make):
    path = make(others[name], CLASSES[name][1])
    for backend in ("sglang", "diffusers"):
        done = run(name, "--transformer-weights-path", path, "--backend", backend, "output.latents=true",
                   "--guidance-scale", 3, "--output-path", backend)  # fmt: skip
        assert done.code == 0, done.err
        assert record(backend)["effective"]["backend"] == backend
    assert_same("sglang", "diffusers", 1)
    assert run(name, "output.latents=true", "--guidance-scale", 3, "--output-path", "own").code == 0
    a, b = (load_file(f"{folder}/generated_image_0.safetensors")["latents"] for folder in ("own", "sglang"))
    assert (a - b).abs().max() > 0.1 * b.abs().max()


@pytest.mark.parametrize("method", ["gguf", "config", "metadata"])
def test_quantized_files_run_on_diffusers_and_the_native_engine_says_what_it_does_not_read(others, run, method):
    if method == "gguf":
        path, reason = "a.gguf", "it reads no GGUF files yet"
        write_gguf(path, stored(others, "flux"), gguf.GGMLQuantizationType.Q8_0)
    elif method == "config":
        path, reason = _bitsandbytes(Path(), others), "it reads no weights that are quantized by bitsandbytes yet"
    else:
        path, reason = "svdq.safetensors", "it reads no weights that are quantized by svdquant yet"
        told = {"quantization_config": json.dumps({"method": "svdquant"})}
        save_file(stored(others, "flux"), path, metadata=told)
    refused = run("flux", "--transformer-weights-path", path, "--backend", "sglang")
    sentence = f"The native engine cannot run this: {reason}; run with --backend diffusers or auto"
    assert (refused.code, refused.lines[-1]) == (2, f"ERROR: {sentence}")
    planned = run("flux", "--transformer-weights-path", path, "dry_run=json")
    assert json.loads(planned.out)["effective"]["backend"] == "diffusers"


def test_the_names_of_the_original_flux_are_known_before_a_weight_is_read():
    component = resolve.read_card(env.preset_configs("flux_dev"), "flux_dev", weights=False).components["transformer"]
    with torch.device("meta"):
        network = diffusers.FluxTransformer2DModel.from_config(component.config)
    theirs = original_flux(network.state_dict(), double=19, single=38)
    assert len(theirs) == 780
    headers = {name: Tensor("BF16", tuple(tensor.shape)) for name, tensor in theirs.items()}
    files = WeightFiles("flux1-dev.safetensors", (Path("flux1-dev.safetensors"),))
    assert replacement.is_own_layout(diffusers.FluxTransformer2DModel, component, headers, files) is False
    del headers["double_blocks.7.img_mod.lin.bias"]
    with pytest.raises(UserError, match=r"1 missing \(transformer_blocks\.7\.norm1\.linear\.bias\)"):
        replacement.is_own_layout(diffusers.FluxTransformer2DModel, component, headers, files)


@pytest.mark.whole
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_layout_of_the_original_project_gives_the_same_picture(others, run, prefix):
    theirs = {f"{prefix}{name}": tensor for name, tensor in original_sd3(stored(others, "sd3")).items()}
    if prefix:
        theirs["vae.decoder.conv_in.weight"] = torch.zeros(3)
    save_file(theirs, "original.safetensors")
    assert run("sd3", "--transformer-weights-path", others["sd3"]).code == 0
    done = run("sd3", "--transformer-weights-path", "original.safetensors")
    assert done.code == 0, done.err
    assert np.array_equal(picture(0), picture(1))
    assert ("only the denoising network" in done.err) == bool(prefix)


def write_gguf(path: str, weights: dict[str, torch.Tensor], kind: gguf.GGMLQuantizationType) -> dict[str, torch.Tensor]:
    """Matrices whose rows are whole blocks as `kind`, the others as F32; returns what the gguf package reads back."""
    writer = gguf.GGUFWriter(path, "flux")
    block = gguf.GGML_QUANT_SIZES[kind][0]
    back = {}
    for name, tensor in weights.items():
        values = tensor.float().numpy()
        fits = tensor.dim() == 2 and tensor.shape[1] % block == 0
        chosen = kind if fits else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(values, chosen)
        writer.add_tensor(name, packed, raw_dtype=chosen)
        back[name] = torch.from_numpy(np.array(gguf.quants.dequantize(packed, chosen))).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return back


GGUF = [(kind, name) for kind in ("Q8_0", "Q4_0", "F16") for name in ("flux", "sd3")]


@pytest.mark.whole
@pytest.mark.parametrize(("kind", "name"), mostly_slow(GGUF, ("Q8_0", "flux"), ("Q4_0", "sd3"), ("F16", "flux")))
def test_a_gguf_file_computes_with_the_numbers_that_the_gguf_package_reads(pipelines, others, run, kind, name):
    back = write_gguf("a.gguf", stored(others, name), gguf.GGMLQuantizationType[kind])
    done = run(name, "--transformer-weights-path", "a.gguf", "--perf-dump-path", "perf.json")
    assert done.code == 0, done.err
    network = CLASSES[name][1].from_pretrained(others[name], dtype=torch.float32)
    network.load_state_dict(back)
    assert np.abs(picture(0) - reference(pipelines, name, network)).max() <= 1
    found = effective()["quantization"]
    if kind == "F16":
        assert found == "none"
        return
    assert (found["method"], found["by"]) == ("prequantized", "gguf")
    assert set(found["layers"]) == {kind}
    assert 0 < found["layers"][kind] <= found["linears"]
    assert found["bytes"] < found["plain_bytes"]
    assert effective()["dtype"] == "float32"
    if kind != "Q8_0":
        return
    work = json.loads(Path("perf.json").read_text())["work"]["denoising"]
    assert run(name, "--perf-dump-path", "plain.json", "--backend", "diffusers").code == 0
    plain = json.loads(Path("plain.json").read_text())["work"]["denoising"]
    assert (work["flops"], work["bytes"] < plain["bytes"]) == (plain["flops"], True)


def test_a_gguf_file_in_the_original_layout_gives_the_same_picture(others, run):
    for path, named in (("a.gguf", stored(others, "sd3")), ("b.gguf", original_sd3(stored(others, "sd3")))):
        write_gguf(path, named, gguf.GGMLQuantizationType.Q8_0)
        done = run("sd3", "--transformer-weights-path", path)
        assert done.code == 0, done.err
    assert np.array_equal(picture(0), picture(1))
    assert effective(0)["quantization"] == effective(1)["quantization"]


def test_blocks_are_unpacked_to_exactly_the_numbers_of_the_gguf_package(pipelines, others):
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    back = write_gguf("flux.gguf", stored(others, "flux"), gguf.GGMLQuantizationType.Q8_0)
    network = diffusers.FluxTransformer2DModel.from_single_file(
        "flux.gguf", config=str(pipelines["flux"] / "transformer"), dtype=torch.float32,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    name = "transformer_blocks.0.attn.to_q.weight"
    unpacked = dequantize_gguf_tensor(network.get_parameter(name))
    assert torch.equal(unpacked, back[name].to(unpacked.dtype))


def _corrupt(folder: Path, others) -> str:
    data = (others["flux"] / f"{STEM}.safetensors").read_bytes()
    Path("bad.safetensors").write_bytes(data[: len(data) // 2])
    return "bad.safetensors"


@pytest.mark.parametrize("words", [("--backend", "auto"), ("--backend", "diffusers"), ("dry_run=true",)])
def test_a_gguf_file_with_flattened_convolutions_is_refused_by_name(run, words):
    writer = gguf.GGUFWriter("unet.gguf", "sdxl")
    weights = np.zeros((4, 4, 3, 3), np.float16)
    writer.add_tensor("input_blocks.0.0.weight", weights.reshape(12, 12))
    writer.add_array("comfy.gguf.orig_shape.input_blocks.0.0.weight", list(weights.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = run("sdxl", "--transformer-weights-path", "unet.gguf", *words)
    assert done.code == 2
    assert "unet.gguf stores 1 tensors in another shape than the network's (input_blocks.0.0.weight; " in done.lines[-1]
    assert "comfy.gguf.orig_shape" in done.lines[-1]
    native = run("sdxl", "--transformer-weights-path", "unet.gguf", "--backend", "sglang")
    assert (native.code, "it reads no GGUF files yet" in native.lines[-1]) == (2, True)


def _gguf_cut(folder: Path, others) -> str:
    write_gguf("flux.gguf", stored(others, "flux"), gguf.GGMLQuantizationType.Q8_0)
    data = Path("flux.gguf").read_bytes()
    Path("flux.gguf").write_bytes(data[: len(data) // 2])
    return "flux.gguf"


def _gguf_noise(folder: Path, others) -> str:
    Path("noise.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 8)
    return "noise.gguf"


def _text(folder: Path, others) -> str:
    Path("text.gguf").write_text("not a model")
    return "text.gguf"


def _changed(change):
    def make(folder: Path, others) -> str:
        tensors = stored(others, "flux")
        change(tensors)
        save_file(tensors, "changed.safetensors")
        return "changed.safetensors"

    return make


def _missing_shard(folder: Path, others) -> str:
    network = diffusers.FluxTransformer2DModel.from_pretrained(others["flux"], dtype=torch.float32)
    network.save_pretrained("cut", max_shard_size="60KB")
    sorted(Path("cut").glob("*.safetensors"))[0].unlink()
    return "cut"


def _pickled(folder: Path, others) -> str:
    torch.save({}, "weights.pt")
    return "weights.pt"


def _pickled_index(folder, others):
    where = Path("indexed")
    where.mkdir()
    torch.save({}, where / "weights.bin")
    torch.save({}, where / "decoy.safetensors")
    content = json.dumps({"weight_map": {"proj_out.bias": "weights.bin"}})
    (where / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    return where


def _pickled_folder(folder: Path, others) -> str:
    Path("pickles").mkdir()
    torch.save({}, "pickles/diffusion_pytorch_model.bin")
    return "pickles"


def _undeclared_int8(folder: Path, others) -> str:
    tensors = stored(others, "flux")
    tensors["x_embedder.weight"] = tensors["x_embedder.weight"].to(torch.int8)
    tensors["x_embedder.weight_scale"] = torch.ones(1)
    save_file(tensors, "odd.safetensors")
    return "odd.safetensors"


def _undeclared_fp8(folder: Path, others) -> str:
    save_file(
        {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored(others, "flux").items()}, "fp8.safetensors"
    )
    return "fp8.safetensors"


def _other_class(folder: Path, others) -> str:
    return str(others["sd3"])


def _other_file(folder: Path, others) -> str:
    return str(others["sd3"] / f"{STEM}.safetensors")


def _other_config(folder: Path, others) -> str:
    shutil.copytree(others["flux"], "deeper")
    config = json.loads(Path("deeper/config.json").read_text()) | {"num_layers": 5}
    Path("deeper/config.json").write_text(json.dumps(config))
    return "deeper"


def _unknown_method(folder: Path, others) -> str:
    shutil.copytree(others["flux"], "odd")
    config = json.loads(Path("odd/config.json").read_text()) | {"quantization_config": {"quant_method": "magic"}}
    Path("odd/config.json").write_text(json.dumps(config))
    return "odd"


def _bitsandbytes(folder: Path, others) -> str:
    shutil.copytree(others["flux"], "nf4")
    declared = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = json.loads(Path("nf4/config.json").read_text()) | {"quantization_config": declared}
    Path("nf4/config.json").write_text(json.dumps(config))
    return "nf4"


def _two_files(folder: Path, others) -> str:
    Path("two").mkdir()
    for name in ("a", "b"):
        shutil.copy(others["flux"] / f"{STEM}.safetensors", f"two/{name}.safetensors")
    return "two"


def _empty(folder: Path, others) -> str:
    Path("empty").mkdir()
    return "empty"


BAD = {
    "missing": (lambda folder, others: "nowhere.safetensors", "nowhere.safetensors does not exist"),
    "corrupt": (_corrupt, "bad.safetensors is corrupt"),
    "gguf cut": (_gguf_cut, "the GGUF file flux.gguf is corrupt"),
    "gguf noise": (_gguf_noise, "the GGUF file noise.gguf is corrupt"),
    "gguf text": (_text, "the GGUF file text.gguf is corrupt"),
    "lacking": (_changed(lambda w: w.pop("proj_out.bias")), "1 missing (proj_out.bias)"),
    "surplus": (_changed(lambda w: w.update(extra=torch.zeros(1))), "1 unexpected (extra)"),
    "shape": (_changed(lambda w: w.update({"proj_out.bias": torch.zeros(3)})), "proj_out.bias [3] in place of [16]"),
    "shard": (_missing_shard, "cut lacks 1 of its "),
    "pickled": (_pickled, "weights.pt is pickled"),
    "pickled folder": (_pickled_folder, "pickles holds only pickled weights (diffusion_pytorch_model.bin)"),
    "pickled index": (_pickled_index, "names the weight file weights.bin, and only safetensors files are read"),
    "scales": (
        _changed(lambda w: w.update({"x_embedder.scale_weight": torch.ones(())})),
        "holds quantized weights (scaled fp8: x_embedder.scale_weight)",
    ),
    "int8": (_undeclared_int8, "stores 1 tensors as I8 (x_embedder.weight) and declares no quantization"),
    "fp8": (_undeclared_fp8, "tensors as F8_E4M3 ("),
    "class": (
        _other_class,
        "holds the class SD3Transformer2DModel, and the model has the class FluxTransformer2DModel",
    ),
    "network": (_other_file, "FluxTransformer2DModel"),
    "config": (_other_config, "is a different FluxTransformer2DModel than the model's (num_layers differ)"),
    "method": (_unknown_method, "odd is quantized by 'magic'"),
    "bitsandbytes": (_bitsandbytes, "nf4 is quantized by bitsandbytes, which diffusers runs on a GPU only"),
    "two": (_two_files, "two holds 2 weight files and no index (a.safetensors, b.safetensors)"),
    "empty": (_empty, "empty holds no weights"),
}


@pytest.mark.parametrize("backend", ["auto", "diffusers"])
@pytest.mark.parametrize("case", sorted(BAD))
def test_weights_that_cannot_be_used_are_refused_in_one_sentence(run, others, case, backend):
    make, sentence = BAD[case]
    done = run("flux", "--transformer-weights-path", make(Path.cwd(), others), "--backend", backend)
    assert done.code == 2, done.err
    (error,) = [line for line in done.lines if line.startswith("ERROR")]
    assert sentence in error
    assert not Path("outputs/generated_image_0.png").exists()


def test_a_missing_gguf_package_names_the_extra(run, monkeypatch):
    Path("a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(env, "package_version", lambda name: None)
    done = run("flux", "--transformer-weights-path", "a.gguf")
    assert (done.code, "pip install 'sglang-gen[gguf]'" in done.err) == (2, True)


@pytest.mark.whole
def test_blocks_outside_of_linear_layers_are_refused(run, others):
    writer = gguf.GGUFWriter("unet.gguf", "unet")
    for name, tensor in stored(others, "sdxl").items():
        is_odd = name == "conv_norm_out.weight"
        kind = gguf.GGMLQuantizationType.BF16 if is_odd else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = run("sdxl", "--transformer-weights-path", "unet.gguf")
    assert (done.code, "(conv_norm_out.weight)" in done.err) == (2, True), done.err


def test_a_tensor_that_another_of_the_files_holds_too_is_refused_by_its_name():
    for name, held in (("one", "ab"), ("two", "c"), ("three", "db")):
        save_file({letter: torch.zeros(2, 3) for letter in held}, f"{name}.safetensors")
    one, two, three = (Path(f"{name}.safetensors") for name in ("one", "two", "three"))
    assert sorted(read_headers([one, two]).tensors) == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"^three\.safetensors holds the tensor b, which another"):
        read_headers([one, two, three])


def test_the_stored_dtype_is_that_of_most_of_the_numbers_and_not_of_most_tensors():
    """Norms in float32 are many and small."""
    small = {f"norm_{number}.weight": Tensor("F32", (4,)) for number in range(5)}
    assert stored_dtype({**small, "weight": Tensor("BF16", (16, 16))}) == "BF16"
    assert stored_dtype({**small, "bias": Tensor("BF16", (8,)), "scale": Tensor("BF16", ())}) == "F32"


@pytest.mark.whole
@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
@pytest.mark.parametrize("name", mostly_slow(["float32", "bfloat16", "float16"], "bfloat16"))
def test_disabled_autocast_computes_in_the_stored_dtype(pipelines, sglang, name, backend):
    kind = diffusers.FluxPipeline
    kind.from_pretrained(pipelines["flux"], dtype=getattr(torch, name)).save_pretrained("stored")
    line = ("generate", "--model-path", Path("stored").resolve(), "--prompt", "a cat", *SIZE, "--backend", backend)
    done = sglang(*line, "--disable-autocast")
    assert done.code == 0, done.err
    assert sglang(*line, "--dtype", name).code == 0
    assert effective(0)["dtype"] == effective(1)["dtype"] == name
    assert np.array_equal(picture(0), picture(1))
    assert sglang("generate", "--config", "outputs/generated_image_0.json").code == 0
    assert np.array_equal(picture(0), picture(2))


def test_a_stored_dtype_that_does_not_compute_is_refused(run, sglang, pipelines, others):
    both = run("flux", "--disable-autocast")
    assert (both.code, "contradicts --dtype float32" in both.err) == (2, True)
    line = ("generate", "--model-path", pipelines["flux"], "--prompt", "a cat", *SIZE, "--disable-autocast",
            "--transformer-weights-path")  # fmt: skip
    done = sglang(*line, _undeclared_fp8(Path.cwd(), others))
    assert (done.code, "are stored in F8_E4M3, which is not a compute dtype" in done.err) == (2, True), done.err
    write_gguf("flux.gguf", stored(others, "flux"), gguf.GGMLQuantizationType.Q8_0)
    done = sglang(*line, "flux.gguf")
    assert (done.code, "stores GGUF blocks, which have no dtype" in done.err) == (2, True), done.err
