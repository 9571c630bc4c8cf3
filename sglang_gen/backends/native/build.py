"""Builds one rank's denoising network in steps that the plan chooses; `meta=True` gives a copy without memory.

Estimates, FLOP counts and predictions of communication trace the copy, so they see the network that runs.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sglang_gen.backends.native.checkpoint import OpenCheckpoint, open_checkpoint
from sglang_gen.backends.native.native_cache import build_cache
from sglang_gen.backends.native.request import pipeline_of
from sglang_gen.engine import attention_kernels
from sglang_gen.engine.block_timing import TimedChain
from sglang_gen.engine.caching.cached_chain import CachedChain, PlannedChain, runner
from sglang_gen.engine.cuda_graphs import Graphs
from sglang_gen.engine.memory_format import to_channels_last
from sglang_gen.engine.residency import Offloaded
from sglang_gen.families.pipeline_contract import Pipeline
from sglang_gen.launch.kept_weights import KeptWeights
from sglang_gen.models.layers import Linear, Shard
from sglang_gen.models.matmul import onednn_linear
from sglang_gen.parallel.mesh import SEQUENCE, Mesh
from sglang_gen.parallel.sharded_network import ParallelNetwork, Split
from sglang_gen.perf.clock import timer
from sglang_gen.plan import offloading, step_cache
from sglang_gen.types import Plan
from sglang_gen.weights import load

if TYPE_CHECKING:
    from sglang_gen.engine.compile import Compiled


@dataclass
class Built:
    """One rank's network, and what was done around it. Callers evaluate `parallel.entrance`."""

    plan: Plan
    mesh: Mesh
    pipeline: Pipeline
    name: str  # of the component
    resources: ExitStack = field(repr=False)  # open files, which are closed when the network is built
    kept: KeptWeights = field(default_factory=KeptWeights)
    network: Any = None
    checkpoint: OpenCheckpoint | None = None
    shards: dict[str, Shard] = field(default_factory=dict)
    parallel: Any = None  # the ParallelNetwork around `network`
    kernel: Any = None
    compiled: "Compiled | None" = None
    graphs: Graphs | None = None
    offloaded: Offloaded | None = None  # if the weights are on the host between generations
    cache: CachedChain | None = None
    timed: TimedChain | None = None

    @property
    def split(self) -> Split:
        return Split(self.mesh, self.pipeline.tensor_parallel, self.pipeline.sharding)

    @property
    def regions(self) -> tuple[type[nn.Module], ...]:
        """Classes of blocks that are compiled; none if the network is compiled as a whole."""
        return self.pipeline.regions if self.plan.run.compile.regional else ()

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.plan.dtype)
        return dtype


Step = Callable[[Built], None]


def build(
    plan: Plan, mesh: Mesh, name: str | None = None, meta: bool = False, kept: KeptWeights | None = None
) -> Built:
    """Build the component `name` (None: the denoising network) on this rank, with the weights in `kept` if it has them.

    Raises UserError for weights that do not fit, a kernel that does not run on this machine, and a missing compiler.
    """
    pipeline = pipeline_of(plan)
    with ExitStack() as resources:
        built = Built(plan, mesh, pipeline, name or pipeline.spec.network, resources, kept or KeptWeights())
        for step in steps(plan, mesh, meta):
            step(built)
    return built


def steps(plan: Plan, mesh: Mesh, meta: bool = False) -> list[Step]:
    """The steps in order; where the plan asks for nothing, a step says what stays as it is."""
    tp, sp = mesh.size("tp") > 1, mesh.axis(SEQUENCE).size > 1
    offloaded = "dit_cpu_offload" in offloading.active(plan.run, plan.device)
    compiles, graphs, timed = plan.run.compile.enable_torch_compile, plan.run.compile.cuda_graphs, plan.run.perf.blocks
    caches = step_cache.wanted(plan.run.cache)
    return [
        create,  # on meta: shapes are known before anything takes memory
        keep_linear_layers,  # a quantized layer takes another's place before anything asks for its tensors
        no_checkpoint if meta else check_checkpoint,  # names and shapes, while every tensor is still whole
        shrink if tp else keep_all_channels,  # before loading: a rank reads its part alone
        stay_on_meta if meta else load_tensors,  # one by one, so that the weights are in memory once
        channels_last if has_channels_last(plan) and not meta else keep_memory_format,  # as kernels prefer it
        add_collectives if tp else add_nothing,  # hooks of the loaded layers
        split_sequence if sp else keep_sequence,  # wraps attention, convolutions and norms
        choose_kernel,  # inside of the wrappers, which merge results if the kernel returns a log-sum-exp
        onednn_products if plan.matmul == "onednn" and not meta else torch_products,
        offload if offloaded and not meta else stay_resident,  # what is complete by now
        cache_steps if caches else compute_every_step,  # takes the place of the chain of blocks
        time_blocks if timed and not meta else run_blocks,  # inside of the cache, which calls the chain in parts
        compile_network if compiles and not meta else run_eagerly,  # after everything that changes the modules
        capture_graphs if graphs and not meta else launch_kernels,  # a graph records compiled code
    ]


def has_channels_last(plan: Plan) -> bool:
    """Whether the network's convolutions have channels last; those of Inductor on a CPU do in float32 too."""
    half = getattr(torch, plan.dtype).itemsize == 2
    return half or (plan.run.compile.enable_torch_compile and plan.device == "cpu")


def create(built: Built) -> None:
    with torch.device("meta"):
        built.network = built.pipeline.build(built.plan.card.components[built.name].config)


def keep_linear_layers(built: Built) -> None:
    """The network keeps its linear layers."""


def no_checkpoint(built: Built) -> None:
    """A copy on meta reads no files."""


def check_checkpoint(built: Built) -> None:
    built.checkpoint = built.resources.enter_context(open_checkpoint(built.plan, built.name))
    built.checkpoint.check(built.network, built.pipeline.sources)


def shrink(built: Built) -> None:
    built.shards = built.split.shrink(built.network)


def keep_all_channels(built: Built) -> None:
    """This rank computes all channels."""


def stay_on_meta(built: Built) -> None:
    built.network.to(built.dtype).eval()


def load_tensors(built: Built) -> None:
    assert built.checkpoint is not None
    source, sources = built.checkpoint.tensors, built.pipeline.sources
    hosted = "dit_cpu_offload" in offloading.active(built.plan.run, built.plan.device)
    device = "cpu" if hosted else built.plan.device

    def read() -> nn.Module:
        load.stream(built.network, source, sources, built.shards, built.dtype, device)
        return built.network  # type: ignore[no-any-return]

    built.network = built.kept.load(built.name, read)


def channels_last(built: Built) -> None:
    to_channels_last(built.network)


def keep_memory_format(built: Built) -> None:
    """float32 keeps diffusers' memory format so that rounding matches."""


def add_collectives(built: Built) -> None:
    built.split.insert_collectives(built.network)


def add_nothing(built: Built) -> None:
    """No layer needs another rank."""


def keep_sequence(built: Built) -> None:
    built.parallel = ParallelNetwork(built.network, built.split)


def split_sequence(built: Built) -> None:
    built.parallel = ParallelNetwork(built.network, built.split)
    built.parallel.split_sequence()


def choose_kernel(built: Built) -> None:
    """The kernel of attention=auto, and the grids of flex, follow with the shapes of the first batch."""
    plan, masked = built.plan, built.pipeline.spec.masks_text
    built.kernel = attention_kernels.choose(plan.run.attention, plan.device, built.dtype, (), masked)
    with_lse = attention_kernels.kernel_with_lse(built.kernel.name, plan.device, built.dtype, masked)
    built.parallel.returns_lse = with_lse is not None or attention_kernels.timed_by_shape(plan)


def onednn_products(built: Built) -> None:
    use_onednn(built.network)


def use_onednn(network: nn.Module) -> None:
    """Compute the products of linear layers with oneDNN."""
    for module in network.modules():
        if isinstance(module, Linear):
            module.matmul = onednn_linear


def torch_products(built: Built) -> None:
    """`F.linear` computes the products."""


def offload(built: Built) -> None:
    built.offloaded = Offloaded(built.network, built.plan.device)


def stay_resident(built: Built) -> None:
    """The weights stay where they were loaded."""


def cache_steps(built: Built) -> None:
    built.cache = built.network.chain = build_cache(built.plan, built.mesh)


def compute_every_step(built: Built) -> None:
    """Every step computes every block."""


def time_blocks(built: Built) -> None:
    built.timed = TimedChain(built.network, timer(built.plan.device))
    runner(built.network).chain = built.timed


def run_blocks(built: Built) -> None:
    """The chain runs one block after the other."""


def compile_network(built: Built) -> None:
    from sglang_gen.engine.compile import Compiled  # imports dynamo, which takes several seconds

    plan, ranks = built.plan, built.mesh.layout.ranks
    built.compiled = Compiled(built.network, built.regions, plan.device, ranks, plan.run.deterministic)


def run_eagerly(built: Built) -> None:
    """Python runs every operator."""


def capture_graphs(built: Built) -> None:
    built.graphs = Graphs(built.network, built.cache if isinstance(built.cache, PlannedChain) else None)


def launch_kernels(built: Built) -> None:
    """Each kernel is launched on its own."""
