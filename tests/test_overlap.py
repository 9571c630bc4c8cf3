"""What is sent while a rank computes: a collective is begun before what does not need it, and waited for after."""

from types import SimpleNamespace

import pytest
import torch

from sglang_gen.models.attention import SelfAttention
from sglang_gen.parallel import sequence, spatial
from sglang_gen.parallel.collectives import Axis
from sglang_gen.parallel.sequence import Lengths, Ring


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What happens on one of three ranks, in order; tensors are shapes alone."""
    found: list[str] = []

    def watched(start):
        def begin(*args):
            found.append("sent")
            pending = start(*args)
            return SimpleNamespace(wait=lambda: (found.append("arrived"), pending.wait())[1])

        return begin

    monkeypatch.setattr(sequence, "exchange", watched(sequence.exchange))
    monkeypatch.setattr(spatial, "start_gather_along", watched(spatial.start_gather_along))
    return found


def test_a_ring_computes_with_what_it_has_while_the_next_keys_are_on_their_way(events):
    def kernel(q, k, v):
        events.append(f"computed {k.shape[2]}")
        return q, q[..., 0]

    ring = Ring(kernel, Axis("ring", 3, 1), Lengths(3, 1, (6, 5, 4)))
    out = ring(*(torch.empty(2, 4, 5, 8, device="meta") for _ in range(3)))
    assert out.shape == (2, 4, 5, 8)
    assert events == ["sent", "computed 5", "arrived", "sent", "computed 6", "arrived", "computed 4"]


def test_rows_compute_their_queries_while_keys_and_values_are_gathered(events):
    linear = torch.nn.functional.linear

    def projected(x, weight, bias=None):
        events.append(f"projected {len(weight)}")
        return linear(x, weight, bias)

    with torch.device("meta"):
        attention = SelfAttention(16, 2)
        rows = spatial.RowAttention(attention, Axis("ring", 3, 1), Lengths(3, 1, (6, 5, 4)))
        attention.to_qkv.matmul = projected
        attention.attend.kernel = lambda q, k, v: (events.append(f"attended {k.shape[2]}"), q)[1]
        out = rows(torch.empty(2, 5, 16))
    assert out.shape == (2, 5, 16)
    assert events[:5] == ["projected 32", "sent", "projected 16", "arrived", "attended 15"]
