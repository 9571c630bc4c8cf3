"""What happens when a rank dies, hangs or runs out of memory, and when the launcher of ranks is told to end."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
from rank_runs import SIZE
from started import children, generating, gone, said

from sglang_gen import env
from sglang_gen.errors import RunError
from sglang_gen.launch import launcher, worker


@contextmanager
def meanwhile(act):
    """Call `act` in a thread once the first picture is there; gives a list that then holds the time of it."""
    acted: list[float] = []

    def wait_and_act() -> None:
        while not list(Path("outputs").glob("*.png")):
            time.sleep(0.05)
        acted.append(time.monotonic())
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    yield acted
    thread.join()


KILLED = "ERROR: Rank 1 was ended by SIGKILL; it may have run out of memory"
TERMINATED = "ERROR: Rank 1 received SIGTERM from outside of the run"


@pytest.mark.parametrize(
    ("name", "layout", "number", "sentence"),
    [
        ("sdxl", "parallel=cfg2", signal.SIGKILL, KILLED),
        ("sd15", "parallel=tp2", signal.SIGTERM, TERMINATED),
        pytest.param("sd15", "parallel=sp2_tp2", signal.SIGKILL, KILLED, marks=pytest.mark.slow),
        pytest.param("sd15", "parallel=sp2_tp2", signal.SIGTERM, TERMINATED, marks=pytest.mark.slow),
        pytest.param("sd15", "parallel=dp2", signal.SIGTERM, TERMINATED, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_a_signal_ends_is_named_and_ends_the_run_within_seconds(
    run_on_ranks, pool, name, layout, number, sentence
):
    """The launcher is this process; rank 1 dies once denoising goes on, and the others lose their connection."""
    with meanwhile(lambda: os.kill(pool.ranks.processes[1].pid, number)) as killed:
        done = run_on_ranks(name, layout, "--num-samples", "99999")
    seconds = time.monotonic() - killed[0]
    assert done.code == 1
    assert [line for line in done.lines if not line.startswith("INFO: ")] == [sentence]
    assert seconds < 5  # 1 s for others to speak and 3 s of patience
    assert pool.ranks is None
    assert not [path for path in Path("outputs").iterdir() if path.name.startswith(".tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel=tp2", "parallel=dp2"])
def test_a_rank_that_waits_in_a_collective_says_at_once_that_it_received_sigterm(run_on_ranks, pool, layout):
    """Rank 0 is stopped. Under dp2 rank 1 waits for it in gloo, where its main thread never returns to Python."""

    def stop_and_terminate() -> None:
        os.kill(pool.ranks.processes[0].pid, signal.SIGSTOP)
        time.sleep(1)
        os.kill(pool.ranks.processes[1].pid, signal.SIGTERM)

    with meanwhile(stop_and_terminate) as stopped:
        done = run_on_ranks("sd15", layout, "--num-samples", "99999")
    assert time.monotonic() - stopped[0] < 7  # a second more
    assert [line for line in done.lines if not line.startswith("INFO: ")] == [TERMINATED]


@pytest.mark.whole
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rank_that_a_signal_ends_before_it_has_torch_is_named(number):
    ranks = launcher.Ranks(2, "cpu")
    try:
        ranks.processes[1].send_signal(number)
        (message,) = ranks._read([ranks.pipes[1]], 60)
        sentence = {signal.SIGTERM: TERMINATED, signal.SIGKILL: KILLED}[number]
        assert ranks._take(message, {}).sentence == sentence.removeprefix("ERROR: ")
    finally:
        ranks.stop()


@pytest.mark.slow
def test_a_rank_that_waits_too_long_for_another_gives_the_run_up(run_on_ranks, pool):
    assert run_on_ranks("sd15", "parallel=tp2", "--output-path", "warm").code == 0
    with meanwhile(lambda: os.kill(pool.ranks.processes[1].pid, signal.SIGSTOP)):
        done = run_on_ranks("sd15", "parallel=tp2", "--num-samples", "99999", "parallel.timeout_minutes=0.1")
    assert done.code == 1
    assert [line for line in done.lines if not line.startswith("INFO: ")] == [
        "ERROR: Rank 0 waited 0.1 minutes for another rank; raise parallel.timeout_minutes to wait longer"
    ]
    assert pool.ranks is None


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits another process")
def test_a_rank_that_runs_out_of_memory_is_the_one_that_is_heard(run_on_ranks, pool):
    """Rank 1 may not allocate what the picture needs; rank 0 may, and then loses its connection to it."""
    assert run_on_ranks("sd15", "parallel=tp2", "--output-path", "warm").code == 0
    process = pool.ranks.processes[1].pid
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[0])
    resource.prlimit(process, resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29,) * 2)
    done = run_on_ranks("sd15", "parallel=tp2", "--perf-dump-path", "perf.json", side=3072)
    assert done.code == 1
    assert [line for line in done.lines if not line.startswith("INFO: ")] == [
        "ERROR: Out of memory while generating; try smaller batches or a smaller image"
    ]
    assert not list(Path("outputs").iterdir())


def test_the_timeout_of_a_run_on_one_rank_changes_nothing_and_says_so(sglang):
    done = sglang("generate", "--prompt", "a", "parallel.timeout_minutes=5", "dry_run=true")
    assert "WARNING: parallel.timeout_minutes has no effect without several ranks" in done.lines


@pytest.mark.whole
def test_ranks_start_deaf_to_ctrl_c_and_blind_to_files_of_the_working_directory(capfd):
    """A terminal sends Ctrl-C to all its processes; the launcher answers. A user's queue.py is not the library's."""
    Path("queue.py").write_text("raise SystemExit(7)")
    ranks = launcher.Ranks(1, "cpu")
    (process,) = ranks.processes
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    ranks.pipes[0].close()
    assert process.wait(60) == 143
    ranks.stop()
    assert capfd.readouterr().err == ""


def failure(rank: int, when: float, follows: bool = False) -> worker.Failure:
    return worker.Failure(rank, False, f"rank {rank}", "", when, follows)


class Said(launcher.Ranks):
    """Ranks of which another one is heard after the first failure; those that say nothing ended by signal `number`."""

    def __init__(self, later: tuple[int, worker.Failure | None], device: str = "cpu", number: int = 0) -> None:
        self.pipes, self.later, self.device = [object() for _ in range(3)], later, device
        self.processes = [SimpleNamespace(wait=lambda: -number) for _ in range(3)]

    def _read(self, pipes, timeout):
        return [self.later] if self.pipes[self.later[0]] in pipes else []


def test_of_several_failures_the_earliest_that_is_a_cause_is_said():
    for first, later, cause in (
        (failure(0, 1.0, follows=True), failure(1, 2.0), "rank 1"),
        (failure(0, 2.0), failure(1, 1.0), "rank 1"),
        (failure(0, 2.0), failure(1, 1.0, follows=True), "rank 0"),
    ):
        ranks = Said((later.rank, later))
        with pytest.raises(RunError, match=cause):
            ranks._raise_first([first], ranks.pipes[:2])


@pytest.mark.parametrize(
    ("device", "number", "follows", "sentence"),
    [
        ("cpu", signal.SIGABRT, False, "Rank 1 was ended by SIGABRT; on GPUs this signal follows"),
        ("cuda", signal.SIGABRT, False, "rank 0"),
        ("cuda", signal.SIGABRT, True, "Rank 1 was ended by SIGABRT; on GPUs this signal follows a CUDA error"),
        ("cuda", signal.SIGKILL, False, "Rank 1 was ended by SIGKILL"),
        ("cuda", signal.SIGKILL, True, "Rank 1 was ended by SIGKILL"),
    ],
)
def test_a_rank_that_vanishes_is_the_cause_unless_nccl_ended_it_and_another_says_one(device, number, follows, sentence):
    """NCCL's watchdog aborts those that wait for a rank that has failed. `follows`: the other lost its connection."""
    ranks = Said((1, None), device, number)
    with pytest.raises(RunError, match=sentence):
        ranks._raise_first([failure(0, 2.0, follows)], ranks.pipes[:2])
    ranks = Said((0, failure(0, 2.0, follows)), device, number)
    with pytest.raises(RunError, match=sentence):
        ranks._raise_first([ranks._take((1, None), {})], ranks.pipes[:2])


@pytest.mark.whole
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's doing")
def test_a_rank_whose_launcher_has_already_ended_ends_too():
    """Its pipe is open: another process of the launcher's has the other end."""
    ours, theirs = Pipe()
    process = subprocess.Popen([sys.executable, "-c", launcher._WORKER, str(theirs.fileno()), "1"],
                               pass_fds=[theirs.fileno()], env=env.rank_variables(1))  # fmt: skip
    assert process.wait(60) == 143
    ours.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's doing")
def test_a_stopped_rank_and_one_that_waits_for_it_end_with_their_launcher(pipelines, tmp_path):
    words = ["--model-path", str(pipelines["sd15"]), "--prompt", "a", *SIZE, "--num-samples", "99999", "parallel=tp2",
             "--num-inference-steps", "20", "--output-path", str(tmp_path)]  # fmt: skip
    process = generating(words)
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    time.sleep(0.5)
    process.kill()
    process.communicate(timeout=60)
    assert gone(ranks, within=2)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for children in /proc")
@pytest.mark.parametrize(
    ("number", "code", "layout"),
    [
        (signal.SIGKILL, -9, "parallel=tp2"),
        (signal.SIGINT, 130, "parallel=ring2"),
        (signal.SIGINT, 130, "parallel=dp2"),
        (signal.SIGTERM, 143, "parallel=tp2"),
    ],
)
def test_no_rank_outlives_its_launcher(pipelines, tmp_path, number, code, layout):
    words = ["--model-path", str(pipelines["sd15"]), "--prompt", "a", *SIZE, "--num-samples", "99999", layout,
             "--num-inference-steps", "20", "--output-path", str(tmp_path)]  # fmt: skip
    process = generating(words)
    ranks = children(process.pid)
    assert len(ranks) == 2
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == code
    assert gone(ranks, within=5)
    if number != signal.SIGKILL:
        word = "Interrupted" if number == signal.SIGINT else "Terminated"
        assert said(rest) == [f"ERROR: {word}"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


@pytest.mark.whole
def test_a_rank_that_cannot_read_its_plan_ends():
    """Such as one that runs another version of the code; the launcher would wait for it forever."""
    ranks = launcher.Ranks(1, "cpu")
    try:
        ranks.pipes[0].send_bytes(b"not a job")
        assert ranks.processes[0].wait(timeout=60) == worker.TERMINATED
    finally:
        ranks.stop()


# A rank whose run loses the exception of SIGTERM, in one of three ways.
LOSING = """
import os, signal, sys, time
from sglang_gen import signals
from sglang_gen.launch import worker

class Deaf:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

def run(job, kept):
    try:
        if job.plan.startswith("discarded"):  # Python prints what is raised while it deletes an object, and goes on
            Deaf()
            time.sleep(10 if job.plan == "discarded" else 0)
            signals.check()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except signals.Terminated:  # as compiled code does
            if job.plan == "replaced":
                raise RuntimeError("could not determine the shape") from None
        signals.check()
        print("the run went on")
    finally:
        time.sleep(0.3)
        print("cleaned up", flush=True)

worker._run, worker.level, worker.log.setup = run, lambda plan, rank: "info", lambda level, handler: None
sys.exit(worker.main())
"""


@pytest.mark.whole
@pytest.mark.parametrize("way", ["discarded", "discarded, then heard", "swallowed", "replaced"])
def test_a_rank_whose_run_loses_sigterm_still_cleans_up_and_ends_without_a_word(way):
    ours, theirs = Pipe()
    words = [sys.executable, "-c", LOSING, str(theirs.fileno()), str(os.getpid())]
    with subprocess.Popen(words, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:  # fmt: skip
        theirs.close()
        ours.send(worker.Job(way, 0, 0, ".", 0.0, False))
        assert process.communicate(timeout=60) == ("cleaned up\n", "")
    assert process.returncode == worker.TERMINATED
