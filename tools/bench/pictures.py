"""Whole generations by the application, ours and diffusers', with random weights or those of the embedded model.

    python -m tools.bench.pictures                                  # the embedded model
    python -m tools.bench.pictures --work tiny --rounds 1           # seconds: shows that it works
    python -m tools.bench.pictures --device cuda --work sdxl,flux_dev --rounds 1 --pictures 5 --folder bench

What is timed is `sglang generate` itself: text encoders, scheduler, guidance, all steps, decoding. Competitors are the
native engine eager, compiled, on a GPU also as CUDA graphs, and diffusers' pipeline, eager and with its network under
torch.compile. Every number is from the perf dump that the run writes; denoising is synchronised after every step, for
everybody alike.

Six pipelines of FLUX dev have 34 GB each, which no GPU holds at once. So competitors do not take turns picture by
picture: a round is one process of each, one after the other, another one first every time, and a process loads, warms
up untimed and makes `--pictures` pictures. Those of one process are alike, so that a round is one observation, the
median of its pictures. With a single round the pictures themselves are the observations, and the interval does not know
how processes differ. With `--folder` models and dumps stay, a later call adds its rounds to those of the same code and
machine, and so `--work` and `--rounds` divide the job among calls; `--rounds 0` prints the table of what is there. FLUX
dev takes 34 GB there, SDXL 7; without `--folder` a work's model is gone when its table is printed.

Exit code 1 where one of ours failed. A peer that fails is named in the table.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from sglang_gen import env
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
OURS, REFERENCE = "sglang", "diffusers"  # others are told as ratios to one of ours; pictures are compared with theirs
ON_GPU = ("sglang-graphs", "sglang-regional-graphs")
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
TINY: folders.Configs = {
    "unet": {
        "sample_size": 16, "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2), "attention_head_dim": (1, 2), "cross_attention_dim": 64,
        "projection_class_embeddings_input_dim": 6 * 256 + 32,
    },
    "vae": {
        "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1,
    },
    "text_encoder": CLIP,
    "text_encoder_2": CLIP,
}  # fmt: skip
Dump = dict[str, Any]
Run = Callable[[Sequence[str], Path], str | None]


@dataclass(frozen=True)
class Picture:
    """What is generated: the words of the command, the model, and within what time it is to be denoised on an H200."""

    title: str
    words: tuple[str, ...]
    work: Callable[[], works.Work] | None = None  # an evaluation of the network; None: weights are not random
    changes: folders.Configs = field(default_factory=dict)  # of the preset's configs
    target: float | None = None  # seconds

    @property
    def preset(self) -> str:
        return self.words[0].removeprefix("model=")


def _tiny_work() -> works.Work:
    return works.Work("tiny", UNet2DConditionModel, "sdxl", folders.configs("sdxl", TINY)["unet"], 2, 77, 16)


WORKS: Mapping[str, Picture] = {
    "tiny": Picture(
        "a tiny SDXL, 32 x 32, 3 steps with guidance",
        ("model=sdxl", "sampling.height=32", "sampling.width=32", "sampling.num_inference_steps=3"),
        _tiny_work, TINY,
    ),
    "landscape": Picture("landscape, 128 x 128, 28 steps with guidance", ("model=landscape",)),
    "sdxl": Picture(
        "SDXL, 1024 x 1024, 50 steps with guidance",
        ("model=sdxl", "sampling.height=1024", "sampling.width=1024", "sampling.num_inference_steps=50"),
        works.WORKS["sdxl"], target=1.6,
    ),
    "flux_dev": Picture(
        "FLUX.1 dev, 1024 x 1024, 28 steps",
        ("model=flux_dev", "sampling.height=1024", "sampling.width=1024", "sampling.num_inference_steps=28"),
        works.WORKS["flux_dev"], target=3.3,
    ),
}  # fmt: skip


def model_of(picture: Picture, folder: Path, device: str) -> tuple[str, ...]:
    """The words that name the model, which is written first where its weights are random."""
    if picture.work is None:
        return ()
    work = picture.work()

    def check(network: Any) -> None:
        works.check_activations(work, network, works.their_arguments(work, torch.bfloat16, device))

    return ("--model-path", str(folders.write(picture.preset, folder / "model", device, picture.changes, check)))


def generate(words: Sequence[str], place: Path) -> str | None:
    """`sglang generate` in a process of its own, its log in `place`; how it failed, if it did."""
    place.mkdir(parents=True)
    with (place / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "sglang_gen", "generate", *words]
        code = subprocess.run(command, env=env.rank_variables(threads=None), stdout=log, stderr=log).returncode
    said = (place / "log.txt").read_text().strip().splitlines()
    return f"exit code {code}: {said[-1] if said else 'it said nothing'}" if code else None


def rounds_of(
    words: Sequence[str], names: Sequence[str], rounds: int, folder: Path, run: Run = generate
) -> dict[str, str]:
    """Add rounds to those in the folder; how competitors failed, which are then not asked again."""
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
    """A competitor's dumps by round, of those that have the newest one's code, machine and settings."""
    places = sorted(folder.glob(f"rounds/*/{name}"), key=lambda place: int(place.parent.name))
    found = [_read(place) for place in places if (place / "perf.json").exists()]
    facts = [(dump["commit_hash"], dump["fingerprint"]["hash"]) for dump in found]
    return [dump for dump, known in zip(found, facts, strict=True) if known == facts[-1]]


def stage(times: Mapping[str, Any], name: str) -> float:
    """Seconds of one stage of one picture."""
    return float(sum(each["duration_ms"] for each in times["steps"] if each["name"] == name)) / 1000


def denoising(times: Mapping[str, Any]) -> float:
    return stage(times, "denoising")


def whole(times: Mapping[str, Any]) -> float:
    """From the prompt to the decoded picture; only the first picture of a process is saved."""
    return float(times["total_duration_ms"]) / 1000 - stage(times, "saving")


def observed(dumps: Sequence[Dump], seconds: Callable[[Mapping[str, Any]], float]) -> list[list[float]]:
    """By round, of every picture."""
    return [[seconds(times) for times in dump["repeats"]] for dump in dumps]


def observations(rounds: Sequence[Sequence[float]]) -> list[float]:
    """A round is one; of a single round each picture."""
    return [median(each) for each in rounds] if len(rounds) > 1 else list(rounds[0])


def peak(dump: Dump) -> float:
    """GiB at the peak: of a GPU what torch allocated, else the process's anonymous memory."""
    points = dump["memory_checkpoints"].values()
    key = "peak_allocated_mb" if dump["effective"]["device"] == "cuda" else "peak_host_anon_mb"
    return max((point[key] for point in points if point[key] is not None), default=math.nan) / 1024


def likeness(dump: Dump, reference: Dump) -> str:
    """PSNR of the first picture against the reference's, in dB."""
    value = psnr(*(np.asarray(Image.open(each["picture"]).convert("RGB")) for each in (dump, reference)))
    return "identical" if math.isinf(value) else f"{value:.1f}"


def table(dumps: Mapping[str, Sequence[Dump]], failed: Mapping[str, str], target: float | None) -> str:
    """Markdown: a line for each competitor, then what the numbers are of and whether the target is met."""
    lines = [
        "| what | attention | denoising, s (least to most) | time / ours (95 %) | picture, s | peak, GiB | load, s "
        "| warm-up, s | PSNR, dB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ran = {name: found for name, found in dumps.items() if found and name not in failed}
    ours = ran.get("sglang-regional") or ran.get(OURS)
    for name in dumps:
        what = f"`{' '.join(ENTRIES[name])}`"
        lines.append(
            f"| {what} | {_row(ran[name], ours, ran.get(REFERENCE)) if name in ran else _absent(failed.get(name))}"
        )
    return "\n".join([*lines, "", _said(ran, ours), *_target(ran, target)])


def _absent(failure: str | None) -> str:
    said = "not run" if failure is None else f"failed: {failure.replace('|', '/')}"
    return f"{said} |" + " |" * 7


def _row(found: Sequence[Dump], ours: Sequence[Dump] | None, reference: Sequence[Dump] | None) -> str:
    rounds, first = observed(found, denoising), found[0]
    values = [*chain(*rounds)]
    middle = median(observations(rounds))
    ratio = _ratio(observations(observed(ours, denoising)), observations(rounds)) if ours else ""
    cells = [
        first["effective"]["attention"],
        f"{middle:.3f} ({min(values):.3f} to {max(values):.3f})",
        ratio,
        f"{median(observations(observed(found, whole))):.3f}",
        f"{max(map(peak, found)):.2f}",
        f"{(first['load']['duration_ms'] + first['load']['imports_ms']) / 1000:.1f}",
        f"{first['warmup']['duration_ms'] / 1000:.1f}",
        likeness(found[-1], reference[-1]) if reference and reference is not found else "",
    ]
    return " | ".join(cells) + " |"


def _ratio(ours: Sequence[float], values: Sequence[float]) -> str:
    verdict = judge(ours, values, tolerance=0.02)
    if verdict.interval is None:
        return f"{verdict.ratio:.2f}"
    return f"{verdict.ratio:.2f} ({verdict.interval[0]:.2f} to {verdict.interval[1]:.2f})"


def _said(ran: Mapping[str, Sequence[Dump]], ours: Sequence[Dump] | None) -> str:
    if not ran:
        return "Nothing ran."
    dump = next(iter(ran.values()))[-1]
    facts, machine = dump["effective"], dump["machine"]
    counts = sorted({len(found) for found in ran.values()})
    of = "/".join(map(str, counts))
    name = next((name for name, found in ran.items() if found is ours), None)
    what = "no ratio: none of ours ran" if name is None else f"ours in the ratio: `{' '.join(ENTRIES[name])}`"
    where = ", ".join(machine["gpus"]) or f"{machine['cpu_count']} x {machine['cpu']}, threads: {machine['threads']}"
    interval = "intervals of pictures of one process" if counts == [1] else "intervals of processes"
    return (
        f"{facts['dtype']} on {where}; rounds of each: {of}, of {len(dump['repeats'])} pictures ({interval}); {what}; "
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
    picture: Picture, names: Sequence[str], settings: Sequence[str], rounds: int, folder: Path, device: str,
    run: Run = generate,
) -> tuple[str, int]:  # fmt: skip
    """The table of one work, and the exit code. `settings` are words that everybody gets."""
    words = ("--prompt", PROMPT, "--seed", str(SEED), *picture.words, *model_of(picture, folder, device), *settings)
    failed = rounds_of(words, names, rounds, folder, run)
    found = {name: dumps_of(folder, name) for name in names}
    return table(found, failed, picture.target), int(any(name.startswith(OURS) for name in failed))


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
