"""Attention kernels of the native engine: which there are, which is fastest, and sparse patterns."""

import json
import sys
import time
import types
from collections import Counter

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_gen.backends.diffusers import attention_backend
from sglang_gen.config.schema import Attention
from sglang_gen.engine import attention_autotune, attention_kernels, onednn_attention, sparse_attention
from sglang_gen.errors import RunError, UserError
from sglang_gen.plan import backend_choice

FLOAT = torch.float32


def qkv(length=24, keys=24):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, each, 16, generator=generator) for each in (length, keys, keys)]


def chosen(name, grids=(), **config):
    return attention_kernels.choose(Attention(backend=name, backend_config=config), "cpu", FLOAT, grids)


def test_the_plan_knows_the_names_of_all_kernels():
    assert set(backend_choice.ATTENTION) == {
        "auto",
        "sdpa",
        "flex",
        attention_kernels.ONEDNN,
        *attention_kernels.SDPA_KERNELS,
        *attention_kernels.KERNEL_PACKAGES,
    }


@pytest.mark.parametrize("name", ["auto", "sdpa", "flash", "math"])
def test_kernels_of_torch_give_the_same_result(name):
    q, k, v = qkv()
    expected = scaled_dot_product_attention(q, k, v)
    assert torch.allclose(chosen(name).kernel(q, k, v), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["math", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_that_tell_the_sum_are_as_exact_as_those_that_do_not(name, dtype):
    q, k, v = (4 * x for x in qkv())
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    expected = scores.softmax(-1) @ v.double()
    out, lse = attention_kernels.kernel_with_lse(name, "cpu", dtype)(q.to(dtype), k.to(dtype), v.to(dtype))
    plain = chosen(name).kernel(q.to(dtype), k.to(dtype), v.to(dtype))
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= 1.5 * (plain - expected).abs().max() + 1e-6
    assert torch.allclose(lse.double(), scores.logsumexp(-1), rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5)


def keys_of_samples(keys=24):
    """A mask `[B, 1, 1, S]` that leaves one key of the first sample and some of the second."""
    return (torch.arange(keys) % 5 < torch.tensor([0, 3])[:, None])[:, None, None].index_fill(
        3, torch.tensor([7]), True
    )


def alone(q, k, v, mask):
    """Attention of each sample to the keys that it has, without a mask."""
    samples = [(q[i : i + 1], k[i : i + 1, :, row], v[i : i + 1, :, row]) for i, row in enumerate(mask[:, 0, 0])]
    return torch.cat([scaled_dot_product_attention(*sample) for sample in samples])


@pytest.mark.parametrize("keys", [24, 19])
@pytest.mark.parametrize("name", ["auto", "sdpa", "flash", "math"])
def test_a_masked_key_counts_for_nothing(name, keys):
    q, k, v = qkv(keys=keys)
    mask = keys_of_samples(keys)
    expected = alone(q, k, v, mask)
    assert torch.allclose(chosen(name).kernel(q, k, v, mask), expected, atol=1e-6)
    assert not torch.allclose(chosen(name).kernel(q, k, v), expected, atol=1e-2)


@pytest.mark.parametrize("name", ["math", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_of_masked_scores_is_that_of_the_other_keys(name, dtype):
    (q, k, v), mask = (x.to(dtype) for x in qkv()), keys_of_samples()
    out, lse = attention_kernels.kernel_with_lse(name, "cpu", dtype, masked=True)(q, k, v, mask)
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    tolerance = 2e-2 if dtype.itemsize == 2 else 1e-5
    assert torch.allclose(out.double(), alone(q.double(), k.double(), v.double(), mask), atol=tolerance)
    assert torch.allclose(lse.double(), scores.masked_fill(~mask, -torch.inf).logsumexp(-1), rtol=tolerance)


@pytest.mark.parametrize("keys", [24, 19])
def test_the_efficient_kernel_gets_a_mask_whose_rows_begin_at_multiples_of_16_bytes(monkeypatch, keys):
    """The CUDA kernel refuses other strides. Here the sum of its scores comes from plain products."""
    q, k, v = qkv(keys=keys)
    mask, given = keys_of_samples(keys), []

    def efficient(q, k, v, bias, with_lse):
        given.append(bias)
        scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
        lse = torch.nn.functional.pad(scores.logsumexp(-1), (0, 32 - scores.shape[2]))
        return scores.softmax(-1) @ v, lse, None, None

    operators = types.SimpleNamespace(aten=types.SimpleNamespace(_scaled_dot_product_efficient_attention=efficient))
    monkeypatch.setattr(attention_kernels.torch, "ops", operators)
    out, lse = attention_kernels.kernel_with_lse("efficient", "cuda", FLOAT, masked=True)(q, k, v, mask)
    assert torch.allclose(out, alone(q, k, v, mask), atol=1e-6)
    assert lse.shape == q.shape[:3]
    assert given[0].shape == (2, 3, 24, keys)
    assert given[0].stride(-1) == 1
    assert all(stride * given[0].element_size() % 16 == 0 for stride in given[0].stride()[:-1])


def test_kernels_of_gpus_that_take_no_mask_are_not_offered_one(monkeypatch):
    """FlashAttention of torch and of packages; sdpa then merges what the efficient kernel computes."""
    takes_masks = {"flash": False, "efficient": True, "cudnn": False, "math": True}
    monkeypatch.setattr(
        attention_kernels, "runs", lambda name, device, dtype, masked=False: takes_masks[name] or not masked
    )
    monkeypatch.setattr(attention_kernels, "_usable", lambda name, device, dtype: True)
    monkeypatch.setattr(attention_kernels, "_imports", lambda package: True)
    monkeypatch.setattr(attention_kernels.importlib.util, "find_spec", lambda name: object())
    half = torch.bfloat16
    shapes = [(1, 1, 8, 8, 8), (1, 1, 8, 12, 8, "masked")]
    assert attention_kernels.candidates(shapes, "cuda", half) == ["sdpa", "efficient", "math"]
    assert {"flash", "cudnn", "flash_attn"} < {*attention_kernels.candidates(shapes[:1], "cuda", half)}
    assert attention_kernels.legal("cuda", half, masked=True) == ["auto", "sdpa", "efficient", "math"]
    for name in ("flash", "cudnn", "flash_attn", "flash_attn_3", "sage", "flex"):
        with pytest.raises(UserError, match=f"'{name}' takes no mask, .*; legal: auto, sdpa, efficient, math"):
            attention_kernels.choose(Attention(backend=name), "cuda", half, (), masked=True)
    of_sdpa = [attention_kernels.kernel_with_lse("sdpa", "cuda", half, masked) for masked in (False, True)]
    assert of_sdpa == [attention_kernels._flash_with_lse, attention_kernels._efficient_with_lse]
    assert attention_kernels.kernel_with_lse("flash", "cuda", half, masked=True) is None


def test_calls_with_a_mask_are_timed_with_one():
    given = []

    def noted(q, k, v, *mask):
        given.append([tuple(x.shape) for x in mask])
        return q

    shapes = {(2, 2, 8, 9, 8, "masked"): 1, (2, 2, 8, 8, 8): 1}
    attention_autotune.measure({"noted": noted}, shapes, "cpu", FLOAT)
    with_mask = given.count([(2, 1, 1, 9)])
    assert given == [[(2, 1, 1, 9)]] * with_mask + [[]] * (len(given) - with_mask)
    assert 0 < with_mask < len(given)


def test_a_kernel_that_does_not_take_a_shape_is_not_the_fastest_and_the_first_fails_aloud():
    def narrow(q, k, v):
        if q.shape[-1] > 8:
            raise RuntimeError("No available kernel")
        return q

    taken = {"sdpa": scaled_dot_product_attention, "narrow": narrow}
    shapes = {(1, 2, 8, 8, 8): 1, (1, 2, 8, 8, 16): 1}
    seconds = attention_autotune.measure(taken, shapes, "cpu", FLOAT)
    assert (seconds["narrow"], seconds["sdpa"] < 1) == (float("inf"), True)
    with pytest.raises(RuntimeError, match="No available kernel"):
        attention_autotune.measure({"narrow": narrow, "sdpa": taken["sdpa"]}, shapes, "cpu", FLOAT)


def test_an_installed_package_that_does_not_import_is_no_candidate(monkeypatch):
    monkeypatch.setattr(attention_kernels, "_usable", lambda name, device, dtype: True)
    monkeypatch.setattr(attention_kernels, "runs", lambda *_: False)
    broken = types.SimpleNamespace(module="no_such_package", function="attend", exact=True)
    monkeypatch.setattr(attention_kernels, "KERNEL_PACKAGES", {"broken": broken})
    assert attention_kernels.candidates([(1, 1, 8, 8, 8)], "cuda", torch.float16) == ["sdpa"]


def test_products_beyond_float16_stay_finite():
    q = torch.full((1, 1, 3, 64), 40, dtype=torch.float16)
    out, lse = attention_kernels.kernel_with_lse("math", "cpu", torch.float16)(q, q, q)
    assert bool(torch.isfinite(out).all() and torch.isfinite(lse).all())


def test_only_the_named_kernel_of_torch_runs(monkeypatch):
    enabled = torch.backends.cuda
    allowed = []

    def attend(q, k, v):
        allowed.append((enabled.math_sdp_enabled(), enabled.flash_sdp_enabled()))

    monkeypatch.setattr(attention_kernels, "scaled_dot_product_attention", attend)
    for order in (["math"], ["flash"], ["flash", "math"]):
        attention_kernels.inside_sdpa(order)(*qkv())
    assert allowed == [(True, False), (False, True), (True, True)]


CUDNN_FIRST = [3, 1, 2, 0, 4]  # numbers of `SDPBackend`


@pytest.fixture
def hopper(monkeypatch):
    """torch's kernels as on a Hopper, where the first call of the process puts cuDNN first; gives the calls' orders."""
    before, orders = torch._C._get_sdp_priority_order(), []

    def attend(q, k, v):
        if not orders:
            torch._C._set_sdp_priority_order(CUDNN_FIRST)
        orders.append(torch._C._get_sdp_priority_order())
        return scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(attention_kernels, "scaled_dot_product_attention", attend)
    yield orders
    torch._C._set_sdp_priority_order(before)


@pytest.mark.parametrize("engine", ["sglang", "diffusers"])
@pytest.mark.parametrize(
    ("name", "order"),
    [("auto", []), ("sdpa", []), ("flash", []), ("math", []), ("sdpa", ["math"]), ("sdpa", ["math", "flash"])],
)
def test_choosing_a_kernel_leaves_torchs_order_of_kernels_as_it_is(hopper, engine, name, order):
    wanted = Attention(backend=name, backend_config={"priority": order} if order else {})
    if engine == "sglang":
        attention_kernels.choose(wanted, "cpu", FLOAT, ()).kernel(*qkv())
    else:
        with attention_backend.own(wanted, "cpu", FLOAT).context():
            attention_kernels.scaled_dot_product_attention(*qkv())
    assert torch._C._get_sdp_priority_order() == CUDNN_FIRST
    assert hopper[-1] == ([0, 1, 3, 2, 4] if len(order) > 1 else CUDNN_FIRST)


@pytest.mark.parametrize("engine", ["sglang", "diffusers"])
def test_the_refusal_of_a_kernel_leaves_torchs_order_of_kernels_as_it_is(hopper, engine):
    choose = chosen if engine == "sglang" else lambda name: attention_backend.own(Attention(backend=name), "cpu", FLOAT)
    with pytest.raises(UserError, match="'cudnn' does not run here"):
        choose("cudnn")
    assert torch._C._get_sdp_priority_order() == CUDNN_FIRST


def test_timing_kernels_leaves_torchs_order_of_kernels_as_it_is(hopper, monkeypatch, tmp_path):
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path / "cache"))
    shapes = Counter({(1, 2, 8, 8, 16): 3})
    names = attention_kernels.candidates(shapes, "cpu", FLOAT)
    timed = {name: attention_kernels.named(name).kernel for name in names}
    assert attention_autotune.fastest(timed, shapes, "cpu", FLOAT) in names == ["sdpa", "math", "onednn"]
    assert torch._C._get_sdp_priority_order() == CUDNN_FIRST


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        (
            "flesh",
            {},
            "has no kernel 'flesh'; did you mean 'flash'? (legal here: auto, sdpa, flash, math, onednn, flex)",
        ),
        ("cudnn", {}, "'cudnn' does not run here; legal: auto, sdpa, flash, math, onednn, flex"),
        ("sage", {}, "'sage' needs the package sageattention (pip install sageattention); legal here: auto, sdpa, "),
        ("math", {"priority": ["flash"]}, "the kernel 'math' takes no settings"),
        ("sdpa", {"prioritty": ["flash"]}, "unknown key 'prioritty'; did you mean 'priority'?"),
        ("auto", {"window": 3}, "'window' is a setting of flex; add attention=flex"),
        ("sdpa", {"priority": ["cudnn"]}, "'priority' is a list of kernels that run here: flash, math"),
        ("flex", {"windw": 2}, "unknown key 'windw'; did you mean 'window'?"),
        ("flex", {"window": "2"}, "'window' is a whole number of at least 0, not '2'"),
        ("flex", {"tile": 0}, "'tile' is a whole number of at least 1, not 0"),
        ("flex", {"window": 1, "tile": 2}, "'window' and 'tile' are two patterns; give one"),
        ("flex", {"reach": 2}, "'reach' counts tiles, and there is no 'tile'"),
    ],
)
def test_a_kernel_that_cannot_be_is_refused_in_one_sentence(name, config, sentence):
    with pytest.raises(UserError) as refused:
        chosen(name, **config)
    assert sentence in str(refused.value)


def test_a_package_for_gpus_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(attention_kernels.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="'sage' does not run here"):
        chosen("sage")


@pytest.mark.parametrize("name", sorted(attention_kernels.KERNEL_PACKAGES))
def test_a_package_gets_its_own_layout_and_gives_back_ours(monkeypatch, name):
    package, seen = attention_kernels.KERNEL_PACKAGES[name], []

    def function(q, k, v):
        seen.append(tuple(q.shape))
        q, k, v = (each if package.heads_first else each.transpose(1, 2) for each in (q, k, v))
        out = scaled_dot_product_attention(q, k, v)
        out = out if package.heads_first else out.transpose(1, 2)
        return (out, None) if name == "flash_attn_3" else out

    module = types.ModuleType(package.module)
    setattr(module, package.function, function)
    monkeypatch.setitem(sys.modules, package.module, module)
    q, k, v = qkv()
    assert torch.equal(attention_kernels.named(name).kernel(q, k, v), scaled_dot_product_attention(q, k, v))
    assert seen == [(2, 3, 24, 16) if package.heads_first else (2, 24, 3, 16)]


def test_auto_leaves_out_the_kernel_whose_scores_are_too_large():
    assert attention_kernels.candidates([(2, 4, 256, 256, 64)], "cpu", FLOAT) == ["sdpa", "math", "onednn"]
    assert attention_kernels.candidates([(2, 10, 16384, 16384, 64)], "cpu", FLOAT) == ["sdpa", "onednn"]
    for dtype, batch in ((FLOAT, 1), (torch.bfloat16, 2)):  # 2**28 bytes of them, and one row more
        onednn = ["onednn"] if onednn_attention.runs(dtype) else []
        assert attention_kernels.candidates([(batch, 1, 8192, 8192, 64)], "cpu", dtype) == ["sdpa", "math", *onednn]
        assert attention_kernels.candidates([(batch, 1, 8193, 8192, 64)], "cpu", dtype) == ["sdpa", *onednn]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attention"


def timed(**milliseconds):
    """Kernels that take a time, and how often each was called."""
    calls: Counter[str] = Counter()

    def kernel(name):
        def attend(q, k, v):
            calls[name] += 1
            time.sleep(milliseconds[name] / 1000)
            return q

        return attend

    return {name: kernel(name) for name in milliseconds}, calls


SHAPES = Counter({(1, 1, 4, 4, 8): 3})


def test_auto_takes_the_fastest_and_asks_only_once(kept):
    found, calls = timed(sdpa=6, math=3)
    assert attention_autotune.fastest(found, SHAPES, "cpu", FLOAT) == "math"
    (file,) = kept.iterdir()
    assert json.loads(file.read_text())["kernel"] == "math"
    once = attention_autotune.ROUNDS + 2  # a warm-up, and the call whose time says that a batch needs no second one
    assert calls["sdpa"] == once
    before = calls.copy()
    assert attention_autotune.fastest(found, SHAPES, "cpu", FLOAT) == "math"
    assert calls == before
    attention_autotune.fastest(found, SHAPES, "cpu", torch.bfloat16)
    assert calls["sdpa"] == 2 * once


def test_auto_keeps_torchs_choice_unless_another_is_clearly_faster(kept, monkeypatch):
    found, _ = timed(sdpa=1, math=1)
    monkeypatch.setattr(attention_autotune, "measure", lambda *_: {"sdpa": 1.0, "math": 0.96})
    assert attention_autotune.fastest(found, SHAPES, "cpu", FLOAT) == "sdpa"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"kernel": "gone"}', "{", '{"kernel": "sdpa", "seconds": {"sdpa": 1.0}}']
)
def test_an_answer_that_is_damaged_is_timed_again(kept, content):
    found, calls = timed(sdpa=6, math=3)
    attention_autotune.fastest(found, SHAPES, "cpu", FLOAT)
    (file,) = kept.iterdir()
    file.write_text(content)
    assert attention_autotune.fastest(found, SHAPES, "cpu", FLOAT) == "math"
    assert calls["sdpa"] == 2 * (attention_autotune.ROUNDS + 2)


def test_a_single_candidate_is_not_timed(kept):
    found, calls = timed(sdpa=1)
    assert attention_autotune.fastest(found, SHAPES, "cpu", FLOAT) == "sdpa"
    assert not calls
    assert not kept.exists()


def seen(pattern, grid):
    """Which query sees which key, `[tokens, tokens]`."""
    number = torch.arange(grid.tokens)
    zero = torch.zeros(())
    return sparse_attention.mask(pattern, grid)(zero, zero, number[:, None], number[None, :])


@pytest.mark.parametrize(
    "grid", [sparse_attention.Grid(5, 7), sparse_attention.Grid(4, 6, before=3), sparse_attention.Grid(3, 5, after=2)]
)
@pytest.mark.parametrize(
    "pattern",
    [
        sparse_attention.Pattern(window=0),
        sparse_attention.Pattern(window=2),
        sparse_attention.Pattern(tile=2),
        sparse_attention.Pattern(tile=3, reach=0),
    ],
)
def test_a_pattern_lets_text_see_everything_and_pictures_their_neighbours(pattern, grid):
    found = seen(pattern, grid)
    for query in range(grid.tokens):
        for key in range(grid.tokens):
            inside = [grid.before <= each < grid.before + grid.rows * grid.columns for each in (query, key)]
            if all(inside):
                (r, c), (s, d) = (divmod(each - grid.before, grid.columns) for each in (query, key))
                if pattern.window is not None:
                    expected = max(abs(r - s), abs(c - d)) <= pattern.window
                else:
                    t = pattern.tile
                    expected = max(abs(r // t - s // t), abs(c // t - d // t)) <= pattern.reach
            else:
                expected = True
            assert bool(found[query, key]) == expected


@pytest.mark.parametrize(("device", "compiles"), [("cuda", True), ("cpu", False)])
def test_the_mask_of_blocks_is_compiled_for_a_gpu(monkeypatch, device, compiles):
    compiled, created = [], []
    monkeypatch.setattr(torch, "compile", lambda function, **words: compiled.append(words) or function)
    monkeypatch.setattr(
        "torch.nn.attention.flex_attention.create_block_mask",
        lambda *given, device: created.append((given[1:], device)),
    )
    monkeypatch.setattr(sparse_attention.env, "require_compiler", lambda *_: None)
    sparse_attention.kernel(sparse_attention.Pattern(window=2), [sparse_attention.Grid(8, 12, before=5)], device)
    assert created == [((None, None, 101, 101), device)]
    assert compiled[:-1] == [{"dynamic": False}] * compiles  # the last is the kernel


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
def test_a_compiled_mask_of_blocks_is_the_same():
    from torch.nn.attention.flex_attention import create_block_mask

    torch._dynamo.reset()
    compiled = torch.compile(create_block_mask, dynamic=False, backend="aot_eager")
    try:
        for grid in (sparse_attention.Grid(40, 24, before=5), sparse_attention.Grid(64, 16, after=7)):
            seen = sparse_attention.mask(sparse_attention.Pattern(window=2), grid)
            given = (seen, None, None, grid.tokens, grid.tokens)
            plain, ours = (create(*given, device="cpu") for create in (create_block_mask, compiled))
            assert torch.equal(plain.to_dense(), ours.to_dense())
            assert 0 < plain.sparsity() == ours.sparsity()
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
@pytest.mark.parametrize("config", [{}, {"window": 2}, {"tile": 2, "reach": 1}])
def test_flex_equals_attention_with_the_patterns_mask(config):
    grid = sparse_attention.Grid(8, 12, before=5)
    q, k, v = qkv(grid.tokens, grid.tokens)
    kernel = chosen("flex", [grid], **config).kernel
    mask = seen(sparse_attention.parse(config), grid) if config else None
    assert torch.allclose(kernel(q, k, v), scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-5)
    q, k, v = qkv(grid.tokens, 7)
    assert torch.equal(kernel(q, k, v), scaled_dot_product_attention(q, k, v))  # to the text: dense


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
def test_flex_is_compiled_for_each_shape_of_a_run_and_one_graph_more_is_an_error(monkeypatch):
    """Past eight graphs torch would go on with an implementation that is not fused. No code is generated here."""
    graphs, compiled = [], torch.compile

    def backend(graph, _):
        graphs.append(graph)
        return lambda q, *rest: [q]

    monkeypatch.setattr(torch, "compile", lambda function, **words: compiled(function, backend=backend, **words))
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(recompile_limit=2):
            kernel = chosen("flex").kernel
            for length in (4, 5, 6, 4):
                kernel(*qkv(length, length))
            assert len(graphs) == 3
            with pytest.raises(RunError, match="flex was compiled for more than the 3 shapes of this run"):
                kernel(*(x.requires_grad_() for x in qkv(4, 4)))
            assert len(graphs) == 3
    finally:
        torch._dynamo.reset()
