"""The native SD3 network against diffusers' class, and what breaks the parity when it is planted."""

import copy
from pathlib import Path

import pytest
import torch
from parity import compare, error, pairs_of
from reference import Reference
from safetensors.torch import load_file, save_file

from sglang_gen.errors import UserError
from sglang_gen.families.sd3 import pipeline
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.weights.load import load

SD3 = Reference("sd3")
VARIANTS, TIMESTEPS = SD3.variants, SD3.timesteps
inputs, ours, theirs, reference = SD3.inputs, SD3.ours, SD3.theirs, SD3.network
PLAIN = SD3.variants["sd3"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(diffusers' network, ours) of a configuration and a dtype."""
    return pairs_of(reference, pipeline, tmp_path_factory)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_network_computes_what_diffusers_computes(pairs, variant):
    compare(pairs, VARIANTS[variant], inputs, ours, theirs, len(TIMESTEPS))


MUTATIONS = {
    "an attention is silent": lambda block: block.attention.to_out.weight.zero_(),
    "the last text queries are silent": lambda block: block.attention.text.to_qkv.weight.zero_(),
    "a bias is doubled": lambda block: block.ff.up.bias.mul_(2),
    "two heads are swapped": lambda block: swap_heads(block.attention.image.to_qkv.weight),
    "a norm is flat": lambda block: block.attention.image.norm_q.weight.fill_(1),
    "the second attention is silent": lambda block: block.attention_2.to_out.weight.zero_(),
}


def swap_heads(qkv: torch.Tensor, width: int = 8) -> None:
    qkv[: 2 * width] = qkv[: 2 * width].roll(width, 0)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_defect_breaks_the_parity(pairs, mutation):
    their, our = pairs(VARIANTS["sd35-medium"], torch.float32)
    given = inputs(PLAIN, torch.float32)
    broken = copy.deepcopy(our)
    with torch.no_grad():
        MUTATIONS[mutation](broken.blocks[1])
    assert error(ours(broken, *given, step=0), theirs(their, *given, step=0)) > 1e-3


def test_another_prompt_and_another_timestep_give_another_output(pairs):
    _, our = pairs(PLAIN, torch.float32)
    latents, text, pooled = inputs(PLAIN, torch.float32)
    first = ours(our, latents, text, pooled, step=0)
    assert error(ours(our, latents, text.flip(0), pooled, step=0), first) > 1e-3
    assert error(ours(our, latents, text, pooled.flip(0), step=0), first) > 1e-3
    assert error(ours(our, latents, text, pooled, step=1), first) > 1e-3


def test_rows_of_a_batch_do_not_see_each_other(pairs):
    _, our = pairs(PLAIN, torch.float64)
    given = inputs(PLAIN, torch.float64)
    alone = ours(our, *(tensor[1:2] for tensor in given), step=0)
    assert error(ours(our, *given, step=0)[1:2], alone) <= 1e-10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("transformer_blocks.1.attn.to_k.weight"), "it lacks transformer_blocks.1.attn.to_k.weight"),
        (lambda w: w.update(extra=torch.zeros(1)), "it holds extra, which SD3 does not have"),
        (
            lambda w: w.update({"proj_out.bias": torch.zeros(3)}),
            "proj_out.bias has the shape [3], this network needs [16]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_name_of_the_tensor(change, sentence):
    reference(**PLAIN).save_pretrained("network")
    (file,) = in_folder(Path("network"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with pytest.raises(UserError) as failure:
        load(lambda: pipeline.build(PLAIN), [file], pipeline.sources, torch.float32, "cpu")
    assert sentence in str(failure.value)


def test_a_sharded_checkpoint_is_the_same():
    reference(**PLAIN).save_pretrained("whole")
    reference(**PLAIN).save_pretrained("shards", max_shard_size="50KB")
    assert len(in_folder(Path("shards"))) > 2
    networks = [
        load(lambda: pipeline.build(PLAIN), in_folder(Path(name)), pipeline.sources, torch.float32, "cpu")
        for name in ("whole", "shards")
    ]
    for (name, whole), shard in zip(networks[0].state_dict().items(), networks[1].state_dict().values(), strict=True):
        assert torch.equal(whole, shard), name
