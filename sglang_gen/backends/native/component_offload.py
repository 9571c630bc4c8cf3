"""Which components of a native run are on the host between their uses, and which options put them there."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from sglang_gen.backends.native.components import offloaded_names
from sglang_gen.engine.residency import Offloaded, on_device
from sglang_gen.families.contract import Spec
from sglang_gen.plan import offloading
from sglang_gen.types import Plan


class ComponentOffload:
    """Uploads each offloaded component for its stage of a batch, and drops it at the end of the stage."""

    def __init__(
        self, plan: Plan, spec: Spec, networks: Iterable[Offloaded | None], components: Mapping[str, Any]
    ) -> None:
        """`networks` are the denoising networks that were loaded on the host; all of them are used in one stage."""
        self.plan, self.components = plan, components
        self.networks = [each for each in networks if each is not None]
        self.others = {
            name: Offloaded(components[name], plan.device) for name in offloaded_names(plan, spec) if name in components
        }
        self.options = offloading.effective(plan.run, plan.device, plan.card)

    def add(self, names: Iterable[str]) -> list[str]:
        """Offload these components too, unless they are; returns those that were added."""
        added = [name for name in names if name not in self.others]
        self.others |= {name: Offloaded(self.components[name], self.plan.device) for name in added}
        return added

    def stage(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """Within this context those of these components that are offloaded are on the device."""
        return on_device(self.others[name] for name in names if name in self.others)

    def denoising(self) -> AbstractContextManager[None]:
        """Within this context the denoising networks are on the device."""
        return on_device(self.networks)
