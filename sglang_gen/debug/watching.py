"""Looking into networks and objects while they run, and changing what they hand on."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sglang_gen.debug.tensor_match import tensors

Seen = dict[str, list[list[Tensor]]]  # a module's name -> for each of its calls the tensors, on the host
Change = Callable[[str, Any], Any]  # (a module's name, its output) -> the output in its place


def copied(value: Any) -> Any:
    """The same value with tensors of its own, which what follows cannot overwrite."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return type(value)(copied(item) for item in value)
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    return value


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """`target.name` is `value` inside; what it was, or that it came from the class, is restored."""
    own, before = name in vars(target), getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        if own:
            setattr(target, name, before)
        else:
            delattr(target, name)


@contextmanager
def outputs(network: nn.Module, names: Iterable[str]) -> Iterator[Seen]:
    """What the modules give out inside."""
    seen: Seen = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: seen.setdefault(name, []).append(_on_host(tensors(output)))

    with _hooked([network.get_submodule(name).register_forward_hook(note(name)) for name in names]):
        yield seen


@contextmanager
def inputs(network: nn.Module, names: Iterable[str]) -> Iterator[Seen]:
    """The first two tensors that the modules are given inside, by position or else by name."""
    seen: Seen = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: seen.setdefault(name, []).append(_on_host(tensors([args, kwargs])[:2]))

    modules = [(name, network.get_submodule(name)) for name in names]
    with _hooked([module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in modules]):
        yield seen


@contextmanager
def changed(network: nn.Module, names: Iterable[str], change: Change) -> Iterator[None]:
    """The modules give out what `change(name, output)` makes of their output; a module comes after those it calls."""

    def hook(name: str) -> Callable[..., Any]:
        return lambda _module, _args, output: change(name, output)

    with _hooked([network.get_submodule(name).register_forward_hook(hook(name)) for name in names]):
        yield


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_host(found: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().to("cpu", copy=True) for tensor in found]
