"""What a dry run expects of each rank: weights, activations, products, and a prediction for a named machine."""

import json
from dataclasses import replace

import pytest
import rehearsed
import torch
import transformers
from cases import mostly_slow
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from reference import Reference
from torch.utils.flop_counter import FlopCounterMode

from sglang_gen import env
from sglang_gen.backends.native import vae_parallel as decoders
from sglang_gen.config import presets
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.config.schema import Machine
from sglang_gen.dry_run.estimate import busiest, estimate, most_memory, predicted
from sglang_gen.dry_run.live_memory import Alive
from sglang_gen.dry_run.roofline import Kernels
from sglang_gen.dry_run.traces import trace_decoding
from sglang_gen.families import autoencoder, encoder_sizes
from sglang_gen.families.contract import Request
from sglang_gen.hub import resolve
from sglang_gen.parallel.collectives import Axis, Traffic, counted
from sglang_gen.parallel.sequence_boundary import shard_sizes
from sglang_gen.plan import offloading
from sglang_gen.plan.make import make_plan
from sglang_gen.types import Layout, Size

NAMES = [preset.name for preset in presets.load() if preset.path]


def encoder(kind: str, config: dict) -> torch.nn.Module:
    found = StableDiffusionSafetyChecker if kind == "StableDiffusionSafetyChecker" else getattr(transformers, kind)
    return found(found.config_class(**config))


@pytest.mark.parametrize("model", NAMES)
def test_parameters_are_those_of_the_libraries(model):
    card = resolve.read_card(env.preset_configs(model), model, weights=False)
    counted = 0
    for part in card.components.values():
        if part.class_name not in encoder_sizes.COUNT:
            continue
        with torch.device("meta"):
            own = part.class_name == "AutoencoderKL"
            network = AutoencoderKL.from_config(part.config) if own else encoder(part.class_name, part.config)
        assert encoder_sizes.COUNT[part.class_name](part.config, 1) == sum(
            each.numel() for each in network.parameters()
        )
        counted += 1
    assert counted >= 2 or not model.startswith(("sd", "flux"))


def test_t5_on_two_ranks_is_the_part_that_each_reads():
    from sglang_gen.families.text_encoder_parallel import TENSOR
    from sglang_gen.parallel import tensor
    from sglang_gen.parallel.collectives import Axis

    card = resolve.read_card(env.preset_configs("sd3_medium"), "sd3_medium", weights=False)
    config = card.components["text_encoder_3"].config
    with torch.device("meta"):
        network = encoder("T5EncoderModel", config)
    tensor.shrink(network, TENSOR, Axis("tp", 2, 0))
    assert encoder_sizes.t5(config, 2) == sum(each.numel() for each in network.parameters())


@pytest.mark.parametrize("there", [("shared.weight",), ("encoder.embed_tokens.weight",), ()])
def test_the_words_of_t5_have_one_name_or_another(tmp_path, there):
    from safetensors.torch import load_file, save_file

    from sglang_gen.families import text_encoder_parallel

    config = {"d_model": 8, "d_ff": 16, "num_heads": 2, "d_kv": 4, "num_layers": 1, "vocab_size": 12}
    encoder("T5EncoderModel", config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    words = tensors.pop("shared.weight")
    named = {name: words.clone() for name in there or ("shared.weight", "encoder.embed_tokens.weight")}
    save_file(tensors | named, tmp_path / "model.safetensors")
    part = text_encoder_parallel.read(tmp_path, torch.float32, "cpu", Axis("tp", 2, 1))
    assert torch.equal(part.shared.weight, words)
    assert part.encoder.embed_tokens is part.shared


def test_bytes_that_are_alive_rise_and_fall():
    known = torch.empty(1000)
    with Alive([known]) as alive:
        known.view(10, 100).add_(1)
        first = torch.empty(100)
        second = first + 1
        del first
        third = second[:50] + 1
    assert (alive.now, alive.most) == (4 * 150, 4 * 200)
    del second, third
    assert alive.now == 0


CONFIG = {
    "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8,
    "num_layers": 2, "patch_size": 2, "in_channels": 4, "pos_embed_max_size": 32, "caption_projection_dim": 32,
}  # fmt: skip


def test_products_are_those_that_torch_counts_and_two_ranks_have_half():
    card = rehearsed.card_of("sd3", CONFIG, {"text_encoder": {"max_position_embeddings": 8}})
    found = rehearsed.rank("sd3", card, Layout(), 0, 128, 128, text_length=8)
    with torch.device("meta"):  # on the CPU the counter sees no attention
        network = rehearsed.FAMILIES["sd3"].build(CONFIG)
        conditioning = network.condition(torch.zeros(2), torch.zeros(1, 16, 8), torch.zeros(1, 8), 16, 16)
        latents = torch.zeros(1, 4, 16, 16)
    with FlopCounterMode(display=False) as counter:
        network(latents, conditioning, 0)
    assert found.flops == counter.get_total_flops()
    assert found.weights == sum(each.numel() * 4 for each in [*network.parameters(), *network.buffers()])
    halves = [rehearsed.rank("sd3", card, layout, 0, 128, 128, text_length=8)
              for layout in (Layout(ring=2), Layout(ulysses=2))]  # fmt: skip
    assert [2 * half.flops for half in halves] == [found.flops, found.flops]
    assert all(half.alive < found.alive for half in halves)
    assert rehearsed.rank("sd3", card, Layout(tp=2), 0, 128, 128, text_length=8).weights < 0.75 * found.weights


@pytest.mark.whole
def test_decoding_by_rows_needs_less_memory_and_sends_what_its_ranks_send():
    card = resolve.read_card(env.preset_configs("sdxl"), "sdxl", weights=False)
    request = Request(Size(1024, 768), rehearsed.FACTOR, steps=1, guidance=1.0, text_length=None)
    alone, half = (
        trace_decoding(rehearsed.FAMILIES["sdxl"], Axis("sp", ranks, 0), card, request, 2, torch.float16, "cuda")
        for ranks in (1, 2)
    )
    widest = 2 * 256 * 1024 * 768 * 4  # bytes of a batch of maps after the last upsampling, in float32
    assert alone.alive == pytest.approx(3 * widest, rel=0.01)  # what a residual adds to, what it convolves, its result
    # The upsampled map, the same with its neighbours' rows beside it, its convolution, and two smaller maps.
    assert half.alive == pytest.approx((1 + 1 + 1 + 0.5 + 0.25) * widest / 2, rel=0.01)
    assert not alone.sent.calls
    network = autoencoder.build(card.components["vae"].config)
    with counted() as expected:
        decoders.meta_copy(network, Axis("sp", 2, 0), torch.float32).decode(torch.empty(2, 4, 128, 96, device="meta"))
    assert half.sent == expected


def test_memory_is_that_of_the_fullest_stage_where_components_are_offloaded():
    weights, alive = {"text_encoder": 9, "transformer": 24, "vae": 1}, {"step": 3, "decoding": 8}
    assert most_memory(weights, alive, {}) == 34 + 8
    assert most_memory(weights, alive, {"text_encoder": "text_encoding"}) == 25 + 9  # while it encodes
    assert most_memory(weights, alive, {"text_encoder": "text_encoding", "transformer": "step"}) == 1 + 24 + 3
    all_of_them = {"text_encoder": "text_encoding", "transformer": "step", "vae": "decoding"}
    assert most_memory(weights, alive, all_of_them) == 27
    assert most_memory({**weights, "text_encoder": 40}, alive, all_of_them) == 40


@pytest.mark.whole
def test_a_dry_run_counts_what_is_on_the_device_at_once(pipelines, sglang, monkeypatch):
    monkeypatch.setattr(offloading, "OFFLOADING", ("cuda", "cpu"))
    words = ("generate", "--model-path", pipelines["sd3"], "--prompt", "a", "--height", 32, "--width", 32,
             "dry_run=json", "--backend", "sglang")  # fmt: skip
    plain, offloaded = (
        json.loads(sglang(*words, *more).out)["estimate"]["memory"] for more in ((), ("offload=model",))
    )
    assert offloaded["weights"] == plain["weights"]
    encoders = sum(size for name, size in plain["weights"].items() if "text" in name)
    assert encoders <= offloaded["total"] < plain["total"]


def traffic(calls: int, size: int) -> Traffic:
    return Traffic({"all_reduce tp": calls}, {"all_reduce tp": size})


def test_a_prediction_is_of_a_named_machine_and_of_its_dtype_alone():
    named = Machine("h200", 800.0, 400.0, 4000.0, 400.0, 10.0)
    kernels = Kernels(fused=True)
    kernels.products.update({(8 * 10**11, 1): 10, (1, 4 * 10**9): 2})  # ten bound by arithmetic, two by bytes
    kernels.attention[4 * 10**12, 1] = 1
    kernels.elementwise = 20 * 10**9
    sent = traffic(100, 4 * 10**9)
    assert predicted(named, "bfloat16", kernels, sent) == {
        "machine": "h200", "products_ms": 12.0, "attention_ms": 10.0, "elementwise_ms": 5.0, "communication_ms": 11.0,
        "step_ms": 38.0, "measured": False,
    }  # fmt: skip
    assert predicted(replace(named, attention_tflops=None), "bfloat16", kernels, Traffic())["attention_ms"] == 5.0
    assert predicted(Machine(), "bfloat16", kernels, sent) is None
    assert "those of bfloat16, and this run is float32" in predicted(named, "float32", kernels, sent)["reason"]
    for lacking in ("matmul_tflops", "memory_gb_per_s", "link_gb_per_s"):
        mine = replace(named, name="mine", **{lacking: None})
        assert "machine=mine lacks one of" in predicted(mine, "bfloat16", kernels, sent)["reason"]
    assert predicted(replace(named, link_gb_per_s=None), "bfloat16", kernels, Traffic())["communication_ms"] == 0


@pytest.mark.parametrize(("latency", "milliseconds"), [(12.0, [10.012, 11.2, 22.0]), (None, [10.0, 10.0, 10.0])])
def test_the_same_bytes_take_longer_in_more_collectives(latency, milliseconds):
    named = Machine("mine", 800.0, 400.0, 4000.0, 400.0, latency)
    found = [
        predicted(named, "bfloat16", Kernels(fused=True), traffic(calls, 4 * 10**9))["communication_ms"]
        for calls in (1, 100, 1000)
    ]
    assert found == milliseconds


def test_named_machines_have_a_latency_beside_their_bandwidth(composed):
    for name in ("h100", "h200"):
        machine = composed("--prompt", "a", f"machine={name}").run.machine
        assert 1 < machine.link_latency_us < 100


def chain(fused: bool) -> Kernels:
    """A product, its gated half, a product of that and a bias."""
    with torch.device("meta"):
        x, w, v = torch.empty(10, 20), torch.empty(20, 60), torch.empty(30, 5)
    with Kernels(fused) as kernels:
        left, right = (x @ w).chunk(2, dim=1)
        (left * torch.nn.functional.silu(right)) @ v
    return kernels


def test_kernels_read_and_write_what_torch_says_they_do():
    for fused in (False, True):
        kernels = chain(fused)
        assert kernels.products == {
            (2 * 10 * 20 * 60, 4 * (10 * 20 + 20 * 60 + 10 * 60)): 1,
            (2 * 10 * 30 * 5, 4 * (10 * 30 + 30 * 5 + 10 * 5)): 1,
        }
        assert kernels.flops == 2 * 10 * 20 * 60 + 2 * 10 * 30 * 5
    half = 4 * 10 * 30
    assert chain(fused=False).elementwise == 2 * half + 3 * half  # silu; then the multiplication
    assert chain(fused=True).elementwise == 2 * half + half  # both halves once, and what the second product reads


def test_what_lives_across_a_product_is_written_and_read_again():
    with torch.device("meta"):
        x, w = torch.empty(8, 8), torch.empty(8, 8)
    with Kernels(fused=True) as kernels:
        x = x * 2
        for _ in range(3):
            x = x + torch.nn.functional.layer_norm(x, (8,)) @ w
    assert kernels.elementwise == 4 * 64 * (2 + 4 + 4 + 3)  # the last reads a product and x, and writes x


def test_a_fused_result_is_written_once_and_an_expanded_tensor_is_as_long_as_it_is():
    with torch.device("meta"):
        x, w = torch.empty(8, 8), torch.empty(8, 8)
        row = torch.empty(1, 8)
    with Kernels(fused=True) as kernels:
        y = x + row.expand(8, 8)
        y @ w
        y @ w
    assert kernels.elementwise == 4 * (64 + 8 + 64)


def test_attention_has_two_products_and_reads_what_fused_kernels_wrote():
    with torch.device("meta"):
        q, k = torch.empty(2, 3, 8, 4), torch.empty(2, 3, 5, 4)
    with Kernels(fused=True) as kernels:
        q, out = q * 2, torch.empty_like(q)
        kernels.add_attention(q, k, k, out)
        out + 1
    assert kernels.attention == {(4 * 2 * 3 * 8 * 5 * 4, 4 * 2 * 3 * (8 + 5 + 5 + 8) * 4): 1}
    assert kernels.elementwise == 3 * 4 * q.numel()  # q read and written, out read


def test_attention_reads_its_mask_and_computes_the_products_of_masked_keys_too():
    with torch.device("meta"):
        q, k, mask = torch.empty(2, 3, 8, 4), torch.empty(2, 3, 5, 4), torch.empty(2, 1, 1, 5, dtype=torch.bool)
    kernels = Kernels(fused=True)
    kernels.add_attention(q, k, k, q, mask)
    assert kernels.attention == {(4 * 2 * 3 * 8 * 5 * 4, 4 * 2 * 3 * (8 + 5 + 5 + 8) * 4 + 2 * 5): 1}


@pytest.mark.whole
def test_the_prediction_for_flux_is_what_its_arithmetic_says():
    """59.5 TFLOP of products and 14.9 of attention; about 8 ms at 4.3 TB/s of what is fused, by hand."""
    card = resolve.read_card(env.preset_configs("flux_dev"), "flux_dev", weights=False)
    alone, pair = (
        rehearsed.rank("flux", card, layout, 0, 1024, 1024, 1.0, text_length=512, dtype=torch.bfloat16, fused=True)
        for layout in (Layout(), Layout(ulysses=2))
    )
    named = compose(Choices(("model=flux_dev", "machine=h200"))).run.machine
    found = predicted(named, "bfloat16", alone.kernels, Traffic())
    assert found["products_ms"] == pytest.approx(59.5 / 790 * 1000, rel=0.01)
    assert found["attention_ms"] == pytest.approx(14.9 / 600 * 1000, rel=0.01)
    assert found["elementwise_ms"] == pytest.approx(8, abs=0.5)
    half = predicted(named, "bfloat16", pair.kernels, pair.step)
    assert 0.5 * found["step_ms"] < half["step_ms"] < 0.6 * found["step_ms"]


@pytest.mark.slow
def test_a_dry_run_shows_memory_communication_products_and_the_prediction(sglang):
    words = ("generate", "model=sd15", "parallel=sp2_tp2", "device=cpu", "machine=h200", "--dtype", "bfloat16")
    table, content = sglang(*words, "dry_run=true"), sglang(*words, "dry_run=json")
    assert table.code == 0, table.err
    rows = dict(line.split("  ", 1) for line in table.out.splitlines())
    assert "unet" in rows["memory per rank"]
    assert "all_reduce tp" in rows["communication per step"]
    assert rows["FLOPs per step"].endswith(" per rank")
    assert rows["PREDICTION"].strip().endswith(" communication); not measured")
    assert "no effect" not in table.err
    found = json.loads(content.out)["estimate"]
    memory = found["memory"]
    assert memory["total"] == sum(memory["weights"].values()) + max(memory["alive"].values())
    assert found["decoding"]["collectives"]["all_gather sp"]["count"] > 0
    assert found["prediction"]["measured"] is False
    compiled = json.loads(sglang(*words, "--enable-torch-compile", "dry_run=json").out)["estimate"]["prediction"]
    assert compiled["elementwise_ms"] < 0.6 * found["prediction"]["elementwise_ms"]
    assert compiled["products_ms"] == found["prediction"]["products_ms"]


@pytest.mark.slow
def test_a_dry_run_warns_of_more_memory_than_there_is(sglang, monkeypatch):
    words = ("generate", "model=sd15", "parallel=sp2", "device=cpu", "--dtype", "bfloat16", "dry_run=true")
    for bytes_, warned in ((2 * 10**10, False), (2 * 10**9, True)):
        monkeypatch.setattr(env, "memory_bytes", lambda device, bytes_=bytes_: bytes_)
        assert ("and this machine has 1.00 GB per rank" in sglang(*words).out) is warned
        assert "and this machine has" not in sglang(*words, "machine=h200").out


@pytest.mark.whole
def test_the_size_and_the_encoding_of_an_input_picture_are_in_the_estimate(sglang):
    Image.new("RGB", (256, 520)).save("photo.png")
    words = ("generate", "model=sd15", "device=cpu", "--dtype", "float32", "dry_run=json")
    plain = json.loads(sglang(*words).out)["estimate"]
    found = json.loads(sglang(*words, "--image-path", "photo.png").out)["estimate"]
    assert found["step"]["flops"] < 0.6 * plain["step"]["flops"]  # 512 x 512 has twice as many pixels
    assert found["memory"]["alive"]["encoding"] > 3 * 256 * 520 * 4
    assert "encoding" not in plain["memory"]["alive"]
    assert sglang(*words, "--image-path", "missing.png").code == 2


@pytest.mark.whole
def test_a_picture_of_fewer_rows_than_ranks_is_refused_by_the_dry_run_too(sglang):
    Image.new("RGB", (64, 64)).save("small.png")
    words = ("generate", "model=sdxl", "device=cpu", "--image-path", "small.png", "dry_run=true")
    done = sglang(*words, "parallel.sp_degree=4")
    assert (done.code, "this image has 2 bands of 32 rows of pixels" in done.err) == (2, True), done.err
    assert sglang(*words, "parallel=sp2").code == 0


UNEVEN = [
    (Layout(ring=4), 9, 0), (Layout(ring=4), 10, 0), (Layout(ring=2, ulysses=2), 11, 0), (Layout(ulysses=4), 5, 0),
    (Layout(ring=2), 2, 1), (Layout(ring=4), 8, 3), (Layout(ring=3), 4, 1),
]  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize(("layout", "bands", "more"), mostly_slow(UNEVEN, UNEVEN[4]))
def test_no_rank_has_more_to_do_than_those_that_are_estimated(layout, bands, more):
    config = Reference("sdxl").variants["sdxl"] | {"attention_head_dim": 4}
    unit = 2 ** (len(config["block_out_channels"]) - 1)
    height = (bands * unit + more) * rehearsed.FACTOR  # rows of latents beside those of whole bands: `more`
    lengths = shard_sizes(bands * unit + more, unit, layout.ranks)
    card = rehearsed.card_of(
        "sdxl", config, {"text_encoder": {"max_position_embeddings": 9}, "text_encoder_2": {"projection_dim": 20}}
    )
    found = {
        rank: rehearsed.rank("sdxl", card, layout, rank, height, 48, 3.0, rows=2, text_length=9)
        for rank in range(layout.ranks)
    }
    assert len({each.alive for each in found.values()}) > 1
    seen = [found[rank] for rank in busiest(layout, lengths)]
    for most in (lambda each: each.alive, lambda each: sum(each.step.bytes.values()), lambda each: each.flops):
        assert max(map(most, seen)) == max(map(most, found.values()))


@pytest.mark.whole
def test_memory_is_shared_by_the_ranks_of_one_machine(sglang, monkeypatch):
    monkeypatch.setattr(env, "memory_bytes", lambda device: 8 * 10**9)
    choices = Choices(("model=sd15", "parallel=tp2", "device=cpu"))
    composed, card = compose(choices), resolve.read_card(env.preset_configs("sd15"), "sd15", weights=False)
    for place, each in ((None, 4), (env.Torchrun(0, 2, 0, 1, 0), 8)):
        found = estimate(make_plan(replace(composed, place=place), card))
        assert found["memory"]["there"] == each * 10**9


def test_diffusers_is_not_estimated(sglang):
    words = ("generate", "model=sd15", "--backend", "diffusers")
    assert "estimate" in sglang(*words, "dry_run=true").out
    assert json.loads(sglang(*words, "dry_run=json").out)["estimate"] == {
        "reason": "none: only runs on the native engine are estimated"
    }
