"""T5 over the ranks of a tensor parallel group, beside transformers' own in one process."""

from pathlib import Path

import pytest
import torch
from parity import error
from split import read_text
from tiny import fill
from transformers import T5Config, T5EncoderModel

from sglang_gen.types import Layout

SIZES = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
GATED = {"feed_forward_proj": "gated-gelu"}  # as the encoders of SD3 and FLUX are
TOKENS = torch.arange(18).view(2, 9) * 7 % 40


@torch.no_grad()
def both(ranks, tp, mutation=None, **config):
    """(what transformers' encoder makes of two texts, what the ranks answer), in float64."""
    whole = fill(T5EncoderModel(T5Config(**SIZES, **config)), 5).double()
    whole.save_pretrained("encoder")
    answers = ranks.run(Layout(tp=tp), read_text, Path("encoder").absolute(), torch.float64, TOKENS, mutation)
    return whole(TOKENS).last_hidden_state, answers


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("config", [GATED, {}], ids=["gated", "plain"])
def test_ranks_read_texts_as_transformers_does(ranks, config, tp):
    expected, answers = both(ranks, tp, **config)
    for hidden, sent, predicted in answers:
        assert error(hidden, expected) <= 1e-10
        assert torch.equal(hidden, answers[0][0])
        assert sent == predicted
        assert sent.calls == {"all_reduce tp": 2 * SIZES["num_layers"]}


DEFECTS = [
    "one rank's part of a sum is silent", "one rank's channels are in another order",
    "biases of positions are those of other heads",
]  # fmt: skip


@pytest.mark.parametrize("mutation", DEFECTS)
def test_a_defect_planted_in_the_text_encoder_breaks_the_parity(ranks, mutation):
    expected, answers = both(ranks, 2, mutation, **GATED)
    assert error(answers[0][0], expected) > 1e-3
