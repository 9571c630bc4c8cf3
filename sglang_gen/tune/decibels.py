"""The value of `--min-psnr`, an option of `sglang tune` and of `sglang tune cache`."""

import math
import re

from sglang_gen.errors import UserError

LARGEST_PSNR = 100.0  # dB; images of 8 bits that differ by less are identical


def decibels(text: str) -> float:
    """A PSNR such as `34` or `34 dB`. Raises UserError."""
    value = finite(re.sub(r"\s*dB$", "", text, flags=re.IGNORECASE))
    if value is None or not 0 < value <= LARGEST_PSNR:
        raise UserError(f"--min-psnr: '{text}' is not a number of dB between 0 and {LARGEST_PSNR:g}, such as 34")
    return value


def finite(text: str) -> float | None:
    """The finite number that a text states, if it does."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
