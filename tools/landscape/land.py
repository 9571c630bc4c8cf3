"""Paints the ground: three ridges from far to near, then the meadow in front of them."""

import numpy as np

from tools.landscape.palette import GROUND, MEADOW, Palette, mix, rgb
from tools.landscape.scene import Scene

# height of a ridge above its base, from far to near, as a fraction of the image
RISE = {
    "mountains": (0.26, 0.17, 0.09),
    "hills": (0.14, 0.11, 0.08),
    "dunes": (0.12, 0.11, 0.09),
    "forest": (0.12, 0.15, 0.19),
    "city": (0.30, 0.24, 0.13),
}
HAZE = (0.60, 0.30, 0.06)
DEPTH = (0.0, 0.055, 0.12)  # offset of a ridge's base below the horizon


def triangle(x: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1 between 0 and 1."""
    return np.abs(2 * (x - np.floor(x)) - 1)


def mountain_line(x: np.ndarray, layer: int, rng: np.random.Generator) -> np.ndarray:
    frequency = (1.6, 2.1, 2.8)[layer] * rng.uniform(0.9, 1.15)
    line = sum(0.5**o * triangle(frequency * 1.9**o * x + rng.uniform()) for o in range(4))
    return line / 1.6


def hill_line(x: np.ndarray, layer: int, rng: np.random.Generator) -> np.ndarray:
    frequency = (1.7, 1.2, 0.9)[layer] * rng.uniform(0.85, 1.2)
    waves = [w * np.sin(2 * np.pi * (f * frequency * x + rng.uniform())) for f, w in ((1, 0.36), (2.1, 0.12))]
    return 0.5 + sum(waves)


def dune_line(x: np.ndarray, layer: int, rng: np.random.Generator) -> np.ndarray:
    frequency = (1.5, 1.2, 0.9)[layer] * rng.uniform(0.85, 1.15)
    return 1 - np.abs(np.sin(np.pi * (frequency * x + rng.uniform()))) ** 0.9


def tree_line(x: np.ndarray, layer: int, rng: np.random.Generator) -> np.ndarray:
    """Conifers side by side: triangles with two tiers and random heights."""
    width = (0.030, 0.046, 0.075)[layer]
    count = int(1 / width) + 3
    centers = (np.arange(count) - 1 + rng.uniform(-0.2, 0.2, count)) * width
    heights = rng.uniform(0.55, 1.0, len(centers))
    u = np.abs(x[None] - centers[:, None]) / (0.85 * width)
    tiers = 1 - u + 0.10 * (triangle(2.5 * u) - 0.5)
    return (heights[:, None] * np.clip(tiers, 0.0, 1)).max(0)


def tower_line(x: np.ndarray, layer: int, rng: np.random.Generator) -> np.ndarray:
    """Flat roofs of random width and height; some towers carry a mast."""
    edges = np.cumsum(rng.uniform(0.05, 0.11, 24) * (1.0, 1.1, 1.3)[layer])
    heights = rng.uniform(0.25, 1.0, 25) * (0.75 + 0.25 * rng.integers(0, 2, 25))
    index = np.searchsorted(edges, x)
    middle = np.concatenate([[0], (edges[:-1] + edges[1:]) / 2, [2]])[index]
    mast = (np.abs(x - middle) < 0.005) & (heights[index] > 0.7)
    return heights[index] + 0.18 * mast


LINES = {
    "mountains": mountain_line,
    "hills": hill_line,
    "dunes": dune_line,
    "forest": tree_line,
    "city": tower_line,
}


def facets(line: np.ndarray, depth: np.ndarray, sheer: float) -> np.ndarray:
    """[H, W] in [-1, 1]: the slope of the ridge's visible flank, extended obliquely down from the crest."""
    size = len(line)
    smooth = np.convolve(np.pad(line, 4, mode="edge"), np.ones(9) / 9, mode="valid")
    slope = np.tanh(np.gradient(smooth) * 2.5).astype(np.float32)
    columns = np.arange(size)[None] + (sheer * depth).astype(np.int32)
    return slope[np.clip(columns, 0, size - 1)]


def windows(size: int, depth: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """[H, W] mask of lit windows on a regular grid below the roofs."""
    cell = size // 32
    lit = rng.uniform(size=(size // cell + 1, size // cell + 1)) < share
    y, x = np.arange(size)[:, None], np.arange(size)[None]
    inside = (y % cell >= cell // 2) & (x % cell >= cell // 2)
    return lit[y // cell, x // cell] & inside & (depth > 3)


def paint_ridge(
    image: np.ndarray, scene: Scene, layer: int, horizon: float, palette: Palette, rng: np.random.Generator
) -> None:
    """Paint one ridge over everything behind it. The crest is the sharpest edge of the image."""
    size = len(image)
    x = np.arange(size, dtype=np.float32) / size
    rise = RISE[scene.terrain][layer]
    line = LINES[scene.terrain](x, layer, rng)
    base = horizon + DEPTH[layer] + (0.02 if scene.terrain != "mountains" else 0.0)
    crest = ((base - rise * line) * size).astype(np.float32)  # [W]
    depth = np.arange(size, dtype=np.float32)[:, None] + 0.5 - crest[None]  # [H, W]
    ground = mix(GROUND[scene.terrain] * palette.light, palette.haze, HAZE[layer])
    shade = np.ones((size, size), np.float32)
    if scene.terrain in ("mountains", "dunes"):
        toward = -1.0 if scene.side == "left" else 1.0
        shade += 0.24 * toward * facets(crest, depth, 0.35)
    if scene.terrain == "hills":
        shade += 0.16 * np.exp(-depth.clip(0) / (0.05 * size)) - 0.06
    if scene.terrain == "forest":
        shade += 0.22 * np.exp(-depth.clip(0) / (0.06 * size)) - 0.12
    color = ground * shade[..., None]
    if scene.terrain == "mountains" and layer < 2:
        snow = mix(rgb(246, 248, 255) * np.sqrt(palette.light), palette.haze, 0.5 * HAZE[layer])
        limit = (horizon - (0.10, 0.035)[layer]) * size + 0.05 * size * (triangle(9 * x + rng.uniform()) - 0.5)
        covered = np.clip(limit[None] - depth - crest[None], 0, 1)[..., None]
        color = mix(color, snow * np.clip(0.75 + 0.25 * shade, 0.6, 1)[..., None], covered)
    if scene.terrain == "city" and layer > 0:
        lamp = rgb(255, 214, 130) if palette.lamp else rgb(190, 216, 236)
        lit = windows(size, depth, rng, palette.lamp or 0.2)[..., None]
        color = mix(color, lamp, 0.9 * lit)
    image[:] = mix(image, color, np.clip(depth, 0, 1)[..., None])


def paint_meadow(image: np.ndarray, scene: Scene, top: float, palette: Palette, rng: np.random.Generator) -> None:
    """Paint plain ground in front: two soft swells, darker towards the viewer."""
    size = len(image)
    x = np.arange(size, dtype=np.float32) / size
    for i, brightness in enumerate((0.92, 0.68)):
        line = top + 0.12 * i + 0.02 * np.sin(2 * np.pi * (rng.uniform(0.5, 1.2) * x + rng.uniform()))
        depth = np.arange(size, dtype=np.float32)[:, None] + 0.5 - (line * size)[None]
        fade = brightness * (1.12 - 0.5 * depth.clip(0) / size)[..., None]
        image[:] = mix(image, MEADOW[scene.terrain] * palette.light * fade, np.clip(depth, 0, 1)[..., None])
