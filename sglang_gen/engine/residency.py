"""Component offload: the weights of a module stay on the host, and a copy is on the device while the module computes.

The host copy is the master. It is pinned for a GPU, so that an upload is one asynchronous copy per tensor. Weights do
not change while images are generated, so the device copy is dropped and never copied back.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Offloaded:
    """A module whose weights are on the host until `upload`, and again after `drop`."""

    def __init__(self, module: nn.Module, device: str) -> None:
        """Weights that are on the device are moved to the host, once."""
        self.device = device
        self.on_device = False
        self.plain: list[tuple[dict[str, Any], str, Tensor]] = []  # (the module's dict, name in it, master)
        # Assigning `data` leaves what a tensor wraps where it is, such as the quantized weights and scales of torchao.
        self.wrapped: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        masters: dict[int, Tensor] = {}  # a tensor may have several names
        for place, name, tensor in _named(module):
            if is_traceable_wrapper_subclass(tensor):
                self.wrapped.append((place, name, nn.Parameter(tensor.detach().to("cpu"), requires_grad=False)))
            elif id(tensor) not in masters:
                masters[id(tensor)] = _on_host(tensor.data, device)
                self.plain.append((place, name, masters[id(tensor)]))
        self.drop()

    def upload(self) -> None:
        """Copy the weights to the device, unless they are there.

        Weights whose dtype was changed since the last drop, as of an autoencoder that decodes in float32, keep it.
        """
        if self.on_device:
            return
        for place, name, master in self.plain:
            place[name].data = _copied(master, self.device).to(place[name].dtype)
        for place, name, wrapped in self.wrapped:
            place[name] = nn.Parameter(_copied(wrapped.detach(), self.device), requires_grad=False)
        self.on_device = True

    def drop(self) -> None:
        """Release the weights on the device."""
        for place, name, master in self.plain:
            place[name].data = master
        for place, name, wrapped in self.wrapped:
            place[name] = wrapped
        self.on_device = False


def _named(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """The parameters and buffers of a module, each with the dict that holds it under its name."""
    for each in module.modules():
        for place in (each._parameters, each._buffers):
            yield from ((place, name, tensor) for name, tensor in place.items() if tensor is not None)


@contextmanager
def on_device(modules: Iterable[Offloaded]) -> Iterator[None]:
    """Within this context the modules are on the device."""
    held = list(modules)
    try:
        for module in held:
            module.upload()
        yield
    finally:
        for module in held:
            module.drop()


def _on_host(tensor: Tensor, device: str) -> Tensor:
    host = tensor.to("cpu")
    return host.pin_memory() if torch.device(device).type == "cuda" else host


def _copied(master: Tensor, device: str) -> Any:
    """A copy on the device with the strides of the master."""
    return master.to(device, non_blocking=True, copy=True)
