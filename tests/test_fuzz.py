"""A thousand requests that nobody should make: one sentence, the right exit code, and nothing is written."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from endings import ran_into

from sglang_gen.config.flags import FLAGS
from sglang_gen.config.schema import leaves

COUNT, SEED = 1000, 20261129
KINDS = leaves()
WORDS = (
    "", " ", "x", "-1", "0", "1.5", "1e9", "nan", "inf", "-inf", "null", "true", "[]", "{}", "[1,2]", '{"a": 1}', "{",
    "9" * 30, "a" * 5000, "../..", "/", ".", "/dev/null", "/nowhere/x", "binary.bin", "~", "$HOME", "${x}", "%s",
    "\x1b[31m", "日本", "a,b", "a=b", "=", "'", '"', "--", "-", "\n", "a\nb", "None", "False", "0x10", "1_000", "+1",
)  # fmt: skip
MODELS = ("sd15", "sdxl", "sd3", "flux")


def flag(draw: random.Random) -> list[str]:
    chosen = draw.choice(FLAGS)
    if chosen.path and KINDS[chosen.path] is bool:
        return [draw.choice([chosen.option, f"--no-{chosen.name}"])]
    return [chosen.option, draw.choice(WORDS)]


def key(draw: random.Random) -> list[str]:
    return [f"{draw.choice(sorted(KINDS))}={draw.choice(WORDS)}"]


def option(draw: random.Random) -> list[str]:
    groups = sorted({path.partition(".")[0] for path in KINDS if "." in path})
    return [f"{draw.choice(['', '+', '~', '++'])}{draw.choice(groups)}={draw.choice(WORDS)}"]


def misspelt(draw: random.Random) -> list[str]:
    name = list(draw.choice(FLAGS).name)
    place = draw.randrange(len(name))
    name[place : place + 1] = draw.choice([[], [name[place]] * 2, ["x"]])
    return [f"--{''.join(name)}", draw.choice(WORDS)]


def number(draw: random.Random) -> list[str]:
    numeric = [
        path for path, kind in KINDS.items() if kind in (int, float) or str(kind) in ("int | None", "float | None")
    ]
    return [f"{draw.choice(numeric)}={draw.choice(['-1', '0', '3', '7', '1000000', '0.1', '-0.5', 'x'])}"]


def pair(draw: random.Random) -> list[str]:
    return [*draw.choice(SINGLE)(draw), *draw.choice(SINGLE)(draw)]


SINGLE: tuple[Callable[[random.Random], list[str]], ...] = (flag, key, option, misspelt, number)


def requests() -> list[list[str]]:
    draw = random.Random(SEED)
    made = []
    for _ in range(COUNT):
        words = draw.choice((*SINGLE, pair))(draw)
        backend = draw.choice([[], ["--backend", "sglang"], ["--backend", "diffusers"]])
        made.append([draw.choice(MODELS), *backend, *words])
    return made


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_request_that_nobody_should_make_ends_in_one_sentence(pipelines, sglang, part):
    Path("binary.bin").write_bytes(bytes(range(256)))
    wrong = []
    for model, *words in requests()[part::10]:
        before = {path for path in Path().rglob("*") if path.is_file()}
        done = sglang("generate", "--model-path", pipelines[model], "--prompt", "a", "dry_run=true", *words)
        problem = ran_into(done.code, done.lines, done.err)
        if problem is None and {path for path in Path().rglob("*") if path.is_file()} != before:
            problem = "a file was written"
        if problem is not None:
            wrong.append((problem, words, done.lines[-1:]))
    assert wrong == []
