"""What the command writes to a terminal, to a closed or full stream, and to one of ASCII only."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases import mostly_slow

from sglang_gen import files, log
from sglang_gen.perf import compare_markdown
from sglang_gen.sweep import columns, markdown

ROOT = str(Path(__file__).parents[1])
PROMPT = "s\u00fc\u00df \u2603 \U0001f408\u200d\u2b1b"
HOSTILE = "a \x1b[31mred\rb \u202eeven\u2066 \x9b c"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def command(*words: object, redirect: str = "", **variables: str) -> subprocess.CompletedProcess:
    shell = ["/bin/sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "sglang_gen"]
    return subprocess.run([*shell, *map(str, words)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": ROOT, **variables})  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize(
    "words", mostly_slow([["dry_run=true"], ["dry_run=json"], ["--cfg", "job"], ["sampling.seed=x"]], ["dry_run=json"])
)
def test_a_stream_of_ascii_gets_escapes(words):
    settings = {"PYTHONIOENCODING": "ascii", "LANG": "C", "PYTHONUTF8": "0"}
    done = command("generate", "--prompt", PROMPT, f"--output-path=\u00fc {PROMPT}", *words, **settings)
    assert "UnicodeEncodeError" not in done.stderr
    assert done.returncode == (2 if "sampling.seed=x" in words else 0), done.stderr
    assert (done.stdout + done.stderr).isascii()
    if "dry_run=json" in words:
        assert json.loads(done.stdout)["run"]["sampling"]["prompt"] == PROMPT


def test_what_is_printed_has_no_control_characters_and_json_stays_itself(capsys):
    files.print_result(json.dumps({"prompt": HOSTILE + "\ud800"}, ensure_ascii=False))
    out = capsys.readouterr().out
    assert not CONTROL.search(out)
    assert json.loads(out) == {"prompt": HOSTILE + "\ud800"}


def test_a_prompt_cannot_steer_the_terminal_and_its_record_keeps_it(sglang, pipelines):
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", HOSTILE, "--height", 32, "--width", 32,
                  "--num-inference-steps", 1, "--perf-dump-path", "p.json")  # fmt: skip
    assert done.code == 0, done.err
    assert 'Generating with prompt: "a  [31mred b' in done.err
    assert not CONTROL.search(done.err)
    assert json.loads(Path("outputs/generated_image_0.json").read_text())["sample"]["prompt"] == HOSTILE
    again = json.loads(Path("p.json").read_text()) | {"timestamp": "2026-01-01T00:00:00+00:00"}
    Path("q.json").write_text(json.dumps(again))
    done = sglang("perf", "compare", "p.json", "q.json", "--markdown", "m.md")
    assert "u001b[31mred" in done.out
    assert not CONTROL.search(done.out + Path("m.md").read_text())


def test_the_cells_of_tables_have_no_control_characters():
    for cell in (columns.escaped, markdown.code, compare_markdown.cell):
        assert not CONTROL.search(cell(HOSTILE)), cell
        assert "\\u202e" in cell(HOSTILE)


def test_a_line_ends_where_a_value_of_100_kb_does_not(sglang):
    value = "x" * 100_000
    for words in (
        ["--model-path", value],
        ["--output-path", value],
        ["--perf-dump-path", value],
        ["--seed", value],
        [f"sampling.height={value}"],
        [f"sampling.{value}=1"],
        [value],
        [f"--{value}"],
        [f"model={value}"],
        ["--config", value],
        ["--lora-path", value],
        ["--image-path", value],
        ["--prompts-file", value],
        ["--quality-reference", value],
        ["--seed", "many words " * 10_000],
    ):
        done = sglang("generate", "--prompt", "a", *words)
        assert done.code == 2, words[0][:40]
        assert all(len(line) < 400 for line in done.lines), (words[0][:40], done.lines[-1][:300])
        assert done.lines[-1].startswith("ERROR: ")


def test_a_list_of_options_stays_whole(sglang):
    log.error("options: " + ", ".join(f"option_{number}" for number in range(60)))
    assert "..." not in sglang("generate", "model=nothing").lines[-1]


@pytest.mark.slow
def test_a_prompt_of_a_megabyte_is_generated(sglang, pipelines):
    prompt = "a lake " * 150_000
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", prompt, "--height", 32, "--width", 32,
                  "--num-inference-steps", 1)  # fmt: skip
    assert done.code == 0, done.err[-500:]
    assert all(len(line) < 400 for line in done.lines)
    assert json.loads(Path("outputs/generated_image_0.json").read_text())["sample"]["prompt"] == prompt


FULL = "ERROR: The result cannot be written to standard output: No space left on device\n"


@pytest.mark.whole
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize(
    ("words", "redirect", "code", "sentence"),
    [
        (
            ["models"],
            "> /dev/full",
            1,
            "ERROR: The result cannot be written to standard output: No space left on device\n",
        ),
        (["generate", "--help"], "> /dev/full 2>&-", 1, ""),
        (["models"], ">&- 2>&-", 0, ""),
        (["models"], "<&- 2>/dev/full", 0, None),
        (["nothing"], "2>&-", 2, ""),
        (["nothing"], "2>/dev/full", 2, ""),
    ],
)
def test_streams_that_are_closed_or_full_change_no_exit_code(words, redirect, code, sentence):
    done = command(*words, redirect=redirect)
    assert done.returncode == code
    assert done.stderr == (sentence or "")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("redirect", ["2>&-", ">&- 2>&- <&-", "> /dev/full 2>/dev/full"])
@pytest.mark.parametrize("layout", ["parallel=single", "parallel=tp2"])
def test_images_are_written_where_only_the_log_is_lost(pipelines, redirect, layout):
    done = command("generate", "--model-path", pipelines["sd15"], "--prompt", "a", "--height", 32, "--width", 32,
                   "--num-inference-steps", 1, layout, redirect=redirect)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Path("outputs/generated_image_0.png").exists()
