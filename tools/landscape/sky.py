"""Paints the sky: gradient, stars, clouds, sun or moon."""

import numpy as np

from tools.landscape.palette import Palette, mix
from tools.landscape.scene import Scene

COLUMN = {"left": (0.14, 0.27), "center": (0.45, 0.55), "right": (0.73, 0.86)}
ROW = {"dawn": (0.30, 0.40), "noon": (0.12, 0.22), "sunset": (0.34, 0.44), "night": (0.12, 0.24)}


def window(size: int, x: float, y: float, rx: float, ry: float) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """Rows and columns of a [size, size] image within (rx, ry) of (x, y), and the offsets dx, dy there in pixels."""
    top, bottom = np.clip([int(y - ry), int(y + ry) + 2], 0, size)
    left, right = np.clip([int(x - rx), int(x + rx) + 2], 0, size)
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - y
    dx = np.arange(left, right, dtype=np.float32)[None, :] + 0.5 - x
    return slice(top, bottom), slice(left, right), dx, dy


def gradient(size: int, horizon: float, palette: Palette) -> np.ndarray:
    """[size, size, 3]: from zenith through middle to horizon colour, constant below the horizon."""
    y = (np.arange(size, dtype=np.float32) + 0.5) / size / horizon
    stops = np.stack([palette.zenith, palette.middle, palette.horizon])  # [3, RGB]
    column = [np.interp(y, [0.0, 0.55, 1.0], channel) for channel in stops.T]
    return np.repeat(np.stack(column, -1).astype(np.float32)[:, None], size, axis=1)


def paint_stars(image: np.ndarray, horizon: float, rng: np.random.Generator) -> None:
    """Paint round white stars, three to five pixels wide at twice the final size."""
    size = len(image)
    image[:] = image * 0.82  # darken the sky so that stars are visible
    for _ in range(rng.integers(80, 110)):
        x, y = rng.uniform(0, size), rng.uniform(0, size * horizon * 0.95)
        radius = size / 256 * rng.choice([1.3, 1.7, 2.4], p=[0.45, 0.4, 0.15])
        rows, columns, dx, dy = window(size, x, y, radius * 1.5, radius * 1.5)
        alpha = np.clip(radius + 0.5 - np.sqrt(dx * dx + dy * dy), 0, 1)[..., None] * rng.uniform(0.8, 1.0)
        image[rows, columns] = mix(image[rows, columns], np.float32(1.0), alpha)


def paint_cloud(
    image: np.ndarray, x: float, y: float, scale: float, palette: Palette, rng: np.random.Generator
) -> None:
    """Paint puffs with a flat bottom, bright above and shaded below."""
    size = len(image)
    alpha = np.zeros((size, size), np.float32)
    count = rng.integers(5, 8)
    for t in np.linspace(-1, 1, count):
        radius = scale * (0.55 - 0.3 * abs(t)) * rng.uniform(0.8, 1.15)
        rows, columns, dx, dy = window(size, x + 1.1 * scale * t, y - 0.4 * radius, radius, radius)
        puff = np.clip((radius - np.sqrt(dx * dx + dy * dy)) / (0.06 * size / 4), 0, 1)
        alpha[rows, columns] = np.maximum(alpha[rows, columns], puff)
    rows, columns, _, dy = window(size, x, y - 0.2 * scale, 1.9 * scale, 0.9 * scale)
    part = alpha[rows, columns] * np.clip((0.28 * scale - dy - 0.2 * scale) / (0.012 * size), 0, 1)
    shade = np.clip(0.5 + 1.1 * dy / scale, 0, 1)[..., None] ** 1.5
    color = mix(palette.cloud, palette.shadow, shade)
    image[rows, columns] = mix(image[rows, columns], color, 0.95 * part[..., None])


def paint_clouds(image: np.ndarray, horizon: float, palette: Palette, rng: np.random.Generator) -> None:
    size = len(image)
    for i in rng.permutation(4):
        x = (i + rng.uniform(0.1, 0.9)) / 4 * size
        y = rng.uniform(0.1, 0.72) * horizon * size
        paint_cloud(image, x, y, size * rng.uniform(0.10, 0.17), palette, rng)


def paint_disc(image: np.ndarray, x: float, y: float, radius: float, palette: Palette, moon: bool) -> None:
    """Paint a disc with a wide Gaussian glow; the moon has three grey seas."""
    size = len(image)
    rows, columns, dx, dy = window(size, x, y, 6 * radius, 6 * radius)
    square = dx * dx + dy * dy
    glow = 0.65 * np.exp(-square / (2 * (2.0 * radius) ** 2))[..., None]
    part = mix(image[rows, columns], palette.glow, glow)
    disc = np.clip(radius + 0.5 - np.sqrt(square), 0, 1)[..., None]
    part = mix(part, palette.disc, disc)
    if moon:
        for ox, oy, r in ((-0.35, -0.2, 0.28), (0.3, 0.15, 0.34), (-0.15, 0.5, 0.2)):
            sea = np.clip(r * radius + 0.5 - np.hypot(dx - ox * radius, dy - oy * radius), 0, 1)[..., None]
            part = mix(part, palette.disc * np.float32(0.86), sea * disc)
    image[rows, columns] = part


def paint_sky(scene: Scene, size: int, horizon: float, palette: Palette, rng: np.random.Generator) -> np.ndarray:
    """[size, size, 3] float32 in [0, 1]; below the horizon it has the horizon's colour."""
    image = gradient(size, horizon, palette)
    if scene.sky == "starry":
        paint_stars(image, horizon, rng)
    if scene.sky == "cloudy":
        paint_clouds(image, horizon, palette, rng)
    x, y = (rng.uniform(*bounds) * size for bounds in (COLUMN[scene.side], ROW[scene.time]))
    if scene.time in ("dawn", "sunset") and scene.terrain in ("mountains", "city"):
        y -= 0.08 * size  # keep it above the peaks
    radius = size * rng.uniform(0.052, 0.064)
    paint_disc(image, x, y, radius, palette, moon=scene.time == "night")
    return image
