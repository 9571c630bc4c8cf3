"""The entries of `tools.bench.networks`: who evaluates the network, in which dtype and how.

Ours runs in float32 and in the dtype of dtype=auto, eagerly and in each mode of compile. The others are diffusers in
the same dtypes, of which float32 is its default, with and without torch.compile, and OpenVINO with the matching
precision hint if it is installed. On a GPU ours runs in bfloat16, and as CUDA graphs too.

On a GPU all our networks share one copy of the weights, which stays there. The weights of the others are kept on the
host, and those of one network at a time are copied to the GPU before its call in every round; the network is then
called once untimed, since the GPU was idle. So a network of 12 billion parameters needs some 71 GiB of GPU memory (22
for ours, 44 for float32, graphs, activations) and 67 of host memory.
"""

import copy
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang_gen.backends.native.build import use_onednn
from sglang_gen.engine import attention_kernels
from sglang_gen.engine.compile import Compiled
from sglang_gen.engine.cuda_graphs import Graphs
from sglang_gen.engine.memory_format import to_channels_last
from sglang_gen.perf import cpu_dtype
from sglang_gen.tensor_tree import to_meta
from tools.bench import works
from tools.bench.host_networks import DeviceSlot, HostNetwork

Call = Callable[[], Any]
Kernels = Mapping[torch.dtype, attention_kernels.Choice]  # the attention kernel of ours in each dtype
Expected = dict[type, set[Any]]  # graphs of each class, of all networks of the process: torch counts them together
MODES = ("eager", "regional", "full")
REFERENCE = "diffusers, float32"  # its default
CAPTURING = CROWDED = ("cuda",)  # devices with CUDA graphs; devices that cannot hold the weights of all entries


def our_dtypes(device: str) -> list[torch.dtype]:
    """The dtypes of our entries; the last one is that of dtype=auto."""
    if device == "cuda":
        return [torch.bfloat16]
    return list(dict.fromkeys((torch.float32, getattr(torch, cpu_dtype.choose(native=True).dtype))))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ours_name(dtype: torch.dtype, mode: str, graphs: bool = False) -> str:
    how = mode if mode == "eager" else f"compile={mode}"
    return f"sglang-gen, {short(dtype)}, {how}" + (", graphs" if graphs else "")


def theirs_name(dtype: torch.dtype, compiled: bool = False) -> str:
    return f"diffusers, {short(dtype)}" + (", torch.compile" if compiled else "")


def openvino_name(dtype: torch.dtype) -> str:
    return f"OpenVINO, {short(dtype)} hint"


def entries(work: works.Work, folder: Path, device: str, kernels: Kernels) -> tuple[dict[str, Call], DeviceSlot]:
    """The calls to time, by their name in the table, and the device slot for the networks that are kept on the host."""
    calls: dict[str, Call] = {}
    expected: Expected = {}
    for dtype, kernel in kernels.items():
        load = _our_networks(work, folder, device, dtype)
        for graphs in (False, True) if device in CAPTURING else (False,):
            for mode in MODES:
                calls[ours_name(dtype, mode, graphs)] = our_call(work, load, device, kernel, mode, graphs, expected)
    peers, slot = _peers(work, folder, device, list(dict.fromkeys((torch.float32, *kernels))))
    calls |= peers
    if device == "cpu" and importlib.util.find_spec("openvino"):
        calls |= {openvino_name(dtype): _openvino(work, folder, dtype) for dtype in kernels}
    return calls, slot


def _peers(
    work: works.Work, folder: Path, device: str, dtypes: list[torch.dtype]
) -> tuple[dict[str, Call], DeviceSlot]:
    networks: dict[str, Any] = {}
    arguments: dict[str, dict[str, Any]] = {}
    for dtype in dtypes:
        loaded = works.their_network(work, folder, dtype)
        for compiled in (False, True):
            name = theirs_name(dtype, compiled)
            networks[name] = loaded if device in CROWDED or not compiled else works.their_network(work, folder, dtype)
            arguments[name] = works.their_arguments(work, dtype, device)
    if device in CROWDED:
        hosts = {id(network): HostNetwork(network, device) for network in networks.values()}
        slot = DeviceSlot({name: hosts[id(network)] for name, network in networks.items()})
    else:
        networks, slot = {name: network.to(device) for name, network in networks.items()}, DeviceSlot({})
    for dtype in dtypes:
        networks[theirs_name(dtype, True)] = torch.compile(networks[theirs_name(dtype, True)])
    return {name: _theirs(network, arguments[name]) for name, network in networks.items()}, slot


def _theirs(network: Any, arguments: dict[str, Any]) -> Call:
    return lambda: network(**arguments, return_dict=False)[0]


def _our_networks(
    work: works.Work, folder: Path, device: str, dtype: torch.dtype
) -> Callable[[], tuple[Any, Any, Tensor]]:
    """A function that returns our network, a function for its conditioning, and the latents.

    On a crowded device all networks share their weights. Elsewhere each has its own: shared weights would still be in
    the cache after the previous call.
    """
    load = partial(works.ours, work, folder, dtype, device)
    if device not in CROWDED:
        return load
    network, condition, latents = load()
    return lambda: (sharing(network), condition, latents)


def sharing(network: torch.nn.Module) -> torch.nn.Module:
    """A copy of the network that shares its weights."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})


def our_call(
    work: works.Work,
    load: Callable[[], tuple[Any, Any, Tensor]],
    device: str,
    kernel: attention_kernels.Choice,
    mode: str,
    graphs: bool = False,
    expected: Expected | None = None,
) -> Call:
    """A call that evaluates the network returned by `load` once, with its conditioning and latents, in one of MODES.

    `expected` is shared by the calls of one process.
    """
    network, condition, latents = load()
    half = latents.dtype.itemsize == 2
    if half or (device == "cpu" and mode != "eager"):
        to_channels_last(network)
    if device == "cpu" and not half and cpu_dtype.fastest_matmul() == "onednn":
        use_onednn(network)
    summing = attention_kernels.kernel_with_lse(kernel.name, device, latents.dtype)
    works.whole(work).parallelize(network).set_kernel(kernel.kernel, summing)
    conditioning = condition(network)
    if mode == "eager":
        if graphs:
            Graphs(network)
        return lambda: network(latents, conditioning, 0)
    regions = work.pipeline.regions if mode == "regional" else ()
    shapes = works.traced_on_meta(
        work,
        regions or (type(network),),
        network,
        lambda copied: copied(to_meta(latents), condition(copied, meta=True), 0),
    )
    blocks = Compiled(network, regions, device)
    if expected is not None:
        blocks.expected = expected
    blocks.expect(shapes)
    if graphs:
        Graphs(network)

    def call() -> Tensor:
        with blocks.limited():
            return network(latents, conditioning, 0)

    return call


def _openvino(work: works.Work, folder: Path, dtype: torch.dtype) -> Call:
    import openvino

    network, arguments = works.theirs(work, folder, torch.float32, "cpu")
    nested = arguments.pop("added_cond_kwargs", {})
    names, inner = list(arguments), list(nested)

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *values: Tensor) -> Tensor:
            given = dict(zip(names, values[: len(names)], strict=True))
            if inner:
                given["added_cond_kwargs"] = dict(zip(inner, values[len(names) :], strict=True))
            return self.network(**given, return_dict=False)[0]

    inputs = (*arguments.values(), *nested.values())
    model = openvino.convert_model(Positional(), example_input=inputs)
    hint = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    request = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint}).create_infer_request()
    arrays = [value.numpy() for value in inputs]
    return lambda: torch.from_numpy(request.infer(arrays)[0])
