"""Composes the YAML files of `conf/`, the --config file and the flags into a `Run`, checked against the schema.

Precedence, lowest first: schema < model preset < group options < experiment < --config file < overrides, flags and
sweep choices. `Composed.sources` gives the source of the value at each config path.
"""

import dataclasses
import os.path
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from sglang_gen import env
from sglang_gen.config import presets, record_limits
from sglang_gen.config.choices import Choices
from sglang_gen.config.config_file import FileValues, read_config_file
from sglang_gen.config.hydra_errors import user_errors
from sglang_gen.config.hydra_loader import Loader, group_options, line_of, open_loader, parse
from sglang_gen.config.overrides import check_option, check_overrides, covers, dict_path
from sglang_gen.config.schema import LOCAL, Run, get, leaves, put
from sglang_gen.errors import UserError


@dataclass(frozen=True)
class Composed:
    """A composed run, the source of each value, and the notices and warnings of the composition."""

    run: Run
    sources: dict[str, str]
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    versions: dict[str, str | None] = field(default_factory=dict)  # package versions in the repeated record
    inputs: dict[str, str] = field(default_factory=dict)  # digests of the record's input files
    in_sweep: bool = False  # True for a job of a multirun
    place: env.Torchrun | None = None  # rank of this process if torchrun started it


def compose(choices: Choices, loader: Loader | None = None) -> Composed:
    """Compose the user's choices into one `Run`. Raises UserError, which suggests a legal name for an unknown key.

    The jobs of a sweep share a `loader`, which reads the YAML files once.
    """
    composed, named = compose_partly(choices, loader)
    notices = _complete(composed.run, composed.sources, named, choices.seed)
    return dataclasses.replace(composed, notices=(*notices, *composed.notices))


def compose_partly(choices: Choices, loader: Loader | None = None) -> tuple[Composed, bool]:
    """The composition before prompt and seed are filled in, and whether an option of the group `model` was chosen."""
    loader = loader or open_loader(choices.config_dir)
    words = parse(loader, choices.overrides)
    options_of = group_options(loader, choices)
    check_overrides(words, choices.flags, options_of)
    file = read_config_file(choices.file) if choices.file is not None else FileValues()
    typed = {word.key: word for word in words if not word.is_hydra}
    stated = {key: word.values[0] for key, word in typed.items() if word.values}
    covered = {*typed, *choices.flags}
    values = {path: value for path, value in file.values.items() if not covered & {path, path.partition(".")[0]}}
    options = {group: option for group, option in file.options.items() if group not in typed}
    withheld = withheld_values(choices, file, covered)
    for group, option in options.items():
        check_option(group, option, options_of(group))
    implied = None
    if "model" in stated or "model" not in typed:  # not ~model
        given = {**values, **stated, **choices.flags}
        implied = presets.option(stated.get("model", options.get("model")), given, choices.config_dir)
    chosen = {**options, **({"model": implied} if implied else {})}
    lines = [*(f"{group}={option}" for group, option in chosen.items()), *map(line_of, words)]
    with user_errors():
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
    if implied not in (None, "custom") and run.model.path is not None:  # None: the embedded model
        notices.append(f"The settings of the preset '{implied}' apply to {run.model.path}")
    yielded = [path for path in file.values if not covered & {path} and path not in values]
    if yielded:
        notices.append(f"Group options on the command line replace {', '.join(yielded)} of {choices.file}")
    warnings = record_limits.warnings(withheld, str(choices.file))
    composed = Composed(run, sources, tuple(notices), tuple(warnings), file.versions, file.inputs)
    return composed, "model" in typed or "model" in file.options


def withheld_values(choices: Choices, file: FileValues, covered: Collection[str]) -> dict[str, Any]:
    """Values that a record may not set and the command line did not set, by config path.

    Raises UserError if the run cannot work without one of them.
    """
    withheld = {path: value for path, value in file.withheld.items() if not {path, path.partition(".")[0]} & {*covered}}
    record_limits.check_trusted_code(
        withheld, str(choices.file), choices.flags.get("model.path", file.values.get("model.path"))
    )
    return withheld


def _merged(composed: Any, value: Any, path: str, typed: Iterable[str]) -> Any:
    """`value`; a mapping is merged with the composed one, in which keys that were overridden singly take precedence."""
    if not isinstance(value, dict) or dict_path(path) is None:
        return value
    overridden = {key.removeprefix(f"{path}.").partition(".")[0] for key in typed if key.startswith(f"{path}.")}
    return {**composed, **{name: item for name, item in value.items() if name not in overridden}}


def _sources(loader: Loader) -> dict[str, str]:
    """For each config path the kind of YAML file that set it last: default, preset, group or experiment."""
    sources = dict.fromkeys(leaves(), "default")
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
            for path in sources:
                if covers(name, path) or covers(path, name):
                    sources[path] = label
    return sources


def _flatten(content: Any, prefix: str) -> list[str]:
    if not isinstance(content, dict) or not content:
        return [prefix] if prefix else []
    inner = f"{prefix}." if prefix else ""
    return [path for name, value in content.items() for path in _flatten(value, f"{inner}{name}")]


def _to_run(cfg: DictConfig, later: Mapping[str, Any]) -> Run:
    """Convert the composed job configuration to a `Run`, and change it. Missing values and interpolations raise
    OmegaConf's errors.

    `later` holds the values of flags and files, which the caller sets verbatim afterwards. They are set here too, if
    they are plain, so that interpolations (`width: ${sampling.height}`) resolve to them.
    """
    with read_write(cfg), open_dict(cfg):
        del cfg["hydra"]
        for path, value in later.items():
            if isinstance(value, (int, float, Enum)) or (isinstance(value, str) and not {"$", "?"} & set(value)):
                OmegaConf.update(cfg, path, value)
    run = OmegaConf.to_object(cfg)
    if not isinstance(run, Run):
        raise UserError("The primary configuration does not build on 'config': put '- config' first in its defaults")
    return run


def _complete(run: Run, sources: dict[str, str], named: bool, seed: int | None) -> list[str]:
    """Fill in the example prompt of a chosen preset and the sweep's seed. Returns notices about both."""
    notices = []
    if run.model.path is None and run.model.preset == env.EMBEDDED_MODEL and not named:
        notices.append(f"No model given: using the embedded model '{env.EMBEDDED_MODEL}'")
    if run.quality.manifest is not None:  # its lines are the prompts, and they do not depend on a drawn seed
        run.sampling.seed = run.sampling.seed or 0
    elif run.sampling.prompt is None and not run.sampling.prompts_file and not run.sampling.prompts:
        if not (named and run.model.example_prompt):
            raise UserError('A prompt is needed: --prompt "a description of the image"')
        run.sampling.prompt = run.model.example_prompt
        sources["sampling.prompt"] = "preset"
        notices.append(f"No prompt given: using the example prompt of the preset '{run.model.preset}'")
    if run.sampling.seed is None and seed is not None:
        run.sampling.seed = seed
        notices.append(f"Multirun: jobs without a seed use seed {seed}")
    return notices
