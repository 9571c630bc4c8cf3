"""Runs a multirun with Hydra's sweeper and launcher, which call a function for every job; each job is composed anew."""

import dataclasses
import os.path
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from sglang_gen import log
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import withheld_values
from sglang_gen.config.config_file import read_config_file
from sglang_gen.config.flags import BY_PATH
from sglang_gen.config.hydra_errors import user_errors
from sglang_gen.config.hydra_loader import Loader, group_options, line_of, open_loader, parse
from sglang_gen.config.overrides import Word, check_overrides
from sglang_gen.config.schema import Sweep
from sglang_gen.errors import UserError
from sglang_gen.files import check_file, check_folder
from sglang_gen.outputs import dump_path
from sglang_gen.sweep.recorded import recorded

OPTIMISING = re.compile(r"hydra_plugins\.hydra_(optuna|ax|nevergrad)_sweeper\.")  # sweepers that need a number


def is_multirun(choices: Choices, requested: bool) -> bool:
    """Whether -m was given (`requested`) or the configuration sets hydra.mode to MULTIRUN, as sweep files do."""
    mode_typed = any(word.lstrip("+").startswith("hydra.mode=") for word in choices.overrides)
    if not (mode_typed or choices.config_dir or choices.config_name != "config"):
        return requested
    hydra = Hydra(task_name="generate", config_loader=open_loader(choices.config_dir))
    mode = hydra.get_mode(choices.config_name, list(choices.overrides))  # None if the composition will fail
    if requested and mode_typed and mode == RunMode.RUN:
        raise UserError("--multirun and hydra.mode=RUN exclude each other")
    return requested or bool(mode == RunMode.MULTIRUN)


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its number, from 0 on, its folder, and the choices from which it is composed."""

    number: int
    folder: Path
    overrides: tuple[str, ...]
    choices: Choices
    settings: Sweep
    total: int | None  # jobs of the sweep, if they are known before it ends
    loader: Loader

    @property
    def name(self) -> str:
        """The job in log lines, which count from 1."""
        return f"Job {self.number + 1}" if self.total is None else f"Job {self.number + 1} of {self.total}"


@dataclass(frozen=True)
class Ended:
    """The folder of a job that has ended, and what its `work` returned or raised."""

    folder: Path
    result: Any


@dataclass(frozen=True)
class _Task:
    """The function that Hydra's launcher calls for each job. It composes again, to apply flags and file values."""

    choices: Choices
    work: Callable[[Job], Any]
    settings: Sweep
    total: int | None
    loader: Loader

    def __call__(self, _cfg: DictConfig) -> Any:
        hydra = HydraConfig.get()
        overrides = tuple(hydra.overrides.task)
        search = tuple(word for word in self.choices.overrides if "hydra.searchpath=" in word)
        choices = dataclasses.replace(self.choices, overrides=(*overrides, *search))
        folder, number = Path(hydra.runtime.output_dir), int(hydra.job.num)
        return self.work(Job(number, folder, overrides, choices, self.settings, self.total, self.loader))


@dataclass(frozen=True)
class Multirun:
    """A composed multirun, before its first job."""

    hydra: Hydra
    cfg: DictConfig
    choices: Choices
    settings: Sweep
    total: int | None
    objective: bool
    named: bool  # whether the user named the folder, and not by a date

    @property
    def folder(self) -> Path:
        return Path(self.cfg.hydra.sweep.dir)

    @property
    def in_process(self) -> bool:
        """Whether Hydra's launcher runs all jobs in this process, one after the other."""
        return str(OmegaConf.select(self.cfg, "hydra.launcher._target_")).startswith("hydra._internal.")

    def run(self, work: Callable[[Job], Any], seed: int, finish: Callable[[], None]) -> list[Ended]:
        """Call `work` for every job that Hydra's sweeper creates, then `finish`. Returns the jobs in order.

        `seed` is that of jobs without one. The sweeper receives the return value of `work`, which it may optimize. A
        job whose `work` raises has failed, and its result is the error, which the sweeper sees only if there is an
        objective.
        """
        choices = dataclasses.replace(self.choices, seed=seed)
        task = _Task(choices, work, self.settings, self.total, self.hydra.config_loader)
        with user_errors():
            ended = _sweep(self.hydra, self.cfg, task, self.objective, finish)
        return [Ended(Path(job.hydra_cfg.hydra.runtime.output_dir), job._return_value) for job in ended]


def prepare(choices: Choices) -> Multirun:
    """Compose and check a multirun. Raises UserError if no job of it could start."""
    hydra = Hydra(task_name="generate", config_loader=open_loader(choices.config_dir))
    words = parse(hydra.config_loader, choices.overrides)
    check_overrides(words, choices.flags, group_options(hydra.config_loader, choices), multirun=True)
    if choices.file is not None:
        withheld_values(choices, read_config_file(choices.file), {*choices.flags, *(word.key for word in words)})
    for name in _stated(choices, words, dump_path.KEY):
        dump_path.check_in_sweep(str(name))
    named = _sweep_dir(choices, words)
    lines = [*map(line_of, words), *named]
    with user_errors():
        cfg = hydra.compose_config(choices.config_name, lines, RunMode.MULTIRUN, with_log_configuration=False)
        for key in OmegaConf.select(cfg, "hydra.sweeper.params") or {}:
            if (flag := BY_PATH.get(str(key).lstrip("+"))) and flag.path in choices.flags:
                raise UserError(f"{flag.path} is given twice, by {flag.option} and by the sweep {choices.config_name}")
        _check_sweep_dir(Path(cfg.hydra.sweep.dir))
        stated = _stated(choices, words, "perf.objective") or [OmegaConf.select(cfg, "perf.objective")]
        sweeper = str(OmegaConf.select(cfg, "hydra.sweeper._target_"))
        if OPTIMISING.match(sweeper) and not any(stated):
            raise UserError(_unaimed(sweeper, " (perf.objective is not set)"))
        by_word = any(word.key == "hydra.sweep.dir" and "${" not in word.text for word in words)
        return Multirun(hydra, cfg, choices, _settings(choices, words, cfg), _total(hydra, cfg, sweeper), any(stated),
                        bool(named) or by_word)  # fmt: skip


def _settings(choices: Choices, words: Sequence[Word], cfg: DictConfig) -> Sweep:
    """The group `sweep`, which holds for all jobs. Raises UserError for a value that is not a bool."""
    settings = Sweep()
    for item in dataclasses.fields(Sweep):
        path = f"sweep.{item.name}"
        value = (_stated(choices, words, path) or [OmegaConf.select(cfg, path)])[0]
        if not isinstance(value, bool):
            raise UserError(f"{path} is '{value}'; it must be true or false")
        setattr(settings, item.name, value)
    return settings


def _total(hydra: Hydra, cfg: DictConfig, sweeper: str) -> int | None:
    """The number of jobs: that of a grid, or the trials of Optuna; None for other sweepers, which decide as they go."""
    if sweeper.startswith("hydra._internal."):
        params = (cfg.hydra.sweeper.params or {}).items()
        lines = [*(f"{name}={value}" for name, value in params), *cfg.hydra.overrides.task]
        words = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(lines)
        return sum(map(len, BasicSweeper.split_arguments(words, None)))
    trials = OmegaConf.select(cfg, "hydra.sweeper.n_trials")
    grid = "GridSampler" in str(OmegaConf.select(cfg, "hydra.sweeper.sampler._target_"))  # which may need fewer
    return trials if OPTIMISING.match(sweeper) and isinstance(trials, int) and not grid else None


def _check_sweep_dir(folder: Path) -> None:
    """Raises UserError if multirun.yaml cannot be written as a regular file; writing to a FIFO would block."""
    check_folder(folder)
    check_file(folder / "multirun.yaml")


def _sweep(
    hydra: Hydra, cfg: DictConfig, task: "_Task", objective: bool, finish: Callable[[], None]
) -> list[JobReturn]:
    """`Hydra.multirun` that also calls the callbacks' on_multirun_end if a signal or a job ends the sweep early.

    `finish` is called before the callbacks. Returns the jobs that have ended, in order, instead of the sweeper's own
    return value.
    """
    name = str(OmegaConf.select(cfg, "hydra.sweeper._target_"))
    basic, ended, plugins = name.startswith("hydra._internal."), list[JobReturn](), Plugins.instance()
    callbacks = Callbacks(cfg)
    callbacks.on_multirun_start(config=cfg, config_name=cfg.hydra.job.config_name)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    words = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
    try:
        with recorded(plugins, ended, failures=objective and not basic):
            sweeper = plugins.instantiate_sweeper(config=cfg, hydra_context=context, task_function=task)
            log.adopt_libraries()  # Optuna prints a line for each study and trial
            sweeper.sweep(arguments=words)
        finish()
    except (TypeError, ValueError, AssertionError) as error:
        measured = any(job._return_value is not None for job in ended)
        if basic or measured or not ended or isinstance(error, UserError):
            raise
        raise UserError(_unaimed(name)) from error
    finally:
        if ended or not isinstance(sys.exception(), Exception):  # otherwise no job was started
            callbacks.on_multirun_end(config=cfg, config_name=cfg.hydra.job.config_name)
    return ended


def _unaimed(name: str, reason: str = "") -> str:
    return (
        f"{name.rpartition('.')[2]} optimizes a number that each job returns, and these jobs return none{reason}: "
        "name a number of the perf dump, such as perf.objective=step_ms, and run without dry_run"
    )


def _stated(choices: Choices, words: Sequence[Word], path: str) -> list[Any]:
    """Values that a flag, an override (all values of a sweep) or the file sets for a config path; [] if none does."""
    if path in choices.flags:
        return [choices.flags[path]]
    group = path.partition(".")[0]
    if typed := [word for word in words if word.key in (path, group)]:
        return [value for word in typed if word.key == path for value in word.values if value is not None]
    file = read_config_file(choices.file).values if choices.file is not None else {}
    return [file[path]] if file.get(path) is not None else []


def _sweep_dir(choices: Choices, words: Sequence[Word]) -> list[str]:
    """The override that makes --output-path the folder of the sweep, in which each job has its own folder."""
    stated = _stated(choices, words, "output.path")
    if not stated:
        return []
    if any(word.key == "hydra.sweep.dir" for word in words):
        raise UserError("output.path and hydra.sweep.dir both name the folder of the sweep; give one")
    if "${" in str(stated[0]) and not any(word.key == "output.path" for word in words):  # Hydra would interpolate it
        raise UserError(f"output.path is {stated[0]}: the folder of a sweep cannot have ${{ in its name")
    quoted = os.path.expanduser(stated[0]).replace("\\", "\\\\").replace('"', '\\"')
    return [f'hydra.sweep.dir="{quoted}"']
