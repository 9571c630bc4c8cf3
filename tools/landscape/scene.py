"""A scene has five attributes, from which both its image and its caption are made."""

from dataclasses import dataclass, fields, replace

import numpy as np

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "time": ("dawn", "noon", "sunset", "night"),
    "terrain": ("mountains", "hills", "dunes", "forest", "city"),
    "water": ("lake", "river", "none"),
    "sky": ("clear", "cloudy", "starry", "foggy"),
    "side": ("left", "center", "right"),
}


@dataclass(frozen=True)
class Scene:
    time: str
    terrain: str
    water: str
    sky: str
    side: str

    def labels(self) -> list[int]:
        """Class index of every attribute, in the order of `ATTRIBUTES`."""
        return [ATTRIBUTES[f.name].index(getattr(self, f.name)) for f in fields(self)]


def from_labels(labels: list[int]) -> Scene:
    return Scene(*(values[label] for values, label in zip(ATTRIBUTES.values(), labels, strict=True)))


def sample_scene(rng: np.random.Generator) -> Scene:
    """Sample all combinations with equal probability, except for a starry sky at noon."""
    while True:
        scene = Scene(*(values[rng.integers(len(values))] for values in ATTRIBUTES.values()))
        if not (scene.time == "noon" and scene.sky == "starry"):
            return scene


def flip(scene: Scene) -> Scene:
    """The scene of the mirrored image."""
    return replace(scene, side={"left": "right", "right": "left"}.get(scene.side, scene.side))
