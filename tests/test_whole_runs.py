"""Runs over guidance branches and data parallel groups, looked at from inside: what is sent, and what is captured."""

from pathlib import Path

import pytest
from native import assert_same
from whole import generated, plan_of

from sglang_gen.errors import UserError
from sglang_gen.plan import make


@pytest.fixture
def run(ranks, pipelines):
    """What happens on each rank of a run of three pictures with guidance, one a batch."""

    def generate(name, folder, *words):
        Path(folder).mkdir()
        planned = plan_of(f"model.path={pipelines[name]}", f"output.path={Path(folder).absolute()}",
                          "sampling.prompt=a cat", "sampling.num_samples=3", "sampling.batch_size=1",
                          "sampling.guidance_scale=3", *words)  # fmt: skip
        return ranks.run(planned.layout, generated, planned)

    return generate


@pytest.mark.whole
def test_data_parallel_groups_meet_once_a_round_and_send_nothing_while_they_denoise(run):
    """Two rounds of three batches; that the operators of a collective would be seen, branches of guidance show."""
    for found in run("sd3", "groups", "parallel=dp2"):
        assert not found.sampling
        assert found.gathers == {"dp": 2}
    for found in run("sd3", "branches", "parallel=cfg2"):
        assert found.sampling == {"shared memory": 3 * 2}  # images, steps
    assert_same("branches", "groups", 3)


@pytest.mark.parametrize("dump", [True, False])
def test_what_a_rank_sends_is_predicted_for_the_dump_and_after_the_last_picture(run, dump):
    words = ("perf.work=false", "perf.machine_rates=false", f"output.perf_dump_path={Path('perf.json').absolute()}")
    found = run("sd3", "pictures", "parallel=sp2_tp2", *(words if dump else ()))
    for each in found:
        assert each.order == ["sampled"] * 3 + ["predicted"] * dump
        assert not each.on_meta.total()
    for stage in ("text_encoding", "conditioning", "denoising", "decoding"):
        collectives = found[0].report["comm"][stage]["collectives"].values()
        assert collectives
        for sent in collectives:
            if dump:
                assert (sent["count"], sent["bytes"]) == (sent["predicted_count"], sent["predicted_bytes"])
            else:
                assert sent.keys() == {"count", "bytes"}


@pytest.fixture
def capturing(monkeypatch):
    """Plans with CUDA graphs on this CPU."""
    monkeypatch.setattr(make, "CAPTURING", ("cuda", "cpu"))


@pytest.mark.whole
@pytest.mark.parametrize(("layout", "rows"), [("cfg2", 1), ("dp2", 2)])
def test_ranks_that_have_a_whole_network_capture_it_once_each(run, capturing, layout, rows):
    """A branch of guidance is one row of the batch, a data parallel group has both."""
    run("sd3", "plain", f"parallel={layout}")
    found = run("sd3", "graphs", f"parallel={layout}", "compile.cuda_graphs=true")
    assert [[shape[0] for shape in each.shapes] for each in found] == [[rows], [rows]]
    assert [each.replays for each in found] == ([6, 6] if layout == "cfg2" else [4, 2])
    assert_same("graphs", "plain", 3)


@pytest.mark.parametrize("layout", ["tp2", "ring2", "ulysses2", "sp2_tp2", "cfg2_sp2"])
def test_graphs_of_a_network_that_is_split_are_refused(pipelines, capturing, layout):
    words = (f"model.path={pipelines['sd3']}", "sampling.prompt=a cat", "sampling.num_samples=2")
    with pytest.raises(UserError, match=r"compile\.cuda_graphs captures no network that is split over ranks; leave it"):
        plan_of(*words, "compile=graphs", f"parallel={layout}")
