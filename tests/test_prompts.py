"""Any text arrives verbatim: as a flag, in a multirun, from a JSON or a YAML file."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_gen.cli import build_parser, split_argv
from sglang_gen.config.config_file import read_config_file
from sglang_gen.config.flag_values import flag_values

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
OPTIONS = set(build_parser()._option_string_actions)
quick = settings(max_examples=80, deadline=None, derandomize=True, database=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
ODD = (
    "a cat, sitting",
    "--prompt",
    "--seed=3",
    "-m",
    "- a list",
    "---",
    "",
    " ",
    "{a: b}",
    '{"prompt": "x"}',
    "${oc.env:HOME}",
    "${sampling.seed}",
    "\\${x}",
    "???",
    "null",
    "true",
    "12:30",
    "2020-01-01",
    "seed=1,2",
    "a=b",
    'it\'s "quoted" \\ and `back`',
    "first line\nsecond line\r\nthird\ttab",
    "🏔️ über 山と湖 \u202eabc\u2028",
    "%s %(x)s {0}",
    "x" * 5000,
)


ALL = "\n".join(ODD)


def parsed(*argv: str) -> dict:
    """The values that the flags of a command line give."""
    parser = build_parser()
    options, overrides = split_argv(argv, parser)
    assert overrides == ["model=sdxl"]
    return flag_values(vars(parser.parse_args(options)))


def read_as_flag(text: str) -> None:
    assert parsed(f"--prompt={text}", "model=sdxl", "--seed", "3")["sampling.prompt"] == text
    if text not in OPTIONS:
        assert parsed("model=sdxl", "--seed=3", "--negative-prompt", text)["sampling.negative_prompt"] == text


def read_from_files(text: str) -> None:
    content = {"prompt": text, "sampling": {"negative_prompt": text}}
    Path("p.json").write_text(json.dumps(content))
    Path("plain.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")
    readable = {"\x85", "\u2028", "\u2029"}.isdisjoint(text)  # YAML folds these line ends unless they are escaped
    Path("p.yaml").write_text(yaml.safe_dump(content, allow_unicode=readable), "utf-8")
    for name in ("p.json", "plain.json", "p.yaml"):
        assert read_config_file(name).values == {"sampling.prompt": text, "sampling.negative_prompt": text}


@pytest.mark.whole
@quick
@given(TEXT)
def test_any_text_is_read_verbatim(text):
    read_as_flag(text)
    read_from_files(text)


@pytest.mark.parametrize("text", ODD)
def test_odd_text_is_read_verbatim(text):
    read_as_flag(text)
    read_from_files(text)


@pytest.mark.parametrize("text", ["???", "${oc.env:HOME}", "--seed=3", "{a: b}", ALL])
def test_composition_keeps_it(composed, text):
    assert composed("model=sdxl", f"--prompt={text}").run.sampling.prompt == text


def test_composition_keeps_it_from_a_file(composed):
    read_from_files(ALL)
    for name in ("p.json", "p.yaml"):
        sampling = composed("model=sdxl", "--config", name).run.sampling
        assert (sampling.prompt, sampling.negative_prompt) == (ALL, ALL)


@pytest.mark.whole
def test_a_multirun_keeps_it(composed):
    words = ("-m", "model=sdxl", "--output-path=sweep", "sampling.num_samples=1,2")
    assert [job.run.sampling.prompt for job in composed(*words, f"--prompt={ALL}")] == [ALL, ALL]
    assert [job.run.sampling.prompt for job in composed(*words, "--prompt=???")] == ["???", "???"]


def test_as_an_override_with_hydras_quotes(composed):
    run = composed("model=sdxl", "sampling.prompt='a cat, {sitting}'", 'sampling.negative_prompt="$ and it\'s"').run
    assert (run.sampling.prompt, run.sampling.negative_prompt) == ("a cat, {sitting}", "$ and it's")


@pytest.mark.parametrize("word", ["sampling.prompt=", "sampling.prompt=''", "--prompt="])
def test_an_empty_prompt_is_a_prompt(composed, word):
    composition = composed("model=sdxl", word)
    assert composition.run.sampling.prompt == ""
    assert composition.notices == ()


@pytest.mark.whole
def test_prompts_reach_the_record_and_the_picture_verbatim(pipelines, sglang):
    text = '--a, {b} ${oc.env:HOME} ???\n"c" 🏔️'
    done = sglang("generate", "--model-path", pipelines["sdxl"], f"--prompt={text}", "--height", "32", "--width", "32",
                  "--num-inference-steps", "1")  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(Path("outputs/generated_image_0.json").read_text("utf-8"))
    assert record["sample"]["prompt"] == record["run"]["sampling"]["prompt"] == text
    again = sglang("generate", "--config", "outputs/generated_image_0.json")
    assert again.code == 0, again.err
    first, second = (Path(f"outputs/generated_image_{number}.png") for number in (0, 1))
    assert json.loads(second.with_suffix(".json").read_text("utf-8"))["sample"]["prompt"] == text
    assert first.stat().st_size > 0
