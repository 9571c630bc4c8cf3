"""The attention kernel of a diffusers pipeline.

The four kernels inside torch's scaled_dot_product_attention are chosen by a context around the call, which reaches
every network. Other kernels are those of diffusers' dispatcher, which not every attention processor goes through: where
none does, the choice is an error.
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
from sglang_gen.errors import UserError, first_line, nearest


@dataclass(frozen=True)
class Kernel:
    """A chosen kernel: its name for the record, and the context inside which the network runs."""

    name: str
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@contextmanager
def chosen(pipeline: Any, kernel: Kernel) -> Iterator[None]:
    """Inside, the denoising networks run with this kernel and the other components with any of torch's.

    An autoencoder attends with one head of hundreds of channels and a text encoder with a mask, which not every kernel
    takes.
    """
    parts = [] if kernel.context is nullcontext else [*pipeline.components.values()]
    others = [part for part in parts if isinstance(part, nn.Module) and part not in denoisers(pipeline).values()]
    with ExitStack() as stack:
        for part in others:
            for name in ("forward", "encode", "decode"):
                if hasattr(part, name):
                    stack.enter_context(_freed(part, name))
        stack.enter_context(kernel.context())
        yield


@contextmanager
def _freed(part: nn.Module, name: str) -> Iterator[None]:
    """Inside, this method runs with any kernel; an offloading hook may have set it on the very module."""
    before = vars(part).get(name)
    setattr(part, name, _with_any(getattr(part, name)))
    try:
        yield
    finally:
        delattr(part, name) if before is None else setattr(part, name, before)


def _with_any(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def free(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(list(SDPA_KERNELS.values())):
            return function(*args, **kwargs)

    return free


def legal(device: str, dtype: torch.dtype) -> list[str]:
    """Names that `attention.backend` can take: sdpa, its kernels that run here, those that diffusers finds."""
    others = [name for name in _processor_kernels() if not name.startswith("_") and not name.endswith("_hub")]
    kernels = [name for name in SDPA_KERNELS if runs(name, device, dtype)]
    return ["auto", "sdpa", *kernels, *(name for name in others if name not in SDPA_KERNELS and not _refusal(name))]


def apply(pipeline: Any, attention: Attention, device: str, dtype: torch.dtype) -> Kernel:
    """Choose the kernel. Raises UserError with the legal names for one that is unknown, unusable or takes no effect."""
    return own(attention, device, dtype) or _dispatched(pipeline, attention.backend)


def check_name(attention: Attention, device: str, dtype: torch.dtype) -> None:
    """Raises UserError with the legal names for one that nobody has."""
    name = attention.backend
    if name not in ("auto", "sdpa", *SDPA_KERNELS, *_processor_kernels()):
        names = legal(device, dtype)
        raise UserError(f"attention.backend: unknown kernel '{name}'{nearest(name, names)} (legal: {', '.join(names)})")


def own(attention: Attention, device: str, dtype: torch.dtype) -> Kernel | None:
    """The kernel where it is torch's; None for one of diffusers' dispatcher. Raises UserError as `apply` does."""
    name = attention.backend
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
    return None


def _processor_kernels() -> list[str]:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [item.value for item in AttentionBackendName if not item.value.startswith(("native", "_native"))]


def _dispatched(pipeline: Any, name: str) -> Kernel:
    """A kernel of diffusers' own dispatcher, for the processors that go through it; set around the call only."""
    from diffusers.models.attention_dispatch import attention_backend

    networks = denoisers(pipeline).values()
    processors = [getattr(module, "processor", None) for network in networks for module in network.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        kinds = ", ".join(type(network).__name__ for network in networks)
        raise UserError(
            f"attention.backend: '{name}' takes no effect on {kinds}, whose attention processors do not dispatch; "
            f"use sdpa, {', '.join(SDPA_KERNELS)}"
        )
    if reason := _refusal(name):
        raise UserError(f"attention.backend: '{name}' cannot be used here: {reason}")
    return Kernel(name, lambda: attention_backend(name))


def _refusal(name: str) -> str | None:
    """Why diffusers' dispatcher refuses a kernel on this machine; None where it takes it."""
    from diffusers.models.attention_dispatch import attention_backend

    try:
        with attention_backend(name):
            return None
    except (ValueError, RuntimeError, ImportError, AttributeError) as error:
        return first_line(error)
