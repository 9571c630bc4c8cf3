"""Benchmarks whole images of one single-file model, native engine and diffusers beside stable-diffusion.cpp.

    python -m tools.bench.single_file --file model.safetensors model.id=NAME

stable-diffusion.cpp reads whole single-file models only, so it takes no part in `tools.bench.networks`. Its Python
package is `stable_diffusion_cpp`; without it, or without a file, the table says so. Each engine loads the file and
makes one untimed image first. Times are of text encoders, all steps and decoding, without loading.
"""

import argparse
import importlib
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sglang_gen.generate import generate

PROMPT, SEED = "A serene landscape with mountains and a lake at sunset", 42
PEER = "stable_diffusion_cpp"


def ours(arguments: argparse.Namespace, backend: str) -> list[float]:
    """Seconds of each timed image of one backend; the first image of the process is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        result = generate(
            f"perf.repeat={arguments.rounds + 1}", *arguments.overrides, model_path=str(arguments.file), prompt=PROMPT,
            seed=SEED, height=arguments.size, width=arguments.size, num_inference_steps=arguments.steps,
            backend=backend, output_path=folder, log_level="error",
        )  # fmt: skip
    assert result is not None
    return [each["total_duration_ms"] / 1000 for each in result.report["repeats"][1:]]


def theirs(arguments: argparse.Namespace) -> list[float]:
    """Seconds of each timed image of stable-diffusion.cpp."""
    engine: Any = importlib.import_module(PEER).StableDiffusion(model_path=str(arguments.file))
    seconds = []
    for _ in range(arguments.rounds + 1):
        start = time.perf_counter()
        engine.generate_image(
            prompt=PROMPT, width=arguments.size, height=arguments.size, sample_steps=arguments.steps, seed=SEED
        )
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def table(arguments: argparse.Namespace) -> str:
    """Markdown table with the median seconds of an image, or why there are none."""
    rows = {"sglang-gen": "no model file", "diffusers": "no model file", "stable-diffusion.cpp": "no model file"}
    if arguments.file is not None:
        rows["sglang-gen"] = f"{statistics.median(ours(arguments, 'sglang')):.2f}"
        rows["diffusers"] = f"{statistics.median(ours(arguments, 'diffusers')):.2f}"
    if importlib.util.find_spec(PEER) is None:
        rows["stable-diffusion.cpp"] = "not installed"
    elif arguments.file is not None:
        rows["stable-diffusion.cpp"] = f"{statistics.median(theirs(arguments)):.2f}"
    return "\n".join(
        ["| engine | s per image |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    )


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=lambda text: Path(text) if text else None, help="a .safetensors file")
    parser.add_argument("overrides", nargs="*", help="for the runs of this package, such as model.id=NAME")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(words)


if __name__ == "__main__":
    print(table(parse()))
