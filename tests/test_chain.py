"""The chain of blocks: any block can be left out from outside, and each reads its own conditioning."""

import copy
from collections.abc import Iterator

import pytest
import torch
from network_cases import CONFIGS, KIND, STEPS, evaluated, given, loaded
from parity import error
from split import FAMILIES, Changes, Skipping, evaluate
from torch import nn
from torch.nn import functional as F

from sglang_gen.models.chain import Chain
from sglang_gen.models.layers import sinusoid
from sglang_gen.models.unet import UNet
from sglang_gen.types import Layout

# Levels of one width, so that stages may be left out on the way down and on the way up.
EVEN = CONFIGS["sd15"] | {"block_out_channels": (16, 16, 16), "attention_head_dim": 4}


def inputs(name: str, dtype: torch.dtype):
    """(config, latents, arguments of `condition`)."""
    config, latents, conditions = given(name, dtype)
    return (EVEN if name == "sd15" else config), latents, conditions


def shortened(network: nn.Module, skipped: range) -> nn.Module:
    """A transformer that was built without these blocks."""
    network = copy.deepcopy(network)
    network.chain = Chain()
    lists = [network.blocks, getattr(network, "single_blocks", nn.ModuleList())]
    for index in reversed(skipped):
        blocks, place = (lists[0], index) if index < len(lists[0]) else (lists[1], index - len(lists[0]))
        del blocks[place]
    return network


def links(network: UNet) -> Iterator[tuple]:
    """The network's levels from fine to coarse and back, as (way, residual, transformer, resampling)."""
    for level in network.down:
        yield from (("down", *pair, None) for pair in level.pairs())
        if level.downsample is not None:
            yield "halve", None, None, level.downsample
    yield from (("middle", *pair, None) for pair in network.middle.pairs())
    for level in network.up:
        pairs = list(level.pairs())
        yield from (("up", *pair, None) for pair in pairs[:-1])
        yield "up", *pairs[-1], level.upsample


def by_hand(network: UNet, latents, conditions, skipped: range, step: int) -> torch.Tensor:
    """A UNet's evaluation without a chain, in which the stages `skipped` do nothing."""
    timesteps, text = conditions
    embedded = network.time_embedder(sinusoid(timesteps[step], network.config.width).to(text))
    x = network.conv_in(latents)
    skips = [x]
    for index, (way, residual, transformer, resample) in enumerate(links(network)):
        if index in skipped:
            continue
        if way == "halve":
            x = resample(x)
        elif way == "up":
            x = torch.cat([x, skips.pop()], dim=1)
        if residual is not None:
            x = residual(x, residual.time(F.silu(embedded))[None])
        if transformer is not None:
            x = transformer(x, [block.cross_attention.read(text) for block in transformer.blocks])
        if way == "up" and resample is not None:
            x = resample(x, *skips[-1].shape[-2:])
        if way in ("down", "halve"):
            skips.append(x)
    assert not skips
    return network.conv_out(F.silu(network.norm_out(x)))


def balanced(network: UNet) -> list[range]:
    """Ranges of stages that push as many skip connections as they pop, and of which each pops one of its own."""
    stages = network.stages()
    found = []
    for start in range(len(stages)):
        depth = 0
        for stop in range(start + 1, len(stages) + 1):
            depth += stages[stop - 1].pushes - stages[stop - 1].pops
            if depth < 0:
                break
            if depth == 0:
                found.append(range(start, stop))
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_transformer_without_a_block_is_one_that_was_built_without_it(name):
    config, latents, conditions = inputs(name, torch.float64)
    network, _ = loaded(name, config)
    whole, count = evaluated(network, latents, conditions), config["num_layers"] + config.get("num_single_layers", 0)
    ranges = [range(start, stop) for start in range(count) for stop in range(start + 1, count + 1)]
    for skipped in ranges:
        network.chain = Skipping(skipped)
        without = evaluated(network, latents, conditions)
        assert error(without, evaluated(shortened(network, skipped), latents, conditions)) == 0
        assert error(without, whole) > 1e-6


@torch.no_grad()
def test_a_unet_without_stages_is_one_written_by_hand_without_them():
    config, latents, conditions = inputs("sd15", torch.float64)
    network, _ = loaded("sd15", config)
    ranges = balanced(network)
    assert {len(skipped) for skipped in ranges} >= {1, 2, 4, len(network.stages()) - 1}
    for skipped in [range(0), *ranges]:
        network.chain = Skipping(skipped)
        expected = torch.stack([by_hand(network, latents, conditions, skipped, step) for step in STEPS])
        assert error(evaluated(network, latents, conditions), expected) <= 1e-12


def test_stages_of_a_unet_declare_skip_connections_that_meet():
    with torch.device("meta"):
        stages = FAMILIES["sd"].build(EVEN).stages()
    depth = 1  # the feature map of the first convolution
    for stage in stages:
        assert stage.pops <= depth
        depth += stage.pushes - stage.pops
    assert depth == 0


SKIPPED = {"flux": range(1, 3), "sd3": range(1), "sd15": range(4, 14)}
LAYOUTS = {"tp2": Layout(tp=2), "ring2": Layout(ring=2)}


@torch.no_grad()
@pytest.mark.whole
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SKIPPED)
def test_ranks_leave_out_the_blocks_that_one_process_leaves_out(ranks, name, layout):
    config, latents, conditions = inputs(name, torch.float64)
    network, folder = loaded(name, config)
    network.chain = Skipping(SKIPPED[name])
    expected = evaluated(network, latents, conditions)
    arguments = (KIND[name], folder, config, torch.float64, latents, conditions, STEPS)
    for outputs, _ in ranks.run(LAYOUTS[layout], evaluate, *arguments, True, None, Changes(SKIPPED[name])):
        assert error(outputs, expected) <= 1e-10


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", *LAYOUTS])
@pytest.mark.parametrize("name", SKIPPED)
def test_compiled_blocks_may_be_left_out_too(ranks, name, layout):
    config, latents, conditions = inputs(name, torch.float64)
    network, folder = loaded(name, config)
    network.chain = Skipping(SKIPPED[name])
    expected = evaluated(network, latents, conditions)
    arguments = (KIND[name], folder, config, torch.float64, latents, conditions, STEPS)
    layouts = {"single": Layout(), **LAYOUTS}
    for outputs, _ in ranks.run(
        layouts[layout], evaluate, *arguments, True, None, Changes(SKIPPED[name], compiled=True)
    ):
        assert error(outputs, expected) <= 1e-10
