"""Which prompts of a request calibrate a schedule, and which measure it."""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_gen.errors import UserError
from sglang_gen.types import Sample

DEFAULT_CALIBRATION = 8  # prompts; at most half of those that are given


@dataclass(frozen=True)
class PromptSplit:
    """Samples for calibration and for measuring, which have no prompt in common."""

    calibrated: tuple[Sample, ...]
    measured: tuple[Sample, ...]


def split_samples(samples: Sequence[Sample], count: int | None) -> PromptSplit:
    """Samples of `count` prompts, evenly spaced, are for calibration, those of all other prompts for measuring.

    Raises UserError if no prompt is left for one of both.
    """
    texts = list(dict.fromkeys(sample.prompt for sample in samples))
    if len(texts) < 2:
        raise UserError(
            "sglang tune cache measures on other prompts than it calibrates on, and needs at least two: give "
            "sampling.prompts_file or quality.manifest"
        )
    if count is not None and count >= len(texts):
        raise UserError(
            f"--calibration-prompts is {count}, and the request has {len(texts)} prompts, of which at least one is "
            f"measured; give at most {len(texts) - 1}"
        )
    count = count or min(DEFAULT_CALIBRATION, len(texts) // 2)
    chosen = {texts[place * len(texts) // count] for place in range(count)}
    return PromptSplit(
        tuple(sample for sample in samples if sample.prompt in chosen),
        tuple(sample for sample in samples if sample.prompt not in chosen),
    )


def indices(samples: Sequence[Sample]) -> str:
    return ", ".join(str(sample.index) for sample in samples)
