"""The report's rows for all stages except the networks, from the results of both backends."""

import numpy as np
import torch
from torch import Tensor

from sglang_gen.debug.native_runs import Free
from sglang_gen.debug.recording import Recording, Step
from sglang_gen.debug.tensor_match import relative_error
from sglang_gen.debug.verdict import Row, Tolerance, Verdict, judge
from sglang_gen.types import Decoded


def texts(free: Free, recording: Recording, tolerance: Tolerance) -> list[Row]:
    """The encoded text as passed to each network, including the rows of the negative prompt."""
    ours, theirs = _text_tensors(free.encoded), _text_tensors(recording.encoded())
    names = recording.encoded_names[: max(len(ours), len(theirs))]
    rows = []
    for index, (name, keys) in enumerate(names):
        our, their = (tensors[index] if index < len(tensors) else None for tensors in (ours, theirs))
        rows.append(_row("text encoding", name, " or ".join(keys), our, their, tolerance.module))
    return rows


def _text_tensors(encoded: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Each tensor of the encoded text, `[rows, ...]`, with the rows of all prompts concatenated."""
    return [torch.cat(tensors) for tensors in zip(*encoded, strict=True)]


def starts(free: Free, recording: Recording, tolerance: Tolerance) -> list[Row]:
    """The schedule (timesteps and sigmas), and the initial latents."""
    ours, theirs = free.schedule, recording.schedule
    names = [name for name in theirs if name in ours]
    rows = [_row("schedule", name, name, ours[name], theirs[name], tolerance.module) for name in names]
    assert recording.decoded is not None
    return [*rows, _row("latents", "initial latents", "latents", free.noise, recording.decoded.noise, tolerance.module)]


def step(ours: Step, theirs: Step, number: int, tolerance: Tolerance) -> list[Row]:
    """The guided prediction of the whole network and the scheduler's step, from the same latents."""
    return [
        _row(
            "prediction", "guided prediction", "noise_pred", ours.prediction, theirs.prediction, tolerance.whole, number
        ),
        _row("scheduler", "next latents", "latents", ours.after, theirs.after, tolerance.whole, number),
    ]


def decoding(led: Decoded, recording: Recording, tolerance: Tolerance) -> Row:
    """Images decoded from the same latents."""
    assert recording.decoded is not None
    return _image("decoding", "image of the same latents", led, recording.decoded, tolerance.whole)


def ends(free: Free, recording: Recording, tolerance: Tolerance) -> list[Row]:
    """Final latents and images of both backends from end to end, without sharing intermediate values."""
    theirs = recording.decoded
    assert theirs is not None
    if free.decoded is None:
        return [Row("end to end", "final latents", "latents", None, Verdict.different, note=free.failure)]
    latents = _row("end to end", "final latents", "latents", free.decoded.latents, theirs.latents, tolerance.whole)
    return [latents, _image("end to end", "image", free.decoded, theirs, tolerance.whole)]


def _image(stage: str, name: str, ours: Decoded, theirs: Decoded, tolerance: float) -> Row:
    """Images of 8 bits: one level of difference is rounding, however dark the image is."""
    a, b = (torch.from_numpy(np.asarray(decoded.frames)) for decoded in (ours, theirs))
    level = 1 / max(int(b.max()), 1)
    return _row(stage, name, "images", a, b, max(tolerance, level))


def _row(
    stage: str, ours: str, theirs: str, a: Tensor | None, b: Tensor | None, tolerance: float, number: int | None = None
) -> Row:
    if a is None or b is None:
        return Row(stage, ours, theirs, None, Verdict.different, number, "only one backend has it")
    if a.shape != b.shape:
        note = f"the shapes are {list(a.shape)} and {list(b.shape)}"
        return Row(stage, ours, theirs, None, Verdict.different, number, note)
    error = relative_error(a, b)
    return Row(stage, ours, theirs, error, judge(error, tolerance), number)


def fits(free: Free, recording: Recording) -> bool:
    """Whether our engine can run on diffusers' latents: both have the same number of steps and shape of latents."""
    assert recording.decoded is not None
    pairs = ((free.schedule["timesteps"], recording.schedule["timesteps"]), (free.noise, recording.decoded.noise))
    return all(theirs is not None and ours.shape == theirs.shape for ours, theirs in pairs)
