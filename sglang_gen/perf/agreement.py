"""How far a run's images agree with their references: the verdict of the run, and each measure over all images."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

IDENTICAL = "identical"
ROUNDED = "equal within rounding"
APPROXIMATE = "approximate"
# The bound of `ROUNDED`, which every image must keep. docs/comparing.md has the measurements behind it.
LARGEST_ERROR = 1  # levels of 255
MOST_CHANGED = 0.01  # fraction of the values that differ

HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "max_error": False}


def verdict(entries: Sequence[Mapping[str, Any]]) -> str:
    """The verdict of a run from the comparisons of its images, which have `identical`, `max_error` and `changed`."""
    if all(entry["identical"] for entry in entries):
        return IDENTICAL
    small = all(entry["max_error"] <= LARGEST_ERROR and entry["changed"] <= MOST_CHANGED for entry in entries)
    return ROUNDED if small else APPROXIMATE


def summaries(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`summary` of PSNR, SSIM and the largest error; of PSNR over the images that are not identical."""
    return {
        name: summary({place: entry[name] for place, entry in enumerate(entries)}, entries, higher)
        for name, higher in HIGHER_IS_BETTER.items()
    }


def summary(
    values: Mapping[int, float | None], entries: Sequence[Mapping[str, Any]], higher_is_better: bool
) -> dict[str, Any]:
    """`{images, mean, standard_error, worst}` of a measure.

    `values` are those of the entries by their place, None where the measure is infinite; `images` counts the others.
    `worst` names the image with the worst value by its index and prompt.
    """
    finite = {place: value for place, value in values.items() if value is not None}
    if not finite:
        return {"images": 0, "mean": None, "standard_error": None, "worst": None}
    place = (min if higher_is_better else max)(finite, key=lambda place: finite[place])
    return {
        "images": len(finite),
        **mean_with_error(list(finite.values())),
        "worst": {**{key: entries[place][key] for key in ("index", "prompt", "seed")}, "value": finite[place]},
    }


def compared_summary(
    values: Sequence[float],
    references: Sequence[float] | None,
    entries: Sequence[Mapping[str, Any]],
    higher_is_better: bool,
) -> dict[str, Any]:
    """`summary` of a measure that the images have alone; `references` are its values for the reference images.

    With them the summary also has `{reference_mean, difference, difference_error}`, and the worst image is the one with
    the worst difference.
    """
    own = summary(dict(enumerate(values)), entries, higher_is_better)
    if references is None or not values:
        return own
    differences = [value - other for value, other in zip(values, references, strict=True)]
    worst = summary(dict(enumerate(differences)), entries, higher_is_better)["worst"]
    paired = paired_difference(values, references)
    return own | {
        "worst": worst | {"value": values[differences.index(worst["value"])], "difference": worst["value"]},
        "reference_mean": mean_with_error(references)["mean"],
        "difference": paired["mean"],
        "difference_error": paired["standard_error"],
    }


def mean_with_error(values: Sequence[float]) -> dict[str, float | None]:
    """`{mean, standard_error}`: s / sqrt(n) with the sample standard deviation s, None for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 6), "standard_error": None if error is None else round(error, 6)}


def paired_difference(values: Sequence[float], references: Sequence[float]) -> dict[str, float | None]:
    """`{mean, standard_error}` of the differences between the values of the same samples in two runs."""
    return mean_with_error([value - other for value, other in zip(values, references, strict=True)])
