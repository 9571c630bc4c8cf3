"""Damaged configuration files end in one sentence: every file of conf/, a user's own option, and a --config file."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from endings import ran_into

CONF = Path(__file__).parents[1] / "conf"
FILES = sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml"))
SEED, DAMAGES, PARTS = 20261129, 3, 4
OPTION = "# @package _global_\nsampling:\n  seed: 5\n  num_inference_steps: 3\nattention:\n  backend: math\n"
FLAT = "seed: 5\nnum_inference_steps: 3\nguidance_scale: 2.5\ndiffusers_kwargs:\n  eta: 0.5\nattention: math\n"
VALUES = (
    "x", "-1", "1.5", "true", "null", "[]", "{}", "[1, [2]]", "{a: {b: c}}", "???", "${x}", "${", "${oc.env:HOME}",
    "${sampling}", "1e999", "9" * 400, "0x10", "2026-11-29", "!!python/object:os.system x", "!!binary AAAA", "&a x",
    "*a", "'unclosed", '"\\q"', "@x", "%x", "\x00", "\x1b[31m", "日本", "a" * 5000, "- a", "? b", "|", ">", "=", ".nan",
)  # fmt: skip
BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])
WHOLE = (
    "", "x", "[]", "- 1\n- 2", "1", "null", "---\n---\na: b", "\ufeff", "defaults", "defaults: x", "defaults: [x]",
    "defaults: [{x: y}]", "defaults: [_self_, _self_]", "defaults: [null]", "defaults: [[config]]", "defaults: {a: b}",
    "defaults: [{override model: nope}]", "defaults: [{override nope: x}]", "defaults: [config, config]", BOMB,
    "a: &a [*a]", "a: &a {b: *a}", "<<: x", "? [a]\n: b", "{" * 3000, "[" * 3000, "a: " * 50, "hydra: x",
    "hydra: {x: y}", "hydra: {sweeper: {_target_: os.system}}", "_target_: os.system", "1: 2",
    "sampling: &s {seed: 1}\nattention: *s",
)  # fmt: skip
Text = str | bytes


def line_of(change: Callable[[random.Random, list[str], int], None]) -> Callable[[random.Random, str], Text]:
    """A damage to one line that is no comment."""

    def damage(draw: random.Random, text: str) -> Text:
        lines = text.splitlines()
        places = [index for index, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")]
        if places:
            change(draw, lines, draw.choice(places))
        return "\n".join(lines) + "\n"

    return damage


def put(lines: list[str], place: int, line: str) -> None:
    lines[place] = line


def value(draw: random.Random, lines: list[str], place: int) -> None:
    put(lines, place, f"{lines[place].partition(':')[0]}: {draw.choice(VALUES)}")


def indent(draw: random.Random, lines: list[str], place: int) -> None:
    put(
        lines,
        place,
        draw.choice([" ", "   ", "\t", ""]) + (lines[place].strip() if draw.random() < 0.5 else lines[place]),
    )


def unknown(draw: random.Random, lines: list[str], place: int) -> None:
    spaces = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
    lines.insert(place, f"{spaces}{draw.choice(['unknown', 'sed', '_x', '1', 'true', '${a}', 'a.b', 'model'])}: 1")


def rename(draw: random.Random, lines: list[str], place: int) -> None:
    name = lines[place].partition(":")[0]
    put(lines, place, lines[place].replace(name, name[:-1] or "x", 1))


def cut(draw: random.Random, text: str) -> Text:
    return text[: draw.randrange(len(text) + 1)]


def binary(draw: random.Random, text: str) -> Text:
    data = bytearray(text.encode())
    for _ in range(draw.choice([1, 20])):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def header(draw: random.Random, text: str) -> Text:
    packages = ["_global_", "_group_", "sampling", "nope", "a.b", "", "_global_.x", "hydra", "??", "x y"]
    rest = "\n".join(line for line in text.splitlines() if not line.startswith("# @package"))
    return f"# @package {draw.choice(packages)}\n{rest}\n"


def whole(draw: random.Random, text: str) -> Text:
    return draw.choice([draw.choice(WHOLE), f"{text}\n{draw.choice(WHOLE)}\n"])


DAMAGE: tuple[Callable[[random.Random, str], Text], ...] = (
    line_of(value), line_of(value), line_of(indent), line_of(unknown), line_of(rename), cut, binary, header, whole,
    line_of(lambda draw, lines, place: lines.pop(place) and None),
    line_of(lambda draw, lines, place: lines.insert(place, lines[place])),
)  # fmt: skip


def selected(name: str) -> list[str]:
    """The words that use a file of the configuration folder."""
    group, _, option = name.removesuffix(".yaml").rpartition("/")
    return [f"{group}={option}"] if group else ["--config-name", option]


def write(path: Path, content: Text) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def cases() -> list[tuple[str, Text, list[str]]]:
    """(name of the file in the configuration folder or of a --config file, its content, the words of the request)."""
    draw, made = random.Random(SEED), []
    texts = {name: (CONF / name).read_text() for name in FILES}
    texts |= {"sampling/mine.yaml": OPTION, "mine.yaml": f"defaults: [config, _self_]\n{OPTION}", "flat.yaml": FLAT}
    for name, text in texts.items():
        words = ["--config", "own/flat.yaml"] if name == "flat.yaml" else ["--config-dir", "own", *selected(name)]
        made += [(name, draw.choice(DAMAGE)(draw, text), words) for _ in range(DAMAGES)]
    return made


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:[\s\S]*deprecated keyword in package header:UserWarning")  # `# @package _group_`
@pytest.mark.parametrize("part", range(PARTS))
def test_a_damaged_configuration_file_ends_in_one_sentence(pipelines, sglang, part):
    wrong = []
    for name, content, words in cases()[part::PARTS]:
        write(Path("own") / name, content)
        done = sglang("generate", *words, "--model-path", pipelines["sd15"], "--prompt", "a", "dry_run=true")
        problem = ran_into(done.code, done.lines, done.err)
        (Path("own") / name).unlink()
        if problem is not None:
            wrong.append((problem, done.err, name, content))
    assert wrong == []


def test_aliases_that_stand_for_billions_of_values_are_refused_at_once(sglang):
    for name, words in {
        "own/mine.yaml": ("--config-dir", "own", "--config-name", "mine"),
        "own/sampling/mine.yaml": ("--config-dir", "own", "sampling=mine"),
        "flat.yaml": ("--config", "flat.yaml"),
        "more/sampling/far.yaml": ("hydra.searchpath=[file://more]", "sampling=far"),
    }.items():
        for text, sentence in ((BOMB, "aliases that stand for more than 100000 values"),
                               ("a: &a [*a]", "an alias inside of the value that it stands for")):  # fmt: skip
            write(Path(name), text)
            done = sglang("generate", *words, "--prompt", "a", "dry_run=true")
            assert (done.code, len(done.lines)) == (2, 1), done.err
            assert sentence in done.err
        Path(name).unlink()


def test_every_file_is_damaged_and_few_damages_are_none():
    made = cases()
    assert len(FILES) >= 70
    assert len(made) == DAMAGES * (len(FILES) + 3)
    assert sum(content == (CONF / name).read_text() for name, content, _ in made if (CONF / name).is_file()) < 60
