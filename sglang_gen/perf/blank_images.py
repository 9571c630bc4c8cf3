"""Images without content: black or of one colour, as a failed decoder makes them. Some measures rate them well."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LEAST_SPREAD = 1.0  # standard deviation of a channel in levels of 255; an image with less in all channels is constant
DARKEST = 2.0  # mean level up to which a constant image is called black


def fault(frame: "np.ndarray[Any, Any]") -> str | None:
    """A clause that says why an image [H, W, 3] has no content; None if it has."""
    import numpy as np

    pixels = frame.reshape(-1, frame.shape[-1]).astype(np.float64)
    spread = float(pixels.std(axis=0).max())
    if spread >= LEAST_SPREAD:
        return None
    name = "a black image" if pixels.mean() <= DARKEST else "a constant image"
    return (
        f"{name}: the standard deviation of its channels is at most {spread:.2g} of 255 levels, and an image with "
        f"content has {LEAST_SPREAD:g} or more"
    )
