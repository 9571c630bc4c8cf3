"""Networks whose weights are kept on the host and copied to the GPU when they are needed, one network at a time."""

from collections.abc import Mapping

import torch
from torch import nn


class HostNetwork:
    """A network on the host that can be copied to a device. Its weights are constant, so nothing is copied back."""

    def __init__(self, network: nn.Module, device: str) -> None:
        self.device, self.tensors = device, [*network.parameters(), *network.buffers()]
        self.host_data = [tensor.data for tensor in self.tensors]

    def load(self) -> None:
        for tensor, data in zip(self.tensors, self.host_data, strict=True):
            tensor.data = data.to(self.device, copy=True)

    def unload(self) -> None:
        for tensor, data in zip(self.tensors, self.host_data, strict=True):
            tensor.data = data
        if self.device == "cuda":
            torch.cuda.empty_cache()  # the next network's tensors have other sizes


class DeviceSlot:
    """Space on the device for one of the host networks, which are given by the names of the entries that use them."""

    def __init__(self, networks: Mapping[str, HostNetwork]) -> None:
        self.networks = networks
        self.loaded: HostNetwork | None = None

    def make_ready(self, name: str) -> bool:
        """Load the host network of this entry, if it has one; returns whether it had to be loaded."""
        network = self.networks.get(name)
        if network is None or network is self.loaded:
            return False
        if self.loaded is not None:
            self.loaded.unload()
        network.load()
        self.loaded = network
        return True
