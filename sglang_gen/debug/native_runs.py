"""Generations of the native engine to compare with a recorded one of diffusers: free, and led by diffusers' latents."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from sglang_gen.debug.recording import Recording, Step, schedule
from sglang_gen.debug.watching import copied, replaced
from sglang_gen.errors import RunError
from sglang_gen.families.contract import Request
from sglang_gen.families.prediction import NetworkSchedule
from sglang_gen.types import Decoded

Generate = Callable[[], Decoded]


@dataclass
class Free:
    """An unchanged generation of the engine; `failure` says why it did not finish, such as a latent that is NaN."""

    request: Request
    encoded: list[tuple[Tensor, ...]]
    noise: Tensor
    schedule: dict[str, Tensor]
    decoded: Decoded | None = None
    failure: str = ""


@dataclass
class Led:
    """A generation that starts every step, and decoding, from diffusers' latents."""

    steps: list[Step] = field(default_factory=list)
    decoded: Decoded | None = None


def run_free(engine: Any, generate: Generate) -> Free:
    """Record a generation of the engine. Raises RunError if it fails before the first step."""
    encoded: list[list[tuple[Tensor, ...]]] = []
    begun: list[Free] = []
    encode, start = engine._encode, engine._noise

    def noted_encode(*args: Any) -> list[tuple[Tensor, ...]]:
        texts: list[tuple[Tensor, ...]] = encode(*args)
        encoded.append(copied(texts))
        return texts

    def noted_start(request: Request, *args: Any) -> Tensor:
        noise: Tensor = start(request, *args)
        begun.append(Free(request, encoded[-1], copied(noise), schedule(engine.components["scheduler"])))
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
    """Run the engine with diffusers' text, timesteps and latents before each step, so that errors do not accumulate.

    Network, guidance, scheduler and decoding are the engine's. Its generators are used as in a normal run, so that a
    scheduler that draws noise draws the same noise.
    """
    led, scheduler, prepare_timesteps = Led(), engine.components["scheduler"], engine.pipeline.prepare
    assert recording.decoded is not None
    noise, begin, step = recording.decoded.noise, engine._noise, scheduler.step

    def prepare(networks: NetworkSchedule, timesteps: Tensor, *args: Any) -> Any:
        return prepare_timesteps(networks, recording.schedule["timesteps"][-len(timesteps) :], *args)

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
            (engine.pipeline, "prepare", prepare),
            (engine, "_encode", lambda *_: recording.encoded()),
            (engine, "_noise", start),
            (scheduler, "step", led_step),
        ):
            stack.enter_context(replaced(owner, name, other))
        led.decoded = generate()
    return led


@torch.no_grad()
def predict_once(engine: Any, request: Request, timestep: Tensor, texts: tuple[Tensor, ...], latents: Tensor) -> None:
    """Evaluate our network once at one timestep, so that hooks can observe its modules."""
    predict = engine.pipeline.prepare(NetworkSchedule.of_one(engine.network, 1), timestep[None], request, [texts])
    predict(latents, 0)
