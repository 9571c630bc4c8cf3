"""Places the components of a diffusers pipeline: on the device, or offloaded to the CPU or to disk."""

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
from sglang_gen.errors import RunError, UserError, in_our_words
from sglang_gen.plan import offloading
from sglang_gen.types import DENOISERS, TEXT_ENCODERS

OFFLOADED_COMPONENTS = {
    "dit_cpu_offload": DENOISERS,
    "dit_layerwise_offload": DENOISERS,
    "text_encoder_cpu_offload": TEXT_ENCODERS,
    "image_encoder_cpu_offload": ("image_encoder",),
    "vae_cpu_offload": ("vae",),
}


def apply(pipeline: Any, run: Run, device: str, ending: ExitStack) -> list[str]:
    """Place every component and return the options that took effect; `ending` removes temporary files after the run.

    On a CPU no option has an effect. Otherwise an offloaded component is moved to the device when it is called and back
    after the call; `dit_layerwise_offload` does so block by block and copies the next block while one computes.

    Raises UserError if nothing can be created in `offload.disk_path`, RunError if it cannot hold a network.
    """
    if device == "cpu":
        pipeline.to("cpu")
        return []
    return _place(pipeline, run.offload, offloading.asked(run), device, ending)


def _place(pipeline: Any, offload: Offload, options: list[str], device: str, ending: ExitStack) -> list[str]:
    offloaded: dict[str, str] = {}  # component -> the option that offloads it
    for option in options:
        components = modules(pipeline, OFFLOADED_COMPONENTS[option])
        if not components:
            log.warning(f"{option}: no effect, {type(pipeline).__name__} has no such component")
        offloaded |= dict.fromkeys(components, option)
    for name, module in pipeline.components.items():
        if not isinstance(module, nn.Module):
            continue
        if name not in offloaded:
            module.to(device)
        elif offloaded[name] == "dit_layerwise_offload" and offload.disk_path:
            _stream_from_disk(module, device, _folder(offload.disk_path, name, ending))
        elif offloaded[name] == "dit_layerwise_offload":
            _stream(module, device, None, layerwise=True)
        else:
            _stream(module, device, None, layerwise=False)
    return [option for option in options if option in offloaded.values()]


def _folder(disk_path: str, name: str, ending: ExitStack) -> str:
    """A new folder for one component of this rank's run; it is removed with its contents when the run ends.

    diffusers names files after modules and reads existing ones, even if another network or run wrote them.
    """
    try:
        Path(disk_path).mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f"{name}-", dir=disk_path)
    except OSError as error:
        raise UserError(f"offload.disk_path: nothing can be made in {disk_path}: {error.strerror}") from error
    ending.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _stream_from_disk(module: nn.Module, device: str, folder: str) -> None:
    from safetensors import SafetensorError

    try:
        _stream(module, device, folder, layerwise=True)
    except (OSError, SafetensorError) as error:
        raise RunError(f"offload.disk_path: {folder} cannot hold the network: {in_our_words(error)}") from error


def _stream(module: nn.Module, device: str, disk_path: str | None, layerwise: bool) -> None:
    """diffusers' group offloading: the component as one group, or one group per block with prefetch."""
    from diffusers.hooks import apply_group_offloading

    halves = None  # modules of an autoencoder, which is called through encode and decode instead of forward
    if hasattr(module, "decode") and not getattr(module, "_group_offload_block_modules", None):
        names = ("encoder", "decoder", "quant_conv", "post_quant_conv")
        halves = [name for name in names if isinstance(getattr(module, name, None), nn.Module)] or None
    apply_group_offloading(
        module,
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1 if layerwise else 10**6,
        use_stream=layerwise,
        offload_to_disk_path=disk_path,
        block_modules=halves,
    )
