"""The experiment file: a candidate as an option of the group `experiment`, which `sglang generate` composes.

The file has the group options of the request and of the candidate, and the values in which their composition still
differs from the candidate's run. So the composed run is that of the candidate, whatever set it: flags, overrides,
files or another experiment.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_gen import files
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose_partly
from sglang_gen.config.hydra_loader import open_loader
from sglang_gen.config.overrides import covers
from sglang_gen.config.schema import Run, get, leaves, plain
from sglang_gen.errors import UserError
from sglang_gen.tune.candidate import Candidate
from sglang_gen.tune.space import Space

EXPERIMENT_HEADER = "# @package _global_\n# Written by sglang tune"
# What is generated, where it is saved and what is measured is not part of the experiment.
OUTSIDE = (
    "sampling.prompt", "sampling.prompts", "sampling.prompts_file", "sampling.seed", "sampling.num_samples",
    "sampling.image_path", "sampling.latents", "output", "perf", "quality", "tracking", "sweep", "machine", "dry_run",
    "log_level",
)  # fmt: skip
GROUPS_OUTSIDE = ("output", "perf", "quality", "tracking", "sweep", "machine", "experiment")


def check_experiment(path: Path, options: list[str]) -> None:
    """Raises UserError if the name belongs to an experiment that `sglang tune` did not write; `options` are those of
    the group."""
    if not path.exists():
        if path.stem in options:
            raise UserError(f"--name: there is an experiment '{path.stem}' already; give another name")
        return
    if not path.is_file() or not path.read_bytes().startswith(EXPERIMENT_HEADER.encode()):
        raise UserError(f"--name: {path} exists and was not written by sglang tune; give another name")


def write_experiment(path: Path, space: Space, candidate: Candidate, comments: list[str]) -> None:
    """Write the experiment of a candidate. Raises RunError."""
    files.save_bytes(path, experiment_text(space, candidate, comments).encode())


def experiment_text(space: Space, candidate: Candidate, comments: list[str]) -> str:
    """The YAML of an experiment; `comments` are lines about how it was found."""
    import yaml

    run = space.planned(candidate).composed.run
    options = _group_options(space, candidate)
    values = _differing(run, _composed(space, options))
    content: dict[str, Any] = {}
    if options:
        content["defaults"] = [{f"override /{group}": option} for group, option in options.items()]
    content |= values
    head = [EXPERIMENT_HEADER, *(f"# {line}" for line in comments)]
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110) if content else "{}\n"
    return "\n".join([*head, body])


def round_trip(space: Space, candidate: Candidate, config_dir: Path, name: str) -> list[str]:
    """Config paths in which the composed experiment differs from the candidate's run; none if it was written well."""
    loader = open_loader(str(config_dir))
    composed, _ = compose_partly(Choices((f"experiment={name}",), config_dir=str(config_dir)), loader)
    return list(_leaf_differences(space.planned(candidate).composed.run, composed.run))


def _group_options(space: Space, candidate: Candidate) -> dict[str, str]:
    """The options of groups that the request and the candidate choose, by group."""
    found: dict[str, str] = {}
    for word in (*space.choices.overrides, *candidate.words):
        group, _, option = word.partition("=")
        if option in space.options_of(group) and group not in GROUPS_OUTSIDE:
            found[group] = option
    return found


def _composed(space: Space, options: Mapping[str, str]) -> Run:
    words = tuple(f"{group}={option}" for group, option in options.items())
    composed, _ = compose_partly(Choices(words, config_dir=space.choices.config_dir), space.loader)
    return composed.run


def _leaf_differences(run: Run, other: Run) -> dict[str, Any]:
    return {
        path: get(run, path)
        for path in leaves()
        if not any(covers(outside, path) for outside in OUTSIDE) and plain(get(run, path)) != plain(get(other, path))
    }


def _differing(run: Run, other: Run) -> dict[str, Any]:
    """The values of `run` that differ from those of `other`, nested by group."""
    nested: dict[str, Any] = {}
    for path, value in _leaf_differences(run, other).items():
        group, _, name = path.rpartition(".")
        target = nested.setdefault(group, {}) if group else nested
        target[name] = _literal(plain(value))
    return nested


def _literal(value: Any) -> Any:
    """A value in which OmegaConf reads no interpolation."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, dict):
        return {name: _literal(item) for name, item in value.items()}
    return [_literal(item) for item in value] if isinstance(value, list) else value
