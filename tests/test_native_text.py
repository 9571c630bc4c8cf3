"""Texts as the native engine encodes them: those of the pipeline's own `encode_prompt`, however long they are."""

import diffusers
import pytest
import torch

from sglang_gen import log
from sglang_gen.families import registry
from sglang_gen.families.text_encoding import expanded, tokens

# In letters, of which each is a token; CLIP has room for 75 beside its start and end.
LETTERS = {"short": 5, "one less than full": 74, "full": 75, "one too many": 76, "long": 200, "longer than T5": 700}
CASES = [(name, length) for name in ("sd15", "sdxl") for length in (None,)]
CASES += [(name, length) for name in ("sd3", "flux") for length in (None, 16, 100)]


@pytest.fixture(scope="module")
def load(pipelines):
    """A pipeline of diffusers by name, read once."""
    found: dict[str, diffusers.DiffusionPipeline] = {}

    def read(name: str) -> diffusers.DiffusionPipeline:
        if name not in found:
            found[name] = diffusers.DiffusionPipeline.from_pretrained(pipelines[name], dtype=torch.float32)
        return found[name]

    return read


def text(letters: int) -> str:
    """A word of so many letters, of which none follows itself."""
    return ("thequickbrownfoxjumpsoveralazydogandsleeps" * 20)[:letters]


def theirs(name: str, pipeline: diffusers.DiffusionPipeline, texts: list[str], length: int | None) -> tuple:
    """What the pipeline's `encode_prompt` makes of prompts, in the order of our `encode`."""
    more = {} if length is None else {"max_sequence_length": length}
    if name == "sd15":
        return pipeline.encode_prompt(texts, "cpu", 1, False)[:1]
    if name == "flux":
        return pipeline.encode_prompt(texts, None, device="cpu", **more)[:2]
    every = (texts, None, None) if name == "sd3" else (texts, None)
    states, _, pooled, _ = pipeline.encode_prompt(*every, do_classifier_free_guidance=False, **more)
    return states, pooled


@pytest.mark.parametrize("letters", LETTERS.values(), ids=LETTERS)
@pytest.mark.parametrize(("name", "length"), CASES)
@torch.no_grad()
def test_a_text_of_any_length_is_encoded_as_the_pipeline_does(load, name, length, letters):
    pipeline = load(name)
    family = registry.pipeline(registry.by_name(name.removesuffix("15")))
    texts = [text(letters), "a cat"]  # in a batch with a short one
    config = getattr(pipeline, family.spec.network).config
    ours, expected = family.encode(pipeline.components, config, texts, length), theirs(name, pipeline, texts, length)
    assert len(ours) == len(expected)
    for mine, its in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "which", "length"), [("sdxl", "", 77), ("sdxl", "_2", 77), ("flux", "_2", 40)])
@pytest.mark.parametrize("letters", [1, 37, 38, 39, 74, 75, 76, 77, 100])
def test_the_end_token_stays_and_what_is_cut_is_named(load, caplog, monkeypatch, name, which, length, letters):
    """Both tokenizers put one token before a word and one behind it."""
    monkeypatch.setattr(log, "_warned", set())
    pipeline = load(name)
    encoder, tokenizer = getattr(pipeline, f"text_encoder{which}"), getattr(pipeline, f"tokenizer{which}")
    (ids,) = tokens(encoder, tokenizer, [text(letters)], length)
    assert len(ids) == length
    assert ids[min(letters + 2, length) - 1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[: min(letters + 2, length) - 1]
    unseen = text(letters)[length - 2 :]
    sentence = f'{type(encoder).__name__} takes {length} tokens and does not see: "{unseen}"'
    assert [record.getMessage() for record in caplog.records] == ([sentence] if unseen else [])


def test_learned_words_stand_as_all_of_their_vectors_as_in_diffusers(pipelines):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(pipelines["sd15"], dtype=torch.float32)
    for count, word in enumerate(("<one>", "<two>", "<three>"), start=1):
        pipeline.load_textual_inversion(torch.ones(count, pipeline.text_encoder.config.hidden_size), token=word)
    texts = ["a <one>, red", "<two> and <three>", "<three> <three> <one>", "no such word: three", ""]
    found = expanded(pipeline.tokenizer, texts)
    assert found == pipeline.maybe_convert_prompt(texts, pipeline.tokenizer)
    assert found[:2] == ["a <one>, red", "<two> <two>_1 and <three> <three>_1 <three>_2"]
