"""Renders an image of a scene: sky, ridges, ground, water, fog. It is drawn at twice the size and averaged."""

import numpy as np

from tools.landscape.land import DEPTH, paint_meadow, paint_ridge
from tools.landscape.palette import PALETTES, Palette, mix, rgb
from tools.landscape.scene import Scene
from tools.landscape.sky import paint_sky
from tools.landscape.water import paint_lake, paint_river

SUPERSAMPLE = 2


def paint_veil(image: np.ndarray, row: float, reach: float, strength: float, palette: Palette) -> None:
    """Paint a horizontal bank of fog, thickest at `row`; `row` and `reach` are fractions of the image height."""
    size = len(image)
    y = (np.arange(size, dtype=np.float32) + 0.5) / size
    alpha = strength * np.exp(-(((y - row) / reach) ** 2))[:, None, None]
    fog = mix(palette.haze, rgb(236, 238, 242) * np.sqrt(palette.light), 0.55)
    image[:] = mix(image, fog, alpha)


def render(scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
    """Render [size, size, 3] uint8. The same generator state gives the same image."""
    large, palette = SUPERSAMPLE * size, PALETTES[scene.time]
    horizon = rng.uniform(0.54, 0.60)
    shore = horizon + rng.uniform(0.15, 0.19)
    image = paint_sky(scene, large, horizon, palette, rng)
    for layer in range(len(DEPTH)):
        paint_ridge(image, scene, layer, horizon, palette, rng)
        if scene.sky == "foggy":
            paint_veil(image, horizon + DEPTH[layer] + 0.02, 0.085, 0.9, palette)
    if scene.water == "lake":
        paint_lake(image, shore, palette, rng)
    else:
        paint_meadow(image, scene, shore, palette, rng)
    if scene.water == "river":
        paint_river(image, shore + 0.005, palette, rng)
    if scene.sky == "foggy":
        paint_veil(image, shore, 0.05, 0.75, palette)
        paint_veil(image, 0.5, 0.5, 0.22, palette)
    small = image.reshape(size, SUPERSAMPLE, size, SUPERSAMPLE, 3).mean((1, 3))
    return np.round(255 * small.clip(0, 1)).astype(np.uint8)
