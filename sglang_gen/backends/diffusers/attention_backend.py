"""The attention kernel of a diffusers pipeline.

The four kernels of torch's scaled_dot_product_attention are selected with a context manager around the call, which
affects every network. Other kernels are selected in diffusers' attention dispatcher, which not every attention
processor uses; if none of a model's processors does, the choice is an error.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import sdpa_kernel

from sglang_gen.backends.diffusers.roles import denoisers
from sglang_gen.config.schema import Attention
from sglang_gen.engine.attention_kernels import SDPA_KERNELS, only, priority, runs
from sglang_gen.errors import UserError, in_our_words, nearest

# Names of diffusers' dispatcher for torch's kernels, which are chosen as ours are, so that they work on every network.
NATIVE_NAMES = {
    "native": "sdpa", "_native_flash": "flash", "_native_efficient": "efficient", "_native_cudnn": "cudnn",
    "_native_math": "math",
}  # fmt: skip
# What a kernel of the dispatcher needs, by a part of its name; the first match counts.
NEEDS = {
    "_hub": "the package kernels and a GPU", "aiter": "the package aiter and a GPU of AMD",
    "flash_3": "FlashAttention 3, built from source, and a GPU", "varlen_3": "FlashAttention 3 and a GPU",
    "flash": "the package flash-attn and a GPU", "sage": "the package sageattention and a GPU",
    "xformers": "the package xformers and a GPU", "npu": "the package torch_npu and an NPU",
    "xla": "the package torch_xla and an XLA device",
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A chosen kernel: its name for the run record, and the context manager in which the network runs."""

    name: str
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@contextmanager
def chosen(pipeline: Any, kernel: Kernel) -> Iterator[None]:
    """Within this context the denoising networks run with `kernel`, the other components with any of torch's kernels.

    An autoencoder's attention has one head of hundreds of channels, and a text encoder's has a mask; not every kernel
    supports these.
    """
    components = [] if kernel.context is nullcontext else [*pipeline.components.values()]
    others = [item for item in components if isinstance(item, nn.Module) and item not in denoisers(pipeline).values()]
    with ExitStack() as stack:
        for module in others:
            for name in ("forward", "encode", "decode"):
                if hasattr(module, name):
                    stack.enter_context(_with_any_kernel(module, name))
        stack.enter_context(kernel.context())
        yield


@contextmanager
def _with_any_kernel(module: nn.Module, name: str) -> Iterator[None]:
    """Within this context the method `name` runs with any kernel; a method set by an offloading hook is restored."""
    before = vars(module).get(name)
    setattr(module, name, _with_any(getattr(module, name)))
    try:
        yield
    finally:
        delattr(module, name) if before is None else setattr(module, name, before)


def _with_any(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def with_any_kernel(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(list(SDPA_KERNELS.values())):
            return function(*args, **kwargs)

    return with_any_kernel


def legal(device: str, dtype: torch.dtype) -> list[str]:
    """Legal values of `attention.backend`: auto, sdpa, and the kernels of sdpa and diffusers that run here."""
    others = [name for name in _processor_kernels() if not name.startswith("_") and not name.endswith("_hub")]
    others = [name for name in others if name not in NATIVE_NAMES and name not in SDPA_KERNELS]
    kernels = [name for name in SDPA_KERNELS if runs(name, device, dtype)]
    return ["auto", "sdpa", *kernels, *(name for name in others if not _refusal(name, device))]


def apply(pipeline: Any, attention: Attention, device: str, dtype: torch.dtype) -> Kernel:
    """Choose the kernel. Raises UserError with the legal names if it is unknown, unusable or would have no effect."""
    return own(attention, device, dtype) or _dispatched(pipeline, attention.backend)


def check_name(attention: Attention, device: str, dtype: torch.dtype) -> None:
    """Raises UserError with the legal names if neither torch nor diffusers has the kernel."""
    name = attention.backend
    if name not in ("auto", "sdpa", *SDPA_KERNELS, *_processor_kernels()):
        names = legal(device, dtype)
        raise UserError(f"attention.backend: unknown kernel '{name}'{nearest(name, names)} (legal: {', '.join(names)})")


def own(attention: Attention, device: str, dtype: torch.dtype) -> Kernel | None:
    """The kernel if it is one of torch's; None for a kernel of diffusers' dispatcher. Raises UserError like `apply`."""
    name = NATIVE_NAMES.get(attention.backend, attention.backend)
    if name in ("auto", "sdpa"):
        order = priority(attention.backend_config, device, dtype)
        if not order:
            return Kernel("sdpa")
        return Kernel(f"sdpa({', '.join(order)})", lambda: only(order))
    if attention.backend_config:
        raise UserError(f"attention.backend_config: the kernel '{name}' takes no settings; sdpa takes 'priority'")
    if name in SDPA_KERNELS:
        if not runs(name, device, dtype):
            raise UserError(f"attention.backend: '{name}' does not run here; legal: {', '.join(legal(device, dtype))}")
        return Kernel(name, lambda: only([name]))
    check_name(attention, device, dtype)
    if reason := _refusal(name, device):
        names = ", ".join(legal(device, dtype))
        raise UserError(f"attention.backend: '{name}' cannot be used here: {reason}; legal: {names}")
    return None


def _processor_kernels() -> list[str]:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [item.value for item in AttentionBackendName]


def _dispatched(pipeline: Any, name: str) -> Kernel:
    """A kernel of diffusers' attention dispatcher, for processors that use it; active only during the call."""
    from diffusers.models.attention_dispatch import attention_backend

    networks = denoisers(pipeline).values()
    processors = [getattr(module, "processor", None) for network in networks for module in network.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        kinds = ", ".join(type(network).__name__ for network in networks)
        raise UserError(
            f"attention.backend: '{name}' has no effect on {kinds}, whose attention processors do not use diffusers' "
            f"attention dispatcher; use sdpa, {', '.join(SDPA_KERNELS)}"
        )
    return Kernel(name, lambda: attention_backend(name))


def _refusal(name: str, device: str) -> str | None:
    """Why diffusers' dispatcher refuses a kernel on this machine; None if it accepts it."""
    from diffusers.models.attention_dispatch import attention_backend

    need = next((needed for part, needed in NEEDS.items() if part in name), None)
    if need is not None and device == "cpu":
        return f"it needs {need}"
    try:
        with attention_backend(name):
            return None
    except (ValueError, RuntimeError, ImportError, AttributeError) as error:
        return f"it needs {need}" if need else in_our_words(error)
