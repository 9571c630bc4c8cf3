"""Collectives in compiled code: every rank keeps those that another waits for, whatever it does with what comes."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rank_runs import assert_as_predicted, assert_same
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import scaled_dot_product_attention

from sglang_gen.engine import attention_kernels
from sglang_gen.engine import compile as compiling
from sglang_gen.families.sd3 import pipeline
from sglang_gen.models.attention import SelfAttention
from sglang_gen.models.layers import Conv2d
from sglang_gen.parallel.collectives import Axis
from sglang_gen.parallel.mesh import SEQUENCE, Mesh
from sglang_gen.parallel.sequence import Lengths, Ring, Ulysses
from sglang_gen.parallel.sequence_boundary import shard_sizes
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.parallel.spatial import RowAttention, split_rows
from sglang_gen.types import Layout

CALL = re.compile(r"(?:(buf\d+) = )?(?:torch\.ops\.\w+|extern_kernels)\.(\w+)(?:\.default)?\((.*)")
NAMES = {"_scaled_dot_product_flash_attention_for_cpu": "attention", "addmm": "mm"}
DUAL = {
    "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16,
    "joint_attention_dim": 32, "pooled_projection_dim": 16, "caption_projection_dim": 64, "pos_embed_max_size": 32,
    "qk_norm": "rms_norm", "dual_attention_layers": (0, 1), "sample_size": 16,
}  # fmt: skip


def kept(module: nn.Module, x: torch.Tensor) -> list[str]:
    """Our operators that are left in the graph once what is dead is gone."""
    found: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: object):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        found.extend(name.split(".")[1] for name in names if name.startswith("sglang_gen."))
        results = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        return lambda *_: [torch.empty(each.meta["val"].shape) for each in results]  # nothing is sent

    torch.compile(module, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(x)
    return found


@pytest.mark.whole
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rank", range(3))
def test_every_rank_keeps_the_exchange_of_rows(stride, rank):
    conv = Conv2d(2, 2, 3, stride=stride, padding=1)
    split_rows(conv, Axis("ring", 3, rank, "a group"))
    with torch.no_grad():
        assert kept(conv, torch.zeros(1, 2, 4, 6))[:2] == ["exchange", "arrived"]


class GeneratedError(RuntimeError):
    """Inductor has generated its code, which is not compiled."""


@pytest.fixture
def generated(monkeypatch):
    """What inductor generates for a function of one of several ranks: its calls, as result, name and arguments."""
    from torch._inductor.graph import GraphLowering

    codes = []

    def stop(graph: GraphLowering):
        codes.append(graph.codegen()[0].value)
        raise GeneratedError

    monkeypatch.setattr(GraphLowering, "compile_to_module", stop)

    def of(function: Callable, *args: torch.Tensor) -> list[tuple[str, str, str]]:
        torch._dynamo.reset()
        with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="GeneratedError"):
            compiling._compiled(function, 2)(*args)
        found = [match.groups() for match in map(CALL.match, map(str.strip, codes.pop().splitlines())) if match]
        return [(result, NAMES.get(name, name), words) for result, name, words in found]

    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield of
    torch._dynamo.reset()


def names(calls: list[tuple[str, str, str]]) -> list[str]:
    return [name for _, name, _ in calls if name in ("gather", "exchange", "arrived", "all_reduce", "attention", "mm")]


def assert_what_is_sent_stays(calls: list[tuple[str, str, str]]) -> None:
    """Until it has arrived: the arrival reads the very buffer, which inductor therefore does not use again."""
    sent = []
    for _, name, words in calls:
        buffers = re.findall(r"(?:buf|arg)\d+(?:_\d+)?", words)
        if name in ("gather", "exchange"):
            sent.append(buffers[0])
        elif name == "arrived":
            assert buffers[1] == sent.pop(0)
    assert not sent


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
@pytest.mark.parametrize("tokens", [(5, 5, 5), (6, 5, 4)])
def test_compiled_rows_compute_their_queries_while_keys_and_values_are_gathered(generated, tokens):
    rows = RowAttention(SelfAttention(64, 2), Axis("ring", 3, 1, "a group"), Lengths(3, 1, tokens))
    calls = generated(rows.forward, torch.randn(2, 5, 64))
    assert names(calls) == ["mm", "gather", "mm", "arrived", "attention", "mm"]
    assert_what_is_sent_stays(calls)


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_ring_computes_with_what_it_has_while_the_next_keys_are_on_their_way(generated):
    kernel = attention_kernels.kernel_with_lse("sdpa", "cpu", torch.float32)
    ring = Ring(kernel, Axis("ring", 3, 1, "a group"), Lengths(3, 1, (6, 5, 4)))
    calls = generated(lambda *qkv: ring(*qkv), *(torch.randn(2, 4, 5, 32) for _ in range(3)))
    assert names(calls) == ["exchange", "attention", "arrived"] * 2 + ["attention"]
    assert_what_is_sent_stays(calls)


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_compiled_ulysses_sends_is_written_once(generated):
    ulysses = Ulysses(scaled_dot_product_attention, Axis("ulysses", 2, 0, "a group"), 0, Lengths(1, 2, (6, 5)))
    calls = generated(lambda *qkv: ulysses(*qkv), *(torch.randn(2, 4, 6, 32) for _ in range(3)))
    assert names(calls) == ["exchange", "arrived", "attention", "exchange", "arrived"]
    assert_what_is_sent_stays(calls)


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_mask_travels_in_the_exchanges_of_a_compiled_ring(generated):
    kernel = attention_kernels.kernel_with_lse("sdpa", "cpu", torch.float32, masked=True)
    ring = Ring(kernel, Axis("ring", 3, 1, "a group"), Lengths(3, 1, (6, 5, 4)))
    qkv = [torch.randn(2, 4, 5, 32) for _ in range(3)]
    calls = generated(lambda *inputs: ring(*inputs), *qkv, torch.ones(2, 1, 1, 5, dtype=torch.bool))
    assert names(calls) == ["exchange", "attention", "arrived"] * 2 + ["attention"]
    assert_what_is_sent_stays(calls)


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_ulysses_gathers_the_mask_while_tokens_are_exchanged_for_heads(generated):
    ulysses = Ulysses(scaled_dot_product_attention, Axis("ulysses", 2, 0, "a group"), 0, Lengths(1, 2, (6, 5)))
    qkv = [torch.randn(2, 4, 6, 32) for _ in range(3)]
    calls = generated(lambda *inputs: ulysses(*inputs), *qkv, torch.ones(2, 1, 1, 6, dtype=torch.bool))
    assert names(calls) == ["gather", "exchange", "arrived", "arrived", "attention", "exchange", "arrived"]


@contextmanager
def dual_block(layout: Layout, rank: int) -> Iterator[tuple[nn.Module, list[torch.Tensor]]]:
    """A block with two attentions as one rank of two has it, and inputs of a picture and a text that do not halve."""
    groups = {axis: SimpleNamespace(group_name=axis) for axis in ("ring", "ulysses", SEQUENCE)}
    network = pipeline.build(DUAL).eval()
    placed = Split(Mesh(layout, rank, groups), {}, pipeline.SHARDING).parallelize(network)
    placed.set_kernel(scaled_dot_product_attention, attention_kernels.kernel_with_lse("sdpa", "cpu", torch.float32))
    texts = shard_sizes(9, 1, 2)
    tokens = pipeline.tokens(network.config, (1, 4, 14, 8), shard_sizes(14, 2, 2), texts)
    sizes = ((tokens["image"][rank],), (texts[rank],), (9,), (6,))
    with placed.lengths["joint"].of(tokens["joint"]), placed.lengths["image"].of(tokens["image"]):
        yield network.blocks[0], [torch.randn(2, *size, 64) for size in sizes]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", [Layout(ring=2), Layout(ulysses=2)])
def test_every_rank_starts_the_collectives_of_two_attentions_in_the_order_of_the_program(generated, layout):
    """Nothing in their data says which attention of a dual block comes first, and shapes differ between ranks."""
    found = []
    for rank in range(2):
        with dual_block(layout, rank) as (block, inputs):
            calls = generated(block.forward, *inputs)
        assert_what_is_sent_stays(calls)
        found.append([name for name in names(calls) if name != "mm"])
    assert found[0] == found[1]
    of_one = ["exchange", "attention", "arrived", "attention"]
    assert found[0] == (of_one if layout.ring == 2 else ["exchange", "arrived", "attention", "exchange", "arrived"]) * 2


@pytest.mark.slow
def test_a_network_that_is_compiled_as_a_whole_sends_what_it_sends_in_eager_mode(run_on_ranks):
    words = ("--backend", "sglang", "--guidance-scale", "1", "parallel=ring2", "--height", 48)
    assert run_on_ranks("sd15", *words, "--output-path", "eager").code == 0
    done = run_on_ranks(
        "sd15", *words, "compile=full", "--output-path", "compiled", "--perf-dump-path", "compiled.json"
    )
    assert done.code == 0, done.err
    assert_same("compiled", "eager", 1)
    dump = json.loads(Path("compiled.json").read_text())
    assert dump["effective"]["compile"] == "full"
    assert_as_predicted(dump["comm"]["denoising"])
