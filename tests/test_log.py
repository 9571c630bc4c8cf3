"""What the command says on stderr: the lines of its page, progress, and little else."""

import io
import logging
import re
import warnings

import pytest

from sglang_gen import log

SMALL = ("--height", "32", "--width", "32", "--num-inference-steps", "2", "--seed", "7", "--dtype", "float32")


class Terminal(io.StringIO):
    """A standard error that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_lines_are_those_of_the_page_in_their_order(pipelines, sglang):
    done = sglang("generate", "--model-path", pipelines["sdxl"], "--prompt", "A serene landscape", *SMALL,
                  "--num-samples", "2")  # fmt: skip
    assert (done.code, done.out) == (0, "")
    assert [line for line in done.lines[:-1] if not line.startswith("INFO: Backend: ")] == [
        f"INFO: Loading model: {pipelines['sdxl']}",
        "INFO: Model loaded successfully",
        'INFO: Generating with prompt: "A serene landscape"',
        "INFO: Progress: 100% [2/2 steps]",
        "INFO: Generated image saved to: outputs/generated_image_0.png",
        'INFO: Generating with prompt: "A serene landscape"',
        "INFO: Progress: 100% [2/2 steps]",
        "INFO: Generated image saved to: outputs/generated_image_1.png",
    ]
    assert re.fullmatch(r"INFO: Total generation time: \d+\.\d\ds", done.lines[-1])


@pytest.mark.whole
def test_a_level_silences_what_lies_below_it(pipelines, sglang):
    quiet = sglang("generate", "--model-path", pipelines["flux"], "--prompt", "a", *SMALL, "--negative-prompt", "b",
                   "--log-level", "warning")  # fmt: skip
    assert quiet.code == 0
    assert [line.partition(":")[0] for line in quiet.lines] == ["WARNING"]
    silent = sglang("generate", "--model-path", pipelines["flux"], "--prompt", "a", *SMALL, "--negative-prompt", "b",
                    "--log-level", "error")  # fmt: skip
    assert (silent.code, silent.err, silent.out) == (0, "", "")


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a cat,\n\tsitting\r\n on a mat ", "a cat, sitting on a mat"),
        ("red \x1b[31m and \u2028 more", "red [31m and more"),
        ("a" * 300, "a" * 97 + "..."),
        ("\N{CAT}\u200d\N{BLACK LARGE SQUARE} 中文 {x}%s", "\N{CAT}\u200d\N{BLACK LARGE SQUARE} 中文 {x}%s"),
    ],
)
def test_a_prompt_stays_on_one_line(pipelines, sglang, prompt, shown):
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", prompt, *SMALL)
    assert done.code == 0, done.err
    (line,) = [line for line in done.lines if "prompt" in line]
    assert re.sub(" +", " ", line) == f'INFO: Generating with prompt: "{shown}"'


def test_an_error_stays_on_one_line(sglang):
    done = sglang("generate", "--model-path", "./no\nsuch\nfolder", "--prompt", "a")
    assert done.lines == ["ERROR: The model folder ./no such folder does not exist"]
    log.error("bytes \udcff that are no text")


def test_piped_progress_is_a_line_every_few_seconds_and_the_last(capsys, monkeypatch):
    log.setup("info")
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    with log.Progress(50) as progress:
        for _ in range(50):
            now[0] += 1.0
            progress.step()
    assert capsys.readouterr().err.splitlines() == [
        *(f"INFO: Progress: {2 * step}% [{step}/50 steps]" for step in range(6, 50, 6)),
        "INFO: Progress: 100% [50/50 steps]",
    ]


def test_a_quick_run_says_only_the_end_and_a_failed_one_nothing(capsys):
    log.setup("info")
    with log.Progress(3) as progress:
        for _ in range(3):
            progress.step()
    assert capsys.readouterr().err == "INFO: Progress: 100% [3/3 steps]\n"
    progress = log.Progress(3)
    progress.__enter__()
    progress.step()
    progress.__exit__(RuntimeError, RuntimeError(), None)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_leaves_the_last_line(monkeypatch):
    log.setup("info")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(log, "PROGRESS_SECONDS", -1.0)
    with log.Progress(3) as progress:
        for _ in range(3):
            progress.step()
    said = terminal.getvalue()
    assert "denoising" in said
    assert "3/3" in said
    assert said.count("Progress:") == 1
    assert said.endswith("INFO: Progress: 100% [3/3 steps]\n")


def test_a_terminal_at_level_warning_gets_no_bar(monkeypatch):
    log.setup("warning")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with log.Progress(2) as progress:
        progress.step()
        progress.step()
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("level", ["info", "error"])
@pytest.mark.parametrize("name", ["diffusers.some.module", "transformers.x", "huggingface_hub", "torchao.y", "torch.z"])
def test_no_message_of_a_library_is_shown(capsys, monkeypatch, level, name):
    library = logging.getLogger(name)
    own = logging.getLogger(name.partition(".")[0])
    monkeypatch.setattr(own, "handlers", [logging.StreamHandler()])  # as after the library's import
    log.setup(level)
    library.warning("be %s", "careful")
    library.error("not found")
    assert capsys.readouterr().err == ""
    log.setup("info")


@pytest.mark.parametrize(
    ("name", "prefix"), [("diffusers.some.module", "diffusers"), ("torch._dynamo", "torch"), ("py.warnings", "Python")]
)
def test_a_library_is_shown_at_level_debug_with_its_name(capsys, name, prefix):
    log.setup("debug")
    for _ in range(2):
        logging.getLogger(name).warning("be %s", "careful\nplease")
    assert capsys.readouterr().err == f"DEBUG: {prefix}: be careful please\n"
    log.setup("info")


def test_loggers_that_torch_logs_makes_talkative_keep_their_handlers(capsys, monkeypatch):
    asked = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    mine = [logging.NullHandler()]
    monkeypatch.setattr(asked, "handlers", mine)
    monkeypatch.setattr(asked, "level", logging.INFO)
    log.setup("info")
    assert asked.handlers is mine


def test_a_logger_without_handlers_writes_nothing_in_a_process_of_the_command(capsys):
    """Python would write its warnings to stderr."""
    before = list(logging.getLogger().handlers)
    log.setup("info")
    try:
        log.capture_warnings()
        log.capture_warnings()
        logging.getLogger("accelerate.big_modeling").warning("some layers stay where they are")
        assert capsys.readouterr().err == ""
        log.setup("debug")
        logging.getLogger("accelerate.big_modeling").warning("some layers stay where they are")
        assert capsys.readouterr().err == "DEBUG: accelerate: some layers stay where they are\n"
    finally:
        logging.captureWarnings(False)
        logging.getLogger().handlers = before
        log.setup("info")


def test_warnings_for_developers_are_shown_at_level_debug_only(capsys):
    for level, shown in (("info", False), ("debug", True)):
        log.setup(level)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(False)
            logging.captureWarnings(True)
            warnings.warn("this will be removed in 2031", FutureWarning, stacklevel=1)
            logging.captureWarnings(False)
        assert ("removed in 2031" in capsys.readouterr().err) is shown
    log.setup("info")
