"""The attention kernel of oneDNN's products: attention=onednn, and what attention=auto and Ring take of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention

from sglang_gen.engine import attention_kernels, onednn_attention

BF16 = torch.bfloat16
DTYPES = [
    torch.float32,
    pytest.param(
        BF16,
        marks=pytest.mark.skipif(not onednn_attention.runs(BF16), reason="this processor has no bfloat16 in oneDNN"),
    ),
]
SIZE = ("--height", "32", "--width", "32", "--num-inference-steps", "2", "--seed", "7")


def qkv(length: int, keys: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """With the strides that they have after a linear layer: 2 samples, 3 heads of 16 channels."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, tokens, 3, 16) for tokens in (length, keys, keys)]
    return [torch.randn(size, generator=generator).to(dtype).transpose(1, 2) for size in sizes]


@pytest.fixture(params=[2**19, 1000])
def blocks(request, monkeypatch):
    """All rows in one block, and blocks of 64 rows."""
    monkeypatch.setattr(onednn_attention, "SCORES", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "keys"), [(150, 150), (64, 7), (1, 40), (130, 1)])
def test_it_computes_attention_and_the_log_sum_exp(blocks, length, keys, dtype):
    q, k, v = (x.to(dtype) for x in qkv(length, keys))
    wide = [x.double() for x in (q, k, v)]
    expected = scaled_dot_product_attention(*wide)
    scores = wide[0] @ wide[1].mT * 16**-0.5
    out, lse = onednn_attention.attend_with_lse(q, k, v)
    assert torch.equal(out, onednn_attention.attend(q, k, v))
    assert (out.dtype, lse.dtype, lse.shape) == (dtype, torch.float32, q.shape[:3])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_it_is_no_farther_from_double_precision_than_twice_torchs_kernel():
    q, k, v = qkv(300, 300)
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double())
    errors = [
        (kernel(q, k, v).double() - expected).norm()
        for kernel in (onednn_attention.attend, scaled_dot_product_attention)
    ]
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_a_run_draws_the_image_of_torchs_kernel(sglang, pipelines, name):
    images = []
    for kernel in ("sdpa", "onednn"):
        done = sglang("generate", "--model-path", pipelines[name], "--prompt", "a", *SIZE, "--dtype", "float32",
                      "--output-path", kernel, f"attention={kernel}")  # fmt: skip
        assert done.code == 0, done.err
        (path,) = Path(kernel).glob("*.png")
        assert json.loads(path.with_suffix(".json").read_text())["effective"]["attention"] == kernel
        images.append(np.asarray(Image.open(path)).astype(int))
    assert abs(images[1] - images[0]).max() <= 1


@pytest.mark.parametrize("word", ["backend=diffusers", "quant=int8"])
def test_it_is_refused_on_diffusers_in_the_plan(sglang, word):
    done = sglang("generate", "--prompt", "a", "attention=onednn", word, "dry_run=true")
    assert done.code == 2
    assert "attention.backend: 'onednn' is a kernel of the native engine" in done.lines[-1]


def test_a_ring_merges_it():
    assert attention_kernels.kernel_with_lse("onednn", "cpu", torch.float32) is onednn_attention.attend_with_lse


@pytest.mark.slow  # compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
@pytest.mark.parametrize("function", [onednn_attention.attend, onednn_attention.attend_with_lse])
def test_a_graph_calls_it_as_one_operator(function):
    q, k, v = qkv(150, 40)
    compiled = torch.compile(lambda *x: function(*x), fullgraph=True, dynamic=False)
    with torch.no_grad():
        found, expected = compiled(q, k, v), function(q, k, v)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
