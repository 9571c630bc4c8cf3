"""Benchmarks whole generations of both backends, with random weights or those of the embedded model.

    python -m tools.bench.pictures                                  # the embedded model
    python -m tools.bench.pictures --work tiny --rounds 1           # takes seconds, to see that it works
    python -m tools.bench.pictures --device cuda --work NAME,NAME --rounds 1 --pictures 5 --folder bench

`sglang generate` itself is timed: text encoders, scheduler, guidance, all steps, decoding. Compared are the native
engine, eager and compiled and on a GPU also as CUDA graphs, and diffusers' pipeline, eager and with torch.compile. All
numbers are from the perf dumps of the runs; denoising is synchronized after every step in all of them.

Six pipelines of 34 GB each do not fit on one GPU. So the entries are not interleaved image by image: a
round is one process per entry, one after the other, starting with another entry each time, and a process loads the
model, warms up untimed and generates `--pictures` images. Images of one process are correlated, so each round counts as
one observation, the median of its images. With a single round the images are the observations, and the interval does
not include differences between processes. With `--folder` models and dumps are kept, and a later call adds its rounds
to those of the same code and machine, so `--work` and `--rounds` can divide the job among calls; `--rounds 0` prints
the table of the existing dumps. The largest model takes 34 GB there; without `--folder` a work's model is deleted when
its table is printed.

The exit code is 1 if a run of the native engine failed. The table says which runs of diffusers failed.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from sglang_gen import env
from sglang_gen.families import registry
from sglang_gen.families.contract import Spec
from sglang_gen.families.examples_contract import RunBenchmark
from sglang_gen.perf.quality import psnr
from sglang_gen.perf.statistics import judge
from tools.bench import folders, works

PROMPT, SEED, WARMUP_STEPS = "A serene landscape with mountains and a lake at sunset", 42, 2
ENTRIES: Mapping[str, tuple[str, ...]] = {
    "sglang": ("backend=sglang",),
    "sglang-regional": ("backend=sglang", "compile=regional"),
    "sglang-graphs": ("backend=sglang", "compile=graphs"),
    "sglang-regional-graphs": ("backend=sglang", "compile=regional", "compile.cuda_graphs=true"),
    "diffusers": ("backend=diffusers",),
    "diffusers-compile": ("backend=diffusers", "compile=full"),
}
OURS, REFERENCE = "sglang", "diffusers"  # the entry for ratios of times, and the entry for comparing images
ON_GPU = ("sglang-graphs", "sglang-regional-graphs")
Dump = dict[str, Any]
Run = Callable[[Sequence[str], Path], str | None]


@dataclass(frozen=True)
class Generation:
    """A generation to benchmark: words of the command, the model, and the target for its denoising time on an H200."""

    title: str
    words: tuple[str, ...]
    work: Callable[[], works.Work] | None = None  # one evaluation of the network; None if weights are not random
    changes: folders.Configs = field(default_factory=dict)  # to the preset's configs
    target: float | None = None  # seconds

    @property
    def preset(self) -> str:
        return self.words[0].removeprefix("model=")


def _generation(spec: Spec, run: RunBenchmark) -> Generation:
    """The generation of a family's benchmark."""
    settings = {"height": run.side, "width": run.side, "num_inference_steps": run.steps}
    words = (f"model={run.preset}", *(f"sampling.{name}={value}" for name, value in settings.items()))
    work = partial(works.work_of, spec, run.network, run.changes.get(spec.network))
    return Generation(run.title, words, work, run.changes, run.target)


WORKS: Mapping[str, Generation] = {
    "landscape": Generation("landscape, 128 x 128, 28 steps with guidance", ("model=landscape",)),
    **{name: _generation(spec, run) for spec in registry.specs() for name, run in registry.examples(spec).runs.items()},
}
TINY = WORKS["tiny"].changes


def model_of(generation: Generation, folder: Path, device: str) -> tuple[str, ...]:
    """The words of the command that name the model; a model with random weights is written first."""
    if generation.work is None:
        return ()
    work = generation.work()

    def check(network: Any) -> None:
        works.check_activations(work, network, works.their_arguments(work, torch.bfloat16, device))

    return ("--model-path", str(folders.write(generation.preset, folder / "model", device, generation.changes, check)))


def generate(words: Sequence[str], place: Path) -> str | None:
    """Run `sglang generate` in a new process with its log in `place`; returns the failure, or None."""
    place.mkdir(parents=True)
    with (place / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "sglang_gen", "generate", *words]
        code = subprocess.run(command, env=env.rank_variables(threads=None), stdout=log, stderr=log).returncode
    said = (place / "log.txt").read_text().strip().splitlines()
    return f"exit code {code}: {said[-1] if said else 'it said nothing'}" if code else None


def rounds_of(
    words: Sequence[str], names: Sequence[str], rounds: int, folder: Path, run: Run = generate
) -> dict[str, str]:
    """Add rounds to those in the folder; returns the failures by entry. An entry that failed is not run again."""
    failed: dict[str, str] = {}
    done = max((int(path.name) for path in folder.glob("rounds/*")), default=0)
    for number in range(done, done + rounds):
        start = number % len(names)
        for name in [*names[start:], *names[:start]]:
            if name in failed:
                continue
            place = folder / "rounds" / str(number + 1) / name
            written = ("--output-path", str(place), "--perf-dump-path", str(place / "perf.json"))
            failure = run((*words, *ENTRIES[name], *written), place)
            if failure is not None:
                failed[name] = failure
            said = failure or f"denoising {median(chain(*observed([_read(place)], denoising))):.3f} s"
            print(f"round {number - done + 1} of {rounds}, {name}: {said}", file=sys.stderr, flush=True)
    return failed


def _read(place: Path) -> Dump:
    dump: Dump = json.loads((place / "perf.json").read_text())
    return dump | {"picture": place / dump["samples"][0]["file"]}


def dumps_of(folder: Path, name: str) -> list[Dump]:
    """An entry's dumps by round: those with the same code, machine and settings as the newest one."""
    places = sorted(folder.glob(f"rounds/*/{name}"), key=lambda place: int(place.parent.name))
    dumps = [_read(place) for place in places if (place / "perf.json").exists()]
    facts = [(dump["commit_hash"], dump["fingerprint"]["hash"]) for dump in dumps]
    return [dump for dump, known in zip(dumps, facts, strict=True) if known == facts[-1]]


def stage(times: Mapping[str, Any], name: str) -> float:
    """Seconds of one stage of one image."""
    return float(sum(entry["duration_ms"] for entry in times["steps"] if entry["name"] == name)) / 1000


def denoising(times: Mapping[str, Any]) -> float:
    return stage(times, "denoising")


def whole(times: Mapping[str, Any]) -> float:
    """Seconds from the prompt to the decoded image; the total of a repeat is without saving."""
    return float(times["total_duration_ms"]) / 1000


def observed(dumps: Sequence[Dump], seconds: Callable[[Mapping[str, Any]], float]) -> list[list[float]]:
    """Seconds of every image, by round."""
    return [[seconds(times) for times in dump["repeats"]] for dump in dumps]


def observations(rounds: Sequence[Sequence[float]]) -> list[float]:
    """One observation per round; if there is a single round, one per image."""
    return [median(seconds) for seconds in rounds] if len(rounds) > 1 else list(rounds[0])


def peak(dump: Dump) -> float:
    """Peak memory in GiB: allocated by torch on a GPU, else anonymous memory of the process."""
    points = dump["memory_checkpoints"].values()
    key = "peak_allocated_mb" if dump["effective"]["device"] == "cuda" else "peak_host_anon_mb"
    return max((point[key] for point in points if point[key] is not None), default=math.nan) / 1024


def likeness(dump: Dump, reference: Dump) -> str:
    """PSNR of the first image against the reference's, in dB."""
    value = psnr(*(np.asarray(Image.open(item["picture"]).convert("RGB")) for item in (dump, reference)))
    return "identical" if math.isinf(value) else f"{value:.1f}"


def table(dumps: Mapping[str, Sequence[Dump]], failed: Mapping[str, str], target: float | None) -> str:
    """Markdown table, one line per entry, then how the numbers were measured and whether the target is met."""
    lines = [
        "| what | attention | denoising, s (least to most) | time / ours (95 %) | picture, s | peak, GiB | load, s "
        "| warm-up, s | PSNR, dB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ran = {name: entry for name, entry in dumps.items() if entry and name not in failed}
    ours = ran.get("sglang-regional") or ran.get(OURS)
    for name in dumps:
        what = f"`{' '.join(ENTRIES[name])}`"
        lines.append(
            f"| {what} | {_row(ran[name], ours, ran.get(REFERENCE)) if name in ran else _absent(failed.get(name))}"
        )
    return "\n".join([*lines, "", _summary(ran, ours), *_target(ran, target)])


def _absent(failure: str | None) -> str:
    said = "not run" if failure is None else f"failed: {failure.replace('|', '/')}"
    return f"{said} |" + " |" * 7


def _row(dumps: Sequence[Dump], ours: Sequence[Dump] | None, reference: Sequence[Dump] | None) -> str:
    rounds, first = observed(dumps, denoising), dumps[0]
    values = [*chain(*rounds)]
    middle = median(observations(rounds))
    ratio = _ratio(observations(observed(ours, denoising)), observations(rounds)) if ours else ""
    cells = [
        first["effective"]["attention"],
        f"{middle:.3f} ({min(values):.3f} to {max(values):.3f})",
        ratio,
        f"{median(observations(observed(dumps, whole))):.3f}",
        f"{max(map(peak, dumps)):.2f}",
        f"{(first['load']['duration_ms'] + first['load']['imports_ms']) / 1000:.1f}",
        f"{first['warmup']['duration_ms'] / 1000:.1f}",
        likeness(dumps[-1], reference[-1]) if reference and reference is not dumps else "",
    ]
    return " | ".join(cells) + " |"


def _ratio(ours: Sequence[float], values: Sequence[float]) -> str:
    verdict = judge(ours, values, tolerance=0.02)
    if verdict.interval is None:
        return f"{verdict.ratio:.2f}"
    return f"{verdict.ratio:.2f} ({verdict.interval[0]:.2f} to {verdict.interval[1]:.2f})"


def _summary(ran: Mapping[str, Sequence[Dump]], ours: Sequence[Dump] | None) -> str:
    if not ran:
        return "Nothing ran."
    dump = next(iter(ran.values()))[-1]
    facts, machine = dump["effective"], dump["machine"]
    counts = sorted({len(entry) for entry in ran.values()})
    of = "/".join(map(str, counts))
    name = next((name for name, entry in ran.items() if entry is ours), None)
    what = "no ratio: none of ours ran" if name is None else f"ours in the ratio: `{' '.join(ENTRIES[name])}`"
    where = ", ".join(machine["gpus"]) or f"{machine['cpu_count']} x {machine['cpu']}, threads: {machine['threads']}"
    interval = "intervals of images of one process" if counts == [1] else "intervals of processes"
    return (
        f"{facts['dtype']} on {where}; rounds of each: {of}, of {len(dump['repeats'])} images ({interval}); {what}; "
        f"load and warm-up: first round; PSNR against diffusers, eager; commit {str(dump['commit_hash'])[:7]}."
    )


def _target(ran: Mapping[str, Sequence[Dump]], target: float | None) -> list[str]:
    if target is None:
        return []
    wanted = f"Target, denoising on an H200: {target} s or less"
    times = {name: median(observations(observed(ran[name], denoising))) for name in ran if name.startswith(OURS)}
    if not times:
        return ["", f"{wanted}: missed, none of ours ran."]
    best = min(times, key=lambda name: times[name])
    gpus = next(iter(ran.values()))[-1]["machine"]["gpus"]
    elsewhere = "" if any("H200" in gpu for gpu in gpus) else f"; measured on {', '.join(gpus) or 'a CPU'}"
    verdict = "met" if times[best] <= target else "missed"
    return ["", f"{wanted}: {verdict} by `{' '.join(ENTRIES[best])}`, {times[best]:.3f} s{elsewhere}."]


def measured(
    generation: Generation, names: Sequence[str], settings: Sequence[str], rounds: int, folder: Path, device: str,
    run: Run = generate,
) -> tuple[str, int]:  # fmt: skip
    """Benchmark one work; returns its table and the exit code. `settings` are words for all entries."""
    words = (
        "--prompt",
        PROMPT,
        "--seed",
        str(SEED),
        *generation.words,
        *model_of(generation, folder, device),
        *settings,
    )
    failed = rounds_of(words, names, rounds, folder, run)
    dumps = {name: dumps_of(folder, name) for name in names}
    return table(dumps, failed, generation.target), int(any(name.startswith(OURS) for name in failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--work", default="landscape", help=f"of {', '.join(WORKS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=3, help="in each process")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", help="bfloat16 on a GPU, else auto")
    parser.add_argument("--only", help=f"of {', '.join(ENTRIES)}")
    parser.add_argument("--folder", type=Path, help="where models and dumps stay; else a temporary one")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else [n for n in ENTRIES if given.device == "cuda" or n not in ON_GPU]
    dtype = given.dtype or ("bfloat16" if given.device == "cuda" else "auto")
    settings = (
        f"device={given.device}", f"dtype={dtype}", "perf=light", f"perf.repeat={given.pictures}",
        f"compile.warmup_steps={WARMUP_STEPS}", "compile.warmup=true",
    )  # fmt: skip
    code = 0
    for name in given.work.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = (given.folder or Path(temporary)).absolute() / name
            text, failed = measured(WORKS[name], names, settings, given.rounds, folder, given.device)
        print(f"\n## {WORKS[name].title}\n\n{text}", flush=True)
        code = max(code, failed)
    return code


if __name__ == "__main__":
    sys.exit(main())
