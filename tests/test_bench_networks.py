"""The benchmark of a denoising step on a device that cannot hold the weights of all entries; on this CPU."""

from functools import partial

import pytest
import torch
from little_work import LITTLE, Uncompiled
from repeated import Repeated

from sglang_gen.engine import attention_kernels, cuda_graphs, onednn_attention
from tools.bench import network_entries as entries
from tools.bench import networks, works
from tools.bench.host_networks import DeviceSlot, HostNetwork

F32, BF16 = DTYPES = (torch.float32, torch.bfloat16)
MODES = ("eager", "compile=regional", "compile=full")
OURS = [
    f"sglang-gen, {dtype}, {mode}{graphs}"
    for dtype in ("float32", "bfloat16")
    for graphs in ("", ", graphs")
    for mode in MODES
]
PEERS = [f"diffusers, {dtype}{how}" for dtype in ("float32", "bfloat16") for how in ("", ", torch.compile")]
SDPA = dict.fromkeys(DTYPES, attention_kernels.sdpa())


@pytest.fixture
def crowded(monkeypatch) -> list[torch.nn.Module]:
    """This CPU as a crowded GPU, without a compiler; the networks that were loaded."""
    loaded: list[torch.nn.Module] = []

    def noted(load, *words: object):
        found = load(*words)
        loaded.append(found[0] if isinstance(found, tuple) else found)
        return found

    monkeypatch.setattr(entries, "CROWDED", ("cpu",))
    monkeypatch.setattr(entries, "CAPTURING", ("cpu",))
    monkeypatch.setattr(entries, "Compiled", Uncompiled)
    monkeypatch.setattr(entries.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(networks, "SIDES", {"cpu": 32})
    monkeypatch.setattr(Repeated, "made", [], raising=False)
    monkeypatch.setattr(cuda_graphs, "Recorder", Repeated)
    monkeypatch.setattr(torch, "compile", lambda network: network)
    for name in ("ours", "their_network"):
        monkeypatch.setattr(works, name, partial(noted, getattr(works, name)))
    return loaded


def test_where_memory_is_short_each_network_is_loaded_once_and_peers_come_in_turn(crowded, tmp_path, monkeypatch):
    folder = works.stored(LITTLE, tmp_path)
    calls, slot = entries.entries(LITTLE, folder, "cpu", SDPA)
    assert list(calls) == [*OURS, *PEERS]
    assert len(crowded) == 4  # ours and diffusers', each in two dtypes
    came = []
    load = HostNetwork.load
    monkeypatch.setattr(HostNetwork, "load", lambda network: came.append(network) or load(network))
    first = networks.first_calls(calls, slot, "cpu")  # compares what they give
    assert list(first) == [*OURS, *PEERS]
    single, half = (slot.networks[name] for name in PEERS[::2])
    assert came == [single, half]
    rates, flops = {}, {}
    for dtype in DTYPES:
        calls_of_dtype, flops_of_dtype = networks.ceilings(LITTLE, "cpu", dtype)
        rates |= calls_of_dtype
        flops |= flops_of_dtype
    assert len(crowded) == 4
    seconds = networks.rounds_of(calls | rates, slot, 2, "cpu")
    assert came == [single, half, single, half, single, half]
    assert {len(values) for values in seconds.values()} == {2}
    table = networks.table(first, seconds, flops, SDPA, "cpu")
    assert "| matrix product 32^3, bfloat16 |" in table
    assert "- our default against diffusers' default: " in table
    assert (
        table.count("against diffusers + torch.compile: ") == table.count("compile=regional against our eager: ") == 2
    )


def test_a_comparison_is_the_mean_of_the_ratios_of_each_round():
    assert networks.paired([1.0, 10.0, 2.0], [2.0, 20.0, 4.0]) == "2.00 (2.00 to 2.00)"
    assert networks.paired([1.0, 1.0], [2.0, 8.0]) == "4.00 (0.00 to 26730.60)"  # exp(log 4 +- 12.706 log(4) / 2)
    assert networks.paired([1.0], [2.0]) == "2.00"


def test_where_there_is_room_everybody_has_a_network_of_its_own_and_nobody_moves(crowded, tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "CROWDED", ())
    calls, slot = entries.entries(LITTLE, works.stored(LITTLE, tmp_path), "cpu", SDPA)
    assert list(networks.first_calls(calls, slot, "cpu")) == [*OURS, *PEERS]
    assert (
        len({next(network.parameters()).data_ptr() for network in crowded}) == len(crowded) == 16
    )  # with and without graphs in this test
    assert slot.networks == {}


def test_ours_attends_with_the_kernel_that_a_run_with_auto_takes(crowded, tmp_path, monkeypatch, sglang, pipelines):
    offered = []

    def fastest(timed, shapes, device, dtype) -> str:
        offered.append((list(timed), set(shapes), device, dtype))
        return "math"

    called = []
    named = attention_kernels.named

    def counting(name: str) -> attention_kernels.Choice:
        choice = named(name)
        return attention_kernels.Choice(name, lambda *qkv: called.append(name) or choice.kernel(*qkv))

    monkeypatch.setattr(networks.attention_autotune, "fastest", fastest)
    monkeypatch.setattr(attention_kernels, "named", counting)
    kernels = {BF16: networks.kernel_of_auto(LITTLE, "cpu", BF16)}
    calls, _ = entries.entries(LITTLE, works.stored(LITTLE, tmp_path / "model"), "cpu", kernels)
    for name in (name for name in OURS if "bfloat16" in name):
        called.clear()
        with torch.no_grad():
            calls[name]()
        assert set(called) == {"math"}, name
    words = ("sampling.height=32", "sampling.width=32", "sampling.num_inference_steps=1", "dtype=bfloat16")
    done = sglang("generate", "--model-path", pipelines["flux"], "--prompt", "a lake", "--backend", "sglang", *words)
    assert done.code == 0, done.err
    (_, shapes, *_), _ = offered
    onednn = ["onednn"] if onednn_attention.runs(BF16) else []
    assert [each[0::2] for each in offered] == [(["sdpa", "math", *onednn], "cpu")] * 2  # the same candidates
    assert {shape[1:] for shape in shapes} == {(2, 21, 21, 32)}  # 4 x 4 tokens and 5 of text


@pytest.mark.whole
def test_a_compiled_guest_is_not_compiled_anew_when_it_comes_back():
    graphs_made = []

    def backend(graph, _):
        graphs_made.append(graph)
        return graph.forward

    network = torch.nn.Linear(2, 2)
    hosted, compiled = HostNetwork(network, "cpu"), torch.compile(network, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            hosted.load()
            compiled(torch.ones(1, 2))
            hosted.unload()
    torch._dynamo.reset()
    assert len(graphs_made) == 1


def test_networks_that_share_have_the_same_weights_and_methods_of_their_own():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    other = entries.sharing(network)
    other[0].forward = None
    assert all(a is b for a, b in zip(network.state_dict(keep_vars=True).values(),
                                      other.state_dict(keep_vars=True).values(), strict=True))  # fmt: skip
    assert network[0].forward is not None


def test_a_host_network_is_on_the_device_for_its_turn_and_leaves_nothing():
    first, second = (HostNetwork(torch.nn.Linear(2, 2), "cpu") for _ in range(2))
    slot = DeviceSlot({"a": first, "also a": first, "b": second})

    def loaded(network: HostNetwork) -> bool:
        return all(
            at.data_ptr() != kept.data_ptr() for at, kept in zip(network.tensors, network.host_data, strict=True)
        )

    expected = [("a", True, first), ("also a", False, first), ("always there", False, first), ("b", True, second)]
    for name, loads, current in expected:
        assert slot.make_ready(name) is loads
        assert [loaded(network) for network in (first, second)] == [network is current for network in (first, second)]
    assert torch.equal(second.tensors[0], second.host_data[0])


@pytest.mark.whole
@pytest.mark.parametrize(("device", "product"), [("cpu", "2048^3"), ("cuda", "8192^3")])
def test_the_matrix_rate_of_a_gpu_is_that_of_a_product_that_takes_longer_than_its_start(device, product):
    assert networks.rate_name(device, BF16) == f"matrix product {product}, bfloat16"
