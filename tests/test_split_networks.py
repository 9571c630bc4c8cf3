"""Every axis and product of axes beside one process, for every native network."""

from functools import cache
from pathlib import Path

import pytest
import rehearsed
import torch
from cases import mostly_slow
from network_cases import CONFIGS, KIND, REFERENCES, STEPS, evaluated, given, read
from parity import error
from split import MUTATIONS, evaluate, guide, in_turn

from sglang_gen.parallel.collectives import Axis
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.parallel.sequence import CurrentLengths, Ring
from sglang_gen.types import Layout, ModelCard


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a network's weights, by name."""
    root = tmp_path_factory.mktemp("networks")

    @cache
    def folder(name: str) -> Path:
        REFERENCES[name].network(**CONFIGS[name]).save_pretrained(root / name)
        return root / name

    return folder


@pytest.fixture(scope="module")
def alone(saved):
    """What a network computes in one process."""

    @cache
    @torch.no_grad()
    def outputs(name: str, dtype: torch.dtype, text: int | None, **size: int) -> torch.Tensor:
        _, latents, conditions = inputs(name, dtype, text, **size)
        return evaluated(read(name, CONFIGS[name], saved(name), dtype), latents, conditions)

    return outputs


@pytest.fixture
def both(ranks, saved, alone):
    """(what one process computes, what each rank of a layout computes and sends)."""

    def computed(name, layout, dtype, summing=True, mutation=None, text=None, **size):
        config, latents, conditions = inputs(name, dtype, text, **size)
        network = (KIND[name], saved(name), config, dtype)
        answers = ranks.run(layout, evaluate, *network, latents, conditions, STEPS, summing, mutation)
        return alone(name, dtype, text, **size), answers

    return computed


def inputs(name: str, dtype: torch.dtype, text: int | None, **size: int):
    """What `given` gives, with that many tokens of the text."""
    config, latents, conditions = given(name, dtype, **size)
    return config, latents, (conditions[0], conditions[1][:, :text], *conditions[2:])


LAYOUTS = {
    "tp2": Layout(tp=2), "tp4": Layout(tp=4), "ulysses2": Layout(ulysses=2), "ring2": Layout(ring=2),
    "ring3": Layout(ring=3), "ring4": Layout(ring=4), "usp4": Layout(ring=2, ulysses=2),
    "ulysses2 tp2": Layout(ulysses=2, tp=2), "ring2 tp2": Layout(ring=2, tp=2),
    "usp4 tp2": Layout(ring=2, ulysses=2, tp=2),
}  # fmt: skip


@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, "tp2", "ulysses2", "ring3", "usp4 tp2"))
@pytest.mark.parametrize("name", ["sd3", "flux", "sdxl", "sd15"])
def test_every_layout_computes_what_one_process_computes(both, name, layout):
    size = {} if name == "flux" else {"height": 14, "width": 10} if name == "sd3" else {"height": 17, "width": 10}
    expected, answers = both(name, LAYOUTS[layout], torch.float64, **size)
    for outputs, _ in answers:
        assert error(outputs, expected) <= 1e-10
    assert all(torch.equal(outputs, answers[0][0]) for outputs, _ in answers)


@pytest.mark.parametrize("layout", [Layout(cfg=2), Layout(cfg=2, ring=2), Layout(dp=2, cfg=2, tp=2)])
@pytest.mark.parametrize("name", ["sd3", "flux", "sdxl", "sd15"])
def test_branches_of_guidance_on_two_ranks_predict_what_one_process_predicts(ranks, saved, name, layout):
    """In float64, a batch of three; other texts without guidance's own order would be another picture."""
    config, latents, conditions = given(name, torch.float64)
    texts = [value for value in conditions[1:] if isinstance(value, torch.Tensor)]
    negatives = [text.roll(1, -1) for text in texts]
    network = (KIND[name], saved(name), config, torch.float64)
    with torch.no_grad():
        expected = guide(Mesh(), *network, latents, conditions, negatives)
        other = guide(Mesh(), *network, latents, (conditions[0], *negatives, *conditions[1 + len(texts) :]), texts)
    for answer in ranks.run(layout, guide, *network, latents, conditions, negatives):
        assert error(answer, expected) <= 1e-10
    assert error(other, expected) > 1e-3


@pytest.mark.parametrize("name", ["sd3", "flux", "sdxl"])
@pytest.mark.parametrize("layout", mostly_slow(["tp2", "usp4", "ring2 tp2"], "tp2"))
def test_in_float32_a_layout_is_as_near_to_the_exact_result_as_one_process(both, name, layout):
    """Within three bits: the tiny SDXL makes a thousand times as much of a rounding, so that each one counts."""
    size = {"height": 17, "width": 10} if name == "sdxl" else {}
    exact, _ = both(name, LAYOUTS[layout], torch.float64, **size)
    alone, answers = both(name, LAYOUTS[layout], torch.float32, **size)
    assert error(answers[0][0].double(), exact) <= 8 * error(alone.double(), exact) <= 1e-2


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("layout", ["ring3", "usp4"])
def test_a_kernel_without_log_sum_exp_sees_all_keys_at_once(both, name, layout):
    expected, answers = both(name, LAYOUTS[layout], torch.float64, summing=False)
    assert error(answers[0][0], expected) <= 1e-10
    assert "all_gather ring" in answers[0][1].calls


DEFECTS = list(MUTATIONS)
PLANTED = [
    *((name, "tp2", mutation) for name in ("sd3", "flux", "sdxl") for mutation in DEFECTS[:3]),
    *((name, "ulysses2", mutation) for name in ("sd3", "flux", "sdxl") for mutation in DEFECTS[3:5]),
    *((name, "ring2", mutation) for name in ("sd3", "flux") for mutation in (DEFECTS[3], DEFECTS[7])),
    *(("sdxl", "ring2", mutation) for mutation in (*DEFECTS[5:7], DEFECTS[8])),
]


@pytest.mark.parametrize(("name", "layout", "mutation"), PLANTED)
def test_a_defect_planted_in_a_layout_breaks_the_parity(both, name, layout, mutation):
    expected, answers = both(name, LAYOUTS[layout], torch.float64, mutation=mutation)
    assert error(answers[0][0], expected) > 1e-3


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_text_of_fewer_tokens_than_ranks_leaves_some_without(both, name):
    expected, answers = both(name, LAYOUTS["usp4"], torch.float64, text=1)
    for outputs, _ in answers:
        assert error(outputs, expected) <= 1e-10


@pytest.mark.parametrize("compiled", mostly_slow(["", "regional", "full"], ""))
@pytest.mark.parametrize("layout", mostly_slow(["ring3", "usp4"], "usp4"))
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_texts_of_two_lengths_may_take_turns(ranks, saved, name, layout, compiled):
    """Each evaluation has the lengths of its own conditioning, and a compiled block those that it is called with."""
    config, latents, conditions = given(name, torch.float64)
    several = [(conditions[0], conditions[1][:, :text], *conditions[2:]) for text in (9, 6)]
    network = (KIND[name], saved(name), config, torch.float64)
    with torch.no_grad():
        expected = in_turn(Mesh(), *network, latents, several)
    for outputs in ranks.run(LAYOUTS[layout], in_turn, *network, latents, several, compiled):
        for output, alone in zip(outputs, expected, strict=True):
            assert error(output, alone) <= 1e-10
    assert error(expected[0], expected[1]) > 1e-3


def test_attention_outside_of_an_evaluation_has_no_lengths_of_the_last_one():
    lengths = CurrentLengths(2, 1)
    ring = Ring(lambda q, k, v: (q, q[..., 0]), Axis("ring", 2, 0), lengths)
    q = torch.empty(1, 2, 5, 4, device="meta")
    with lengths.of((5, 4)):
        with lengths.of((5, 3)):
            assert lengths.of_groups() == (5, 3)
        assert ring(q, q, q).shape == q.shape
    with pytest.raises(AssertionError, match="outside of an evaluation"):
        ring(q, q, q)


def described(name: str, latents: torch.Tensor, text: torch.Tensor) -> tuple[ModelCard, int, int, int]:
    """(a model with texts of that length, height and width in pixels, the length to ask for)."""
    config, rows, columns = given(name, torch.float32)[0], *latents.shape[-2:]
    if name == "flux":
        rows, columns = (2 * side for side in REFERENCES[name].size)
    clip = text.shape[1] - 4 if name == "sd3" else text.shape[1]
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"] if (
        name == "sdxl") else 0  # fmt: skip
    encoders = {"text_encoder": {"max_position_embeddings": clip}, "text_encoder_2": {"projection_dim": pooled}}
    length = 4 if name == "sd3" else text.shape[1]
    return rehearsed.card_of(PIPELINE[name], config, encoders), rows * 8, columns * 8, length


PIPELINE = {"sd3": "sd3", "flux": "flux", "sdxl": "sdxl", "sd15": "sd"}


@pytest.mark.parametrize("layout", mostly_slow(["tp2", "ulysses2 tp2", "ring3", "usp4 tp2"], "tp2"))
@pytest.mark.parametrize("name", PIPELINE)
def test_the_estimate_of_every_rank_is_what_it_sends(both, name, layout):
    size = {} if name in ("flux", "sd3") else {"height": 17, "width": 10}
    _, answers = both(name, LAYOUTS[layout], torch.float32, **size)
    _, latents, conditions = given(name, torch.float32, **size)
    card, height, width, length = described(name, latents, conditions[1])
    for rank, (_, traffic) in enumerate(answers):
        found = rehearsed.rank(PIPELINE[name], card, LAYOUTS[layout], rank, height, width, rows=len(latents),
                               text_length=length)  # fmt: skip
        assert found.step == traffic
