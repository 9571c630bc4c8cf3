"""The rows of each stage but the networks', from what both backends made."""

import numpy as np
import torch
from torch import Tensor

from sglang_gen.debug.native_runs import Free
from sglang_gen.debug.recording import TEXT_STAGES, Recording, Step
from sglang_gen.debug.tensor_match import relative_error
from sglang_gen.debug.verdict import Row, Tolerance, Verdict, judge
from sglang_gen.types import Decoded


def texts(free: Free, recording: Recording, tolerance: Tolerance) -> list[Row]:
    """The encoded text as each network is given it, the negative prompt's rows included."""
    ours, theirs = _parts(free.encoded), _parts(recording.encoded())
    names = [(name, keys) for name, keys in TEXT_STAGES][: max(len(ours), len(theirs))]
    rows = []
    for index, (name, keys) in enumerate(names):
        mine, its = (parts[index] if index < len(parts) else None for parts in (ours, theirs))
        rows.append(_row("text encoding", name, " or ".join(keys), mine, its, tolerance.module))
    return rows


def _parts(encoded: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Each part of the text `[rows, ...]`, of all prompts below each other."""
    return [torch.cat(part) for part in zip(*encoded, strict=True)]


def starts(free: Free, recording: Recording, tolerance: Tolerance) -> list[Row]:
    """The times of the steps, and the latents before the first."""
    ours, theirs = free.schedule, recording.schedule
    names = [name for name in theirs if name in ours]
    rows = [_row("schedule", name, name, ours[name], theirs[name], tolerance.module) for name in names]
    assert recording.decoded is not None
    return [*rows, _row("latents", "initial latents", "latents", free.noise, recording.decoded.noise, tolerance.module)]


def step(ours: Step, theirs: Step, number: int, tolerance: Tolerance) -> list[Row]:
    """The network as it is and guidance, then the scheduler, from the same latents."""
    return [
        _row(
            "prediction", "guided prediction", "noise_pred", ours.prediction, theirs.prediction, tolerance.whole, number
        ),
        _row("scheduler", "next latents", "latents", ours.after, theirs.after, tolerance.whole, number),
    ]


def decoding(led: Decoded, recording: Recording, tolerance: Tolerance) -> Row:
    """Pictures of the same latents."""
    assert recording.decoded is not None
    return _picture("decoding", "picture of the same latents", led, recording.decoded, tolerance.whole)


def ends(free: Free, recording: Recording, tolerance: Tolerance) -> list[Row]:
    """What both made from end to end, each from its own numbers."""
    theirs = recording.decoded
    assert theirs is not None
    if free.decoded is None:
        return [Row("end to end", "final latents", "latents", None, Verdict.different, note=free.failure)]
    latents = _row("end to end", "final latents", "latents", free.decoded.latents, theirs.latents, tolerance.whole)
    return [latents, _picture("end to end", "picture", free.decoded, theirs, tolerance.whole)]


def _picture(stage: str, name: str, ours: Decoded, theirs: Decoded, tolerance: float) -> Row:
    """Of 8 bits: a number that is rounded to the other side is no difference, however dark the picture is."""
    a, b = (torch.from_numpy(np.asarray(each.frames)) for each in (ours, theirs))
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
    """True where one backend can be led along the other's steps: as many of them, in latents of one shape."""
    assert recording.decoded is not None
    pairs = ((free.schedule["timesteps"], recording.schedule["timesteps"]), (free.noise, recording.decoded.noise))
    return all(theirs is not None and ours.shape == theirs.shape for ours, theirs in pairs)
