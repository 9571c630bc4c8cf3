"""The layouts that the plan accepts are those that run, and a refusal names one that does."""

import re
from dataclasses import replace

import pytest
import rehearsed
import torch
from cases import mostly_slow
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_gen import env
from sglang_gen.config import presets
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import Composed, compose
from sglang_gen.config.schema import Parallel
from sglang_gen.errors import UserError
from sglang_gen.families import registry
from sglang_gen.hub import resolve
from sglang_gen.plan import checks, layout_limits, make
from sglang_gen.plan import degrees as layout
from sglang_gen.types import Layout, ModelCard, Plan, Size

LAYOUTS = sorted(path.stem for path in (env.conf_dir() / "parallel").glob("*.yaml"))
TRUE_CFG = "backend.diffusers_kwargs={true_cfg_scale:4}"


def card_of(model: str) -> ModelCard:
    if model == "landscape":
        return resolve.read_card(env.embedded_model(), model, weights=False)
    return resolve.read_card(env.preset_configs(model), model, weights=False)


NAMES = [preset.name for preset in presets.load() if preset.name != "custom"]
PRESETS = [name for name in NAMES if registry.by_pipeline_class(card_of(name).pipeline_class)]


def composed(*words: str, **flags: object) -> Composed:
    text = {"sampling.prompt": "x", "sampling.negative_prompt": "y", "sampling.seed": 7}
    return compose(Choices(("backend=sglang", "sampling.num_samples=4", "device=cpu", *words), text | flags))


def planned(model: str, *words: str, **flags: object) -> Plan:
    found = composed(f"model={model}", *words, **flags)
    checks.check_request(found)
    return make.make_plan(found, card_of(model))


def alternatives(sentence: str) -> list[list[str]]:
    """The overrides of each suggestion."""
    return [each.split(" ") for each in sentence.rpartition(", such as ")[2].split(" or ")]


def test_every_preset_and_layout_is_seen():
    assert len(PRESETS) == 9
    assert len(LAYOUTS) == 11


def refusal(run: Composed, card: ModelCard) -> str | None:
    """The sentence of a run that is refused."""
    try:
        make.make_plan(run, card)
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def options() -> dict[str, Composed]:
    """A run with each option of the group."""
    return {name: composed("model=sdxl", f"parallel={name}") for name in LAYOUTS}


LONG = {"sd15", "sd21", "sd35_large", "flux_dev", "sdxl"}


@pytest.mark.whole
@pytest.mark.parametrize("model", mostly_slow(PRESETS, *sorted(set(PRESETS) - LONG)))
def test_every_layout_of_a_preset_plans_and_runs_or_neither(options, model):
    card = card_of(model)
    spec = registry.by_pipeline_class(card.pipeline_class)
    part = card.components[spec.network]
    thin = replace(card, components=card.components | {
        spec.network: replace(part, config=rehearsed.shallow(part.config))
    })  # fmt: skip
    one = composed(f"model={model}", "sampling.guidance_scale=3", *([TRUE_CFG] if spec.guidance.embedded else []))
    side = one.run.sampling.height or 128
    ran: dict[Layout, bool] = {}
    for name, option in options.items():
        degrees = {key: source for key, source in option.sources.items() if key.startswith("parallel.")}
        run = replace(one, run=replace(one.run, parallel=option.run.parallel), sources={**one.sources, **degrees})
        whole = layout.infer(run.run.parallel, layout.stated(run.sources), layout_limits.common_heads(card))
        split = Layout(ring=whole.ring, ulysses=whole.ulysses, tp=whole.tp)
        if split not in ran:
            ran[split] = rehearsed.runs(spec.name, thin, split, side, side)
        sentence = refusal(run, card)
        assert (sentence is None) == ran[split], name
        assert sentence is None or re.search(": take .*, such as parallel[.]", sentence), sentence


def limits(pipeline: str, config: dict, height: int, width: int | None = None) -> layout_limits.Limits:
    return registry.by_name(pipeline).limits(config, Size(height, width or height), rehearsed.FACTOR)


DEGREES = st.sampled_from([1, 1, 2, 3, 4])
SPLIT = st.builds(Layout, ring=DEGREES, ulysses=DEGREES, tp=DEGREES).filter(lambda found: found.ranks <= 16)
UNET = {
    "layers_per_block": 1, "cross_attention_dim": 8, "sample_size": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
PLAIN = {"attention_head_dim": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8, "num_layers": 1}


@st.composite
def networks(draw) -> tuple[str, dict]:
    pipeline = draw(st.sampled_from(["sd", "sd3", "flux"]))
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    if pipeline == "sd":
        groups = draw(st.sampled_from([1, 2, 4, 6]))
        first = 2 * groups * draw(st.integers(1, 4))  # sines and cosines of the time
        return pipeline, UNET | {"block_out_channels": (first, 12 * heads * groups), "norm_num_groups": groups,
                                 "attention_head_dim": (draw(st.integers(1, 5)), heads)}  # fmt: skip
    if pipeline == "sd3":
        return pipeline, PLAIN | {"num_attention_heads": heads, "patch_size": draw(st.sampled_from([1, 2])),
                                  "in_channels": 4, "pos_embed_max_size": 16, "caption_projection_dim": 4 * heads,
                                  "dual_attention_layers": (0,)}  # fmt: skip
    return pipeline, PLAIN | {"num_attention_heads": heads, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4),
                              "num_single_layers": 1, "in_channels": 4}  # fmt: skip


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(networks(), SPLIT, st.integers(1, 6))
def test_a_layout_is_legal_exactly_where_its_ranks_can_run(network, split, rows):
    pipeline, config = network
    found = limits(pipeline, config, rows * 16, 16)
    runs = rehearsed.runs(pipeline, rehearsed.card_of(pipeline, config), split, rows * 16, 16)
    assert (layout_limits.obstacle(found, split) is None) == runs


FIELDS = ("num_gpus", "tp_size", "sp_degree", "ulysses_degree", "ring_degree", "dp_size")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    stated=st.dictionaries(st.sampled_from(FIELDS), st.sampled_from([1, 2, 3, 4, 8]), max_size=4),
    heads=st.sampled_from([(10, 20), (8,), (24,), (6,)]),
    units=st.integers(1, 9),
)
def test_what_a_refusal_suggests_is_legal_and_is_what_comes_out(stated, heads, units):
    found = layout_limits.Limits(heads, ((32, "group norms of {} groups"),), units, "rows")
    common = {(10, 20): 10}.get(heads, heads[0])
    try:
        asked = layout.infer(Parallel(**stated), set(stated), common)
    except UserError:
        return
    try:
        layout_limits.check_network(found, asked, stated.keys())
    except UserError as error:
        for words in alternatives(str(error)):
            values = stated | {
                key.removeprefix("parallel."): int(value) for key, value in (w.split("=") for w in words)
            }
            other = layout.infer(Parallel(**values), set(values), common)
            assert layout_limits.obstacle(found, other) is None
            assert other.ranks <= asked.ranks
            assert (other.dp, other.cfg) == (asked.dp, asked.cfg)


@pytest.mark.parametrize(
    ("model", "words", "sentence"),
    [
        ("sdxl", ("parallel.tp_size=4",), "parallel.tp_size is 4 and this network has layers of 10 heads: take "
         "tp_size 1 or 2, such as parallel.ring_degree=2 parallel.tp_size=2 or "),
        ("sdxl", ("parallel.ulysses_degree=4",), "parallel.ulysses_degree is 4 and this network has layers of 10 "
         "heads: take ulysses_degree 1 or 2, such as "),
        ("sdxl", ("parallel.ulysses_degree=2", "parallel.tp_size=2"), "layers of 10 heads, 5 on each of 2 tensor "
         "parallel ranks: take ulysses_degree 1 or 2, such as "),
        ("sdxl", ("parallel.tp_size=5",), "parallel.tp_size is 5 and this network has group norms of 32 groups: take "
         "tp_size 1, such as parallel.ulysses_degree=5 parallel.tp_size=1"),
        ("sd21", ("parallel=tp2",), "parallel.tp_size is 2 and this network has layers of 5 heads: take tp_size 1, "
         "such as "),
        ("sd35_large", ("parallel.tp_size=4",), "this network has layers of 38 heads: take tp_size 1 or 2, such as "),
        ("landscape", ("parallel.tp_size=4",), "this network has layers of 6 heads: take tp_size 1 or 2, such as "),
        ("sdxl", ("parallel.ring_degree=4", "sampling.height=96"), "parallel.sp_degree is 4 (ring_degree 4 x "
         "ulysses_degree 1) and this image has 3 bands of 32 rows of pixels: take sp_degree 2, such as "),
        ("sd3_medium", ("parallel.sp_degree=4", "sampling.height=32"), "image has 2 rows of patches: take "
         "sp_degree 1 or 2"),
        ("flux_dev", ("parallel.sp_degree=8", "sampling.height=32", "sampling.width=16"),
         "this image has 2 tokens: take sp_degree 1 or 2, such as parallel.sp_degree=2 parallel.ulysses_degree=2 "
         "parallel.tp_size=4 or "),
        ("sd3_medium", ("parallel=sp2", "attention=flex"), "attention=flex depends on the positions of tokens"),
        ("flux_dev", ("parallel=cfg2",), "parallel.enable_cfg_parallel: there is no guidance without a negative prompt "
         "and a true_cfg_scale above 1.0"),
        ("sd15", ("parallel=cfg2", "sampling.guidance_scale=1"), "there is one branch; raise the scale or run with"),
    ],
)  # fmt: skip
def test_a_refusal_says_which_number_to_change(model, words, sentence):
    with pytest.raises(UserError) as error:
        planned(model, *words)
    assert sentence in str(error.value)


def test_guidance_that_a_scale_of_one_does_not_take_away_is_split():
    found = planned("flux_schnell", "parallel=cfg2", TRUE_CFG)
    assert (found.run.sampling.guidance_scale, found.layout.cfg) == (0.0, 2)
    with pytest.raises(UserError, match="there is no guidance without a negative prompt"):
        planned("flux_schnell", "parallel=cfg2", TRUE_CFG, **{"sampling.negative_prompt": None})


@pytest.mark.whole
def test_four_gpus_alone_are_sequence_parallel_as_far_as_the_heads_divide():
    expected = {"sdxl": (2, 2), "sd15": (1, 4), "sd21": (4, 1), "sd3_medium": (1, 4), "sd35_medium": (1, 4),
                "sd35_large": (2, 2), "flux_dev": (1, 4), "flux_schnell": (1, 4), "landscape": (2, 2)}  # fmt: skip
    assert set(expected) == set(PRESETS)
    for model, degrees in expected.items():
        found = planned(model, "parallel.num_gpus=4").layout
        assert (found.ring, found.ulysses) == degrees, model


def test_the_size_of_an_input_picture_is_checked_where_it_is_read():
    words = ("parallel.ring_degree=4", "sampling.height=96", "sampling.image_path=fox.png")
    found = planned("sdxl", *words)
    stated = layout.stated(found.sources)
    layout_limits.check_size(found.run, found.card, found.layout, stated, Size(128, 128))
    with pytest.raises(UserError, match=re.escape("this image has 3 bands")):
        layout_limits.check_size(found.run, found.card, found.layout, stated, Size(96, 128))


def test_a_picture_of_less_than_a_band_is_made_whole_on_every_rank_and_shared_by_none():
    small = {"sampling.height": 32, "sampling.width": 32}
    assert planned("sd15", "parallel=tp2", *(f"{name}={value}" for name, value in small.items())).layout.tp == 2
    with pytest.raises(UserError, match=re.escape("this image has 0 bands of 64 rows of pixels: take sp_degree 1")):
        planned("sd15", "parallel=sp2", *(f"{name}={value}" for name, value in small.items()))


def test_more_ranks_than_gpus_are_told_of_the_cpu(monkeypatch):
    monkeypatch.setattr(env, "gpu_count", lambda: 2)
    layout_limits.check_machine(2, "cuda")
    layout_limits.check_machine(3, "cpu")
    with pytest.raises(UserError, match="3 ranks need 3 GPUs and torch sees 2; device=cpu runs them as processes"):
        layout_limits.check_machine(3, "cuda")


def test_the_twin_refuses_what_would_be_computed_wrongly():
    """Ten heads on four ranks would be two, of another width."""
    config = UNET | {"block_out_channels": (32, 640), "norm_num_groups": 32, "attention_head_dim": (5, 10)}
    with pytest.raises(AssertionError, match="10 does not divide by 4"):
        rehearsed.rank("sd", rehearsed.card_of("sd", config), Layout(tp=4), 0, 64, 64)
    assert torch.get_default_dtype() is torch.float32
