"""Collects results of a checkout in one JSON file, to compare two commits on one machine.

    python -m tools.baseline collect FOLDER before.json     # in the one checkout
    python -m tools.baseline collect FOLDER after.json      # in the other: a worktree, with PYTHONPATH=.
    python -m tools.baseline compare before.json after.json

FOLDER holds the tiny pipelines, so that both checkouts read the same weights. Compared are the bits of the final
latents of every family and of the embedded model (eager, in float32 and bfloat16, in one process and with one layout of
each axis), the flag table, the composed configuration of every option, the keys of run records and perf dumps, and
the exit codes and messages of requests that are refused.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "single": (),
    "dp2": ("parallel=dp2", "--num-samples", "2"),
    "cfg2": ("parallel=cfg2",),
    "ring2": ("parallel=ring2",),
    "ulysses2": ("parallel=ulysses2",),
    "tp2": ("parallel=tp2",),
}
RUN = ("--prompt", "a quiet lake at dawn", "--seed", "7", "--num-inference-steps", "2", "--height", "64",
       "--width", "64", "--guidance-scale", "3", "output.latents=true")  # fmt: skip
QUICK = ("--num-inference-steps", "1", "--height", "64", "--width", "64", "--seed", "1")
REQUESTS: tuple[tuple[str, ...], ...] = (
    ("--model-path", "nowhere"), ("--model-path", "/nowhere/model"), ("model=nothing",), ("nothing=1",),
    ("sampling.seed=-1",), ("--seed", "x"), ("--height", "0"), ("--height", "63"), ("--num-inference-steps", "0"),
    ("--guidance-scale", "nan"), ("--dtype", "int7"), ("--backend", "other"), ("--num-gpus", "0"),
    ("--num-gpus", "3"), ("parallel=tp2", "parallel.tp_size=3"), ("parallel.tp_size=7",), ("parallel=nothing",),
    ("cache=dbcache", "--backend", "sglang"), ("cache=deepcache",), ("quant=int8", "--backend", "sglang"),
    ("offload=disk",), ("attention=sage",), ("attention.backend=other",), ("--lora-path", "nowhere.safetensors"),
    ("--lora-path", "/nowhere"), ("--transformer-weights-path", "nowhere.safetensors"),
    ("--component-paths", '{"vae": "nowhere"}'), ("--component-paths", "{}{}"),
    ("--component-paths", '{"x": "y"}'),
    ("--diffusers-kwargs", '{"shfit": 2}'), ("--diffusers-kwargs", "[1]"), ("--image-path", "nowhere.png"),
    ("sampling.latents=nowhere.safetensors",), ("--config", "nowhere.yaml"), ("--prompt-file-path", "nowhere.txt"),
    ("--flag-that-is-none",), ("sampling.promt=x",), ("dry_run=maybe",), ("device=cuda",), ("compile=graphs",),
    ("tracking=nothing",), ("quality.reference=nowhere",), ("output.path=",), ("--output-path", "/proc/x"),
    ("sampling.guidance_interval=[2,1]",), ("--num-frames", "5"), ("--negative-prompt", ""), ("--fps", "0"),
    ("sampling.batch_size=0",), ("--num-samples", "0"), ("perf.repeat=0",), ("--perf-dump-path", "."),
    ("model.configs=nowhere",), ("--pipeline-class-name", "NoPipeline"), ("--revision", "x", "--model-path", "nowhere"),
)  # fmt: skip


def collect(folder: Path) -> dict[str, Any]:
    """Everything in this checkout that a restructuring must not change."""
    models = _tiny(folder)
    return {
        "latents": dict(_latents(models)),
        "records": dict(_records(models)),
        "flags": _flags(),
        "options": dict(_options()),
        "requests": dict(_requests()),
    }


def _requests() -> Iterator[tuple[str, Any]]:
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        for words in REQUESTS:
            yield " ".join(words), _run(("generate", "--prompt", "a", *QUICK, *words))


def _tiny(folder: Path) -> dict[str, Path | None]:
    """Folders of the tiny pipelines, built once; None for the embedded model."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "lib"))
    tiny = importlib.import_module("tiny")
    folders: dict[str, Path | None] = {"landscape": None}
    for name, build in tiny.BUILDERS.items():
        place = folder / name
        if not (place / "model_index.json").exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            build(place)
        folders[name] = place
    return folders


def _latents(models: Mapping[str, Path | None]) -> Iterator[tuple[str, Any]]:
    for name in models:
        for dtype in ("float32", "bfloat16"):
            for layout, words in LAYOUTS.items():
                model = ("--model-path", str(models[name])) if models[name] else ()
                yield f"{name} {dtype} {layout}", _digests((*model, *RUN, "--dtype", dtype, *words))


def _digests(words: tuple[str, ...]) -> Any:
    """SHA-256 of each latents file that the command writes; exit code and last log line if it fails."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "sglang_gen", "generate", *words]
        done = subprocess.run(
            command, cwd=place, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())}
        )
        if done.returncode:
            return [done.returncode, done.stderr.splitlines()[-1:]]
        files = sorted(Path(place, "outputs").glob("*.safetensors"))
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _records(models: Mapping[str, Path | None]) -> Iterator[tuple[str, Any]]:
    """The keys of a run record and of a perf dump, on both backends."""
    folder = next(each for each in models.values() if each)
    for backend in ("sglang", "diffusers"):
        with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
            words = ("--model-path", str(folder.resolve()), *RUN, "--backend", backend)
            code, _ = _run(("generate", *words, "--perf-dump-path", "dump.json"))
            assert code == 0
            yield f"{backend} record", sorted(_keys(json.loads(Path("outputs/generated_image_0.json").read_text())))
            yield f"{backend} dump", sorted(_keys(json.loads(Path("dump.json").read_text())))


def _keys(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from _keys(inner, f"{prefix}{key}.")


def _flags() -> Any:
    code, lines = _run(("generate", "--help"))
    return [code, lines]


def _options() -> Iterator[tuple[str, Any]]:
    """The composed configuration of every option of every group."""
    for file in sorted(Path("conf").glob("*/*.yaml")):
        yield f"{file.parent.name}={file.stem}", _run(("generate", f"{file.parent.name}={file.stem}", "--cfg", "job"))


def _run(words: tuple[str, ...]) -> tuple[int, list[str]]:
    """Exit code and output lines of the command, run in this process."""
    from sglang_gen.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    messages = [line for line in err.getvalue().splitlines() if line.startswith(("ERROR", "WARNING"))]
    return code, [*out.getvalue().splitlines(), *messages]


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One line for each thing that differs."""
    lines = []
    for section, old in before.items():
        new = after.get(section)
        if not isinstance(old, dict) or not isinstance(new, dict):
            lines += [] if old == new else [f"{section} differ"]
            continue
        for key in old.keys() | new.keys():
            if old.get(key) != new.get(key):
                lines.append(f"{section}: {key}: {_shown(old.get(key))} -> {_shown(new.get(key))}")
    return sorted(lines)


def _shown(value: Any) -> str:
    return json.dumps(value)[-160:]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.baseline", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="write the results of this checkout")
    collecting.add_argument("folder", type=Path, help="folder of the tiny pipelines; missing ones are built")
    collecting.add_argument("output", type=Path)
    comparing = commands.add_parser("compare", help="print the differences between two such files")
    comparing.add_argument("files", type=Path, nargs=2)
    given = parser.parse_args()
    if given.command == "compare":
        lines = compare(*(json.loads(file.read_text()) for file in given.files))
        print("\n".join(lines) or "no difference")
        return 1 if lines else 0
    folder, output = given.folder.resolve(), given.output.resolve()
    result = collect(folder)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
