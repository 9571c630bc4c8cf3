"""Random weights (model.weights=random): each parameter is drawn from a generator of its own.

The seed of a generator is a hash of the component's name, the parameter's name and the number of the chunk. So a
parameter has the same values in every layout and order of loading, with any number of threads and on both backends.
Numbers are drawn in float32 and rounded to the requested dtype.

Weights are normal with the variance 1 / fan_in, which keeps activations of order one: outputs of linear layers and
convolutions have about the variance of their inputs (LeCun et al. 1998). Embeddings have a variance of 1, scales of
norms are 1, and biases have a deviation of 0.02, so that a bias that is added twice or not at all changes the result.
"""

import hashlib
import math
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

CHUNK = (
    2**15
)  # numbers of one generator: few enough that they stay in a cache and that torch adds no threads of its own
BIAS_DEVIATION = 0.02


@dataclass(frozen=True)
class Draw:
    """How one parameter is drawn: mean and standard deviation of its numbers."""

    shape: tuple[int, ...]
    mean: float
    deviation: float


def drawn(key: str, draw: Draw, dtype: torch.dtype) -> Tensor:
    """The parameter `key` on the CPU: its chunks are drawn by as many threads as torch computes with."""
    tensor = torch.empty(draw.shape, dtype=dtype, device="cpu")
    if draw.deviation == 0:
        return tensor.fill_(draw.mean)
    pieces = torch.split(tensor.view(-1), CHUNK)
    fill: Callable[[int], None] = partial(_fill, key, draw, pieces)
    if len(pieces) == 1 or torch.get_num_threads() == 1:
        for number in range(len(pieces)):
            fill(number)
        return tensor
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for _ in threads.map(fill, range(len(pieces))):
            pass
    return tensor


def _fill(key: str, draw: Draw, pieces: Sequence[Tensor], number: int) -> None:
    digest = hashlib.sha256(f"{key}/{number}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
    numbers = torch.empty(pieces[number].shape, dtype=torch.float32, device="cpu")
    pieces[number].copy_(numbers.normal_(draw.mean, draw.deviation, generator=generator))


def draws(network: nn.Module) -> dict[str, Draw]:
    """How each parameter of a network is drawn, by name; a parameter that modules share has its first name."""
    modules = dict(network.named_modules())
    found = {}
    for name, parameter in network.named_parameters():
        path, _, own = name.rpartition(".")
        found[name] = Draw(tuple(parameter.shape), *_moments(modules[path], own, parameter))
    return found


def _moments(module: nn.Module, name: str, parameter: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a module's parameter."""
    if name.endswith("bias"):
        return 0.0, BIAS_DEVIATION
    if isinstance(module, nn.Embedding):
        return 0.0, 1.0
    is_product = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    if not is_product and parameter.numel() == max(parameter.shape, default=1):
        return 1.0, 0.0  # a scale for each channel, also of the shape [C, 1, 1, 1]
    return 0.0, 1 / math.sqrt(parameter[0].numel())


class RandomTensors:
    """The tensors of a component's checkpoint, drawn when they are taken; see `load.Tensors`.

    `network` is the component's network on the meta device. Its buffers that a checkpoint holds are constants, such as
    tables of positions, and keep their values.
    """

    def __init__(self, component: str, network: nn.Module, dtype: torch.dtype) -> None:
        self.component, self.dtype = component, dtype
        self.draws = draws(network)
        buffers = {name for name, _ in network.named_buffers()}
        self.constants: dict[str, Tensor] = {
            name: tensor for name, tensor in network.state_dict().items() if name in buffers
        }

    def names(self) -> Set[str]:
        return self.draws.keys() | self.constants.keys()

    def shape(self, name: str) -> Sequence[int]:
        return self.draws[name].shape if name in self.draws else self.constants[name].shape

    def take(self, name: str) -> Tensor:
        """The whole tensor, which is in memory only once; a rank slices its shard from it."""
        if name in self.draws:
            return drawn(f"{self.component}/{name}", self.draws[name], self.dtype)
        return self.constants[name]
