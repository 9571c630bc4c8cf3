"""Paints water: a lake that mirrors the image above it, or a river that winds towards the viewer."""

import numpy as np

from tools.landscape.palette import Palette, mix


def paint_lake(image: np.ndarray, shore: float, palette: Palette, rng: np.random.Generator) -> None:
    """Fill the image below the shore with its mirror image: rippled, tinted and darkened."""
    size = len(image)
    row = int(shore * size)
    below = np.arange(size - row)
    squeeze = 1.45  # vertical compression of the mirror image, so that the sky and the sun fit in
    source = np.clip(row - 1 - (squeeze * below), 0, size - 1).astype(np.int32)
    ripple = np.sin(below * 256 / size * 0.8 + rng.uniform(0, 6)) * (0.6 + 0.022 * below * 256 / size) * size / 256
    columns = np.clip(np.arange(size)[None] + np.round(ripple)[:, None].astype(np.int32), 0, size - 1)
    mirrored = image[source[:, None], columns]
    tint = mix(palette.middle * np.float32(0.8), palette.zenith, 0.5)
    streak = 1 + 0.05 * np.sin(below * 256 / size * 0.55 + rng.uniform(0, 6))[:, None, None]
    image[row:] = np.clip(mix(mirrored * np.float32(0.86), tint, 0.28) * streak, 0, 1)
    edge = max(1, size // 128)
    image[row : row + edge] = mix(palette.horizon, palette.light, 0.3)


def paint_river(image: np.ndarray, top: float, palette: Palette, rng: np.random.Generator) -> None:
    """Paint a band in the sky's colour that widens and winds down to the lower edge, with dark banks."""
    size = len(image)
    y = np.arange(size, dtype=np.float32)[:, None] + 0.5
    t = np.clip((y / size - top) / (1 - top), 0, 1)
    phase, sway = rng.uniform(0, 2 * np.pi), rng.uniform(0.10, 0.16)
    center = 0.5 + rng.uniform(-0.15, 0.15) + sway * np.sin(phase + 4.2 * t) * (0.35 + 0.65 * t)
    half = 0.018 + 0.15 * t**1.4
    distance = np.abs((np.arange(size, dtype=np.float32)[None] + 0.5) / size - center)
    color = mix(palette.horizon, palette.zenith, (0.15 + 0.45 * t)[..., None])
    seen = y / size > top
    bank = np.clip((half + 0.014 - distance) * size, 0, 1) * seen
    band = np.clip((half - distance) * size, 0, 1) * seen
    image[:] = mix(image, image * np.float32(0.62), bank[..., None])
    image[:] = mix(image, color, band[..., None])
