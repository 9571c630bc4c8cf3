"""Compositions of the session with one loader, as the jobs of a sweep have it: 5 ms in place of 75."""

import functools

from sglang_gen import env
from sglang_gen.config import compose
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import Composed
from sglang_gen.config.hydra_loader import Loader, open_loader

CONF, ORIGINAL = env.conf_dir(), compose.compose_partly


@functools.cache
def shipped() -> Loader:
    """The loader of the shipped options, which no test changes."""
    return open_loader(None)


def compose_partly(choices: Choices, loader: Loader | None = None) -> tuple[Composed, bool]:
    """In place of `compose.compose_partly`. Other folders and settings of Hydra have a loader of their own."""
    of_hydra = any("hydra" in word for word in choices.overrides)
    if loader is None and (choices.config_dir, choices.config_name, env.conf_dir()) == (None, "config", CONF):
        loader = None if of_hydra else shipped()
    return ORIGINAL(choices, loader)
