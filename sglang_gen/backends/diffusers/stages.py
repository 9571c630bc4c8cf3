"""Observes a running diffusers pipeline from outside: stages, steps, first and last latents."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from sglang_gen import log, signals
from sglang_gen.perf.clock import Clock


class Latents:
    """The first and the last latents of one call, and a replacement for the first."""

    def __init__(self, noise: torch.Tensor | None, batch: int) -> None:
        self.replacement = None if noise is None else noise.expand(batch, *noise.shape[1:])
        self.noise: torch.Tensor | None = None
        self.last: torch.Tensor | None = None

    def start(self, prepared: Any) -> Any:
        """Record the result of `prepare_latents`, or replace it by the loaded noise."""
        latents = prepared[0] if isinstance(prepared, tuple) else prepared
        if self.replacement is not None:
            if self.replacement.shape != latents.shape:
                raise ValueError(
                    f"sampling.latents holds noise of shape {list(self.replacement.shape)}, "
                    f"this request starts from {list(latents.shape)}"
                )
            latents = self.replacement.to(latents)
        self.noise = latents
        return (latents, *prepared[1:]) if isinstance(prepared, tuple) else latents

    def after_step(self, _pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Callback of the pipeline at the end of a step."""
        self.last = tensors.get("latents")
        return {}


def plain_config(component: Any) -> dict[str, Any]:
    """The JSON-serializable entries of a component's config, with infinities as strings."""
    keep = (bool, int, float, str, type(None), list)
    plain = {
        key: value for key, value in component.config.items() if not key.startswith("_") and isinstance(value, keep)
    }
    return {key: str(value) if value in (math.inf, -math.inf) else value for key, value in plain.items()}


@contextmanager
def observed(pipeline: Any, clock: Clock, latents: Latents, note_decode: Callable[..., None]) -> Iterator[None]:
    """Within this context report the pipeline's stages and steps to `clock`, and its latents to `latents`.

    `note_decode(args, kwargs)` is called with the arguments of the autoencoder's `decode`, if it has one.
    """
    functions = {"progress_bar": _progress_bar(clock)}
    if hasattr(pipeline, "encode_prompt"):
        functions["encode_prompt"] = _timed_encoding(pipeline.encode_prompt, clock)
    if hasattr(pipeline, "prepare_latents"):
        prepare = pipeline.prepare_latents
        functions["prepare_latents"] = lambda *args, **kwargs: latents.start(prepare(*args, **kwargs))
    vae: Any = getattr(pipeline, "vae", None)
    noted = {"decode": _noted(vae.decode, note_decode)} if hasattr(vae, "decode") else {}
    with _replaced(pipeline, functions), _replaced(vae, noted):
        yield


@contextmanager
def _replaced(owner: Any, functions: Mapping[str, Any]) -> Iterator[None]:
    """Within this context these attributes of `owner` are the given functions."""
    own = {name: vars(owner)[name] for name in functions if name in vars(owner)}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name in functions:
            if name in own:
                setattr(owner, name, own[name])
            else:
                delattr(owner, name)


def _noted(decode: Any, note: Callable[..., None]) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        note(args, kwargs)
        return decode(*args, **kwargs)

    return noted


def _timed_encoding(encode: Any, clock: Clock) -> Any:
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        clock.enter("text_encoding")
        encoded = encode(*args, **kwargs)
        clock.enter("latents")
        return encoded

    return encode_prompt


def _progress_bar(clock: Clock) -> Any:
    """Replacement for `DiffusionPipeline.progress_bar`: denoising lasts from its creation to its end."""

    def progress_bar(iterable: Any = None, total: int | None = None) -> _Bar:
        return _Bar(clock, iterable, total if total is not None else len(iterable))

    return progress_bar


class _Bar:
    def __init__(self, clock: Clock, iterable: Any, total: int) -> None:
        self.clock, self.iterable, self.progress = clock, iterable, log.Progress(total)

    def __enter__(self) -> "_Bar":
        self.clock.enter("denoising")
        self.progress.__enter__()
        return self

    def update(self, count: int = 1) -> None:
        for _ in range(count):
            self.clock.step()
            self.progress.step()
            signals.check()

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)
        self.clock.enter("decoding")

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable:
                yield item
                self.update()
