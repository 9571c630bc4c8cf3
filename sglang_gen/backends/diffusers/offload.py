"""Places the components of a diffusers pipeline: on the device, or offloaded to the CPU or to disk."""

import shutil
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sglang_gen import log
from sglang_gen.backends.diffusers.roles import modules
from sglang_gen.config.schema import Offload, Run
from sglang_gen.engine.residency import Offloaded
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


class OnDemand:
    """Offloaded components, each of which is uploaded at its first call and stays until another one is called.

    Text encoders stay until something else is called, because a pipeline may call them in turns. A pipeline therefore
    uploads a component once in a generation, unless it returns to it, as to the autoencoder of an input image.
    """

    def __init__(self) -> None:
        self.current: dict[str, Offloaded] = {}  # on the device, by component
        self.options: list[str] = []  # those that took effect

    def call(self, name: str, component: Offloaded) -> None:
        """The component is about to compute."""
        if name in self.current:
            return
        if not {name, *self.current} <= {*TEXT_ENCODERS}:
            self.drop()
        self.current[name] = component
        component.upload()

    def drop(self) -> None:
        """The generation has ended: release the device's copies."""
        for component in self.current.values():
            component.drop()
        self.current.clear()


def apply(pipeline: Any, run: Run, device: str, ending: ExitStack) -> OnDemand:
    """Place every component; `ending` removes temporary files after the run.

    On a CPU no option has an effect. Otherwise an offloaded component is on the host between generations;
    `dit_layerwise_offload` uploads block by block, in each step, and copies the next block while one computes.

    Raises UserError if nothing can be created in `offload.disk_path`, RunError if it cannot hold a network.
    """
    demand = OnDemand()
    if device == "cpu":
        pipeline.to("cpu")
    else:
        demand.options = _place(pipeline, run.offload, offloading.asked(run), device, ending, demand)
    return demand


def _place(
    pipeline: Any, offload: Offload, options: list[str], device: str, ending: ExitStack, demand: OnDemand
) -> list[str]:
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
            _upload_when_called(name, module, device, demand)
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


def _upload_when_called(name: str, module: nn.Module, device: str, demand: OnDemand) -> None:
    """Have diffusers' hooks, which tell a pipeline where the component computes, upload the whole component.

    By themselves they copy the weights back after each call. A denoising network needs the hook of its
    own call alone, so that none is inside of compiled blocks.
    """
    _stream(module, device, None, layerwise=False)
    component = Offloaded(module, device)
    upload = torch.compiler.disable(partial(demand.call, name, component))  # type: ignore[no-untyped-call]
    hooked = [each for each in module.modules() if getattr(each, "_diffusers_hook", None)]
    for each in hooked:
        hook: Any = each._diffusers_hook.get_hook("group_offloading")  # type: ignore[union-attr, operator]
        if hook is None:
            continue
        if name in DENOISERS and each is not module:
            each._diffusers_hook.remove_hook("group_offloading", recurse=False)  # type: ignore[union-attr, operator]
        else:
            hook.group.onload_, hook.group.offload_ = upload, _keep


def _keep() -> None:
    """A call has ended, and the component stays on the device."""


class _Forward(partial[Any]):
    """The forward of a hooked module; cache-dit binds the one that it restores, and a partial cannot be bound."""

    def __get__(self, instance: Any, owner: Any = None) -> "_Forward":
        return self


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
    if type(forward := module.forward) is partial:
        module.forward = _Forward(forward.func, *forward.args, **forward.keywords)
        module.forward.__dict__.update(forward.__dict__)
