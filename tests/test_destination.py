"""What a name stands for decides how it is written: files are replaced whole, streams are written to and stay."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_gen import destination, files
from sglang_gen.errors import RunError, UserError
from sglang_gen.report.job_reader import read_jobs

SMALL = ("--height", "32", "--width", "32", "--num-inference-steps", "1", "--seed", "7")
DUMP = {"total_duration_ms": 1.0, "steps": []}


def kind(path: Path) -> int:
    return stat.S_IFMT(path.lstat().st_mode)


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def bound(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as open_socket:
        open_socket.bind(str(path))
    return path


def null(path: Path) -> Path:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"no device can be made here: {error.strerror}")
    return path


def disk(path: Path) -> Path:
    try:
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(259, 255))
    except OSError as error:
        pytest.skip(f"no device can be made here: {error.strerror}")
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def read_by(path: Path, write: Callable[[], object]) -> bytes:
    """What a reader of the FIFO gets while `write` runs."""
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    reader.start()
    write()
    reader.join(timeout=30)
    return found[0]


@pytest.mark.parametrize("links", [0, 1, 3])
def test_a_fifo_takes_the_bytes_and_stays(tmp_path, links):
    path = name = fifo(tmp_path / "pipe")
    for number in range(links):
        Path(tmp_path / f"link{number}").symlink_to(os.path.relpath(name, tmp_path))
        name = tmp_path / f"link{number}"
    files.prepare_file(name, stream=True)
    content = {"text": "x" * 100_000}  # more than a pipe holds
    assert json.loads(read_by(path, lambda: files.save_json(name, content, stream=True))) == content
    assert kind(path) == stat.S_IFIFO
    assert links == 0 or kind(name) == stat.S_IFLNK
    assert len(list(tmp_path.iterdir())) == 1 + links


def test_a_device_takes_the_bytes_and_stays(tmp_path):
    path = null(tmp_path / "null")
    (tmp_path / "link").symlink_to("null")
    for name in (path, tmp_path / "link"):
        files.prepare_file(name, stream=True)
        files.save_json(name, DUMP, stream=True)
    assert kind(path) == stat.S_IFCHR
    assert kind(tmp_path / "link") == stat.S_IFLNK
    assert sorted(os.listdir(tmp_path)) == ["link", "null"]


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(
    ("make", "stream", "sentence"),
    [
        (fifo, False, "It is a FIFO, and only a regular file can be replaced"),
        (null, False, "It is a device, and only a regular file can be replaced"),
        (bound, True, "It is a socket, and only a regular file can be replaced"),
        (disk, True, "It is a block device, and only a regular file can be replaced"),
        (folder, True, "Is a directory"),
    ],
)
def test_what_is_neither_file_nor_stream_is_refused_and_stays(tmp_path, make, stream, sentence, linked):
    path = name = make(tmp_path / "thing")
    before = kind(path)
    if linked:
        name = tmp_path / "link"
        name.symlink_to(path)
    with pytest.raises(UserError, match=f"{name} cannot be written: {sentence}"):
        files.prepare_file(name, stream)
    with pytest.raises(RunError, match=sentence):
        files.save_json(name, DUMP, stream)
    (tmp_path / "finished").write_text("new")
    with pytest.raises(OSError, match=sentence if not linked else "It is a link"):
        destination.replace(tmp_path / "finished", name)
    assert kind(path) == before
    assert len(list(tmp_path.iterdir())) == 2 + linked


def test_a_link_to_a_file_stays_and_its_target_is_replaced(tmp_path):
    target = folder(tmp_path / "there") / "perf.json"
    target.write_text("old")
    inode = target.stat().st_ino
    link = tmp_path / "link.json"
    link.symlink_to("there/perf.json")
    files.prepare_file(link, stream=True)
    files.save_json(link, DUMP, stream=True)
    assert os.readlink(link) == "there/perf.json"
    assert json.loads(target.read_text()) == DUMP
    assert target.stat().st_ino != inode  # replaced whole, not written over
    assert os.listdir(tmp_path / "there") == ["perf.json"]


def test_a_link_that_dangles_makes_its_target_but_no_folder(tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to("perf.json")
    files.save_json(link, DUMP)
    assert (os.readlink(link), json.loads((tmp_path / "perf.json").read_text())) == ("perf.json", DUMP)
    lost = tmp_path / "lost.json"
    lost.symlink_to("gone/perf.json")
    with pytest.raises(UserError, match=r"lost\.json cannot be written: It is a link into .*gone, which does"):
        files.prepare_file(lost)
    with pytest.raises(RunError, match="No such file or directory"):
        files.save_json(lost, DUMP)
    assert not (tmp_path / "gone").exists()


def test_links_in_a_circle_are_one_sentence(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match="a cannot be written: Too many levels of symbolic links"):
        files.prepare_file(tmp_path / "a", stream=True)


@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}", "/proc/thread-self/fd/{}", "link"])
def test_a_descriptor_of_a_file_is_written_from_where_it_stands(tmp_path, name):
    with open(tmp_path / "shared", "w+b") as shared:
        shared.write(b"before ")
        shared.flush()
        if name == "link":
            (tmp_path / name).symlink_to(f"/dev/fd/{shared.fileno()}")
            name = str(tmp_path / name)
        path = Path(name.format(shared.fileno()))
        files.prepare_file(path, stream=True)
        files.write_bytes(path, b"dump", stream=True)
        os.write(shared.fileno(), b" after")
    assert (tmp_path / "shared").read_bytes() == b"before dump after"


def test_descriptors_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with open(tmp_path / "file", "rb") as reading:
        with pytest.raises(UserError, match="It is open for reading only"):
            files.prepare_file(Path(f"/dev/fd/{reading.fileno()}"), stream=True)
        closed = os.dup(reading.fileno())
    os.close(closed)
    with pytest.raises(UserError, match="Bad file descriptor"):
        files.prepare_file(Path(f"/dev/fd/{closed}"), stream=True)
    with pytest.raises(UserError, match="a descriptor of another process"):
        files.prepare_file(Path(f"/proc/{os.getppid()}/fd/1"), stream=True)


def started(*words: object, **streams: object) -> subprocess.CompletedProcess:
    assert os.readlink("/dev/stdout") == "/proc/self/fd/1"
    return subprocess.run(
        [sys.executable, "-m", "sglang_gen", *map(str, words)], stderr=subprocess.PIPE, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parent.parent)}, check=False, **streams,
    )  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("to", ["pipe", "file", "socket"])
def test_the_standard_output_gets_a_report_and_stays_what_it_is(tmp_path, to):
    for name in ("base.json", "new.json"):
        (tmp_path / name).write_text(json.dumps({"total_duration_ms": 10.0, "steps": [], "meta": {"model": "m"}}))
    words = ("perf", "compare", tmp_path / "base.json", tmp_path / "new.json", "--json", "/dev/stdout")
    if to == "pipe":
        done = started(*words, stdout=subprocess.PIPE)
        said = done.stdout
    elif to == "file":
        with open(tmp_path / "said", "wb") as file:
            file.write(b"kept ")
            file.flush()
            done = started(*words, stdout=file)
        said = (tmp_path / "said").read_bytes()
        assert said.startswith(b"kept ")
        said = said.removeprefix(b"kept ")
    else:
        ours, theirs = socket.socketpair()
        done = started(*words, stdout=theirs.fileno())
        theirs.close()
        said = b"".join(iter(lambda: ours.recv(65536), b""))
        ours.close()
    assert os.readlink("/dev/stdout") == "/proc/self/fd/1"
    report, end = json.JSONDecoder().raw_decode(said.decode())
    assert done.returncode == report["exit_code"], done.stderr
    assert said.decode()[end:].strip().startswith("**")  # the report for a reader, after it


def test_a_dump_goes_into_a_fifo_and_the_fifo_stays(pipelines, sglang):
    path = fifo(Path("pipe").absolute())
    words = ("generate", "--model-path", pipelines["sd15"], "--prompt", "a", *SMALL, "--perf-dump-path", "pipe",
             "perf=light")  # fmt: skip
    dump = json.loads(read_by(path, lambda: sglang(*words)))
    assert [stage["name"] for stage in dump["steps"]][:2] == ["load", "text_encoding"]
    assert kind(path) == stat.S_IFIFO


@pytest.mark.parametrize("more", [(), ("dry_run=true",)])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--perf-dump-path", "socket"), "output.perf_dump_path: socket cannot be written: It is a socket, and only a"),
        (("--perf-dump-path", "/dev/fd/77"), "output.perf_dump_path: /dev/fd/77 cannot be written: Bad file descr"),
        (("--output-path", "pipe"), "pipe cannot be written: It is not a folder"),
        (("--output-path", "pipe/below"), "pipe/below cannot be written: pipe is not a folder"),
        (("--output-path", "dangling"), "dangling cannot be written: It is not a folder"),
        (("tracking=csv", "--output-path", "tracked"), "tracked/runs.csv cannot be written: It is a FIFO, and only a"),
    ],
)
def test_names_of_other_things_are_refused_before_loading(sglang, words, sentence, more):
    fifo(Path("pipe"))
    bound(Path("socket"))
    Path("dangling").symlink_to("gone/further")
    fifo(folder(Path("tracked")) / "runs.csv")
    done = sglang("generate", "model=landscape", "--prompt", "a", *SMALL, *words, *more)
    assert (done.code, len(done.lines)) == (2, 1), done.err
    assert sentence in done.err
    assert {path.name for path in Path().iterdir()} == {"pipe", "socket", "dangling", "tracked"}


def test_a_sweep_waits_for_no_fifo_in_its_folder(sglang):
    fifo(folder(Path("sweep")) / "multirun.yaml")
    done = sglang("generate", "--prompt", "a", *SMALL[:-2], "-m", "sampling.seed=1,2",
                  "--output-path", "sweep")  # fmt: skip
    assert done.code == 2
    assert "sweep/multirun.yaml cannot be written: It is a FIFO" in done.err
    assert os.listdir("sweep") == ["multirun.yaml"]


def test_a_fifo_among_the_files_of_a_job_is_not_read(tmp_path):
    fifo(folder(tmp_path / "0") / "job.json")
    (row,) = read_jobs(tmp_path)
    assert (row.status, row.error) == ("unfinished", "job.json is not a regular file")


def test_a_descriptor_beyond_the_standard_ones_is_not_for_several_ranks(sglang, pipelines):
    with open("shared", "wb") as shared:
        done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", *SMALL, "parallel=dp2",
                      "device=cpu", "--num-samples", "2",
                      "--perf-dump-path", f"/dev/fd/{shared.fileno()}")  # fmt: skip
    assert (done.code, len(done.lines)) == (2, 1), done.err
    assert "belongs to this process, and one of 2 ranks writes the dump; name a file" in done.err


def test_nothing_but_a_file_gets_the_name_of_a_numbered_result(tmp_path, monkeypatch):
    """Another process takes the name of the record while the picture is written."""
    import numpy as np

    link = os.link

    def planting(source, path):
        fifo(tmp_path / "generated_image_0.json")
        link(source, path)

    monkeypatch.setattr(os, "link", planting)
    with pytest.raises(RunError, match=r"_0\.json cannot be written: It is a FIFO"):
        files.save_image(tmp_path, np.zeros((8, 8, 3), np.uint8), lambda name: {})
    assert kind(tmp_path / "generated_image_0.json") == stat.S_IFIFO
