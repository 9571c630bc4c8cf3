"""Generations of the native engine beside a recorded one of diffusers: as it is, and led along the other's latents."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sglang_gen.debug.recording import Recording, Step, schedule
from sglang_gen.debug.watching import copied, replaced
from sglang_gen.errors import RunError
from sglang_gen.families.contract import Request
from sglang_gen.types import Decoded

Generate = Callable[[], Decoded]


@dataclass
class Free:
    """A generation as the engine makes it; `failure` says why it has no end, such as numbers that are not finite."""

    request: Request
    encoded: list[tuple[Tensor, ...]]
    noise: Tensor
    schedule: dict[str, Tensor]
    decoded: Decoded | None = None
    failure: str = ""


@dataclass
class Led:
    """A generation that stands on diffusers' latents before every step: what it makes of each, and of the last."""

    steps: list[Step] = field(default_factory=list)
    decoded: Decoded | None = None


def run_free(engine: Any, generate: Generate) -> Free:
    """Raises RunError where it fails before the first step, when there is nothing to compare."""
    encoded: list[list[tuple[Tensor, ...]]] = []
    begun: list[Free] = []
    encode, start = engine._encode, engine._noise

    def noted_encode(*args: Any) -> list[tuple[Tensor, ...]]:
        found: list[tuple[Tensor, ...]] = encode(*args)
        encoded.append(copied(found))
        return found

    def noted_start(request: Request, *args: Any) -> Tensor:
        noise: Tensor = start(request, *args)
        begun.append(Free(request, encoded[-1], copied(noise), schedule(engine.parts["scheduler"])))
        return noise

    with replaced(engine, "_encode", noted_encode), replaced(engine, "_noise", noted_start):
        try:
            decoded = generate()
        except RunError as error:
            if not begun:
                raise
            begun[0].failure = str(error)
            return begun[0]
    begun[0].decoded = decoded
    return begun[0]


def run_led(engine: Any, generate: Generate, recording: Recording) -> Led:
    """Everything of the engine between one picture of the latents and the next, without what has added up before.

    The text, the timesteps and the latents before each step are those of the recording; network, guidance, scheduler
    and decoding are the engine's. Its generators are drawn from as ever, so that a scheduler that draws noise draws
    the same.
    """
    led, glue, scheduler = Led(), engine.glue, engine.parts["scheduler"]
    assert recording.decoded is not None
    noise, begin, step = recording.decoded.noise, engine._noise, scheduler.step

    def prepare(network: Any, timesteps: Tensor, *args: Any) -> Any:
        return glue.prepare(network, recording.schedule["timesteps"][-len(timesteps) :], *args)

    def start(*args: Any) -> Tensor:
        drawn: Tensor = begin(*args)
        return drawn if noise is None else noise.to(drawn)

    @wraps(step)
    def led_step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        prediction = copied(model_output)
        result = step(model_output, timestep, sample, *args, **kwargs)
        led.steps.append(Step(prediction, copied(sample), copied(result[0])))
        return (recording.steps[len(led.steps) - 1].after.clone(),)

    with ExitStack() as stack:
        for owner, name, other in (
            (engine, "glue", SimpleNamespace(**{**vars(glue), "prepare": prepare})),
            (engine, "_encode", lambda *_: recording.encoded()),
            (engine, "_noise", start),
            (scheduler, "step", led_step),
        ):
            stack.enter_context(replaced(owner, name, other))
        led.decoded = generate()
    return led


@torch.no_grad()
def predict_once(engine: Any, request: Request, timestep: Tensor, texts: tuple[Tensor, ...], latents: Tensor) -> None:
    """One evaluation of the network of ours at one timestep, for those who watch its modules."""
    predict = engine.glue.prepare(engine.network, timestep[None], request, [texts])
    predict(latents, 0)
