"""Turns an error of memory that runs out into one sentence: where, how much there is, and what to change."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sglang_gen.config.schema import QuantMethod
from sglang_gen.errors import RunError, is_out_of_memory
from sglang_gen.plan import offloading
from sglang_gen.types import Plan


@contextmanager
def memory_explained(plan: Plan, rank: int) -> Iterator[None]:
    """Within this context of generating, an error of memory that runs out is a RunError of one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(plan, rank, "generating", error) from error


def out_of_memory(plan: Plan, rank: int, doing: str, error: BaseException) -> RunError:
    """The error to raise; `doing` is "generating", or "loading" a model."""
    sentence = f"Out of memory while {doing}"
    if plan.device == "cuda" and "DefaultCPUAllocator" not in str(error):  # else the host's memory ran out
        return RunError(f"{sentence} {_place(rank)}; run with {_changes(plan, loading=doing != 'generating')}")
    return RunError(f"{sentence}; try smaller batches or a smaller image" if doing == "generating" else sentence)


def _place(rank: int) -> str:
    """The rank and its GPU, with the memory that the GPU has."""
    index = torch.cuda.current_device()
    name, sizes = f"cuda:{index}", ""
    with contextlib.suppress(RuntimeError):  # the error may have left the GPU without a usable context
        free, total = torch.cuda.mem_get_info(index)
        sizes = f": {free / 2**30:.2f} GiB of {total / 2**30:.2f} GiB are free"
        name += f", {torch.cuda.get_device_name(index)}"
    return f"on rank {rank} ({name}){sizes}"


def _changes(plan: Plan, loading: bool) -> str:
    """What to change, without what the run does already."""
    active = offloading.active(plan.run, plan.device)
    changes = []
    if "dit_layerwise_offload" not in active:
        changes.append("offload=layerwise" if "dit_cpu_offload" in active else "offload=model")
    if not loading:
        changes.append("a smaller image")
    if not loading and max(map(len, plan.batches)) > 1:
        changes.append("smaller batches")
    if plan.run.quant.method is QuantMethod.none:
        changes.append("quant=int8")
    if not changes:
        return "more ranks (parallel.tp_size) or a smaller model"
    *most, last = changes
    return f"{', '.join(most)} or {last}" if most else last
