"""What each axis sends in a step, by closed formulas: a layout that communicates more than it should fails here.

Nothing runs: ranks are rehearsed on the meta device. The formulas take the shapes that the undivided network meets.
"""

from collections import Counter
from functools import partial
from math import ceil, prod
from typing import Any

import pytest
import rehearsed
import torch
from on_meta import on_meta
from reference import Reference
from torch import nn

from sglang_gen.backends.native import vae_parallel
from sglang_gen.dry_run.estimate import busiest
from sglang_gen.families import autoencoder as autoencoder
from sglang_gen.families.contract import Request
from sglang_gen.families.prediction import NetworkSchedule
from sglang_gen.models.attention import Attend
from sglang_gen.models.unet import SelfAttention
from sglang_gen.models.vae import Autoencoder
from sglang_gen.parallel import tensor
from sglang_gen.parallel.collectives import Axis, counted
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.types import Layout, Size

SD3, FLUX, SDXL, SD15 = (
    Reference(family).variants[variant]
    for family, variant in (("sd3", "sd3"), ("flux", "dev"), ("sdxl", "sdxl"), ("sd", "sd15"))
)
HEIGHT = WIDTH = 256  # pixels: 32 latents, which every layout here divides
ROWS, TEXT, ITEM = 2, 8, 4  # pictures, tokens of each text encoder, bytes of a number
CONFIGS = {
    "sd3": SD3 | {"dual_attention_layers": (0, 1), "num_attention_heads": 8, "attention_head_dim": 4},
    "flux": FLUX | {"num_attention_heads": 4, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)},
    "sdxl": SDXL | {"attention_head_dim": 4},
    "sd": SD15 | {"attention_head_dim": 4},
}
DECODER = {
    "block_out_channels": (8, 16), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
UNETS, TRANSFORMERS = ("sdxl", "sd"), ("sd3", "flux")


def card(name: str):
    encoders = {"text_encoder": {"max_position_embeddings": TEXT}, "text_encoder_2": {"projection_dim": 20}}
    return rehearsed.card_of(name, CONFIGS[name], encoders)


def sent(name: str, layout: Layout, scale: float = 1.0) -> Counter[str]:
    """Bytes by collective and, as "calls of ...", calls of the rank that sends most, in a step."""
    number = busiest(layout, [1] * layout.ring * layout.ulysses)[-1]
    found = rehearsed.rank(name, card(name), layout, number, HEIGHT, WIDTH, scale, rows=ROWS, text_length=TEXT).step
    return Counter(found.bytes) + Counter({f"calls of {key}": count for key, count in found.calls.items()})


def total(collective: str, *sizes: float) -> Counter[str]:
    """The same for collectives of these bytes."""
    return Counter({collective: sum(map(ceil, sizes)), f"calls of {collective}": len(sizes)})


class Layers:
    """The shapes of what the layers of an undivided network take and give."""

    def __init__(self) -> None:
        self.layers: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = {}

    def note(self, key: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if args and isinstance(args[0], torch.Tensor) and isinstance(out, torch.Tensor):
            self.layers[key] = (module, tuple(args[0].shape), tuple(out.shape))

    def inputs(self, kind: type) -> list[tuple[Any, tuple[int, ...]]]:
        return [(module, shape) for module, shape, _ in self.layers.values() if isinstance(module, kind)]


class Met(Layers):
    """Those of a denoising network in one evaluation, and of its queries and keys."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.family = rehearsed.FAMILIES[name]
        split = Split(Mesh(Layout()), {}, self.family.sharding)
        placed = on_meta(split, lambda: self.family.build(CONFIGS[name]), torch.float32)
        placed.set_kernel(lambda q, k, v: torch.empty_like(q), None)
        self.network = placed.network
        self.sharded = {id(leaf) for leaves in placed.attention_ops.values() for leaf in leaves}
        request = Request(Size(HEIGHT, WIDTH), rehearsed.FACTOR, steps=2, guidance=3.5, text_length=TEXT)
        configs = {key: part.config for key, part in card(name).components.items()}
        shapes = (*self.family.encoded_shapes(configs, TEXT), self.family.latents_shape(CONFIGS[name], request))
        *texts, latents = (torch.empty(ROWS, *shape, device="meta") for shape in shapes)
        with torch.no_grad():
            predict = self.family.prepare(
                NetworkSchedule.of_one(self.network, 2), torch.zeros(2), request, [tuple(texts)]
            )
            for key, module in self.network.named_modules():
                module.register_forward_hook(partial(self.note, key))
            predict(latents, 0)

    def outputs(self, kind: Any) -> list[tuple[int, ...]]:
        """Outputs of the layers that a rule of the table names, in an evaluation."""
        named = [
            name
            for name, _, rule in tensor.matched(self.network, self.family.tensor_parallel)
            if isinstance(rule, kind)
        ]
        return [self.layers[name][2] for name in named if name in self.layers]

    def attentions(self) -> list[tuple[int, ...]]:
        """Keys `[B, H, L, D]` of attentions to the whole sequence."""
        return [shape for module, shape, _ in self.layers.values()
                if isinstance(module, Attend) and id(module) in self.sharded]  # fmt: skip

    def door(self, ranks: int) -> Counter[str]:
        """The network's output, gathered once."""
        whole = prod(list(self.layers.values())[-1][2])
        return total("all_gather sp", (ranks - 1) * whole / ranks * ITEM)


@pytest.fixture(scope="module")
def met():
    kept: dict[str, Met] = {}
    return lambda name: kept.setdefault(name, Met(name))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_tensor_parallel_sums_once_behind_every_layer_that_is_cut_by_rows(met, name, ranks):
    shapes = met(name).outputs(tensor.Rows)
    assert len(shapes) >= 8
    expected = total("all_reduce tp", *(2 * (ranks - 1) / ranks * prod(shape) * ITEM for shape in shapes))
    assert sent(name, Layout(tp=ranks)) == expected


def exchanges(shapes: list[tuple[int, ...]], ranks: int, shared: int = 1) -> Counter[str]:
    """Ulysses: queries, keys and values one way and the result back; `shared` ranks have other tokens or heads."""
    parts = [prod(shape) / shared * (ranks - 1) / ranks**2 * ITEM for shape in shapes]
    return total("all_to_all ulysses", *(each for part in parts for each in (3 * part, part)))


def passes(shapes: list[tuple[int, ...]], ranks: int, shared: int = 1) -> Counter[str]:
    """Ring: keys and values of one rank, to all others in turn."""
    parts = [2 * prod(shape) / shared / ranks * ITEM for shape in shapes]
    return total("all_to_all ring", *(part for part in parts for _ in range(ranks - 1)))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_ulysses_exchanges_twice_around_every_attention(met, name, ranks):
    expected = exchanges(met(name).attentions(), ranks) + met(name).door(ranks)
    assert sent(name, Layout(ulysses=ranks)) == expected


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_ring_passes_keys_and_values_to_every_other_rank(met, name, ranks):
    expected = passes(met(name).attentions(), ranks) + met(name).door(ranks)
    assert sent(name, Layout(ring=ranks)) == expected


def halos(found: Layers, ranks: int) -> Counter[str]:
    """Rows of maps: both neighbours' for a convolution of stride one, the one below's for a stride of two."""
    rows = [
        (2 if module.stride[0] == 1 and ranks > 2 else 1) * prod(shape) / shape[2] * ITEM
        for module, shape in found.inputs(nn.Conv2d)
        if module.kernel_size == (3, 3)
    ]
    return total("all_to_all sp", *rows)


def moments(found: Layers, ranks: int) -> Counter[str]:
    """Mean, deviation and count of every group of every group norm."""
    sizes = [(ranks - 1) * 3 * shape[0] * module.num_groups * 4 for module, shape in found.inputs(nn.GroupNorm)]
    return total("all_gather sp", *sizes)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", UNETS)
def test_rows_of_a_unet_meet_at_halos_norms_and_keys_and_values(met, name, ranks):
    """Two ranks are first and last: each sends one row for a convolution, and rank 0 one where the stride is two."""
    found = met(name)
    tokens = [shape for _, shape in found.inputs(SelfAttention)]
    keys = total("all_gather ring", *((ranks - 1) * 2 * prod(shape) / ranks * ITEM for shape in tokens))
    expected = halos(found, ranks) + moments(found, ranks) + keys + found.door(ranks)
    assert sent(name, Layout(ring=ranks)) == expected


@pytest.mark.whole
@pytest.mark.parametrize("name", UNETS)
def test_ulysses_of_a_unet_exchanges_around_attention_to_the_picture_alone(met, name):
    found = met(name)
    expected = halos(found, 2) + moments(found, 2) + exchanges(found.attentions(), 2) + found.door(2)
    assert sent(name, Layout(ulysses=2)) == expected


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_product_of_axes_sends_what_its_axes_send_of_their_part(met, name):
    """Ring 2 x Ulysses 2 x tensor parallel 2: a rank has a quarter of the tokens, and half of the heads."""
    found = met(name)
    shapes = found.attentions()
    sums = total("all_reduce tp", *(prod(shape) / 4 * ITEM for shape in found.outputs(tensor.Rows)))
    expected = sums + exchanges(shapes, 2, shared=4) + passes(shapes, 2, shared=4) + found.door(4)
    assert sent(name, Layout(ring=2, ulysses=2, tp=2)) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_guidance_branches_exchange_the_prediction_once(met, name):
    prediction = prod(list(met(name).layers.values())[-1][2]) * ITEM
    assert sent(name, Layout(cfg=2), scale=3.0) == total("all_gather cfg", prediction)


@pytest.mark.whole
@pytest.mark.parametrize("name", UNETS)
def test_rows_of_a_unet_on_two_axes_send_what_each_axis_sends_of_its_part(met, name):
    """Ring 2 x Ulysses 2: four ranks share the rows, two the tokens behind Ulysses and two the heads."""
    found = met(name)
    shapes = found.attentions()
    attended = exchanges(shapes, 2, shared=2) + passes(shapes, 2, shared=2)
    assert sent(name, Layout(ring=2, ulysses=2)) == halos(found, 4) + moments(found, 4) + attended + found.door(4)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("attention", [True, False])
def test_rows_of_a_decoder_meet_at_halos_norms_keys_and_values_and_the_picture(ranks, attention):
    config = autoencoder.config(DECODER | {"mid_block_add_attention": attention})
    with torch.device("meta"), torch.no_grad():
        vae, latents = Autoencoder(config), torch.empty(ROWS, config.channels, 16, 16)
        found = Layers()
        for key, module in vae.decoder.named_modules():
            module.register_forward_hook(partial(found.note, key))
        picture = vae.decode(latents)
    keys = [shape for module, shape in found.inputs(Attend)]
    assert len(keys) == attention
    whole = total("all_gather sp", (ranks - 1) / ranks * picture.numel() * ITEM)
    gathered = total("all_gather sp", *((ranks - 1) * 2 * prod(shape) / ranks * ITEM for shape in keys))
    expected = halos(found, ranks) + moments(found, ranks) + gathered + whole
    for index in range(ranks):  # inner ranks send the most; here only those, or one of two
        with torch.device("meta"):
            split = vae_parallel.split(Autoencoder(config), Axis("sp", ranks, index))
        with torch.no_grad(), counted() as traffic:
            split.decode(latents)
        if index == ranks // 2:
            assert Counter(traffic.bytes) + Counter({f"calls of {k}": n for k, n in traffic.calls.items()}) == expected
        assert sum(traffic.bytes.values()) <= sum(size for key, size in expected.items() if "calls" not in key)
