"""Files of a run: numbered without overwriting, whole or absent, and carrying their record."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sglang_gen import files
from sglang_gen.errors import RunError, UserError
from sglang_gen.plan import checks

SMALL = ("--height", "32", "--width", "32", "--num-inference-steps", "1", "--seed", "7")
NOISE = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)


def record(name: str) -> dict:
    return {"schema_version": 1, "file": name}


def save(folder: Path, latents: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    return files.save_image(folder, NOISE, record, latents)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse(code: int):
    """A stand-in for a function of `os` that the file system refuses."""

    def refused(*_args: object, **_kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return refused


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ([], 0),
        (["generated_image_0.png", "generated_image_4.png"], 5),  # gaps stay: numbers tell the order
        (["generated_image_2.jpg"], 3),
        (["generated_image_9.json"], 10),  # a record whose picture was moved away
        (["generated_image_1.png.bak", "generated_image_x.png", "my_generated_image_7.png"], 2),
        (["generated_video_3.mp4"], 0),
    ],
)
def test_the_number_is_above_every_number_in_use(tmp_path, present, expected):
    for name in present:
        (tmp_path / name).write_bytes(b"mine")
    path = save(tmp_path)
    assert path.name == f"generated_image_{expected}.png"
    assert names(tmp_path) == sorted([*present, path.name, f"{path.stem}.json"])
    assert all((tmp_path / name).read_bytes() == b"mine" for name in present)


def test_results_are_listed_in_the_order_of_their_numbers_without_what_lies_beside_them(tmp_path):
    for name in ("generated_image_10.png", "generated_image_2.png", "generated_image_2.json", "generated_video_3.mp4",
                 "generated_image_10.safetensors", "perf.json", "other_1.png"):  # fmt: skip
        (tmp_path / name).touch()
    assert files.results(tmp_path) == ["generated_image_2.png", "generated_video_3.mp4", "generated_image_10.png"]


def test_a_folder_with_the_name_of_a_picture_counts_as_taken(tmp_path):
    (tmp_path / "generated_image_0.png").mkdir()
    assert save(tmp_path).name == "generated_image_1.png"


def test_a_number_taken_while_writing_is_left_alone(tmp_path, monkeypatch):
    fill = files._fill

    def overtaken(path, write):
        (tmp_path / "generated_image_0.png").write_bytes(b"the other run")
        fill(path, write)

    monkeypatch.setattr(files, "_fill", overtaken)
    assert save(tmp_path).name == "generated_image_1.png"
    assert (tmp_path / "generated_image_0.png").read_bytes() == b"the other run"
    assert names(tmp_path) == ["generated_image_0.png", "generated_image_1.json", "generated_image_1.png"]


def check_whole(folder: Path, count: int) -> None:
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == count
    assert len(names(folder)) == 2 * count
    for path in pictures:
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(picture), NOISE)
            inside = json.loads(picture.text[files.PNG_KEY])
        assert inside == json.loads(path.with_suffix(".json").read_text()) == record(path.name)


@pytest.mark.parametrize("links", [True, False])
def test_threads_in_one_folder_get_numbers_of_their_own(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    together = threading.Barrier(2)

    def work():
        together.wait()
        for _ in range(8):
            save(tmp_path)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_whole(tmp_path, 16)


def python(code: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)], cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.whole
def test_processes_in_one_folder_get_numbers_of_their_own(tmp_path):
    code = """
        import pathlib, sys, time
        import numpy as np
        import PIL.PngImagePlugin
        from sglang_gen import files
        folder = pathlib.Path(sys.argv[1])
        frame = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
        print("ready", flush=True)
        while not (folder.parent / "go").exists():
            time.sleep(0.001)
        for _ in range(10):
            files.save_image(folder, frame, lambda name: {"schema_version": 1, "file": name})
    """
    folder = tmp_path / "shared"
    folder.mkdir()
    processes = [python(code, folder) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    (tmp_path / "go").touch()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    check_whole(folder, 20)


@pytest.mark.whole
def test_a_file_that_outgrows_its_limit_leaves_nothing(tmp_path):
    code = """
        import pathlib, resource, sys
        import numpy as np
        from sglang_gen import errors, files
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        frame = np.random.default_rng(1).integers(0, 256, (512, 512, 3), np.uint8)
        try:
            files.save_image(pathlib.Path(sys.argv[1]), frame, lambda name: {})
        except errors.RunError as error:
            print(error)
    """
    process = python(code, tmp_path)
    said, errors = process.communicate(timeout=60)
    assert said == f"{tmp_path}/generated_image_0.png cannot be written: File too large\n", errors
    assert names(tmp_path) == []


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_leaves_neither_temporary_nor_half_a_result(tmp_path, monkeypatch, failing):
    import torch

    calls = []
    sync = os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"_0\.(png|json|safetensors) cannot be written: No space left on device"):
        save(tmp_path, {"noise": torch.zeros(2), "latents": torch.zeros(2)})
    assert names(tmp_path) == []


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path)
    assert names(tmp_path) == []


def test_a_full_disk_ends_the_command_with_one_sentence(pipelines, sglang, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", *SMALL)
    assert done.code == 1
    assert done.lines[-1] == "ERROR: outputs/generated_image_0.png cannot be written: No space left on device"
    assert names(Path("outputs")) == []


def test_a_replaced_json_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "perf.json"
    files.save_json(path, {"old": 1})
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    with pytest.raises(RunError, match="No space left on device"):
        files.save_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == ["perf.json"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_file_systems_without_hard_links_work(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "link", refuse(code))
    (tmp_path / "generated_image_0.png").write_bytes(b"mine")
    assert save(tmp_path).name == "generated_image_1.png"
    assert (tmp_path / "generated_image_0.png").read_bytes() == b"mine"
    monkeypatch.setattr(os, "replace", refuse(errno.ENOSPC))
    with pytest.raises(RunError, match="No space left"):
        save(tmp_path)
    assert names(tmp_path) == ["generated_image_0.png", "generated_image_1.json", "generated_image_1.png"]


def test_other_refusals_of_a_link_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse(errno.EIO))
    with pytest.raises(RunError, match="Input/output error"):
        save(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("where", ["taken", "taken/inside", "/proc/pictures"])
def test_an_output_folder_that_cannot_be_is_refused_before_loading(pipelines, sglang, monkeypatch, where):
    Path("taken").write_text("a file")
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", *SMALL, "--output-path", where)
    assert (done.code, len(done.lines)) == (2, 1)
    assert done.lines[0].startswith(f"ERROR: {where} cannot be written: ")
    assert Path("taken").read_text() == "a file"


def test_a_name_that_is_too_long_is_refused_before_loading(pipelines, sglang):
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", *SMALL, "--output-path", "x" * 300)
    assert (done.code, len(done.lines)) == (2, 1)
    assert done.lines[0].startswith("ERROR: output.path is too long to name anything: ")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("generated_image_7.json", "names such as generated_image_7.json are those of other results"),
        ("new/generated_video_0.mp4", "names such as generated_video_0.mp4 are those of other results"),
        ("o/runs.csv", "names such as runs.csv are those of other results"),
        ("p5/", "is p5/, which ends in a slash; it must name a JSON file"),
        ("notes.txt", "is notes.txt, a file that is not a perf dump and would be lost; give another name"),
        ("table.csv", "is table.csv, a file that is not a perf dump"),
    ],
)
def test_a_perf_dump_takes_the_place_of_no_other_result(sglang, name, sentence):
    Path("notes.txt").write_text("mine")
    Path("table.csv").write_text("job,overrides\n")
    done = sglang("generate", "--prompt", "a", *SMALL, "--perf-dump-path", name)
    assert (done.code, sentence in done.lines[-1]) == (2, True), done.err
    assert names(Path()) == ["notes.txt", "table.csv"]
    assert Path("notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["", '{"total_duration_ms": 1, "steps": []}'])
def test_a_perf_dump_of_any_name_replaces_an_older_one_and_an_empty_file(composed, content):
    Path("speed").write_text(content)
    checks.check_request(composed("--prompt", "a", "--perf-dump-path", "speed"))


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        files.prepare_file(tmp_path)
    files.prepare_file(tmp_path / "new" / "perf.json")
    assert names(tmp_path / "new") == []


@pytest.mark.parametrize(("code", "kind"), [(errno.EROFS, UserError), (errno.ENOSPC, RunError)])
def test_the_probe_tells_a_read_only_mount_from_a_full_disk(tmp_path, monkeypatch, code, kind):
    monkeypatch.setattr(Path, "write_bytes", refuse(code))
    with pytest.raises(kind, match=os.strerror(code)):
        files.prepare_folder(tmp_path / "new")


def test_the_output_folder_that_vanishes_is_one_sentence(tmp_path):
    with pytest.raises(RunError, match="gone cannot be written: No such file or directory"):
        files.save_image(tmp_path / "gone", NOISE, record)


def test_a_dot_is_the_working_directory_and_nothing_is_refused(pipelines, sglang):
    common = ("generate", "--model-path", pipelines["sd15"], "--prompt", "a", *SMALL, "--output-path")
    blank = sglang(*common, "")
    assert (blank.code, len(blank.lines)) == (2, 1)
    assert "output.path is blank" in blank.lines[0]
    done = sglang(*common, ".")
    assert done.code == 0, done.err
    assert "INFO: Generated image saved to: generated_image_0.png" in done.lines
    assert names(Path()) == ["generated_image_0.json", "generated_image_0.png"]


def test_missing_folders_of_pictures_and_dump_are_made(pipelines, sglang):
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", *SMALL, "--output-path", "a/b",
                  "--perf-dump-path", "c/d/perf.json", "perf.machine_rates=false", "perf.work=false")  # fmt: skip
    assert done.code == 0, done.err
    assert names(Path("a/b")) == ["generated_image_0.json", "generated_image_0.png"]
    assert names(Path("c/d")) == ["perf.json"]


def test_the_png_carries_the_record_that_lies_beside_it(pipelines, sglang):
    prompt = 'a cat 🐈\u200d⬛, {braces}, "quotes", ${x}\nand Ünïcode 中文 \\ \' '
    done = sglang("generate", "--model-path", pipelines["sd3"], "--prompt", prompt, *SMALL)
    assert done.code == 0, done.err
    with Image.open("outputs/generated_image_0.png") as picture:
        inside = json.loads(picture.text[files.PNG_KEY])
        assert type(picture.text[files.PNG_KEY]).__name__ == "iTXt"
    raw = Path("outputs/generated_image_0.json").read_bytes()
    assert inside == json.loads(raw)
    assert "🐈\u200d⬛".encode() in raw
    assert "🐈\u200d⬛".encode() in Path("outputs/generated_image_0.png").read_bytes()
    assert inside["sample"]["prompt"] == inside["run"]["sampling"]["prompt"] == prompt
    assert inside["file"] == "generated_image_0.png"
    assert inside["run"]["sampling"]["seed"] == 7
    assert inside["versions"]["torch"]
