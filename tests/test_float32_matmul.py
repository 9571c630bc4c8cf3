"""backend.float32_matmul: equal products, the choice of the faster library, and the record that repeats it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processors import AMX, XEON, ZEN
from torch.nn import functional as F

from sglang_gen.backends.native import build
from sglang_gen.models.layers import Linear
from sglang_gen.models.matmul import onednn_linear
from sglang_gen.perf import cpu_dtype

SIZE = ("--height", "32", "--width", "32", "--num-inference-steps", "2", "--seed", "7", "--dtype", "float32")


@pytest.fixture
def rates(monkeypatch, tmp_path):
    """The rates of a processor, set by the test."""
    monkeypatch.delenv("SGLANG_GEN_CPU_DTYPE")
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path / "cache"))
    found = dict(XEON)
    monkeypatch.setattr(cpu_dtype, "measure", lambda: dict(found))
    yield found
    cpu_dtype._rates.cache_clear()


def inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
    x = torch.randn(2, 6, 5, 24, generator=generator)
    return {
        "contiguous": x, "matrix": x[0, 0], "vector": x[0, 0, 0], "transposed": x.transpose(1, 2),
        "rows apart": x[:, ::2], "channels apart": torch.randn(2, 6, 48, generator=generator)[..., ::2],
        "broadcast": x[:1].expand(3, -1, -1, -1), "channels first": torch.randn(2, 24, 6, generator=generator).mT,
        "empty": x[:, :0],
    }  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", inputs(torch.Generator()))
def test_onednn_computes_the_product_of_any_memory_layout(layout, bias):
    generator = torch.Generator().manual_seed(0)
    x, layer = inputs(generator)[layout], Linear(24, {"q": 8, "k": 16, "v": 8}, bias)
    for only in ((), ("k", "v"), ("q", "v")):
        expected = layer.double()(x.double(), only)
        layer.float().matmul = onednn_linear
        with torch.no_grad():
            found = layer(x, only)
        layer.matmul = F.linear
        assert (found.shape, found.dtype) == (expected.shape, torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_onednn_is_refused_where_this_build_of_torch_lacks_it(sglang, pipelines, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    words = ("generate", "--model-path", pipelines["sd3"], "--prompt", "a", *SIZE, "dry_run=true")
    done = sglang(*words, "backend.float32_matmul=onednn")
    assert done.code == 2
    assert done.lines[-1] == "ERROR: backend.float32_matmul=onednn: this build of torch has no oneDNN; leave it out"
    assert cpu_dtype.measure().keys() == {*cpu_dtype.RATES}
    assert sglang(*words).code == 0


@pytest.mark.parametrize(("found", "library"), [(XEON, "torch"), (AMX, "torch"), (ZEN, "onednn")])
def test_auto_takes_onednn_where_it_is_faster(rates, found, library):
    rates.update(found)
    assert cpu_dtype.fastest_matmul() == library


def generated(sglang, model: Path, folder: str, *words: object) -> tuple[np.ndarray, dict]:
    """The image of a run into `folder`, and the effective settings of its record."""
    done = sglang("generate", "--model-path", model, "--prompt", "a", *SIZE, "--output-path", folder, *words)
    assert done.code == 0, done.err
    return drawn(folder)


def drawn(folder: str) -> tuple[np.ndarray, dict]:
    (path,) = Path(folder).glob("*.png")
    record = json.loads(path.with_suffix(".json").read_text())
    return np.asarray(Image.open(path)).astype(int), record["effective"]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_both_libraries_draw_the_same_image(sglang, pipelines, name, monkeypatch):
    products = []
    monkeypatch.setattr(build, "onednn_linear", lambda *operands: products.append(1) or onednn_linear(*operands))
    image, effective = generated(sglang, pipelines[name], "torch", "backend.float32_matmul=torch")
    assert (effective["float32_matmul"], products) == ("torch", [])
    other, effective = generated(sglang, pipelines[name], "onednn", "backend.float32_matmul=onednn")
    assert effective["float32_matmul"] == "onednn"
    assert len(products) > 10
    assert abs(other - image).max() <= 1


def test_a_record_repeats_the_library_of_its_run(sglang, pipelines, rates):
    rates.update(ZEN)
    image, effective = generated(sglang, pipelines["sd3"], "first")
    assert effective["float32_matmul"] == "onednn"
    rates.update(XEON)
    cpu_dtype._rates.cache_clear()
    (path,) = Path("first").glob("*.json")
    done = sglang("generate", "--config", path, "--output-path", "again")
    assert done.code == 0, done.err
    again, effective = drawn("again")
    assert effective["float32_matmul"] == "onednn"
    assert np.array_equal(again, image)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["backend=diffusers"], "the diffusers backend uses torch's own products"),
        (["backend=sglang", "dtype=bfloat16"], "this run computes in bfloat16"),
    ],
)
def test_a_library_without_effect_is_a_warning(sglang, pipelines, words, reason):
    line = [
        "generate",
        "--model-path",
        pipelines["sd3"],
        "--prompt",
        "a",
        "backend.float32_matmul=onednn",
        "dry_run=true",
    ]
    done = sglang(*line, *words)
    assert done.code == 0, done.err
    assert done.out.count(f"backend.float32_matmul=onednn has no effect: {reason}") == 1


@pytest.mark.slow  # compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
@pytest.mark.parametrize("regional", ["true", "false"])
def test_a_compiled_network_keeps_the_library(sglang, pipelines, regional):
    image, _ = generated(sglang, pipelines["sd3"], "eager", "backend.float32_matmul=torch")
    words = ("backend.float32_matmul=onednn", "--enable-torch-compile", f"compile.regional={regional}")
    other, effective = generated(sglang, pipelines["sd3"], "compiled", *words)
    assert effective["float32_matmul"] == "onednn"
    assert abs(other - image).max() <= 1
