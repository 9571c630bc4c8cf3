"""Checks overrides before composition. Refuses unknown keys and options, settings given twice, and settings of Hydra
that would have no effect."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_gen.config.flags import BY_KEY, BY_PATH, FLAGS
from sglang_gen.config.schema import leaves
from sglang_gen.errors import UserError, nearest

# Groups whose options set a single key, which also has a flag.
SELECTORS = {"backend": "backend.name", "attention": "attention.backend"}

# Settings of Hydra that have an effect in every run, and those that have one in a multirun only.
_EVERYWHERE = ("hydra.mode", "hydra.searchpath")
_MULTIRUN = ("hydra.sweep.dir", "hydra.sweeper", "hydra.launcher", "hydra.callbacks", "hydra.job.env_set",
             "hydra.job.env_copy", "hydra.job.name", "hydra/launcher", "hydra/sweeper", "hydra/callbacks")  # fmt: skip
LONGEST_GROUP = 255  # characters; a longer name cannot be that of a folder, and the file system refuses to look


@dataclass(frozen=True)
class Word:
    """One parsed override, such as `sampling.seed=1,2`."""

    text: str  # as typed
    sign: str  # "", "+", "++" or "~"
    key: str  # such as sampling.seed, model, hydra/launcher
    package: str | None
    values: tuple[Any, ...]  # the value, or all values of a finite sweep
    is_sweep: bool

    @property
    def is_hydra(self) -> bool:
        return self.key.replace("/", ".").partition(".")[0] == "hydra"


def covers(outer: str, path: str) -> bool:
    """Whether `path` is `outer` or lies below it."""
    return path == outer or path.startswith(f"{outer}.")


def dict_path(key: str) -> str | None:
    """The config path of the free-form mapping that contains `key` (backend.diffusers_kwargs.eta); None without one."""
    return next((path for path, kind in leaves().items() if _is_dict(kind) and covers(path, key)), None)


def _is_dict(kind: Any) -> bool:
    return getattr(kind, "__origin__", None) is dict


def check_overrides(
    words: Iterable[Word], flags: Mapping[str, Any], options_of: Callable[[str], list[str]], multirun: bool = False
) -> None:
    """Raises UserError for the first invalid override.

    `options_of` returns the options of a group, and [] for any other key.
    """
    seen: set[str] = set()
    for word in words:
        if word.key in seen:
            raise UserError(f"'{word.key}' is overridden twice")
        seen.add(word.key)
        if word.is_sweep and not multirun:
            raise UserError(f"'{word.text}' is a sweep: add -m for one run per value, or quote the value")
        if word.package is not None:
            raise UserError(f"'{word.text}': groups take no package here; write {word.key}={_shown(word.values)}")
        if word.is_hydra:
            _check_hydra(word, options_of, multirun)
        elif 0 < len(word.key) <= LONGEST_GROUP and (options := options_of(word.key)):
            _check_group(word, options, flags)
        else:
            _check_key(word, flags)


def _check_hydra(word: Word, options_of: Callable[[str], list[str]], multirun: bool) -> None:
    taken = (*_EVERYWHERE, *_MULTIRUN) if multirun else _EVERYWHERE
    if not any(covers(name, word.key) for name in taken):
        mode = "a multirun" if multirun else "a single run"
        raise UserError(f"'{word.text}' has no effect in {mode}; of Hydra's own settings it takes {', '.join(taken)}")
    if "/" in word.key:
        options = options_of(word.key)
        unknown = [value for value in word.values if value not in options]
        if unknown:
            raise UserError(
                f"'{word.text}': Hydra has no such plugin here (options: {', '.join(options)}); "
                "joblib, submitit and ray come with pip install 'sglang-gen[launchers]'"
            )


def _check_group(word: Word, options: list[str], flags: Mapping[str, Any]) -> None:
    if word.sign == "~":
        return
    if word.sign:
        raise UserError(f"'{word.text}': the group has an option already; write {word.key}={_shown(word.values)}")
    for option in word.values:
        check_option(word.key, option, options)
    selector = SELECTORS.get(word.key, "")
    if selector in flags:
        raise UserError(f"{BY_PATH[selector].option} and '{word.text}' both choose {selector}; give one")


def check_option(group: str, option: Any, options: list[str]) -> None:
    """Raises UserError if the group has no such option."""
    if isinstance(option, (list, dict)):
        raise UserError(f"The group '{group}' takes the name of one option (options: {', '.join(options)})")
    name = "null" if option is None else str(option)
    if name not in options:
        near = nearest("none" if option is None else name, options)
        raise UserError(f"Unknown option '{name}' of the group '{group}'{near} (options: {', '.join(options)})")


def _check_key(word: Word, flags: Mapping[str, Any]) -> None:
    kinds = leaves()
    if word.key not in kinds and dict_path(word.key) is None:
        flag = BY_KEY.get(word.key.replace("-", "_"))
        if flag and flag.path:
            raise UserError(f"Unknown key '{word.key}'; write {flag.option} or {flag.path}=...")
        legal = [*kinds, *{path.partition(".")[0] for path in kinds}, *(flag.option for flag in FLAGS)]
        raise UserError(f"Unknown key '{word.key}'{nearest(word.key.replace('/', '.'), legal)}")
    for path in flags:
        if covers(path, word.key):
            raise UserError(f"{path} is given twice, by {BY_PATH[path].option} and by the override '{word.text}'")
    if word.sign == "~":
        raise UserError(f"'{word.text}': a key of the schema cannot be deleted; set it to null or to its default")
    if word.key == "output.path" and word.is_sweep:
        raise UserError("output.path is the folder of the whole sweep and cannot be swept")
    if word.key.startswith("sweep.") and word.is_sweep:
        raise UserError(f"{word.key} is a setting of the whole sweep and cannot be swept; give it one value")


def _shown(values: tuple[Any, ...]) -> str:
    return ",".join("null" if value is None else str(value) for value in values)
