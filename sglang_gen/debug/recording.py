"""Records a generation of diffusers' pipeline: calls of the network, steps of the scheduler, latents to decode."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from torch import Tensor, nn

from sglang_gen.debug.watching import copied, replaced
from sglang_gen.families.examples_contract import EncodedNames
from sglang_gen.types import Decoded


@dataclass(frozen=True)
class Call:
    """One call of the denoising network: its arguments by name, in order, and how those of the text are called."""

    arguments: Mapping[str, Any]
    encoded: EncodedNames

    @property
    def latents(self) -> Tensor:
        tensor: Tensor = next(iter(self.arguments.values()))
        return tensor

    @property
    def texts(self) -> tuple[Tensor, ...]:
        """The tensors of the encoded text."""
        given = {**self.arguments, **(self.arguments.get("added_cond_kwargs") or {})}
        tensors = [next((given[key] for key in keys if given.get(key) is not None), None) for _, keys in self.encoded]
        return tuple(tensor for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class Step:
    """One step of the scheduler: its inputs (guided prediction and latents), and the next latents."""

    prediction: Tensor
    before: Tensor
    after: Tensor


@dataclass
class Recording:
    """A recorded generation; `decoded` and `schedule` are set after it has ended."""

    encoded_names: EncodedNames
    calls: list[Call] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    schedule: dict[str, Tensor] = field(default_factory=dict)
    scaled: Tensor | None = None  # the scaled latents that the autoencoder decoded
    decoded: Decoded | None = None

    def evaluations(self) -> list[list[Call]]:
        """The calls of each step of the scheduler: one, or one for the prompt and one for the negative prompt."""
        per_step = len(self.calls) // len(self.steps)
        assert per_step * len(self.steps) == len(self.calls), "the pipeline called its network irregularly"
        return [self.calls[start : start + per_step] for start in range(0, len(self.calls), per_step)]

    def encoded(self) -> list[tuple[Tensor, ...]]:
        """The text in our order: negative prompts first. Pipelines with two calls per step begin with the prompt."""
        return [call.texts for call in reversed(self.evaluations()[0])]


def schedule(scheduler: Any) -> dict[str, Tensor]:
    """The timesteps and sigmas of a scheduler, by attribute name."""
    values = {name: getattr(scheduler, name, None) for name in ("timesteps", "sigmas")}
    return {name: times.detach().clone() for name, times in values.items() if isinstance(times, Tensor)}


@contextmanager
def recorded(network: nn.Module, scheduler: Any, vae: Any, encoded: EncodedNames) -> Iterator[Recording]:
    """Within this context record the calls of the network, the scheduler and the autoencoder.

    `encoded` are the names of the network's arguments for the encoded text.
    """
    recording = Recording(encoded)
    signature = inspect.signature(network.forward)

    def note_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.calls.append(Call(copied(dict(signature.bind(*args, **kwargs).arguments)), encoded))

    step = scheduler.step

    @wraps(step)  # pipelines inspect its signature
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
