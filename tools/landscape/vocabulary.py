"""Trains the tokenizers on captions: byte-level BPE for CLIP, Unigram for T5.

Every string can be tokenized: words of the grammar to one token, other words to several.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

from tools.landscape.captions import caption
from tools.landscape.scene import sample_scene
from tools.landscape.words import FILLERS

CLIP_LENGTH = 32
CORPUS_SIZE = 20000
START, END = "<|startoftext|>", "<|endoftext|>"


def corpus(seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for _ in range(CORPUS_SIZE):
        yield caption(sample_scene(rng), rng).text
    yield from 50 * FILLERS


def build_clip_tokenizer(seed: int, merges: int) -> CLIPTokenizer:
    """All 256 bytes, inside and at the end of a word, then `merges` merges."""
    reference = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer, tokenizer.pre_tokenizer = reference.normalizer, reference.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    learned = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]][:merges]
    tokens = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(pair) for pair in learned] + [START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=learned, model_max_length=CLIP_LENGTH)


def build_t5_tokenizer(seed: int, clip: CLIPTokenizer) -> T5TokenizerFast:
    """Words of the corpus scored by frequency, then subwords, then single characters."""
    words = Counter(re.findall(r"[A-Za-z]+|[^\sA-Za-z]", " ".join(corpus(seed)).lower()))
    words = {word: count for word, count in words.items() if count >= 40}
    total = sum(words.values())
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "\u2581": -6.0}
    for word, count in words.items():
        score = math.log(count / total)
        pieces |= {f"\u2581{word}": score, f"\u2581{word.capitalize()}": score - 1, word: score - 4}
    subwords = [token for token in clip.get_vocab() if token.isascii() and token.isalpha()]
    pieces = {subword: -14.0 - 1 / len(subword) for subword in sorted(subwords) if len(subword) > 1} | pieces
    pieces = {chr(c): -16.0 for c in range(33, 127)} | pieces
    specials = ["<pad>", "</s>", "<unk>"]
    vocabulary = [(piece, 0.0) for piece in specials] + [(p, s) for p, s in pieces.items() if p not in specials]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def save_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save tokenizer.json for current versions of transformers, vocab.json and merges.txt for older ones."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
