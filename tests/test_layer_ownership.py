"""Layers own their tensors: one with another storage is loaded, cut, run and copied to meta as any other."""

import ast
from pathlib import Path

import pytest
import torch
from cases import mostly_slow
from network_cases import CONFIGS, KIND, STEPS, evaluated, given, loaded
from on_meta import on_meta
from parity import error
from split import FAMILIES, Changes, Transposed, evaluate, transposed

import sglang_gen
from sglang_gen.models.layers import Linear
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.types import Layout
from sglang_gen.weights.load import slots

LAYOUTS = {"single": Layout(), "tp2": Layout(tp=2), "ring2": Layout(ring=2)}


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "flux", "sd15"])
def test_a_network_of_layers_with_another_storage_computes_the_same_in_one_process(name):
    config, latents, conditions = given(name, torch.float64)
    network, folder = loaded(name, config)
    expected = evaluated(network, latents, conditions)
    arguments = (KIND[name], folder, config, torch.float64, latents, conditions, STEPS)
    outputs, _ = evaluate(Mesh(), *arguments, changes=Changes(stored=True))
    assert error(outputs, expected) <= 1e-10


@pytest.mark.whole
@pytest.mark.parametrize("layout", ["tp2", "ring2"])
@pytest.mark.parametrize("name", ["sd3", "flux", "sd15"])
def test_ranks_cut_layers_that_store_their_weights_in_another_form(ranks, name, layout):
    config, latents, conditions = given(name, torch.float64)
    with torch.no_grad():
        network, folder = loaded(name, config)
        expected = evaluated(network, latents, conditions)
    arguments = (KIND[name], folder, config, torch.float64, latents, conditions, STEPS)
    for outputs, _ in ranks.run(LAYOUTS[layout], evaluate, *arguments, True, None, Changes(stored=True)):
        assert error(outputs, expected) <= 1e-10


@pytest.mark.whole
@pytest.mark.parametrize("layout", ["tp2", "ring2"])
@pytest.mark.parametrize("name", mostly_slow(["sd3", "flux", "sd15"], "sd15"))
def test_each_rank_offloads_its_own_shard(ranks, name, layout):
    config, latents, conditions = given(name, torch.float64)
    with torch.no_grad():
        network, folder = loaded(name, config)
        expected = evaluated(network, latents, conditions)
    arguments = (KIND[name], folder, config, torch.float64, latents, conditions, STEPS)
    for outputs, _ in ranks.run(LAYOUTS[layout], evaluate, *arguments, True, None, Changes(offloaded=True)):
        assert error(outputs, expected) <= 1e-10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_meta_copy_of_such_a_network_holds_the_same_parts(name, layout):
    """The last rank's tensors as a checkpoint provides them, and the bytes that it stores."""
    family, mesh = FAMILIES[KIND[name]], Mesh(LAYOUTS[layout], LAYOUTS[layout].ranks - 1)
    split = Split(mesh, family.tensor_parallel, family.sharding)
    plain = on_meta(split, lambda: family.build(CONFIGS[name]), torch.bfloat16).network
    stored = on_meta(split, lambda: transposed(family.build(CONFIGS[name])), torch.bfloat16).network
    assert sum(isinstance(module, Transposed) for module in stored.modules()) > 5
    assert {slot.name: slot.shape for slot in slots(stored)} == {slot.name: slot.shape for slot in slots(plain)}
    sizes = [sum(weight.nbytes for weight in network.parameters()) for network in (plain, stored)]
    assert sizes[0] == sizes[1]
    assert all(weight.is_meta for weight in stored.parameters())


def test_a_layer_computes_only_the_sections_that_it_is_asked_for():
    torch.manual_seed(0)
    layer, x = Linear(6, {"q": 4, "k": 2, "v": 2, "ff": 8}).double(), torch.randn(3, 6).double()
    q, k, v, ff = layer.split(layer(x), ("q",), ("k",), ("v",), ("ff",))
    for only, expected in ((("k", "v"), (k, v)), (("q",), (q,)), (("q", "ff"), (q, ff)), (("ff", "k"), (k, ff))):
        assert error(layer(x, only=only), torch.cat(expected, dim=-1)) <= 1e-14
    layer.reduce = torch.nn.Hardtanh(-0.1, 0.1)  # stands for the sum over ranks, before the bias
    assert error(layer(x, only=("k",)), (k - layer.bias[4:6]).clamp(-0.1, 0.1) + layer.bias[4:6]) <= 1e-14


def test_a_name_table_that_misses_a_section_is_not_used():
    """Otherwise the query of a checkpoint could be read as its value."""
    layer = torch.nn.Sequential(Linear(2, {"q": 2, "k": 2}))
    (weight, _) = slots(layer)
    assert weight.ordered({"to_k": "k", "to_q": "q"}) == ["to_q", "to_k"]
    with pytest.raises(AssertionError, match="has the sections"):
        weight.ordered({"to_q": "q", "to_v": "v"})


PACKAGE = Path(sglang_gen.__file__).parent
TENSORS = {"weight", "bias", "out_features", "in_features", "out_channels", "in_channels", "num_groups", "num_channels"}
ELSEWHERE = {"models", "assets"}  # what owns them


def test_no_code_outside_of_a_layer_reads_its_weights():
    """Of our networks: the diffusers backend looks at the modules of that library."""
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in ELSEWHERE and "diffusers" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in TENSORS
    ]
    assert found == []
