"""Networks whose weights wait on the host and come to the GPU for their turn, one network at a time."""

from collections.abc import Mapping

import torch
from torch import nn


class Guest:
    """A network on the host that can go to a device; what it leaves there is nothing, since nothing changes it."""

    def __init__(self, network: nn.Module, device: str) -> None:
        self.device, self.tensors = device, [*network.parameters(), *network.buffers()]
        self.waiting = [tensor.data for tensor in self.tensors]

    def come(self) -> None:
        for tensor, kept in zip(self.tensors, self.waiting, strict=True):
            tensor.data = kept.to(self.device, copy=True)

    def go(self) -> None:
        for tensor, kept in zip(self.tensors, self.waiting, strict=True):
            tensor.data = kept
        if self.device == "cuda":
            torch.cuda.empty_cache()  # what comes next is of other sizes


class Room:
    """On the device beside what is always there: for one of the guests, by the names of the entries that need them."""

    def __init__(self, guests: Mapping[str, Guest]) -> None:
        self.guests = guests
        self.inside: Guest | None = None

    def make_ready(self, name: str) -> bool:
        """Have the guest of this entry in, if it has one; whether it had to come."""
        guest = self.guests.get(name)
        if guest is None or guest is self.inside:
            return False
        if self.inside is not None:
            self.inside.go()
        guest.come()
        self.inside = guest
        return True
