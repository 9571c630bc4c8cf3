"""The works to benchmark: one evaluation of a denoising network, with random weights or those of the embedded model."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from sglang_gen import env
from sglang_gen.engine.meta_trace import Shapes, trace_on_meta
from sglang_gen.families import registry
from sglang_gen.families.contract import ComponentConfig, Spec
from sglang_gen.families.examples_contract import Examples, NetworkBenchmark
from sglang_gen.families.pipeline_contract import Pipeline
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.weights.load import load

TIME, GUIDANCE = 500.0, 3.5  # timestep, of 1000


@dataclass(frozen=True)
class Work:
    """A network in diffusers and in the native engine, and the inputs of one evaluation."""

    title: str
    spec: Spec
    config: Mapping[str, Any]
    batch: int
    tokens: int  # text tokens
    size: int  # height and width in latents, or in tokens for families that pack latents
    weights: Path | None = None  # folder; None for random weights

    @property
    def examples(self) -> Examples:
        return registry.examples(self.spec)

    @property
    def pipeline(self) -> Pipeline:
        return registry.pipeline(self.spec)

    @property
    def kind(self) -> Any:
        """The class in diffusers."""
        return getattr(diffusers, self.spec.network_classes[0])

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        """Latents, encoded texts, and further tensors of the conditioning."""
        generator = torch.Generator().manual_seed(0)
        shapes = self.examples.shapes(self.config, self.tokens, self.size, self.size)
        drawn = [torch.randn((self.batch, *shape), generator=generator).to(device, dtype) for shape in shapes]
        return (*drawn, *self.examples.further(self.config, drawn[0], self.size, self.size))


def work_of(spec: Spec, benchmark: NetworkBenchmark, changes: ComponentConfig | None = None) -> Work:
    """The work of a family's benchmark; `changes` to the config of a preset's network."""
    folder = None
    if benchmark.config is not None:
        config: dict[str, Any] = dict(benchmark.config)
    else:
        configs = env.preset_configs(benchmark.preset) if benchmark.preset else env.embedded_model()
        folder = None if benchmark.preset else configs / spec.network
        config = json.loads((configs / spec.network / "config.json").read_text()) | dict(changes or {})
    size = benchmark.side or config["sample_size"]
    return Work(benchmark.title, spec, config, benchmark.batch, benchmark.tokens, size, folder)


BENCHMARKS = {
    name: (spec, benchmark) for spec in registry.specs() for name, benchmark in registry.examples(spec).networks.items()
}
WORKS: Mapping[str, Callable[[], Work]] = {
    name: partial(work_of, spec, benchmark) for name, (spec, benchmark) in BENCHMARKS.items()
}
LAPTOP = ",".join(name for name, (_, benchmark) in BENCHMARKS.items() if benchmark.config is not None)


def stored(work: Work, folder: Path) -> Path:
    """The folder of the work's checkpoint; random weights are drawn and saved to `folder` in bfloat16."""
    if work.weights is not None:
        return work.weights
    torch.manual_seed(0)
    work.kind(**work.config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def theirs(work: Work, folder: Path, dtype: torch.dtype, device: str) -> tuple[Any, dict[str, Any]]:
    """diffusers' network and the arguments of its call."""
    return their_network(work, folder, dtype).to(device), their_arguments(work, dtype, device)


def their_network(work: Work, folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' network on the CPU."""
    return work.kind.from_pretrained(folder, torch_dtype=dtype).eval()


def their_arguments(work: Work, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The arguments of a call of diffusers' network."""
    latents, *given = work.inputs(dtype, device)
    times = torch.full((work.batch,), TIME, device=device)
    return work.examples.arguments(work.config, latents, tuple(given), times, work.size, work.size, GUIDANCE)


@torch.no_grad()
def check_activations(work: Work, network: Any, arguments: Mapping[str, Any]) -> None:
    """Assert that the output of every block is finite and of order one, as in a trained network.

    `network` is diffusers' network, `arguments` are the arguments of its call.
    """
    sizes: dict[str, float] = {}

    def note(name: str, output: Any) -> None:
        for number, tensor in enumerate(output if isinstance(output, tuple) else (output,)):
            if isinstance(tensor, Tensor):
                sizes[f"{name}[{number}]"] = tensor.float().square().mean().sqrt().item()

    hooks = []
    lists = [(name, module) for name, module in network.named_modules() if isinstance(module, torch.nn.ModuleList)]
    for name, blocks in lists:
        for number, block in enumerate(blocks):
            hooks.append(block.register_forward_hook(lambda _m, _given, out, at=f"{name}.{number}": note(at, out)))
    network(**arguments, return_dict=False)
    for hook in hooks:
        hook.remove()
    assert sizes, f"{work.title} has no blocks"
    odd = {name: size for name, size in sizes.items() if not 0.01 < size < 100}  # includes NaN
    assert not odd, f"{work.title}: root mean squares far from one: {odd}"


def ours(work: Work, folder: Path, dtype: torch.dtype, device: str) -> tuple[Any, Callable[[Any], Any], Tensor]:
    """Our network, a function for its conditioning, and the latents."""
    family = work.pipeline
    network: Any = load(lambda: family.build(work.config), in_folder(folder), family.sources, dtype, device)
    latents, *given = work.inputs(dtype, device)
    return network, partial(conditioning, work, given), latents


def outline(work: Work, dtype: torch.dtype) -> Any:
    """Our network on the meta device."""
    with torch.device("meta"):
        return work.pipeline.build(work.config).to(dtype)


def conditioning(work: Work, given: Sequence[Tensor], network: Any, meta: bool = False) -> Any:
    """The conditioning of one step, for a network or (with `meta`) for its copy on the meta device."""
    on = "meta" if meta else given[0].device
    tensors = tuple(tensor.to(on) for tensor in given)
    return network.condition(torch.tensor([TIME]), *work.examples.conditions(tensors, work.size, work.size, GUIDANCE))


def whole(work: Work) -> Split:
    """The layout of a single rank, which has the whole network."""
    return Split(Mesh(), work.pipeline.tensor_parallel, work.pipeline.sharding)


def traced_on_meta(work: Work, regions: tuple[type, ...], network: Any, evaluate: Callable[[Any], Any]) -> Shapes:
    """Trace `evaluate` on a copy of the network on the meta device."""
    with torch.device("meta"):
        copy = type(network)(network.config).to(next(network.parameters()).dtype)
    return trace_on_meta(whole(work).parallelize(copy), regions, evaluate)
