"""One generation of diffusers' pipeline, and all that the comparison needs of it."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from torch import Tensor, nn

from sglang_gen.debug.watching import copied, replaced
from sglang_gen.types import Decoded

# What the networks of diffusers call the text that our glue's `encode` gives, in its order.
TEXT_STAGES = (("text", ("encoder_hidden_states",)), ("pooled text", ("pooled_projections", "text_embeds")))


@dataclass(frozen=True)
class Call:
    """One call of the denoising network: its arguments by name, in order."""

    arguments: Mapping[str, Any]

    @property
    def latents(self) -> Tensor:
        tensor: Tensor = next(iter(self.arguments.values()))
        return tensor

    @property
    def texts(self) -> tuple[Tensor, ...]:
        """The encoded text, as many parts as there are."""
        given = {**self.arguments, **(self.arguments.get("added_cond_kwargs") or {})}
        found = [next((given[key] for key in keys if given.get(key) is not None), None) for _, keys in TEXT_STAGES]
        return tuple(part for part in found if part is not None)


@dataclass(frozen=True)
class Step:
    """One call of the scheduler: the guided prediction and the latents that it was given, and the next latents."""

    prediction: Tensor
    before: Tensor
    after: Tensor


@dataclass
class Recording:
    """`decoded` and the schedule are there once the generation is over."""

    calls: list[Call] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    schedule: dict[str, Tensor] = field(default_factory=dict)
    scaled: Tensor | None = None  # what the autoencoder was given to decode
    decoded: Decoded | None = None

    def evaluations(self) -> list[list[Call]]:
        """The calls of each step of the scheduler: one, or one for the prompt and one for the negative prompt."""
        each = len(self.calls) // len(self.steps)
        assert each * len(self.steps) == len(self.calls), "the pipeline called its network irregularly"
        return [self.calls[start : start + each] for start in range(0, len(self.calls), each)]

    def encoded(self) -> list[tuple[Tensor, ...]]:
        """The text as our glue takes it: without the prompt first. Pipelines that call twice begin with the prompt."""
        return [call.texts for call in reversed(self.evaluations()[0])]


def schedule(scheduler: Any) -> dict[str, Tensor]:
    """The times that a scheduler has been set to, under the names that it gives them."""
    found = {name: getattr(scheduler, name, None) for name in ("timesteps", "sigmas")}
    return {name: times.detach().clone() for name, times in found.items() if isinstance(times, Tensor)}


@contextmanager
def recorded(network: nn.Module, scheduler: Any, vae: Any) -> Iterator[Recording]:
    """What the network, the scheduler and the autoencoder are given and give inside."""
    recording = Recording()
    signature = inspect.signature(network.forward)

    def note_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.calls.append(Call(copied(dict(signature.bind(*args, **kwargs).arguments))))

    step = scheduler.step

    @wraps(step)  # pipelines look at its signature
    def noted_step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        prediction, before = copied(model_output), copied(sample)
        result = step(model_output, timestep, sample, *args, **kwargs)
        recording.steps.append(Step(prediction, before, copied(result[0])))
        return result

    decode = vae.decode

    @wraps(decode)
    def noted_decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        recording.scaled = copied(z)
        return decode(z, *args, **kwargs)

    with ExitStack() as stack:
        stack.callback(network.register_forward_pre_hook(note_call, with_kwargs=True).remove)
        stack.enter_context(replaced(scheduler, "step", noted_step))
        stack.enter_context(replaced(vae, "decode", noted_decode))
        yield recording
    recording.schedule = schedule(scheduler)
