"""Collectives in compiled code: every rank keeps those that another waits for, whatever it does with what comes."""

import json
from pathlib import Path

import pytest
import torch
from test_ranks import assert_same, pool  # noqa: F401 - the ranks that those tests share
from test_split_runs import assert_as_predicted, run  # noqa: F401
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from sglang_gen.parallel.collectives import Axis
from sglang_gen.parallel.spatial import RowConv


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


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rank", range(3))
def test_every_rank_keeps_the_exchange_of_rows(stride, rank):
    conv = RowConv(nn.Conv2d(2, 2, 3, stride=stride, padding=1), Axis("ring", 3, rank, "a group"))
    with torch.no_grad():
        assert kept(conv, torch.zeros(1, 2, 4, 6))[:2] == ["exchange", "arrived"]


@pytest.mark.slow
def test_a_network_that_is_compiled_as_a_whole_sends_what_it_sends_in_eager_mode(run):  # noqa: F811
    words = ("--backend", "sglang", "--guidance-scale", "1", "parallel=ring2", "--height", 48)
    assert run("sd15", *words, "--output-path", "eager").code == 0
    done = run("sd15", *words, "compile=full", "--output-path", "compiled", "--perf-dump-path", "compiled.json")
    assert done.code == 0, done.err
    assert_same("compiled", "eager", 1)
    dump = json.loads(Path("compiled.json").read_text())
    assert dump["effective"]["compile"] == "full"
    assert_as_predicted(dump["comm"]["denoising"])
