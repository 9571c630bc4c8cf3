"""Saves videos and audio, with numbered names and records like those of images."""

import json
import wave
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sglang_gen.files import save_numbered

FRAMES_PER_SECOND = 16  # default frame rate of a video


def save_video(
    folder: Path,
    frames: "np.ndarray[Any, Any]",
    fps: int,
    record: Callable[[str], dict[str, Any]],
    latents: Mapping[str, Any] | None = None,
) -> Path:
    """Save uint8 [F, H, W, 3] frames as the next generated_video_N.mp4 (H.264), with its record inside and as JSON."""
    return save_numbered(folder, "generated_video.mp4", partial(_write_mp4, frames, fps), record, latents)


def _write_mp4(frames: "np.ndarray[Any, Any]", fps: int, file: BinaryIO, record: dict[str, Any]) -> None:
    """Write with ffmpeg to the open file's name. Odd sizes are kept and use 4:4:4 chroma, which supports them."""
    import imageio.v2 as imageio

    height, width = frames.shape[1:3]
    even = height % 2 == 0 and width % 2 == 0
    writer = imageio.get_writer(
        file.name, format="FFMPEG", mode="I", fps=fps, codec="libx264", quality=None, macro_block_size=1,
        pixelformat="yuv420p" if even else "yuv444p",
        output_params=["-crf", "12", "-metadata", f"comment={json.dumps(record, ensure_ascii=False)}"],
    )  # fmt: skip
    with writer:
        for frame in frames:
            writer.append_data(frame)


def save_sound(
    folder: Path,
    samples: "np.ndarray[Any, Any]",
    rate: int,
    record: Callable[[str], dict[str, Any]],
    latents: Mapping[str, Any] | None = None,
) -> Path:
    """Save float [C, T] samples in [-1, 1] as the next generated_audio_N.wav (16 bit), with its record as JSON."""
    return save_numbered(folder, "generated_audio.wav", partial(_write_wav, samples, rate), record, latents)


def _write_wav(samples: "np.ndarray[Any, Any]", rate: int, file: BinaryIO, _record: dict[str, Any]) -> None:
    data = np.rint(np.clip(samples, -1, 1).T * 32767).astype("<i2")  # [T, C]
    with wave.open(file, "wb") as sound:
        sound.setnchannels(data.shape[1])
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(data.tobytes())
