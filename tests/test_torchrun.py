"""Ranks that torchrun starts: one run of all of them, on one machine or several, that speaks with one voice."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from launched import COMMAND, TORCHRUN, finish, free_port, start, words
from rank_runs import SIZE, assert_same
from started import children, gone

from sglang_gen import env, generate
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.errors import UserError
from sglang_gen.launch import torchrun


@pytest.fixture
def alone(sglang, pipelines):
    """The picture of one process, in the folder `one`."""
    assert sglang("generate", *words(pipelines["sd15"], "--output-path", "one")).code == 0


@pytest.mark.slow
def test_the_ranks_of_torchrun_give_the_picture_of_one_process(alone, pipelines):
    run = words(pipelines["sd15"], "--output-path", "two")  # no degree: all ranks share the sequence
    codes, lines = finish(start([*TORCHRUN, "--nproc-per-node", 2, *COMMAND, *run]))
    assert codes == [0], lines
    assert_same("two", "one", 1)
    assert len(lines) == len(set(lines))
    assert lines[-2] == "INFO: Generated image saved to: two/generated_image_0.png"


@pytest.mark.slow
def test_each_group_warns_of_its_own_pictures_and_what_all_say_is_said_once(pipelines):
    cut = "x" * 75  # as much as the encoder takes
    Path("prompts.txt").write_text(f"{cut} noon\n{cut} dawn\na lake\n{cut} noon\n")
    run = ["--model-path", pipelines["sd15"], *SIZE, "--num-inference-steps", 2, "sampling.prompts_file=prompts.txt",
           "sampling.batch_size=1", "parallel=dp2"]  # fmt: skip
    codes, lines = finish(start([*TORCHRUN, "--nproc-per-node", 2, *COMMAND, *run]))
    assert codes == [0], lines
    warnings = [line for line in lines if "does not see" in line]
    assert len(warnings) == len(set(warnings)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["c10d", "static"])
def test_two_machines_give_the_picture_of_one_process(alone, pipelines, kind):
    run, port = words(pipelines["sd15"], "--output-path", "two", "parallel=tp2"), free_port()
    agents = []
    for number in range(2):
        how = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
        if kind == "static":
            how = ["--node-rank", number, "--master-addr", "localhost", "--master-port", port]
        agents.append(start([*TORCHRUN, "--nnodes", 2, "--nproc-per-node", 1, *how, *COMMAND, *run]))
    codes, lines = finish(*agents)
    assert codes == [0, 0], lines
    assert_same("two", "one", 1)
    assert len(lines) == len(set(lines))


@pytest.mark.whole
def test_a_machine_without_the_model_says_so_and_ends_all_ranks(pipelines):
    """A launcher that sets the same variables, and a relative path that leads somewhere on rank 0 alone."""
    Path("there").mkdir()
    Path("there/model").symlink_to(pipelines["sd15"])
    Path("elsewhere").mkdir()
    port, ranks = free_port(), []
    for rank, folder in enumerate(("there", "elsewhere")):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        ranks.append(start([sys.executable, *COMMAND, *words("./model", "parallel=tp2")], folder, **place))
    started = time.monotonic()
    codes, lines = finish(*ranks)
    assert codes == [2, 2]
    said = f"ERROR: Rank 1 on {socket.gethostname()}: The model folder ./model does not exist"
    assert [line for line in lines if not line.startswith("INFO: ")] == [said, said]  # once on each machine
    assert time.monotonic() - started < 120
    assert not list(Path("there/outputs").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for children in /proc")
def test_a_killed_rank_or_torchrun_leaves_nobody(pipelines):
    run = words(pipelines["sd15"], "--output-path", "two", "--num-samples", 99999)
    for victim in ("rank", "torchrun"):
        agent = start([*TORCHRUN, "--nproc-per-node", 2, *COMMAND, *run])
        while not list(Path("two").glob("*.png")):
            time.sleep(0.1)
        ranks = children(agent.pid)
        assert len(ranks) == 2
        os.kill(max(ranks) if victim == "rank" else agent.pid, signal.SIGKILL)
        assert gone(ranks, within=5)
        _, lines = finish(agent)
        errors = [line for line in lines if line.startswith("ERROR: ")]
        if victim == "rank":  # whatever of the two comes first
            lost = f"ERROR: Rank 0 on {socket.gethostname()} lost the connection to another rank"
            assert errors in ([lost], ["ERROR: Terminated"])
        assert not [path for path in Path("two").iterdir() if path.name.startswith(".tmp")]
        for path in Path("two").iterdir():
            path.unlink()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for children in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_ends_all_ranks(pipelines, number):
    run = words(pipelines["sd15"], "parallel=ring2", "--output-path", "two", "--num-samples", 99999)
    agent = start([*TORCHRUN, "--nproc-per-node", 2, *COMMAND, *run])
    while not list(Path("two").glob("*.png")):
        time.sleep(0.1)
    ranks = children(agent.pid)
    assert len(ranks) == 2
    agent.send_signal(number)
    assert gone(ranks, within=5)
    codes, lines = finish(agent)
    assert codes[0] != 0
    assert [line for line in lines if line.startswith("ERROR: ")] in (
        [], ["ERROR: Interrupted"], ["ERROR: Terminated"]
    )  # fmt: skip
    assert not [path for path in Path("two").iterdir() if path.name.startswith(".tmp")]


@pytest.fixture
def only_rank(monkeypatch):
    """This process is the one rank of a launcher that sets torchrun's variables."""
    place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.whole
def test_a_rank_ends_cleanly_while_it_still_watches(only_rank):
    """The interpreter aborts where it ends while another thread is inside of torch, so that thread has to be over."""
    code = (
        "import time; from sglang_gen import env; from sglang_gen.launch import torchrun; torchrun.WATCH = 0.0; "
        "raise SystemExit(torchrun.run(env.torchrun(), lambda: time.sleep(0.2) or 0, lambda _: 1))"
    )
    codes, _ = finish(start([sys.executable, "-c", code]))
    assert codes == [0]


@pytest.mark.whole
def test_one_rank_alone_generates_and_a_dry_run_prints(sglang, pipelines, only_rank):
    done = sglang("generate", *words(pipelines["sd15"]))
    assert (done.code, len(list(Path("outputs").glob("*.png")))) == (0, 1), done.err
    done = sglang("generate", *words(pipelines["sd15"], "dry_run=true"))
    assert (done.code, "ranks 1" in done.out) == (0, True)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ("parallel=tp2",),
            "torchrun has started 1 process and the run has 2 ranks; make",
        ),
        (("-m", "sampling.seed=1,2"), "each job of a multirun starts its own: sweep without torchrun"),
    ],
)
def test_what_torchrun_does_not_fit_is_refused(sglang, pipelines, only_rank, more, sentence):
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", *more)
    assert (done.code, [line for line in done.lines if not line.startswith("INFO: ")]) == (2, done.lines[-1:])
    assert sentence in done.lines[-1]


def test_a_number_of_torchrun_that_is_none_is_refused(sglang, only_rank, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    done = sglang("generate", "--prompt", "a")
    assert (done.code, done.lines) == (
        2, ["ERROR: The environment variable RANK is 'first'; torchrun sets it to a number"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("MASTER_PORT", "abc", "The environment variable MASTER_PORT is 'abc'; torchrun sets it to a number"),
        ("MASTER_PORT", "99999", "The environment variable MASTER_PORT is 99999; it must lie between 1 and 65535"),
        ("WORLD_SIZE", "0", "The environment variable WORLD_SIZE is 0; it must lie between 1 and 2147483647"),
        ("WORLD_SIZE", "9" * 30, f"The environment variable WORLD_SIZE is {'9' * 30}; it must lie between 1 and"),
        ("RANK", "\u00b2", "The environment variable RANK is '\u00b2'; torchrun sets it to a number"),
        ("LOCAL_RANK", "-1", "The environment variable LOCAL_RANK is '-1'; torchrun sets it to a number"),
    ],
)
def test_a_number_of_torchrun_that_makes_no_sense_is_refused_before_torch_sees_it(
    sglang, only_rank, monkeypatch, name, value, sentence
):
    monkeypatch.setenv(name, value)
    done = sglang("generate", "--prompt", "a")
    assert (done.code, len(done.lines)) == (2, 1)
    assert sentence in done.lines[0]


@pytest.mark.slow
def test_a_port_that_another_program_has_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost",
                 "MASTER_PORT": taken.getsockname()[1]}  # fmt: skip
        codes, lines = finish(start([sys.executable, *COMMAND, "--prompt", "a", "parallel=tp2"], **place))
    assert (codes, len(lines)) == ([1], 1)
    assert "cannot reach the other ranks: another program has MASTER_PORT, or nothing answers" in lines[0]


def place(ranks: int) -> env.Torchrun:
    return env.Torchrun(rank=0, ranks=ranks, local=0, here=ranks, node=0)


def test_a_run_that_states_no_degree_has_the_ranks_that_are_there():
    composed = compose(Choices(overrides=("sampling.prompt=a", "parallel.timeout_minutes=5")))
    fitted = torchrun.fit(composed, place(4), single=False)
    assert (fitted.run.parallel.num_gpus, fitted.sources["parallel.num_gpus"]) == (4, "torchrun")


@pytest.mark.parametrize("word", ["parallel=tp2", "parallel=single", "parallel.tp_size=2", "parallel.num_gpus=8"])
def test_a_run_that_states_another_number_of_ranks_is_refused(word):
    composed = compose(Choices(overrides=("sampling.prompt=a", word)))
    with pytest.raises(UserError, match=r"torchrun has started 4 processes and the run has [128] ranks?;"):
        torchrun.fit(composed, place(4), single=word == "parallel=single")


def test_python_does_not_start_a_run_in_every_process(only_rank, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun has started 2 processes, and generate"):
        generate(prompt="a")
