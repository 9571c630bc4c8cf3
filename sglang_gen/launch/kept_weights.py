"""Weights that stay in memory from one run of a process to the next, so that the jobs of a sweep load them once.

A run computes with copies of the loaded modules. The copies have their own structure, which attention kernels, step
caches and compilation change, and share the memory of the parameters, which nothing changes in place.
"""

import copy
import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import nn

from sglang_gen.config.schema import plain
from sglang_gen.engine.freed_memory import return_freed_memory
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.plan import offloading
from sglang_gen.types import ModelCard, Plan

Loaded = TypeVar("Loaded")


class KeptWeights:
    """What a process has loaded, for the next run that loads the same; nothing unless `keeps`."""

    def __init__(self, keeps: bool = False) -> None:
        self._keeps, self._runs = keeps, 0
        self._identity: str | None = None
        self._loaded: dict[str, object] = {}
        self.reused = False  # whether the run that was started last has found what it loads

    def start(self, plan: Plan, mesh: Mesh) -> None:
        """Begin a run: release the weights of the last one, unless this run loads the same."""
        identity = _identity(plan, mesh) if self._keeps else None
        if identity is None or identity != self._identity:
            self.release()
        if self._keeps:
            _collect(first=self._runs == 0)
            self._runs += 1
        self._identity, self.reused = identity, False

    def load(self, name: str, read: Callable[[], Loaded]) -> Loaded:
        """A copy of what `read()` returned in this run or an earlier one: a module, a dict of them or a pipeline."""
        if self._identity is None:
            return read()
        self.reused = name in self._loaded
        if not self.reused:
            loaded = read()
            if not all(map(_is_plain, _parameters(loaded))):  # an own class of tensors may not share its memory
                return loaded
            self._loaded[name] = loaded
        kept: Loaded = self._loaded[name]  # type: ignore[assignment]  # what `read` of this name returned
        return _sharing_copy(kept)

    def forget(self, name: str) -> None:
        """Release what `load` of this name keeps, because the run itself does not keep it on the device."""
        self._loaded.pop(name, None)

    def release(self) -> None:
        """Release everything that is kept."""
        self._loaded.clear()
        self._identity = None


def _collect(first: bool) -> None:
    """Collect what earlier runs left and return it to the kernel, so that the peak of a run does not depend on them.

    What the process has before its first run are imported modules, which later collections need not visit.
    """
    gc.collect()
    if first:
        gc.freeze()
    return_freed_memory()


def _identity(plan: Plan, mesh: Mesh) -> str | None:
    """A digest of all that decides which weights a rank loads; None for a run whose weights are not kept.

    A LoRA is merged into the weights in place, and an offloaded network has a master of its own on the host.
    """
    run = plan.run
    if run.lora.path or run.lora.adapters or offloading.active(run, plan.device):
        return None
    facts = (plan.card, plan.backend, plan.device, plan.dtype, run.model, run.quant, run.offload)
    tp = mesh.axis("tp")
    shard = (tp.size, tp.index, tp.group)  # text encoders are loaded with the collectives of this group
    text = json.dumps([plan.pipeline_class, shard, _states(plan.card), *map(plain, facts)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _states(card: ModelCard) -> list[tuple[str, int, int]]:
    """Name, size and time of change of the model's files, which another program may write between two jobs."""
    places = {part for each in card.components.values() for part in (each.folder, each.file)} | {card.file}
    files = {
        file for place in places if place is not None for file in (place.rglob("*") if place.is_dir() else [place])
    }
    states = [(str(file), file.stat()) for file in sorted(files) if file.is_file()]
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def _modules(loaded: object) -> Iterator[nn.Module]:
    if isinstance(loaded, nn.Module):
        yield loaded
    else:
        parts = loaded if isinstance(loaded, Mapping) else vars(loaded)
        yield from (part for part in parts.values() if isinstance(part, nn.Module))


def _parameters(loaded: object) -> Iterator[nn.Parameter]:
    for module in _modules(loaded):
        yield from module.parameters()


def _is_plain(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor


def _sharing_copy(loaded: Loaded) -> Loaded:
    """A deep copy whose parameters share the memory of the original's; tokenizers and processors are not copied."""
    made: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in _parameters(loaded)
    }
    parts = loaded.values() if isinstance(loaded, Mapping) else vars(loaded).values()
    made |= {id(part): part for part in parts if _is_read_only(part)}
    return copy.deepcopy(loaded, made)


def _is_read_only(part: object) -> bool:
    """Whether a component is a tokenizer or a processor, which a pipeline calls and does not change."""
    return hasattr(part, "save_pretrained") and not isinstance(part, nn.Module) and not hasattr(part, "set_timesteps")
