"""The command `sglang tune`: searches, then writes the experiment, tune.json and the report."""

import datetime
import json
import math
import re
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_gen import env, files, log
from sglang_gen.config.schema import SCHEMA_VERSION, user_gave
from sglang_gen.errors import RunError, UserError, in_our_words
from sglang_gen.report.job_reader import TUNING_FILE
from sglang_gen.signals import Terminated
from sglang_gen.tune.tuning_options import TuningOptions, read_tuning_options

if TYPE_CHECKING:
    from sglang_gen.config.choices import Choices
    from sglang_gen.tune.candidate import Candidate
    from sglang_gen.tune.measuring import Machine
    from sglang_gen.tune.search import Search
    from sglang_gen.tune.space import Space

PRINTED_WIDTH = 120  # if standard output is not a terminal
LEAST_PRINTED_WIDTH = 60
FEW_IMAGES = 4  # fewer say little about other prompts


@dataclass(frozen=True)
class Places:
    """Where the results go."""

    folder: Path
    config_dir: Path  # whose folder `experiment` gets the experiment
    name: str  # of the experiment

    @property
    def experiment(self) -> Path:
        return self.config_dir / "experiment" / f"{self.name}.yaml"


def tune(choices: "Choices", given: Mapping[str, Any]) -> int:
    """Carry out `sglang tune`; returns the exit code. Raises UserError, and RunError if nothing keeps the bounds."""
    started = time.perf_counter()
    options = read_tuning_options(given)
    env.prepare_libraries()
    from sglang_gen.tune.space import Space

    space = Space(choices, options)
    folder = _folder(space)
    config_dir = Path(choices.config_dir) if choices.config_dir else folder / "conf"
    places = Places(folder, config_dir, options.name or _name(space, options))
    _check(space, places)
    log.setup(space.base.run.log_level.name)
    _tell(space, options)
    if space.base.run.dry_run:
        files.print_result(_described(space))
        return 0
    from sglang_gen.launch.session import Session
    from sglang_gen.sweep import sweep_folder
    from sglang_gen.tune.measuring import Machine

    with sweep_folder.locked(folder):
        session = Session()
        try:
            return _search(space, Machine(space, folder, session, started), options, places)
        finally:
            session.close()


def _search(space: "Space", machine: "Machine", options: TuningOptions, places: Places) -> int:
    from sglang_gen.tune.candidate import Bounds, CandidateError, CandidateVerdict
    from sglang_gen.tune.search import Search

    seed = space.base.run.sampling.seed or 0
    bounds = Bounds(options.min_psnr, options.max_memory)
    search = Search(space.axes, machine, bounds, options.budget, seed, space.baseline)
    try:
        machine.prepare()
        search.run()
    except CandidateError as error:
        kind = UserError if error.status is CandidateVerdict.REFUSED else RunError
        was = "failed" if error.status is CandidateVerdict.FAILED else f"was {error.status}"
        raise kind(f"The base configuration {was}: {error.reason}") from error
    except (KeyboardInterrupt, Terminated) as stop:
        search.is_interrupted = True
        if search.trials.known:
            best = _conclude(search, space, machine, places)
            stop.add_note("no candidate had generated all images" if best is None else f"the best so far: {best}")
        raise
    if _conclude(search, space, machine, places) is None:
        from sglang_gen.tune.tuning_table import why_nothing

        raise RunError(why_nothing(search))
    return 0


def _conclude(search: "Search", space: "Space", machine: "Machine", places: Places) -> "Candidate | None":
    """Write and print what was found so far. Returns the chosen candidate; None if there is none."""
    from sglang_gen.tune.outcome import candidate_rows, outcome_dict
    from sglang_gen.tune.tuning_table import conclusion_lines, table_lines

    rows, command = candidate_rows(search), None
    conclusion = conclusion_lines(search, rows)
    if search.chosen is not None:
        command = _write_experiment(search.chosen, space, conclusion, places)
    about = {
        "schema_version": SCHEMA_VERSION,
        "name": places.name,
        "model": space.card.name,
        "reference": machine.reference,
        "time": "processor" if space.options.by_processor else "elapsed",
        "command": command,
        "conclusion": conclusion,
        "commit_hash": env.commit_hash(),
        "fixed_axes": space.fixed,
    }
    files.save_json(places.folder / TUNING_FILE, outcome_dict(search, rows, about))
    log.info(f"Candidates saved to: {places.folder / TUNING_FILE}")
    _write_report(places.folder)
    lines = [*table_lines(search, rows, _width()), "", *conclusion]
    files.print_result("\n".join([*lines, *([] if command is None else ["", f"Use it: {command}"])]))
    return search.chosen


def _write_experiment(chosen: "Candidate", space: "Space", comments: list[str], places: Places) -> str:
    """Write the experiment of the chosen candidate. Returns the command that generates with it."""
    from sglang_gen.tune.experiment_file import round_trip, write_experiment

    write_experiment(places.experiment, space, chosen, comments)
    log.info(f"Experiment saved to: {places.experiment}")
    if other := round_trip(space, chosen, places.config_dir, places.name):
        log.warning(
            f"{places.experiment} composes another {', '.join(other)} than the candidate had; set it beside the "
            "experiment"
        )
    sample = space.base_plan.batches[0][0]
    words = ["generate", "--config-dir", str(places.config_dir), f"experiment={places.name}"]
    return shlex.join(["sglang", *words, "--prompt", sample.prompt, "--seed", str(sample.seed)])


def _folder(space: "Space") -> Path:
    """The folder of the results. Raises UserError if it has those of an earlier search or a sweep."""
    base = space.base
    if not user_gave(base.run, base.sources, "output.path"):
        return Path("outputs/tune") / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path(base.run.output.path)
    files.check_folder(folder)
    taken = next((name for name in (TUNING_FILE, "0", "sweep.json") if (folder / name).exists()), None)
    if taken is not None:
        raise UserError(f"{folder} has the results of another command ({taken}); give another --output-path")
    return folder


def _name(space: "Space", options: TuningOptions) -> str:
    model = space.base.run.model
    base = model.preset or Path(model.path or "model").stem
    return re.sub(r"\W+", "_", f"{base}_{options.min_psnr:g}db", flags=re.ASCII).strip("_")


def _check(space: "Space", places: Places) -> None:
    """Raises UserError if the experiment cannot be written."""
    from sglang_gen.tune.experiment_file import check_experiment

    check_experiment(places.experiment, space.options_of("experiment"))
    if not space.base.run.dry_run:
        files.prepare_folder(places.folder)
        files.prepare_file(places.experiment)


def _tell(space: "Space", options: TuningOptions) -> None:
    """Log what is searched."""
    for notice in space.base.notices:
        log.info(notice)
    for warning in space.base_plan.warnings:
        log.warning(warning)
    memory = "" if math.isinf(options.max_memory) else f" in at most {options.max_memory / 1e9:.3g} GB"
    clock = ", by processor time" if options.by_processor else ""
    fixed = f"; the request sets {', '.join(space.fixed)}" if space.fixed else ""
    log.info(
        f"Tuning {space.card.name} over {', '.join(space.axes)}: every one of {space.images} images with at least "
        f"{options.min_psnr:g} dB{memory}, within {options.budget / 60:.3g} min{clock}{fixed}"
    )
    if space.images < FEW_IMAGES:
        log.warning(
            f"A bound over {log.quantity(space.images, 'image')} says little about other prompts; give more with "
            "quality.manifest=FILE or --num-samples"
        )


def _described(space: "Space") -> str:
    """The changes of every axis, with what the plan or an estimate says against them; JSON with dry_run=json."""
    from sglang_gen.tune.candidate import Candidate, slowness_sentence

    def against(candidate: Candidate) -> str | None:
        ratio = space.slowness(candidate)
        return space.refusal(candidate) or (None if ratio is None else slowness_sentence(ratio))

    found = {axis: {word: against(Candidate(((axis, word),))) for word in words} for axis, words in space.axes.items()}
    if space.base.run.dry_run == "json":
        return json.dumps(found, indent=2, ensure_ascii=False)
    lines = []
    for axis, refusals in found.items():
        lines.append(f"{axis}:")
        lines += [f"  {word}" + ("" if refusal is None else f": {refusal}") for word, refusal in refusals.items()]
    return "\n".join(lines)


def _width() -> int:
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return max(shutil.get_terminal_size((PRINTED_WIDTH, 0)).columns if is_terminal else PRINTED_WIDTH,
               LEAST_PRINTED_WIDTH)  # fmt: skip


def _write_report(folder: Path) -> None:
    from sglang_gen.report import vega_scripts

    if vega_scripts.missing():
        log.info(f"For a report with plots: {vega_scripts.INSTALL}, then sglang report {folder}")
        return
    from sglang_gen.report.write import write_report

    try:
        for path in write_report([folder]):
            log.info(f"Report saved to: {path}")
    except (UserError, RunError, OSError, ValueError) as error:  # the search has its results without one
        log.error(f"The report could not be written: {in_our_words(error)}")
        log.debug(traceback.format_exc())
