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
        plain = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers()) if not _wraps(tensor)}
        self.masters = [(tensor, _on_host(tensor.data, device)) for tensor in plain.values()]
        # Assigning `data` leaves what a tensor wraps where it is, such as the quantized weights and scales of torchao.
        self.wrapped = [
            (place._parameters, name, nn.Parameter(parameter.detach().to("cpu"), requires_grad=False))
            for place in module.modules()
            for name, parameter in place._parameters.items()
            if parameter is not None and _wraps(parameter)
        ]
        self.drop()

    def upload(self) -> None:
        """Copy the weights to the device, unless they are there."""
        if self.on_device:
            return
        for tensor, master in self.masters:
            tensor.data = _copied(master, self.device)
        for parameters, name, wrapped in self.wrapped:
            parameters[name] = nn.Parameter(_copied(wrapped.detach(), self.device), requires_grad=False)
        self.on_device = True

    def drop(self) -> None:
        """Release the weights on the device."""
        for tensor, master in self.masters:
            tensor.data = master
        for parameters, name, wrapped in self.wrapped:
            parameters[name] = wrapped
        self.on_device = False


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


def _wraps(tensor: Tensor) -> bool:
    return bool(is_traceable_wrapper_subclass(tensor))


def _on_host(tensor: Tensor, device: str) -> Tensor:
    host = tensor.to("cpu")
    return host.pin_memory() if torch.device(device).type == "cuda" else host


def _copied(master: Tensor, device: str) -> Any:
    """A copy on the device with the strides of the master."""
    return master.to(device, non_blocking=True, copy=True)
