"""A stand-in for the memory of a GPU: weights that are offloaded are not finite until they are uploaded."""

from collections import Counter

import torch

from sglang_gen.engine import residency


def counted_uploads(monkeypatch) -> Counter:
    """The number of uploads of each offloaded module, by class."""
    counted: Counter = Counter()
    init, upload, drop = residency.Offloaded.__init__, residency.Offloaded.upload, residency.Offloaded.drop

    def noted_init(self, module, device) -> None:
        self.kind = type(module).__name__
        init(self, module, device)

    def noted(self) -> None:
        counted[self.kind] += not self.on_device
        upload(self)

    def unreadable(self) -> None:
        drop(self)
        for place, name, master in self.plain:
            if master.is_floating_point():
                place[name].data = torch.full_like(master, torch.nan)

    monkeypatch.setattr(residency.Offloaded, "__init__", noted_init)
    monkeypatch.setattr(residency.Offloaded, "upload", noted)
    monkeypatch.setattr(residency.Offloaded, "drop", unreadable)
    return counted
