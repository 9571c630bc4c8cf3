"""The search space: the base configuration of a request, and candidates that the plan accepts on this machine."""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from sglang_gen import env, log
from sglang_gen.config import manifest
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import Composed, compose, compose_partly
from sglang_gen.config.hydra_loader import Loader, group_options, open_loader, parse
from sglang_gen.config.schema import Quality, Run, Tracker, get, plain, user_gave
from sglang_gen.errors import UserError
from sglang_gen.hub import resolve
from sglang_gen.plan import checks, make
from sglang_gen.plan.guidance import guided_steps
from sglang_gen.plan.quality_request import AUTO
from sglang_gen.tune import axes as tuned_axes
from sglang_gen.tune import pruning
from sglang_gen.tune.candidate import BASE, Candidate
from sglang_gen.tune.tuning_options import TuningOptions
from sglang_gen.types import ModelCard, Plan

# Settings of a run that a search decides itself.
DECIDED = (
    "output.perf_dump_path", "output.latents", "perf.repeat", "perf.interleave", "perf.objective", "perf.trace",
    "perf.blocks", "perf.tag", "tracking.name", "sweep.resume", "sweep.skip_refused", "sweep.fresh",
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A candidate as a run, and its plan."""

    composed: Composed
    plan: Plan


class Space:
    """The candidates of a request. Everything is decided without reading a weight."""

    def __init__(self, choices: Choices, options: TuningOptions) -> None:
        self.options, self.loader = options, open_loader(choices.config_dir)
        for word in parse(self.loader, choices.overrides):
            if word.is_sweep:
                raise UserError(f"'{word.text}' is a sweep; leave the setting out to search it, or give it one value")
        self.choices = _with_samples(choices, self.loader)
        composed = compose(self.choices, self.loader)
        self.stated_reference = None if composed.run.quality.reference == AUTO else composed.run.quality.reference
        self.base = _prepared(composed)
        _check_decided(self.base)
        self.card: ModelCard = resolve.find(self.base.run.model, weights=False)
        self._planned: dict[Candidate, Planned | str] = {BASE: self._plan_base()}
        self._slowness: dict[Candidate, float] = {}
        self._same = {_identity(self.base_plan): BASE}  # the first candidate of each plan
        fixed = tuned_axes.fixed_axes(self.choices, self.base.sources)
        chosen = tuned_axes.select(options.axes, fixed)
        self.fixed = sorted(fixed)
        self.options_of = group_options(self.loader, self.choices)
        self.axes = {axis.name: self._with_settings(axis.words(self.base.run, self.options_of)) for axis in chosen}
        self.baseline = self._plan_baseline() if options.baseline else None

    @property
    def base_plan(self) -> Plan:
        return self.planned(BASE).plan

    @property
    def images(self) -> int:
        return sum(map(len, self.base_plan.batches))

    def planned(self, candidate: Candidate) -> Planned:
        """The run of a candidate that the plan accepts."""
        found = self._of(candidate)
        if isinstance(found, str):
            raise UserError(found)
        return found

    def refusal(self, candidate: Candidate) -> str | None:
        """Why a candidate is not measured: the plan refuses it, it equals another, or it needs too much memory."""
        found = self._of(candidate)
        return found if isinstance(found, str) else None

    def slowness(self, candidate: Candidate) -> float | None:
        """How many times as long as the base a candidate is predicted to take, if it is clearly slower."""
        self._of(candidate)
        return self._slowness.get(candidate)

    def reference(self) -> Composed:
        """The run whose exact images are the reference: the base, in float32 if the search may change the dtype."""
        words = ("dtype=float32",) if "dtype" in self.axes else ()
        composed = _prepared(compose(self._choices(words), self.loader))
        composed.run.quality.reference = AUTO
        return composed

    def _with_settings(self, changes: Iterable[str]) -> tuple[str, ...]:
        """The changes of an axis and, for options of the group `cache`, further settings of their method."""
        found = list(changes)
        for change in [each for each in found if each.startswith("cache=")]:
            method = compose(self._choices((change,)), self.loader).run.cache.method
            found += [f"{change} {settings}" for settings in tuned_axes.CACHE_SETTINGS.get(method, ())]
        return tuple(found)

    def _of(self, candidate: Candidate) -> Planned | str:
        if candidate not in self._planned:
            self._planned[candidate] = self._judged(candidate)
        return self._planned[candidate]

    def _judged(self, candidate: Candidate) -> Planned | str:
        try:
            with _warnings() as told:
                found = self._plan(self._choices(candidate.words))
        except UserError as error:
            return str(error)
        idle = [line for line in (*found.plan.warnings, *told)
                if "no effect" in line and line not in self.base_plan.warnings]  # fmt: skip
        if idle:
            return idle[0]
        same = self._same.setdefault(_identity(found.plan), candidate)
        if same != candidate:
            return f"it is the same as {same}"
        if self.options.by_processor and found.plan.layout.ranks > 1:
            return "several processes cannot be compared by processor time"
        shares_images = self.base_plan.layout.dp == 1 and tuned_axes.THROUGHPUT not in self.axes
        if found.plan.layout.dp > 1 and shares_images:
            return "data parallelism makes no image faster; --axes with throughput searches it"
        against = pruning.obstacles(found.plan, self.base_plan, self.options.max_memory)
        if against.slowness is not None:
            self._slowness[candidate] = against.slowness
        return against.refusal or found

    def _choices(self, words: tuple[str, ...]) -> Choices:
        return replace(self.choices, overrides=(*self.choices.overrides, *words))

    def _plan(self, choices: Choices) -> Planned:
        """Raises UserError for what the plan or its backend refuses."""
        from sglang_gen.backends.preflight import check_backend

        composed = _prepared(compose(choices, self.loader))
        checks.check_request(composed)
        plan = make.make_plan(composed, self.card)
        check_backend(plan, warn=True)
        return Planned(composed, plan)

    def _plan_base(self) -> Planned:
        """Raises UserError if the base configuration cannot be carried out or makes no images."""
        planned = self._plan(self.choices)
        asked = replace(planned.composed, run=replace(planned.composed.run, quality=_compared(planned.composed.run)))
        try:
            plan = make.make_plan(asked, self.card)
            checks.check_request(asked)
            from sglang_gen.backends.preflight import check_backend

            check_backend(plan)
        except UserError as error:
            raise UserError(str(error).replace("quality.reference compares", "--min-psnr compares")) from None
        if self.options.by_processor and (plan.device != "cpu" or plan.layout.ranks > 1):
            raise UserError("--time processor is that of one process on a CPU; leave it out")
        return planned

    def _plan_baseline(self) -> Candidate:
        """The configuration of --baseline, which replaces settings of the request."""
        words = self.options.baseline
        keys = {word.partition("=")[0].lstrip("+~") for word in words}
        kept = tuple(
            word
            for word in self.choices.overrides
            if word.partition("=")[0].lstrip("+~") not in keys or word.startswith("quality.")
        )
        flags = {path: value for path, value in self.choices.flags.items() if not _covered(path, keys)}
        baseline = Candidate((("baseline", " ".join(words)),), is_baseline=True)
        try:
            self._planned[baseline] = self._plan(replace(self.choices, overrides=(*kept, *words), flags=flags))
        except UserError as error:
            raise UserError(f"--baseline: {error}") from None
        if sum(map(len, self.planned(baseline).plan.batches)) != self.images:
            raise UserError("--baseline sets other samples than the base, which cannot be compared; leave them out")
        return baseline


def _covered(path: str, keys: set[str]) -> bool:
    return path in keys or path.partition(".")[0] in keys


def _compared(run: Run) -> Quality:
    return replace(run.quality, reference=run.quality.reference or AUTO)


def _with_samples(choices: Choices, loader: Loader) -> Choices:
    """The choices with a manifest of the package for a model that has one, if the request names no prompt."""
    partly, _ = compose_partly(choices, loader)
    sampling, quality = partly.run.sampling, partly.run.quality
    if sampling.prompt is not None or sampling.prompts or sampling.prompts_file or quality.manifest is not None:
        return choices
    own = [name for name in manifest.shipped() if partly.run.model.path is None and
           name.startswith(partly.run.model.preset or "\0")]  # fmt: skip
    if not own:
        return choices
    if user_gave(partly.run, partly.sources, "sampling.num_samples"):
        raise UserError(f"--num-samples needs a prompt: without one, the samples are those of the manifest {own[0]}")
    return replace(choices, overrides=(*choices.overrides, f"quality.manifest={own[0]}"))


def _prepared(composed: Composed) -> Composed:
    """The run with a seed, so that its images can be compared, and without a reference, which the search sets."""
    run = composed.run
    sampling = run.sampling if run.sampling.seed is not None else replace(run.sampling, seed=0)
    if run.quality.manifest is not None:  # an experiment may set a number that the manifest decides
        sampling = replace(sampling, num_samples=1)
    return replace(composed, run=replace(run, sampling=sampling, quality=replace(run.quality, reference=None)))


def _check_decided(composed: Composed) -> None:
    """Raises UserError for a setting that the search decides."""
    if env.torchrun() is not None:
        raise UserError("sglang tune starts the processes of its candidates itself: run it without torchrun")
    for path in DECIDED:
        if user_gave(composed.run, composed.sources, path):
            raise UserError(f"sglang tune decides {path} itself; leave it out")
    if get(composed.run, "tracking.name") is not Tracker.none:
        raise UserError("sglang tune keeps its results in its own folder; leave out tracking")


def _identity(plan: Plan) -> str:
    """The settings that a plan carries out, with what `auto` stands for."""
    run = plain(plan.run)
    for group in ("output", "perf", "quality", "tracking", "sweep", "log_level", "dry_run", "machine"):
        del run[group]
    run["backend"]["name"], run["dtype"], run["parallel"] = plan.backend, plan.dtype, plain(plan.layout)
    sampling, batches = run["sampling"], [len(batch) for batch in plan.batches]
    del sampling["guidance_interval"], sampling["batch_size"]  # what they come to is compared
    steps = sampling["num_inference_steps"]
    guided = list(guided_steps(plan.run.sampling.guidance_interval, steps))
    return json.dumps([run, guided, batches, plan.matmul, plan.device], sort_keys=True, default=str)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Context in which warnings are collected in place of being logged."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    found: list[str] = []
    with log.redirected(Collector()):
        yield found
