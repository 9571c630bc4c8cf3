"""Composition: YAML of `conf/` against the schema, then file values, then flags; plain dataclasses come out.

Precedence, lowest first: schema < model preset < group options < experiment < --config file < overrides, flags and
sweep choices. `Composed.sources` says for every config path which of these its value came from.
"""

import copy
import dataclasses
import logging
import os.path
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from sglang_gen import env, hydra_code, presets, record_limits
from sglang_gen.config_file import FileValues, read_config_file
from sglang_gen.errors import RunError, UserError, first_line
from sglang_gen.flags import BY_PATH
from sglang_gen.output import FULL, check_file, check_folder
from sglang_gen.overrides import Word, check, check_option, covers, dict_leaf
from sglang_gen.perf import place
from sglang_gen.schema import LOCAL, Run, get, leaves, plain, put
from sglang_gen.sweep.recorded import recorded


@dataclass(frozen=True)
class Choices:
    """What the user typed, not yet composed. `seed` stands in where no seed is given (one for a whole sweep)."""

    overrides: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)  # config path -> typed value
    file: str | None = None
    config_dir: str | None = None
    config_name: str = "config"
    seed: int | None = None


@dataclass(frozen=True)
class Composed:
    """A run, where each of its values came from, and what the user should be told about the composition."""

    run: Run
    sources: dict[str, str]
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    versions: dict[str, str | None] = field(default_factory=dict)  # of the record being repeated
    inputs: dict[str, str] = field(default_factory=dict)  # digests of its files
    in_sweep: bool = False  # whether it is a job of a multirun
    place: env.Torchrun | None = None  # which rank this process is already, where torchrun started it


def compose(choices: Choices) -> Composed:
    """One `Run` from what the user typed. Raises UserError, with the nearest legal name for an unknown key."""
    composed, named = _compose(choices)
    notices = _complete(composed.run, composed.sources, named, choices.seed)
    return dataclasses.replace(composed, notices=(*notices, *composed.notices))


def _compose(choices: Choices) -> tuple[Composed, bool]:
    """The composition, and whether an option of the group `model` was named."""
    loader = _loader(choices.config_dir)
    words = _parse(loader, choices.overrides)
    options_of = _options(loader, choices)
    check(words, choices.flags, options_of)
    file = read_config_file(choices.file) if choices.file is not None else FileValues()
    typed = {word.key: word for word in words if not word.is_hydra}
    stated = {key: word.values[0] for key, word in typed.items() if word.values}
    covered = {*typed, *choices.flags}
    values = {path: value for path, value in file.values.items() if not covered & {path, path.partition(".")[0]}}
    options = {group: option for group, option in file.options.items() if group not in typed}
    withheld = _withheld(choices, file, covered)
    for group, option in options.items():
        check_option(group, option, options_of(group))
    implied = None
    if "model" in stated or "model" not in typed:  # not ~model
        given = {**values, **stated, **choices.flags}
        implied = presets.option(stated.get("model", options.get("model")), given, choices.config_dir)
    chosen = {**options, **({"model": implied} if implied else {})}
    lines = [*(f"{group}={option}" for group, option in chosen.items()), *map(_line, words)]
    with _as_user_error():
        cfg = loader.load_configuration(choices.config_name, lines, run_mode=RunMode.RUN)
        sources = _sources(loader)
        run = _to_run(cfg, {**values, **choices.flags})
    sources |= {path: "override" for path in leaves() if any(covers(path, key) for key in typed)}
    for stated_values, source in ((values, "file"), (choices.flags, "flag")):
        for path, value in stated_values.items():
            put(run, path, _merged(get(run, path), value, path, typed))
            sources[path] = source
    for path in LOCAL:
        if isinstance(name := get(run, path), str):
            put(run, path, os.path.expanduser(name))
    notices = []
    if implied not in (None, "custom") and run.model.path is not None:  # the embedded model brings its own
        notices.append(f"The settings of the preset '{implied}' apply to {run.model.path}")
    yielded = [path for path in file.values if not covered & {path} and path not in values]
    if yielded:
        notices.append(f"Group options given beside {choices.file} replace its {', '.join(yielded)}")
    warnings = record_limits.warnings(withheld, str(choices.file))
    composed = Composed(run, sources, tuple(notices), tuple(warnings), file.versions, file.inputs)
    return composed, "model" in typed or "model" in file.options


def _withheld(choices: Choices, file: FileValues, covered: Collection[str]) -> dict[str, Any]:
    """What a record cannot decide and the command line does not. Raises UserError where the run cannot do without."""
    found = {path: value for path, value in file.withheld.items() if not {path, path.partition(".")[0]} & {*covered}}
    record_limits.check(found, str(choices.file), choices.flags.get("model.path", file.values.get("model.path")))
    return found


def _merged(composed: Any, value: Any, path: str, typed: Iterable[str]) -> Any:
    """A mapping keeps the keys that it had from below (a preset) and those that were overridden one by one."""
    if not isinstance(value, dict) or dict_leaf(path) is None:
        return value
    overridden = {key.removeprefix(f"{path}.").partition(".")[0] for key in typed if key.startswith(f"{path}.")}
    return {**composed, **{name: item for name, item in value.items() if name not in overridden}}


@contextmanager
def _as_user_error() -> Iterator[None]:
    """What Hydra and OmegaConf raise while they read a configuration is the user's to mend: one sentence."""
    try:
        yield
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, AssertionError, AttributeError) as error:
        raise UserError(_sentence(error)) from error
    except RecursionError as error:
        raise UserError("The configuration is nested too deeply") from error
    except OSError as error:
        if error.errno in FULL:  # only the folder of a sweep is written here
            raise RunError(f"The folder of the sweep cannot be written: {error.strerror}") from error
        raise UserError(f"{error.filename or 'The configuration'} cannot be used: {error.strerror or error}") from error


class _Loader(ConfigLoaderImpl):  # type: ignore[misc] # Hydra states no types
    """Hydra's, which keeps what it last composed: reading it all once more would double the time of a composition."""

    defaults: Sequence[ResultDefault] = ()
    read: IConfigRepository

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        self.defaults, self.read = defaults, repo
        composed: DictConfig = super()._compose_config_from_defaults_list(defaults, repo)
        return composed

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        """Hydra's; every configuration comes from here, that of each job too. Raises UserError for code of others."""
        cfg: DictConfig = super().load_configuration(*args, **kwargs)
        hydra_code.check(typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False)), _installed())
        return cfg

    def _process_config_searchpath(
        self, config_name: str | None, parsed_overrides: list[Override], repo: IConfigRepository
    ) -> None:
        given = [word.value() for word in parsed_overrides if word.get_key_element() == "hydra.searchpath"]
        primary = repo.load_config(config_name) if config_name is not None else None
        if not given and primary is not None and OmegaConf.is_dict(primary.config):
            given = [OmegaConf.select(primary.config, "hydra.searchpath")]
        for entries in given:
            hydra_code.check_search_path(list(entries) if OmegaConf.is_list(entries) else entries)
        super()._process_config_searchpath(config_name, parsed_overrides, repo)


@cache
def _installed() -> frozenset[str]:
    """Classes that Hydra may instantiate: its plugins, what they and it registered, callbacks, and ours."""
    from hydra.experimental import callbacks

    found = {hydra_code.OURS, *Plugins.instance().class_name_to_class}
    pending = [callbacks.Callback]
    while pending:
        classes = pending.pop().__subclasses__()
        pending += classes
        names = [f"{each.__module__}.{each.__qualname__}" for each in classes]
        found.update(name for name in names if name.partition(".")[0] in hydra_code.PACKAGES)
    return frozenset(found | set(_targets(ConfigStore.instance().repo.get("hydra", {}))))


def _targets(stored: Any) -> Iterator[str]:
    """Every `_target_` of the nodes that packages have put into Hydra's store."""
    if isinstance(stored, ConfigNode):
        stored = OmegaConf.to_container(OmegaConf.create(stored.node), resolve=False)
    for name, item in stored.items() if isinstance(stored, dict) else ():
        if name == "_target_":
            yield str(item)
        else:
            yield from _targets(item)


def _loader(config_dir: str | None) -> _Loader:
    search_path = create_config_search_path(str(env.conf_dir()))
    if config_dir is not None:
        if not os.path.isdir(config_dir):  # False also for names that no file system takes
            raise UserError(f"--config-dir: '{config_dir}' is not a folder")
        search_path.prepend("command-line", f"file://{Path(config_dir).absolute()}")
    store = ConfigStore.instance()
    if "schema.yaml" not in store.repo:
        store.store(name="schema", node=Run, provider="schema")
    return _Loader(config_search_path=search_path)


def _options(loader: ConfigLoaderImpl, choices: Choices) -> Callable[[str], list[str]]:
    """Gives the options of a group, those in folders of hydra.searchpath included."""
    search = [word for word in choices.overrides if "hydra.searchpath=" in word]

    def options_of(group: str) -> list[str]:
        with _as_user_error():
            return list(loader.get_group_options(group, config_name=choices.config_name, overrides=search))

    return options_of if search or choices.config_name != "config" else loader.repository.get_group_options


def _parse(loader: ConfigLoaderImpl, lines: Iterable[str]) -> list[Word]:
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
            f"The override '{line}' cannot be read: {first_line(error)}"
            f" (special characters need quotes inside: {key}='\"...\"')"
        ) from error
    sign = {OverrideType.ADD: "+", OverrideType.FORCE_ADD: "++", OverrideType.DEL: "~"}.get(override.type, "")
    values: tuple[Any, ...] = ()
    if override.is_discrete_sweep():
        values = tuple(Override._convert_value(value) for value in override.sweep_iterator())
    elif not override.is_sweep_override() and not override.is_delete():
        values = (override.value(),)
    return Word(line, sign, override.key_or_group, override.package, values, override.is_sweep_override())


def _line(word: Word) -> str:
    """The word as Hydra is to see it: keys of a free mapping are added or changed alike."""
    return f"++{word.text}" if not word.sign and dict_leaf(word.key) else word.text


def _sources(loader: _Loader) -> dict[str, str]:
    """For every config path the kind of YAML file that set it last: default, preset, group or experiment."""
    found = dict.fromkeys(leaves(), "default")
    for item in loader.defaults:
        if item.config_path is None or item.config_path.startswith("hydra/") or item.config_path == "schema":
            continue
        loaded = loader.read.load_config(item.config_path)
        if loaded is None or not isinstance(loaded.config, DictConfig):
            continue
        label = {"model": "preset", "experiment": "experiment"}.get(item.config_path.partition("/")[0], "group")
        package = item.package or ""
        content = OmegaConf.to_container(loaded.config, resolve=False)
        for name in _flatten(content, package) if content else ():
            for path in found:
                if covers(name, path) or covers(path, name):
                    found[path] = label
    return found


def _flatten(content: Any, prefix: str) -> list[str]:
    if not isinstance(content, dict) or not content:
        return [prefix] if prefix else []
    inner = f"{prefix}." if prefix else ""
    return [path for name, value in content.items() for path in _flatten(value, f"{inner}{name}")]


def _to_run(cfg: DictConfig, later: Mapping[str, Any]) -> Run:
    """The composed job configuration as a `Run`; missing values and interpolations raise OmegaConf's errors.

    `later` holds what flags and files will set. An interpolation (`width: ${sampling.height}`) sees those values, as
    far as they are plain; the values themselves are set verbatim, after this.
    """
    job = copy.deepcopy(cfg)
    with read_write(job), open_dict(job):
        del job["hydra"]
        for path, value in later.items():
            if isinstance(value, (int, float, Enum)) or (isinstance(value, str) and not {"$", "?"} & set(value)):
                OmegaConf.update(job, path, value)
    run = OmegaConf.to_object(job)
    if not isinstance(run, Run):
        raise UserError("The primary configuration does not build on 'config': put '- config' first in its defaults")
    return run


def _complete(run: Run, sources: dict[str, str], named: bool, seed: int | None) -> list[str]:
    """Fill in the example prompt of a named preset and the sweep's seed; the sentences that say so."""
    notices = []
    if run.model.path is None and run.model.preset == "landscape" and not named:
        notices.append("No model given: using the embedded model 'landscape'")
    if run.sampling.prompt is None and not run.sampling.prompts_file and not run.sampling.prompts:
        if not (named and run.model.example_prompt) or sources["model.path"] in ("flag", "override", "file"):
            raise UserError('A prompt is needed: --prompt "a description of the picture"')
        run.sampling.prompt = run.model.example_prompt
        sources["sampling.prompt"] = "preset"
        notices.append(f"No prompt given: using the example prompt of the preset '{run.model.preset}'")
    if run.sampling.seed is None and seed is not None:
        run.sampling.seed = seed
        notices.append(f"Multirun: jobs without a seed use seed {seed}")
    return notices


def _sentence(error: Exception) -> str:
    """One sentence for an error of Hydra or OmegaConf, its place in the configuration included."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException) and str(cause)[:40] not in text:
        text = f"{text.rstrip('.')}: {first_line(cause)}"
    place = next((line for line in lines if line.startswith("full_key:")), "").partition(": ")[2]
    key = getattr(error, "full_key", None) or place
    return f"{text} (at {key})" if key and key not in text else text


def show(choices: Choices, given: Mapping[str, Any]) -> str:
    """What --cfg, --info and --hydra-help print."""
    hydra = Hydra(task_name="generate", config_loader=_loader(choices.config_dir))
    mode = RunMode.MULTIRUN if given.get("multirun") else RunMode.RUN
    with _as_user_error():
        if given.get("hydra_help"):
            return _hydra_help(hydra)
        if given.get("info"):
            with _root_logger_kept():
                hydra.show_info(given["info"], choices.config_name, list(choices.overrides), mode)
            return ""
        return _show_cfg(hydra, choices, given, mode)


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Hydra prints its information by a handler that it leaves on the root logger of the process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _hydra_help(hydra: Hydra) -> str:
    groups = hydra.config_loader.list_groups("hydra")
    lines = [f"  hydra/{name}: {', '.join(hydra.config_loader.get_group_options(f'hydra/{name}'))}" for name in groups]
    return "Hydra's own config groups, chosen as overrides (hydra/launcher=basic):\n" + "\n".join(lines)


def _show_cfg(hydra: Hydra, choices: Choices, given: Mapping[str, Any], mode: RunMode) -> str:
    import yaml

    parts: dict[str, Any] = {}
    if given["cfg"] in ("job", "all"):
        parts = plain(_compose(choices)[0].run)
    if given["cfg"] in ("hydra", "all"):
        cfg = hydra.compose_config(choices.config_name, list(choices.overrides), mode, with_log_configuration=False)
        if given.get("resolve"):
            with read_write(cfg.hydra), open_dict(cfg.hydra):  # what only a job has
                cfg.hydra.job.update({"num": 0, "id": "0"})
                cfg.hydra.runtime.output_dir = cfg.hydra.run.dir
        HydraConfig.instance().set_config(cfg)
        parts["hydra"] = OmegaConf.to_container(cfg.hydra, resolve=bool(given.get("resolve")), enum_to_str=True)
    for name in [] if given.get("package") in (None, "_global_") else given["package"].split("."):
        if not isinstance(parts, dict) or name not in parts:
            raise UserError(f"--package: the configuration has no '{given['package']}'")
        parts = parts[name]
    return yaml.safe_dump(parts, sort_keys=False, allow_unicode=True).removesuffix("...\n").rstrip("\n")


def is_multirun(choices: Choices, asked: bool) -> bool:
    """True where -m was given or the configuration sets hydra.mode to MULTIRUN (a sweep file does)."""
    mode_typed = any(word.lstrip("+").startswith("hydra.mode=") for word in choices.overrides)
    if not (mode_typed or choices.config_dir or choices.config_name != "config"):
        return asked
    hydra = Hydra(task_name="generate", config_loader=_loader(choices.config_dir))
    mode = hydra.get_mode(choices.config_name, list(choices.overrides))  # None for what composition will refuse
    if asked and mode_typed and mode == RunMode.RUN:
        raise UserError("--multirun and hydra.mode=RUN exclude each other")
    return asked or bool(mode == RunMode.MULTIRUN)


@dataclass(frozen=True)
class Job:
    """One cell of a sweep: its number, its folder, and the choices from which it composes."""

    number: int
    folder: Path
    overrides: tuple[str, ...]
    choices: Choices


@dataclass(frozen=True)
class _Task:
    """What Hydra's launcher calls for each job; it recomposes, so that flags and file values are applied."""

    choices: Choices
    work: Callable[[Job], Any]

    def __call__(self, _cfg: DictConfig) -> Any:
        hydra = HydraConfig.get()
        overrides = tuple(hydra.overrides.task)
        search = tuple(word for word in self.choices.overrides if "hydra.searchpath=" in word)
        choices = dataclasses.replace(self.choices, overrides=(*overrides, *search))
        return self.work(Job(int(hydra.job.num), Path(hydra.runtime.output_dir), overrides, choices))


def multirun(choices: Choices, work: Callable[[Job], Any]) -> list[Any]:
    """Call `work` for every job that Hydra's sweeper makes of the choices; the results in order of the jobs.

    What `work` returns is what the sweeper gets, for one that optimises the objective. A job whose `work` raises has
    failed; its result is the error, which reaches the sweeper only where there is an objective.
    """
    hydra = Hydra(task_name="generate", config_loader=_loader(choices.config_dir))
    words = _parse(hydra.config_loader, choices.overrides)
    check(words, choices.flags, _options(hydra.config_loader, choices), multirun=True)
    if choices.file is not None:
        _withheld(choices, read_config_file(choices.file), {*choices.flags, *(word.key for word in words)})
    for name in _stated(choices, words, place.KEY):
        place.check_in_sweep(str(name))
    lines = [*map(_line, words), *_sweep_dir(choices, words)]
    with _as_user_error():
        cfg = hydra.compose_config(choices.config_name, lines, RunMode.MULTIRUN, with_log_configuration=False)
        for key in OmegaConf.select(cfg, "hydra.sweeper.params") or {}:
            if (flag := BY_PATH.get(str(key).lstrip("+"))) and flag.path in choices.flags:
                raise UserError(f"{flag.path} is given twice, by {flag.option} and by the sweep {choices.config_name}")
        _check_sweep_dir(Path(cfg.hydra.sweep.dir))
        stated = _stated(choices, words, "perf.objective") or [OmegaConf.select(cfg, "perf.objective")]
        ended = _sweep(hydra, cfg, _Task(choices, work), any(stated))
    return [job._return_value for job in ended]


def _check_sweep_dir(folder: Path) -> None:
    """Raises UserError where Hydra would write its multirun.yaml into something that is no file, or wait for a FIFO."""
    check_folder(folder)
    check_file(folder / "multirun.yaml")


OPTIMISING = re.compile(r"hydra_plugins\.hydra_(optuna|ax|nevergrad)_sweeper\.")


def _sweep(hydra: Hydra, cfg: DictConfig, task: "_Task", objective: bool) -> list[JobReturn]:
    """`Hydra.multirun`, but that a sweep which a signal or a job cuts short has ended too: its callbacks hear of it.

    The jobs that have ended, in order: what a sweeper returns is its own affair.
    """
    name = str(OmegaConf.select(cfg, "hydra.sweeper._target_"))
    if OPTIMISING.match(name) and not objective:
        raise UserError(_unaimed(name, "perf.objective is not set"))
    basic, ended, plugins = name.startswith("hydra._internal."), list[JobReturn](), Plugins.instance()
    callbacks = Callbacks(cfg)
    callbacks.on_multirun_start(config=cfg, config_name=cfg.hydra.job.config_name)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    words = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
    try:
        with recorded(plugins, ended, failures=objective and not basic):
            sweeper = plugins.instantiate_sweeper(config=cfg, hydra_context=context, task_function=task)
            sweeper.sweep(arguments=words)
    except (TypeError, ValueError, AssertionError) as error:
        measured = any(job._return_value is not None for job in ended)
        if basic or measured or not ended or isinstance(error, UserError):
            raise
        raise UserError(_unaimed(name, first_line(error))) from error
    finally:
        if ended or not isinstance(sys.exception(), Exception):  # else it was no sweep
            callbacks.on_multirun_end(config=cfg, config_name=cfg.hydra.job.config_name)
    return ended


def _unaimed(name: str, reason: str) -> str:
    return (
        f"{name.rpartition('.')[2]} optimises a number that each job returns, and these return none ({reason}): name "
        "one of the perf dump, such as perf.objective=step_ms, and run without dry_run"
    )


def _stated(choices: Choices, words: Sequence[Word], path: str) -> list[Any]:
    """The values that flag, override (all of a sweep) or file give to a config path; none where it is left alone."""
    if path in choices.flags:
        return [choices.flags[path]]
    group = path.partition(".")[0]
    if typed := [word for word in words if word.key in (path, group)]:
        return [value for word in typed if word.key == path for value in word.values if value is not None]
    file = read_config_file(choices.file).values if choices.file is not None else {}
    return [file[path]] if file.get(path) is not None else []


def _sweep_dir(choices: Choices, words: Sequence[Word]) -> list[str]:
    """--output-path is the sweep's folder; each job works in a folder below it."""
    stated = _stated(choices, words, "output.path")
    if not stated:
        return []
    if any(word.key == "hydra.sweep.dir" for word in words):
        raise UserError("output.path and hydra.sweep.dir both name the folder of the sweep; give one")
    if "${" in str(stated[0]) and not any(word.key == "output.path" for word in words):  # which Hydra would read
        raise UserError(f"output.path is {stated[0]}: the folder of a sweep cannot have ${{ in its name")
    quoted = os.path.expanduser(stated[0]).replace("\\", "\\\\").replace('"', '\\"')
    return [f'hydra.sweep.dir="{quoted}"']
