"""No exception class name and no sentence of a library reaches a user."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
import sentences
from finished import Finished

import sglang_gen
from sglang_gen import log
from sglang_gen.errors import InvalidValueError, RunError, UserError, ending, in_our_words

PACKAGE = Path(sglang_gen.__file__).parent

# Functions that make a sentence of an exception, and attributes that hold no sentence of another library: the system's
# words for an error number, and what Python's JSON parser found at a place in the text.
TRANSLATORS = {
    "in_our_words", "unexpected", "is_out_of_memory", "out_of_memory", "_problem", "isinstance", "_of_value",
    "_of_hydra", "override_problem", "yaml_problem", "hub_error", "_write_error", "getattr", "_report", "_fail",
    "_failure", "_first_failure", "_clear_frames",
}  # fmt: skip
FACTS = {"strerror", "errno", "filename", "msg", "lineno", "pos"}
OWN = {"UserError", "RunError", "InvalidValueError", "LostError", "CandidateError", "Terminated", "KeyboardInterrupt"}


def handlers():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and node.name:
                yield path.relative_to(PACKAGE), node


def is_translated(name: ast.Name, parent: ast.AST) -> bool:
    if isinstance(parent, ast.Raise | ast.Assign | ast.AnnAssign | ast.BoolOp):
        return True  # the cause of another exception, or given another name
    if isinstance(parent, ast.Attribute):
        return parent.attr in FACTS
    return isinstance(parent, ast.Call) and ast.unparse(parent.func).rpartition(".")[2] in TRANSLATORS


def test_no_message_is_made_of_the_message_of_a_library():
    seen, wrong = 0, []
    for path, handler in handlers():
        caught = {each.rpartition(".")[2] for each in ast.unparse(handler.type).strip("()").split(", ")}
        if caught <= OWN:
            continue
        parents = {child: node for node in ast.walk(handler) for child in ast.iter_child_nodes(node)}
        uses = [node for node in parents if isinstance(node, ast.Name) and node.id == handler.name]
        seen += len(uses)
        wrong += [f"{path}:{use.lineno}" for use in uses if not is_translated(use, parents[use])]
    assert seen > 100
    assert wrong == []


# Values whose article is known: each begins with a consonant.
CONSONANTS = {"language", "which"}


def test_no_sentence_has_an_article_before_a_name_that_it_fills_in():
    """Such as "a AutoencoderTiny"."""
    articles, values = 0, set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else ()
            for before, value in pairwise(parts):
                if isinstance(before, ast.Constant) and re.search(r"\b[Aa]n? ['\"]?$", before.value):
                    articles += 1
                    values.add(ast.unparse(value.value))
    assert articles >= 3
    assert {value for value in values if value not in CONSONANTS} == set()


def test_what_the_suite_shows_to_users_is_watched(sglang):
    before = len(sentences.seen)
    done = sglang("generate", "model=sdxl", "sampling.sed=1")
    RunError("KeyError: 'lost'")
    log.setup("info")
    log.warning("size mismatch for conv_in.weight")
    Finished(1, "", "INFO: a\nERROR: Error while deserializing header\n")
    recorded = sentences.seen[before:]
    assert done.lines[-1].removeprefix("ERROR: ") in recorded
    assert sentences.foreign(recorded) == [
        "KeyError: 'lost'", "size mismatch for conv_in.weight", "Error while deserializing header"
    ]  # fmt: skip
    del sentences.seen[before:]  # these were ours


@pytest.mark.parametrize("sentence", [
    "KeyError: 'lost'", "'NoneType' object has no attribute 'shape'",
    "Error while deserializing header: HeaderTooLarge",
    "Key 'pth' not in 'Adapter'", "mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)", "`height` is wrong",
])  # fmt: skip
def test_sentences_of_libraries_are_found(sentence):
    assert sentences.foreign([sentence, "The weight file a.safetensors is corrupt", "FluxPipeline takes no mask"]) == [
        sentence
    ]


def test_an_exception_is_described_in_our_words():
    assert in_our_words(UserError("a")) == in_our_words(RunError("a")) == in_our_words(InvalidValueError("a")) == "a"
    assert in_our_words(OSError(28, "No space left on device")) == "No space left on device"
    assert in_our_words(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")) == "it is not UTF-8 text"
    assert (
        in_our_words(ModuleNotFoundError("x", name="a.b")) == "the package a is missing or has an unsupported version"
    )
    for unknown in (ValueError("`height` is wrong"), OSError("Can't load the model"), KeyError("k"), ImportError("x")):
        assert in_our_words(unknown) == "--log-level debug shows why"


def test_an_unexpected_exception_is_named_by_its_place():
    try:
        sglang_gen.generate(log_level=log.shorten(None))
    except AttributeError as error:
        code, sentence = ending(error)
    assert code == 1
    assert sentence.startswith("An unexpected error in log.py, line ")
    assert sentence.endswith(" ended the run (--log-level debug shows it)")
