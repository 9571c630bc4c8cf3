"""Colours of the sky, the light and the ground for each time of day."""

from dataclasses import dataclass

import numpy as np

Color = np.ndarray  # [3] float32 in [0, 1]


def rgb(red: int, green: int, blue: int) -> Color:
    return np.array([red, green, blue], np.float32) / 255


def mix(a: np.ndarray, b: np.ndarray, amount: float | np.ndarray) -> np.ndarray:
    return a + (b - a) * amount


@dataclass(frozen=True)
class Palette:
    zenith: Color
    middle: Color
    horizon: Color
    disc: Color  # sun or moon
    glow: Color
    light: Color  # multiplies the ground's own colours
    haze: Color  # into which far ridges fade
    cloud: Color
    shadow: Color  # underside of clouds
    lamp: float  # fraction of lit windows


PALETTES = {
    "dawn": Palette(
        rgb(110, 132, 200), rgb(216, 172, 206), rgb(255, 206, 180), rgb(255, 244, 214), rgb(255, 206, 170),
        np.array([0.88, 0.72, 0.80], np.float32), rgb(232, 190, 206), rgb(255, 226, 220), rgb(196, 150, 190), 0.15,
    ),
    "noon": Palette(
        rgb(38, 112, 214), rgb(104, 172, 240), rgb(196, 228, 248), rgb(255, 250, 210), rgb(255, 246, 200),
        np.array([1.0, 1.0, 0.96], np.float32), rgb(170, 204, 232), rgb(255, 255, 255), rgb(186, 204, 226), 0.0,
    ),
    "sunset": Palette(
        rgb(70, 38, 108), rgb(214, 86, 74), rgb(255, 176, 66), rgb(255, 238, 160), rgb(255, 150, 50),
        np.array([0.62, 0.40, 0.38], np.float32), rgb(230, 120, 76), rgb(255, 164, 110), rgb(140, 64, 100), 0.25,
    ),
    "night": Palette(
        rgb(6, 9, 34), rgb(14, 22, 62), rgb(40, 58, 112), rgb(244, 242, 222), rgb(130, 150, 210),
        np.array([0.30, 0.34, 0.50], np.float32), rgb(52, 70, 124), rgb(96, 108, 154), rgb(40, 48, 92), 0.35,
    ),
}  # fmt: skip

GROUND = {
    "mountains": rgb(122, 118, 132),
    "hills": rgb(96, 156, 64),
    "dunes": rgb(228, 178, 100),
    "forest": rgb(40, 104, 62),
    "city": rgb(96, 108, 136),
}
MEADOW = {
    "mountains": rgb(92, 110, 80),
    "hills": rgb(80, 140, 52),
    "dunes": rgb(214, 160, 84),
    "forest": rgb(36, 84, 44),
    "city": rgb(84, 96, 96),
}
