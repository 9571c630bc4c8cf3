"""Where the components of a diffusers pipeline wait, and how they come to the device."""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sglang_gen import log
from sglang_gen.backends.diffusers.roles import modules
from sglang_gen.config.schema import Offload, Run
from sglang_gen.errors import RunError, UserError, first_line
from sglang_gen.plan import offloading
from sglang_gen.types import DENOISERS, TEXT_ENCODERS

OFFLOADED_PARTS = {
    "dit_cpu_offload": DENOISERS,
    "dit_layerwise_offload": DENOISERS,
    "text_encoder_cpu_offload": TEXT_ENCODERS,
    "image_encoder_cpu_offload": ("image_encoder",),
    "vae_cpu_offload": ("vae",),
}


def apply(pipeline: Any, run: Run, device: str, ending: ExitStack) -> list[str]:
    """Place every component and say which options took effect; `ending` is told what to remove after the run.

    On a CPU nothing does. Elsewhere a flagged component comes to the device when it is called and returns after the
    call; `dit_layerwise_offload` does so block by block, the next block being copied while one computes.

    Raises UserError for an `offload.disk_path` in which nothing can be made, RunError where it cannot hold a network.
    """
    if device == "cpu":
        pipeline.to("cpu")
        return []
    return _place(pipeline, run.offload, offloading.asked(run), device, ending)


def _place(pipeline: Any, offload: Offload, asked: list[str], device: str, ending: ExitStack) -> list[str]:
    waiting: dict[str, str] = {}  # component -> the option under which it waits
    for option in asked:
        found = modules(pipeline, OFFLOADED_PARTS[option])
        if not found:
            log.warning(f"{option}: no effect, {type(pipeline).__name__} has no such component")
        waiting |= dict.fromkeys(found, option)
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        if name not in waiting:
            part.to(device)
        elif waiting[name] == "dit_layerwise_offload" and offload.disk_path:
            _stream_from_disk(part, device, _folder(offload.disk_path, name, ending))
        elif waiting[name] == "dit_layerwise_offload":
            _stream(part, device, None, layerwise=True)
        else:
            _stream(part, device, None, layerwise=False)
    return [option for option in asked if option in waiting.values()]


def _folder(disk_path: str, name: str, ending: ExitStack) -> str:
    """A new folder for one component of this rank's run, which is removed with all that it holds when the run ends.

    diffusers names files after modules and takes those that it finds, whichever network or run has written them.
    """
    try:
        Path(disk_path).mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f"{name}-", dir=disk_path)
    except OSError as error:
        raise UserError(f"offload.disk_path: nothing can be made in {disk_path}: {error.strerror}") from error
    ending.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _stream_from_disk(part: nn.Module, device: str, folder: str) -> None:
    from safetensors import SafetensorError

    try:
        _stream(part, device, folder, layerwise=True)
    except (OSError, SafetensorError) as error:
        raise RunError(f"offload.disk_path: {folder} cannot hold the network: {first_line(error)}") from error


def _stream(part: nn.Module, device: str, disk_path: str | None, layerwise: bool) -> None:
    """diffusers' group offloading: one group an entire component, or one group a block with prefetch."""
    from diffusers.hooks import apply_group_offloading

    halves = None  # of an autoencoder, which is called by them and not by its forward
    if hasattr(part, "decode") and not getattr(part, "_group_offload_block_modules", None):
        names = ("encoder", "decoder", "quant_conv", "post_quant_conv")
        halves = [name for name in names if isinstance(getattr(part, name, None), nn.Module)] or None
    apply_group_offloading(
        part,
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1 if layerwise else 10**6,
        use_stream=layerwise,
        offload_to_disk_path=disk_path,
        block_modules=halves,
    )
