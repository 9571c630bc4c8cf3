"""Images that a user gives: as PIL's users expect, or one sentence, and never a warning of a library."""

import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sglang_gen.backends.input_files import read_image
from sglang_gen.errors import UserError
from sglang_gen.perf import quality


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims `side` x `side` pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def png(mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> bytes:
    Image.new(mode, size, 100).save("whole.png")
    return Path("whole.png").read_bytes()


BROKEN = [
    ("bomb", lambda: bomb(60_000), "it has more than 89478485 pixels; make it smaller"),
    ("smaller bomb", lambda: bomb(10_000), "it has more than 89478485 pixels; make it smaller"),
    ("half", lambda: png()[:45], ""),
    ("empty", lambda: b"", "the file is empty"),
    ("text", lambda: b"a lake", "its format is unknown, or it is damaged"),
    ("bad checksum", lambda: png().replace(b"IDAT", b"IDAX"), ""),
]


@pytest.mark.parametrize(("name", "content", "sentence"), BROKEN, ids=[name for name, *_ in BROKEN])
@pytest.mark.parametrize("read", [lambda path: read_image(str(path), "--image-path"), quality.read_reference])
def test_a_broken_image_is_one_sentence_and_little_memory(name, content, sentence, read):
    Path("odd.png").write_bytes(content())
    tracemalloc.start()
    with pytest.raises(UserError) as refused:
        read(Path("odd.png"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sentence in str(refused.value)
    assert "odd.png" in str(refused.value)
    assert len(str(refused.value)) < 200
    assert peak < 10e6


def test_a_folder_is_no_image():
    Path("folder.png").mkdir()
    with pytest.raises(UserError, match=r"--image-path: folder\.png is not a readable image .it is a folder"):
        read_image("folder.png", "--image-path")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK", "YCbCr"])
def test_an_image_of_any_mode_is_read_as_pil_converts_it_without_a_warning(mode):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(grey).convert(mode) if mode != "I;16" else Image.fromarray(grey.astype(np.uint16) * 257)
    name = "odd.jpg" if mode in ("CMYK", "YCbCr") else "odd.png"
    image.save(name, **({"quality": 100} if name.endswith("jpg") else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_image(name, "--image-path")
    assert (read.mode, read.size) == ("RGB", (16, 16))
    expected = np.where(grey > 127, 255, 0) if mode == "1" else grey
    if mode == "1":  # dithered
        assert set(np.unique(read)) <= {0, 255}
    else:
        assert np.abs(np.asarray(read)[..., 0].astype(int) - expected).max() <= (0 if name.endswith("png") else 4)


def test_a_palette_with_transparency_says_so_in_our_words(capsys, sglang):
    sglang("--version")
    image = Image.new("P", (16, 16))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save("odd.png", transparency=b"\x00\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image("odd.png", "--image-path").getpixel((0, 0)) == (10, 20, 30)
    assert "odd.png has transparent pixels; their transparency is ignored" in capsys.readouterr().err


def test_an_animation_gives_its_first_frame_and_says_so(capsys, sglang):
    sglang("--version")
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    frames[0].save("odd.gif", save_all=True, append_images=frames[1:])
    assert read_image("odd.gif", "--image-path").getpixel((0, 0)) == (255, 0, 0)
    assert "has 2 frames; the first one is used" in capsys.readouterr().err
