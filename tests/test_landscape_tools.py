"""The pictures and captions that the embedded model learns from."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tools.landscape.captions import caption, full_caption
from tools.landscape.data import draw
from tools.landscape.presets import Autoencoder, Preset
from tools.landscape.presets import Denoiser as Spec
from tools.landscape.scene import ATTRIBUTES, Scene, flip, from_labels, sample_scene
from tools.landscape.vocabulary import CLIP_LENGTH, build_clip_tokenizer, build_t5_tokenizer
from tools.landscape.words import PHRASES

LITTLE = Preset(
    size=16,
    images=8,
    autoencoder=Autoencoder((8, 16), latent_channels=2, batch=2, steps=1, rate=1e-3),
    denoiser=Spec(
        layers=2, heads=2, head_dim=32, patch=4, text_width=32, text_layers=2, batch=4, steps=4, rate=1e-3,
        muon_rate=2e-3, shift=3.0,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers():
    clip = build_clip_tokenizer(seed=0, merges=200)
    return clip, build_t5_tokenizer(seed=0, clip=clip)


def test_a_seed_and_an_index_give_one_picture():
    (first_scene, first), (again_scene, again) = draw(3, 5, 64), draw(3, 5, 64)
    assert first_scene == again_scene
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, draw(3, 6, 64)[1])


def test_every_attribute_changes_the_picture():
    rng = np.random.default_rng(0)
    scenes = {draw(0, index, 32)[0] for index in range(40)}
    for position, values in enumerate(ATTRIBUTES.values()):
        assert {scene.labels()[position] for scene in scenes} == set(range(len(values)))
    assert not any(scene.time == "noon" and scene.sky == "starry" for scene in (sample_scene(rng) for _ in range(300)))


def test_a_full_caption_states_every_attribute_of_its_picture():
    rng = np.random.default_rng(1)
    for _ in range(500):
        scene = sample_scene(rng)
        text = full_caption(scene, rng).lower()
        for name, values in PHRASES.items():
            said = [value for value in values if any(phrase_in(text, phrase) for phrase in values[value])]
            assert getattr(scene, name) in said, (name, text)


def phrase_in(text: str, phrase: str) -> bool:
    return any(phrase.format(disc=disc) in text for disc in ("sun", "moon"))


def test_short_captions_leave_out_what_they_do_not_mention():
    rng = np.random.default_rng(2)
    lake = Scene("noon", "hills", "lake", "clear", "left")
    river = Scene("noon", "hills", "river", "clear", "left")
    for _ in range(200):
        state = rng.bit_generator.state
        first = caption(lake, rng)
        rng.bit_generator.state = state
        second = caption(river, rng)
        assert first.mentions == second.mentions
        if "water" not in first.mentions:
            assert first.text == second.text


def test_a_flip_swaps_the_side_and_nothing_else():
    scene = Scene("night", "city", "river", "starry", "left")
    assert flip(scene) == Scene("night", "city", "river", "starry", "right")
    assert flip(flip(scene)) == scene
    middle = Scene("dawn", "dunes", "none", "clear", "center")
    assert flip(middle) == middle
    assert from_labels(scene.labels()) == scene


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\t\r", "🐉🌄", "日本語", "\x00\ufffd", "a" * 400, "<|endoftext|></s><pad>", "Ünïcode, {braces} ${x}"],
)
def test_every_string_has_tokens(tokenizers, text):
    for tokenizer, length in zip(tokenizers, (CLIP_LENGTH, 256), strict=True):
        ids = tokenizer(text, padding="max_length", truncation=True, max_length=length).input_ids
        assert len(ids) == length
        assert max(ids) < len(tokenizer)


def test_a_full_caption_fits_the_clip_encoders(tokenizers):
    rng = np.random.default_rng(4)
    clip, _ = tokenizers
    lengths = [len(clip(full_caption(sample_scene(rng), rng)).input_ids) for _ in range(200)]
    assert max(lengths) <= CLIP_LENGTH + 8  # 200 merges here, 800 in the model


@pytest.mark.slow
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(monkeypatch):
    from tools.landscape import denoiser, text, train, train_autoencoder

    monkeypatch.setattr(text, "CLIP_MERGES", 50)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    train_autoencoder.build_autoencoder(LITTLE).save_pretrained("vae")
    rng = np.random.default_rng(0)
    np.save("latents.npy", rng.standard_normal((8, 2, 8, 8)).astype(np.float16))
    np.save("latent_labels.npy", np.array([sample_scene(rng).labels() for _ in range(8)], np.uint8))

    def run(out: str, resume: bool = False) -> None:
        args = Namespace(data=Path(), vae=Path("vae"), out=Path(out), seed=3, device=torch.device("cpu"),
                         save_every=2, resume=resume)  # fmt: skip
        torch.manual_seed(0)
        train.train(denoiser.Denoiser(LITTLE, 8), args, LITTLE, 4)

    run("whole")
    loss, calls = train.flow_loss, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(train, "flow_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.setattr(train, "flow_loss", loss)
    run("parts", resume=True)
    whole, parts = (load_file(f"{out}/transformer/diffusion_pytorch_model.safetensors") for out in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
