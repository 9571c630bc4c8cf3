"""Videos and sounds: what is written is what was made."""

import json
import wave
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import tiny

from sglang_gen.outputs import video_audio


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return tiny.wan(tmp_path_factory.mktemp("wan") / "tiny-wan")


def frames_of(path: Path) -> tuple[np.ndarray, float]:
    return imageio.imread(path), imageio.immeta(path)["fps"]


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # imageio's reader leaves its pipe to the garbage collector
@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_a_video_has_its_frames_its_rate_and_its_record(tmp_path, size):
    grey = np.linspace(10, 240, 6).astype(np.uint8)
    frames = np.broadcast_to(grey[:, None, None, None], (6, *size, 3))
    path = video_audio.save_video(tmp_path, frames, 8, lambda name: {"file": name, "prompt": "é🐱; a=b"})
    read, fps = frames_of(path)
    assert (path.name, fps) == ("generated_video_0.mp4", 8)
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).max() <= 3
    assert json.loads(path.with_suffix(".json").read_text()) == {"file": path.name, "prompt": "é🐱; a=b"}


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_text_to_video_saves_a_video_with_the_settings_of_the_request(wan, sglang):
    done = sglang("generate", "--model-path", wan, "--prompt", "a cat", "--height", "16", "--width", "16",
                  "--num-frames", "5", "--fps", "4", "--num-inference-steps", "2", "--seed", "3")  # fmt: skip
    assert done.code == 0, done.err
    assert "INFO: Generated video saved to: outputs/generated_video_0.mp4" in done.lines
    read, fps = frames_of(Path("outputs/generated_video_0.mp4"))
    assert (read.shape, fps) == ((5, 16, 16, 3), 4)
    effective = json.loads(Path("outputs/generated_video_0.json").read_text())["effective"]
    assert (effective["num_frames"], effective["fps"], effective["makes"]) == (5, 4, "video")


def test_video_settings_without_a_video_are_a_warning(pipelines, sglang):
    done = sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a", "--height", "32", "--width", "32",
                  "--num-inference-steps", "1", "--num-frames", "5", "--fps", "4")  # fmt: skip
    assert done.code == 0, done.err
    for setting in ("sampling.num_frames", "output.fps"):
        assert any(line.startswith(f"WARNING: {setting} has no effect") for line in done.lines)


def test_a_sound_has_its_samples_and_its_rate(tmp_path):
    samples = np.stack([np.sin(np.linspace(0, 50, 800)), np.linspace(-1, 1, 800)])
    path = video_audio.save_sound(tmp_path, samples, 16000, lambda name: {"file": name})
    with wave.open(str(path)) as sound:
        assert (sound.getnchannels(), sound.getframerate(), sound.getnframes()) == (2, 16000, 800)
        read = np.frombuffer(sound.readframes(800), "<i2").reshape(-1, 2).T / 32767
    assert np.abs(read - samples).max() < 1e-4
    assert json.loads(path.with_suffix(".json").read_text()) == {"file": "generated_audio_0.wav"}


def test_samples_of_a_sound_are_rounded_to_the_nearest_of_16_bits_and_clipped(tmp_path):
    levels = np.array([[0.0, 0.7, -0.7, 1.4, 2.6, -2.6, 32766.9, 40000.0, -40000.0]]) / 32767
    path = video_audio.save_sound(tmp_path, levels, 8000, lambda name: {"file": name})
    with wave.open(str(path)) as sound:
        found = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
    assert found.tolist() == [0, 1, -1, 1, 3, -3, 32767, 32767, -32767]
