"""Records and replaces inputs and outputs of modules, and attributes of objects, while a network runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sglang_gen.debug.tensor_match import tensors

Seen = dict[str, list[list[Tensor]]]  # module name -> tensors of each of its calls, on the CPU
Change = Callable[[str, Any], Any]  # (module name, output) -> replacement for the output


def copied(value: Any) -> Any:
    """A copy of the value with cloned tensors, which later computations cannot overwrite."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return type(value)(copied(item) for item in value)
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    return value


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Within this context `target.name` is `value`; afterwards the attribute is restored, or deleted if it was new."""
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
    """Record the outputs of the modules within this context."""
    seen: Seen = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: seen.setdefault(name, []).append(_on_host(tensors(output)))

    with _hooked([network.get_submodule(name).register_forward_hook(note(name)) for name in names]):
        yield seen


@contextmanager
def inputs(network: nn.Module, names: Iterable[str]) -> Iterator[Seen]:
    """Record the first two input tensors of the modules within this context, positional arguments first."""
    seen: Seen = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: seen.setdefault(name, []).append(_on_host(tensors([args, kwargs])[:2]))

    modules = [(name, network.get_submodule(name)) for name in names]
    with _hooked([module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in modules]):
        yield seen


@contextmanager
def changed(network: nn.Module, names: Iterable[str], change: Change) -> Iterator[None]:
    """Within this context `change(name, output)` replaces each module's output, inner modules first."""

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


def _on_host(values: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().to("cpu", copy=True) for tensor in values]
