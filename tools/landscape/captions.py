"""Captions from a small grammar. They state a random subset of an image's attributes and may contain filler words."""

from dataclasses import asdict, dataclass

import numpy as np

from tools.landscape.scene import ATTRIBUTES, Scene
from tools.landscape.words import EMOJI, FILLERS, KINDS, MOODS, PHRASES


@dataclass(frozen=True)
class Caption:
    text: str
    mentions: frozenset[str]  # names of the attributes that the text states


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def choose_mentions(rng: np.random.Generator) -> frozenset[str]:
    """All five attributes with probability 0.35, otherwise each with probability 0.6."""
    if rng.uniform() < 0.35:
        return frozenset(ATTRIBUTES)
    return frozenset(name for name in ATTRIBUTES if rng.uniform() < 0.6)


def phrase(scene: Scene, name: str, rng: np.random.Generator) -> str:
    disc = "moon" if scene.time == "night" else "sun"
    return pick(rng, PHRASES[name][asdict(scene)[name]]).format(disc=disc)


def opening(rng: np.random.Generator) -> str:
    mood, kind = pick(rng, MOODS), pick(rng, KINDS)
    return pick(rng, (f"a {mood} {kind}", f"a {kind}", f"{mood} {kind}", f"{kind}"))


def sentence(scene: Scene, mentions: frozenset[str], rng: np.random.Generator) -> str:
    """a serene landscape with mountains and a lake at sunset, cloudy sky, sun on the left"""
    phrases = {name: phrase(scene, name, rng) for name in ATTRIBUTES if name in mentions}
    things = [phrases[name] for name in ("terrain", "water") if name in phrases]
    text = opening(rng)
    if things:
        text += pick(rng, (" with ", " of ", ", ", " with ")) + pick(rng, (" and ", " and ", " with ")).join(things)
    if "time" in phrases:
        text += pick(rng, (" ", " ", ", ")) + phrases["time"]
    rest = [phrases[name] for name in ("sky", "side") if name in phrases]
    return ", ".join([text, *(rest if rng.uniform() < 0.7 else rest[::-1])])


def listing(scene: Scene, mentions: frozenset[str], rng: np.random.Generator) -> str:
    """mountains, sunset, a lake, clouds: in any order, with or without an opening"""
    parts = [phrase(scene, name, rng) for name in ATTRIBUTES if name in mentions]
    if not parts or rng.uniform() < 0.4:
        parts.append(opening(rng))
    rng.shuffle(parts)
    return pick(rng, (", ", ", ", " ")).join(parts)


def brief(scene: Scene, mentions: frozenset[str], rng: np.random.Generator) -> str:
    """a beautiful forest scene at dawn: the terrain comes first and carries the mood"""
    if "terrain" not in mentions:
        return listing(scene, mentions, rng)
    terrain = phrase(scene, "terrain", rng).removeprefix("a ").removeprefix("the ")
    text = f"{pick(rng, ('a ', '', 'the '))}{pick(rng, MOODS)} {terrain}{pick(rng, (' scene', ' landscape', '', ''))}"
    if "sky" in mentions and rng.uniform() < 0.5:
        text = f"{phrase(scene, 'sky', rng)} over {text}"
    elif "sky" in mentions:
        text += f" with {phrase(scene, 'sky', rng)}"
    if "water" in mentions:
        text += pick(rng, (" by ", " and ", " near ", " with ")) + phrase(scene, "water", rng)
    if "time" in mentions:
        text += " " + phrase(scene, "time", rng)
    return text + (", " + phrase(scene, "side", rng) if "side" in mentions else "")


def nonsense(rng: np.random.Generator) -> str:
    """A meaningless word: a filler word, random letters, or rare characters."""
    kind = rng.uniform()
    if kind < 0.75:
        return pick(rng, FILLERS)
    if kind < 0.93:
        return "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 8)))
    return "".join(EMOJI[c] for c in rng.integers(0, len(EMOJI), rng.integers(1, 3)))


def insert_nonsense(text: str, rng: np.random.Generator) -> str:
    words = text.split(" ")
    for _ in range(rng.integers(1, 5)):
        words.insert(int(rng.integers(0, len(words) + 1)), nonsense(rng))
    return " ".join(words)


def caption(scene: Scene, rng: np.random.Generator) -> Caption:
    mentions = choose_mentions(rng)
    form = (sentence, sentence, listing, brief)[rng.integers(4)]
    text = form(scene, mentions, rng)
    if rng.uniform() < 0.25:
        text = insert_nonsense(text, rng)
    if rng.uniform() < 0.5:
        text = text[:1].upper() + text[1:]
    return Caption(text, mentions)


def full_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that states all five attributes, without filler words; used in the evaluation."""
    return sentence(scene, frozenset(ATTRIBUTES), rng)
