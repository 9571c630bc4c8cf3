"""Ranks send each other data, never pickled objects, and those of one machine listen to that machine only."""

import ast
import json
import pickle
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

import sglang_gen
from sglang_gen import env
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.hub import resolve
from sglang_gen.launch import plan_json
from sglang_gen.outputs import decoded_bytes
from sglang_gen.parallel import mesh
from sglang_gen.plan import make
from sglang_gen.types import Decoded, Layout

PACKAGE = Path(sglang_gen.__file__).parent


def planned(*overrides: str):
    composed = compose(Choices(overrides=("sampling.prompt=a", "sampling.seed=1", "device=cpu", *overrides)))
    return make.make_plan(composed, resolve.find(composed.run.model, weights=False))


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=sdxl", "parallel=cfg2"),
        ("model=flux_dev", "sampling.num_samples=3", "backend.diffusers_kwargs={max_sequence_length: 8}"),
        (
            "model=sd3_medium",
            "sampling.guidance_interval=[0.1,0.9]",
            "output.path='\u00fc \u2603'",
        ),
    ],
)
def test_a_plan_is_the_same_after_its_way_as_json(overrides):
    plan = planned(*overrides)
    assert plan_json.decode(plan_json.encode(plan)) == plan


class Trap:
    """Leaves a file where it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


@pytest.mark.parametrize("text", [pickle.dumps(Trap()), b"[]", b"{}", json.dumps({"run": {}}).encode(), b'"plan"'])
def test_what_is_no_plan_is_refused_and_runs_nothing(text):
    with pytest.raises(ValueError, match=r"not a plan|Expecting value|codec"):
        plan_json.decode(text)
    assert not Path("trapped").exists()


def test_a_batch_of_images_is_the_same_after_its_way_as_bytes():
    plan = planned("model=sdxl", "output.latents=true")
    latents = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    batch = Decoded(np.arange(2 * 48, dtype=np.uint8).reshape(2, 1, 4, 4, 3), latents, latents.mT, effective={"a": [1]})
    again = decoded_bytes.decode(decoded_bytes.encode(plan, batch))
    assert (again.frames == batch.frames).all()
    assert torch.equal(again.noise, batch.noise)
    assert torch.equal(again.latents, batch.latents)
    assert (again.kind, again.rate, again.effective) == ("image", None, {"a": [1]})
    assert decoded_bytes.decode(decoded_bytes.encode(planned("model=sdxl"), batch)).latents is None
    assert decoded_bytes.encode(plan, None) == b""


def collect(joined: mesh.Mesh) -> tuple:
    """What each rank has of things that all of them send."""
    mine = b"\0" * joined.rank
    return (
        joined.broadcast({"kernel": "math", "rank": joined.rank}),
        joined.gather(mine, "dp"),
        joined.gather_all([joined.rank, "\u00fc", None]),
        joined.minimum(7 - joined.rank),
    )


def test_ranks_exchange_json_and_bytes_of_unequal_length(ranks):
    first, second = ranks.run(Layout(dp=2), collect)
    assert first == ({"kernel": "math", "rank": 0}, [b"", b"\0"], [[0, "\u00fc", None], [1, "\u00fc", None]], 6)
    assert second == ({"kernel": "math", "rank": 0}, None, None, 6)


def test_the_store_of_local_ranks_is_out_of_reach_of_other_machines():
    store = mesh.local_store()
    socket.create_connection(("127.0.0.1", store.port), 1).close()
    with pytest.raises(ConnectionRefusedError):  # a socket on all addresses would answer
        socket.create_connection(("127.0.0.2", store.port), 1)


@pytest.mark.skipif(not Path("/sys/class/net/lo").exists(), reason="names the interface as Linux does")
def test_the_connections_of_local_ranks_are_too_unless_the_user_names_an_interface(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert env.rank_variables(None)["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert env.rank_variables(None)["GLOO_SOCKET_IFNAME"] == "eth7"


COPY = "config/hydra_loader.py"  # copies an object of this process


def test_nothing_that_arrives_over_a_network_is_unpickled():
    found = {
        (path.relative_to(PACKAGE).as_posix(), node.attr)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and re.search(r"^pickle\.|^dist\..*_object(_list)?$", ast.unparse(node))
    }
    assert found == {(COPY, "loads"), (COPY, "dumps"), (COPY, "PicklingError")}
