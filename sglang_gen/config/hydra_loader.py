"""Hydra's configuration loader and its override parser."""

import copy
import os.path
import pickle
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.default_element import ConfigDefault, GroupDefault, ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sglang_gen import env
from sglang_gen.config import hydra_code
from sglang_gen.config.aliases import check_folder
from sglang_gen.config.choices import Choices
from sglang_gen.config.hydra_errors import override_problem, user_errors
from sglang_gen.config.overrides import Word, dict_path
from sglang_gen.config.schema import Run, leaves
from sglang_gen.errors import UserError

_Base = tuple[Callable[[], DictConfig], Sequence[ResultDefault], IConfigRepository]


class Loader(ConfigLoaderImpl):  # type: ignore[misc] # Hydra states no types
    """Hydra's loader, which keeps the last defaults list so that `compose` need not read all files a second time."""

    defaults: Sequence[ResultDefault] = ()
    read: IConfigRepository

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bases: dict[
            tuple[Any, ...], tuple[Callable[[], DictConfig], Sequence[ResultDefault], IConfigRepository]
        ] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the compositions, which another process makes faster than it would read them."""
        return {**self.__dict__, "_bases": {}}

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        self.defaults, self.read = defaults, repo
        composed: DictConfig = super()._compose_config_from_defaults_list(defaults, repo)
        return composed

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        """Hydra's method, which loads every configuration, also those of jobs.

        Raises UserError for a configuration that would run code from other packages.
        """
        try:
            cfg: DictConfig = super().load_configuration(*args, **kwargs)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._undecodable()} is not UTF-8 text") from error
        hydra_code.check_targets(
            typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False)), instantiable()
        )
        return cfg

    def _load_configuration_impl(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *args: Any, **kwargs: Any
    ) -> DictConfig:
        """Hydra's method, which composes all files for every job of a sweep, in 0.1 s.

        Values of the schema's keys do not affect which files are composed. So the files are composed once for all
        jobs that have the same other overrides, and the values are set in a copy.
        """
        words = OverridesParser.create().parse_overrides(overrides)
        values = [word for word in words if run_mode == RunMode.RUN and _is_value(word)]
        others = [str(word.input_line) for word in words if word not in values]
        key = (config_name, *others, run_mode)
        if key not in self._bases:
            base = super()._load_configuration_impl(config_name, others, run_mode, *args, **kwargs)
            self._bases[key] = (_copies(base), self.defaults, self.read)
        copied, self.defaults, self.read = self._bases[key]
        cfg = copied()
        self._apply_overrides_to_config(values, cfg)
        tasks = [word for word in words if not word.is_hydra_override()]
        cfg.hydra.overrides.task = [word.input_line for word in tasks]
        naming = cfg.hydra.job.config.override_dirname
        cfg.hydra.job.override_dirname = get_overrides_dirname(
            tasks, kv_sep=naming.kv_sep, item_sep=naming.item_sep, exclude_keys=naming.exclude_keys
        )
        return cfg

    def _undecodable(self) -> str:
        """The first configuration file of the search path that is not UTF-8 text."""
        folders = [str(entry.path).removeprefix("file://") for entry in self.config_search_path.get_path()]
        for path in (path for folder in folders for path in sorted(Path(folder).rglob("*.yaml"))):
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return str(path)
            except OSError:
                continue
        return "A configuration file"

    def _process_config_searchpath(
        self, config_name: str | None, parsed_overrides: list[Override], repo: IConfigRepository
    ) -> None:
        given = [word.value() for word in parsed_overrides if word.get_key_element() == "hydra.searchpath"]
        primary = repo.load_config(config_name) if config_name is not None else None
        if not given and primary is not None and OmegaConf.is_dict(primary.config):
            given = [OmegaConf.select(primary.config, "hydra.searchpath")]
        for entries in given:
            hydra_code.check_search_path(list(entries) if OmegaConf.is_list(entries) else entries)
            for entry in entries or () if OmegaConf.is_list(entries) or isinstance(entries, list) else ():
                check_folder(Path(str(entry).removeprefix("file://")))
        super()._process_config_searchpath(config_name, parsed_overrides, repo)
        if config_name is not None:
            _build_on_shipped(config_name, repo)
            _read_from_top(config_name, repo)


def _copies(cfg: DictConfig) -> Callable[[], DictConfig]:
    """A function that returns a new copy. Pickle takes a seventh of the time of `copy.deepcopy`."""
    try:
        return partial(pickle.loads, pickle.dumps(cfg))
    except pickle.PicklingError:  # in a launcher's process Hydra has loaded the classes of a plugin twice
        return partial(copy.deepcopy, cfg)


def _is_value(word: Override) -> bool:
    """Whether an override sets one value of a key that no config group can have as its name."""
    is_key = word.key_or_group in leaves() or dict_path(word.key_or_group) is not None
    return is_key and "." in word.key_or_group and word.package is None and not (
        word.is_delete() or word.is_sweep_override())  # fmt: skip


def _build_on_shipped(config_name: str, repo: CachingConfigRepository) -> None:
    """Compose a user's primary configuration without a defaults list on top of the shipped one.

    The result in the cache is changed, as if the file began with `defaults: [config, _self_]`; a file that is itself
    named config.yaml could not name the shipped one.
    """
    own = repo.load_config(config_name)
    shipped = next(source for source in repo.get_sources() if source.provider == "main")
    if own is None or own.defaults_list or own.provider in ("main", "schema") or not OmegaConf.is_dict(own.config):
        return
    base = shipped.load_config("config")
    listed = repo.delegate._extract_defaults_list("config", base.config)
    own.defaults_list = repo.delegate._create_defaults_list("config", listed)
    own.config = typing.cast(DictConfig, OmegaConf.merge(base.config, own.config))


def _read_from_top(config_name: str, repo: CachingConfigRepository) -> None:
    """Read a user's primary configuration in a folder as one at the top of the configuration folder.

    Hydra places the keys of `inner/mine` under the key `inner` and looks for its defaults in `inner` alone. The result
    in the cache is changed: the keys are those of a run, and defaults that `inner` does not have are those of the top.
    """
    folder = config_name.rpartition("/")[0]
    own = repo.load_config(config_name)
    if not folder or own is None or own.provider in ("main", "schema"):
        return
    if own.header["package"] is None:
        own.header["package"] = "_global_"
    for item in own.defaults_list or ():
        if isinstance(item, ConfigDefault) and item.path and not item.path.startswith("/") and not item.is_self():
            item.path = item.path if repo.config_exists(f"{folder}/{item.path}") else f"/{item.path}"
        elif isinstance(item, GroupDefault) and item.group and not item.group.startswith("/"):
            item.group = item.group if repo.group_exists(f"{folder}/{item.group}") else f"/{item.group}"


@cache
def instantiable() -> frozenset[str]:
    """Names of the classes that Hydra may instantiate: its plugins, registered targets, callbacks, and our callback."""
    from hydra.experimental import callbacks

    allowed = {hydra_code.OURS, *Plugins.instance().class_name_to_class}
    pending = [callbacks.Callback]
    while pending:
        classes = pending.pop().__subclasses__()
        pending += classes
        names = [f"{cls.__module__}.{cls.__qualname__}" for cls in classes]
        allowed.update(name for name in names if name.partition(".")[0] in hydra_code.TRUSTED_PACKAGES)
    return frozenset(allowed | set(_targets(ConfigStore.instance().repo.get("hydra", {}))))


def _targets(stored: Any) -> Iterator[str]:
    """Every `_target_` of the nodes that packages registered in Hydra's ConfigStore."""
    if isinstance(stored, ConfigNode):
        stored = OmegaConf.to_container(OmegaConf.create(stored.node), resolve=False)
    for name, item in stored.items() if isinstance(stored, dict) else ():
        if name == "_target_":
            yield str(item)
        else:
            yield from _targets(item)


def open_loader(config_dir: str | None) -> Loader:
    search_path = create_config_search_path(str(env.conf_dir()))
    if config_dir is not None:
        if not os.path.isdir(config_dir):  # False also for invalid path names
            raise UserError(f"--config-dir: '{config_dir}' is not a folder")
        check_folder(Path(config_dir))
        search_path.prepend("command-line", f"file://{Path(config_dir).absolute()}")
    store = ConfigStore.instance()
    if "schema.yaml" not in store.repo:
        store.store(name="schema", node=Run, provider="schema")
    return Loader(config_search_path=search_path)


def group_options(loader: ConfigLoaderImpl, choices: Choices) -> Callable[[str], list[str]]:
    """A function that returns the options of a group, including those in folders of hydra.searchpath."""
    search = [word for word in choices.overrides if "hydra.searchpath=" in word]

    def options_of(group: str) -> list[str]:
        with user_errors():
            return list(loader.get_group_options(group, config_name=choices.config_name, overrides=search))

    return options_of if search or choices.config_name != "config" else loader.repository.get_group_options


def parse(loader: ConfigLoaderImpl, lines: Iterable[str]) -> list[Word]:
    parser = OverridesParser.create(config_loader=loader)
    return [_word(parser, line) for line in lines]


def _word(parser: OverridesParser, line: str) -> Word:
    if "=" not in line and not line.startswith("~"):
        raise UserError(f"'{line}' is neither an option nor an override of the form key=value")
    try:
        (override,) = parser.parse_overrides([line])
    except (HydraException, ValueError) as error:
        key = line.partition("=")[0]
        raise UserError(
            f"The override '{line}' cannot be read: {override_problem(error)} "
            f"(special characters need quotes inside: {key}='\"...\"')"
        ) from error
    sign = {OverrideType.ADD: "+", OverrideType.FORCE_ADD: "++", OverrideType.DEL: "~"}.get(override.type, "")
    values: tuple[Any, ...] = ()
    if override.is_discrete_sweep():
        values = tuple(Override._convert_value(value) for value in override.sweep_iterator())
    elif not override.is_sweep_override() and not override.is_delete():
        values = (override.value(),)
    return Word(line, sign, override.key_or_group, override.package, values, override.is_sweep_override())


def line_of(word: Word) -> str:
    """The override as passed to Hydra, with `++` for keys of free-form mappings, which may or may not exist yet."""
    return f"++{word.text}" if not word.sign and dict_path(word.key) else word.text
