"""Composition: YAML of `conf/` against the schema, then file values, then flags; plain dataclasses come out.

Precedence, lowest first: schema < model preset < group options < experiment < --config file < overrides, flags and
sweep choices. `Composed.sources` says for every config path which of these its value came from.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from sglang_gen import env, presets
from sglang_gen.config_file import FileValues, read_config_file
from sglang_gen.errors import UserError, first_line, nearest
from sglang_gen.flags import BY_PATH, FLAGS
from sglang_gen.schema import Run, leaves, plain, put

# Groups whose option is the choice of one key: the flag and the option then name the same thing.
SELECTORS = {"backend": "backend.name", "attention": "attention.backend"}


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
    versions: dict[str, str | None] = field(default_factory=dict)  # of the record being repeated


def compose(choices: Choices) -> Composed:
    """One `Run` from what the user typed. Raises UserError, with the nearest legal name for an unknown key."""
    try:
        return _compose(choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error)) from error


def _compose(choices: Choices) -> Composed:
    loader = _loader(choices.config_dir)
    overrides = _parse(loader, choices)
    for override in overrides:
        if override.is_sweep_override():
            raise UserError(f"'{override.input_line}' is a sweep: add -m for one run per value, or quote the value")
    _check(overrides, choices.flags, loader)
    file = read_config_file(choices.file) if choices.file else FileValues()
    typed_paths = {_path(override) for override in overrides}
    covered = typed_paths | set(choices.flags)
    file_values = {path: value for path, value in file.values.items() if not covered & {path, path.partition(".")[0]}}
    options = {group: option for group, option in file.options.items() if group not in typed_paths}
    options |= _model_option(overrides, choices, file_values, options)
    words = [*(f"{group}={option}" for group, option in options.items()), *choices.overrides]
    cfg = loader.load_configuration(choices.config_name, words, run_mode=RunMode.RUN)
    sources = _sources(loader, choices.config_name, words)
    sources |= {path: "override" for path in leaves() if any(_covers(path, typed) for typed in typed_paths)}
    run = _to_run(cfg)
    for values, source in ((file_values, "file"), (choices.flags, "flag")):
        for path, value in values.items():
            put(run, path, value)
            sources[path] = source
    named = "model" in typed_paths or "model" in file.options
    notices = _complete(run, sources, named, choices.seed)
    if options.get("model") not in (None, "custom") and "model" not in file.options:
        notices += (f"The settings of the preset '{options['model']}' apply to {run.model.path}",)
    return Composed(run, sources, notices, file.versions)


def _loader(config_dir: str | None) -> ConfigLoaderImpl:
    search_path = create_config_search_path(str(env.conf_dir()))
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UserError(f"--config-dir: the folder {config_dir} does not exist")
        search_path.prepend("command-line", f"file://{Path(config_dir).absolute()}")
    ConfigStore.instance().store(name="schema", node=Run, provider="schema")
    return ConfigLoaderImpl(config_search_path=search_path)


def _parse(loader: ConfigLoaderImpl, choices: Choices) -> list[Override]:
    for word in choices.overrides:
        if "=" not in word and not word.startswith("~"):
            raise UserError(f"'{word}' is neither an option nor an override of the form key=value")
    parser = OverridesParser.create(config_loader=loader)
    found = []
    for word in choices.overrides:
        try:
            found.append(parser.parse_override(word))
        except HydraException as error:
            raise UserError(
                f"The override '{word}' cannot be read: {first_line(error)} (quote special characters)"
            ) from error
    return found


def _path(override: Override) -> str:
    """The key of an override as a config path or group name: `sampling.seed`, `model`."""
    return str(override.key_or_group).replace("/", ".")


def _covers(outer: str, path: str) -> bool:
    """True where `path` is `outer` or lies below it."""
    return path == outer or path.startswith(f"{outer}.")


def _check(overrides: Iterable[Override], flags: Mapping[str, Any], loader: ConfigLoaderImpl) -> None:
    """Refuse unknown keys and options, and settings that are given twice, before Hydra composes."""
    kinds, groups = leaves(), set(loader.list_groups("")) - {"hydra"}
    seen: set[str] = set()
    for override in overrides:
        path = _path(override)
        if path == "hydra" or path.startswith("hydra."):
            continue
        if path in seen:
            raise UserError(f"'{path}' is overridden twice")
        seen.add(path)
        if path in flags:
            raise UserError(f"{path} is given twice, by {BY_PATH[path].option} and by the override '{path}=...'")
        if path in groups:
            _check_option(override, path, flags, loader)
        elif not any(leaf == path or (_is_dict(kind) and _covers(leaf, path)) for leaf, kind in kinds.items()):
            legal = [*kinds, *groups, *(flag.option for flag in FLAGS)]
            raise UserError(f"Unknown key '{path}'{nearest(path, legal)}")
        elif override.is_delete():
            raise UserError(f"'~{path}': a key of the schema cannot be deleted; set it to null or to its default")


def _is_dict(kind: Any) -> bool:
    return getattr(kind, "__origin__", None) is dict


def _check_option(override: Override, group: str, flags: Mapping[str, Any], loader: ConfigLoaderImpl) -> None:
    if override.is_delete():
        return
    available = loader.get_group_options(group)
    chosen = override.sweep_string_iterator() if override.is_discrete_sweep() else [override.value()]
    for option in chosen:
        if option is None and group == "experiment":
            continue
        if str(option) not in available:
            raise UserError(
                f"Unknown option '{option}' of the group '{group}'{nearest(str(option), available)}"
                f" (options: {', '.join(available)})"
            )
    selector = SELECTORS.get(group, "")
    if selector in flags:
        raise UserError(f"{BY_PATH[selector].option} and '{group}={override.value()}' both choose {selector}; give one")


def _model_option(
    overrides: Iterable[Override], choices: Choices, file_values: Mapping[str, Any], options: Mapping[str, str]
) -> dict[str, str]:
    """The option of the group `model` that a path or an id implies: {} where the user chose one or named nothing."""
    typed = {_path(override): override.value() for override in overrides if not override.is_delete()}
    given = {**file_values, **typed, **choices.flags}
    known = presets.load(choices.config_dir)
    by_id = presets.by_id(given["model.id"], known) if given.get("model.id") else None
    explicit = typed.get("model", options.get("model"))
    if given.get("model.id") is not None and by_id is None:
        legal = [preset.name for preset in known]
        raise UserError(f"No preset is named '{given['model.id']}'{nearest(str(given['model.id']), legal)}")
    if explicit is not None:
        if by_id is not None and by_id != explicit:
            raise UserError(f"model={explicit} and the model id '{given['model.id']}' name two presets; give one")
        return {}
    if by_id is not None:
        return {"model": by_id}
    if given.get("model.path") is None:
        return {}
    preset = given.get("model.preset")  # a record names the preset that it was made with
    return {"model": str(preset or presets.by_path(given["model.path"], known) or "custom")}


def _sources(loader: ConfigLoaderImpl, config_name: str, words: Sequence[str]) -> dict[str, str]:
    """For every config path the kind of YAML file that set it last: default, preset, group or experiment."""
    found = dict.fromkeys(leaves(), "default")
    plan = loader.compute_defaults_list(config_name, list(words), RunMode.RUN)
    for item in plan.defaults:
        if item.config_path is None or item.config_path.startswith("hydra/") or item.config_path == "schema":
            continue
        loaded = loader.repository.load_config(item.config_path)
        if loaded is None or not isinstance(loaded.config, DictConfig):
            continue
        label = {"model": "preset", "experiment": "experiment"}.get(item.config_path.partition("/")[0], "group")
        package = item.package or ""
        content = OmegaConf.to_container(loaded.config, resolve=False)
        for name in _flatten(content, package) if content else ():
            for path in found:
                if _covers(name, path) or _covers(path, name):
                    found[path] = label
    return found


def _flatten(content: Any, prefix: str) -> list[str]:
    if not isinstance(content, dict) or not content:
        return [prefix] if prefix else []
    inner = f"{prefix}." if prefix else ""
    return [path for name, value in content.items() for path in _flatten(value, f"{inner}{name}")]


def _to_run(cfg: DictConfig) -> Run:
    """The composed job configuration as a `Run`; missing values and interpolations raise OmegaConf's errors."""
    job = copy.deepcopy(cfg)
    with read_write(job), open_dict(job):
        del job["hydra"]
    run = OmegaConf.to_object(job)
    if not isinstance(run, Run):
        raise UserError("The primary configuration does not build on 'config': put '- config' first in its defaults")
    return run


def _complete(run: Run, sources: dict[str, str], named: bool, seed: int | None) -> tuple[str, ...]:
    """Fill in the example prompt of a named preset and the sweep's seed; the sentences that say so."""
    notices = []
    if sources["model.path"] in ("default", "preset") and run.model.preset == "landscape" and not named:
        notices.append("No model given: using the embedded model 'landscape'")
    if run.sampling.prompt is None and not run.sampling.prompts_file and not run.sampling.prompts:
        if not (named and run.model.example_prompt) or sources["model.path"] in ("flag", "override", "file"):
            raise UserError('A prompt is needed: --prompt "a description of the picture"')
        run.sampling.prompt = run.model.example_prompt
        sources["sampling.prompt"] = "preset"
        notices.append(f"No prompt given: using the example prompt of the preset '{run.model.preset}'")
    if run.sampling.seed is None and seed is not None:
        run.sampling.seed = seed
    return tuple(notices)


def _sentence(error: Exception) -> str:
    """One sentence for an error of Hydra or OmegaConf, its place in the configuration included."""
    text = first_line(error)
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        text = f"{text.rstrip('.')}: {first_line(cause)}"
    key = getattr(error, "full_key", None)
    return f"{text} (at {key})" if key and key not in text else text


def show(choices: Choices, given: Mapping[str, Any]) -> str:
    """What --cfg, --info and --hydra-help print."""
    hydra = Hydra(task_name="generate", config_loader=_loader(choices.config_dir))
    mode = RunMode.MULTIRUN if given.get("multirun") else RunMode.RUN
    try:
        if given.get("hydra_help"):
            return _hydra_help(hydra)
        if given.get("info"):
            hydra.show_info(given["info"], choices.config_name, list(choices.overrides), mode)
            return ""
        return _show_cfg(hydra, choices, given, mode)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error)) from error


def _hydra_help(hydra: Hydra) -> str:
    groups = hydra.config_loader.list_groups("hydra")
    lines = [f"  hydra/{name}: {', '.join(hydra.config_loader.get_group_options(f'hydra/{name}'))}" for name in groups]
    return "Hydra's own config groups, chosen as overrides (hydra/launcher=basic):\n" + "\n".join(lines)


def _show_cfg(hydra: Hydra, choices: Choices, given: Mapping[str, Any], mode: RunMode) -> str:
    import yaml

    parts: dict[str, Any] = {}
    if given["cfg"] in ("job", "all"):
        parts = plain(compose(choices).run)
    if given["cfg"] in ("hydra", "all"):
        cfg = hydra.compose_config(choices.config_name, list(choices.overrides), mode, with_log_configuration=False)
        HydraConfig.instance().set_config(cfg)
        parts["hydra"] = OmegaConf.to_container(cfg.hydra, resolve=bool(given.get("resolve")), enum_to_str=True)
    for name in [] if given.get("package") in (None, "_global_") else given["package"].split("."):
        if not isinstance(parts, dict) or name not in parts:
            raise UserError(f"--package: the configuration has no '{given['package']}'")
        parts = parts[name]
    return yaml.safe_dump(parts, sort_keys=False, allow_unicode=True).rstrip()


def is_multirun(choices: Choices, asked: bool) -> bool:
    """True where -m was given or the configuration sets hydra.mode to MULTIRUN (a sweep file does)."""
    mode_typed = any(word.lstrip("+").startswith("hydra.mode=") for word in choices.overrides)
    if asked or not (mode_typed or choices.config_dir or choices.config_name != "config"):
        return asked
    hydra = Hydra(task_name="generate", config_loader=_loader(choices.config_dir))
    try:
        return bool(hydra.get_mode(choices.config_name, list(choices.overrides)) == RunMode.MULTIRUN)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error)) from error


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
        choices = dataclasses.replace(self.choices, overrides=overrides)
        return self.work(Job(int(hydra.job.num), Path(hydra.runtime.output_dir), overrides, choices))


def multirun(choices: Choices, work: Callable[[Job], Any]) -> list[Any]:
    """Call `work` for every job that Hydra's sweeper makes of the choices; the results in order of the jobs."""
    hydra = Hydra(task_name="generate", config_loader=_loader(choices.config_dir))
    overrides = _parse(hydra.config_loader, choices)
    try:
        _check(overrides, choices.flags, hydra.config_loader)
        words = [*choices.overrides, *_sweep_dir(choices, overrides)]
        batches = hydra.multirun(choices.config_name, _Task(choices, work), words, with_log_configuration=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error)) from error
    return [job.return_value for batch in batches for job in batch]


def _sweep_dir(choices: Choices, overrides: Iterable[Override]) -> list[str]:
    """--output-path is the sweep's folder; each job works in a folder below it."""
    typed = {_path(override): override.value() for override in overrides if not override.is_delete()}
    folder = choices.flags.get("output.path", typed.get("output.path"))
    if folder is None or "hydra.sweep.dir" in typed:
        return []
    quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    return [f'hydra.sweep.dir="{quoted}"']
