"""`sglang debug parity`: equal where the backends are, and a planted defect is found where it was planted."""

import json
import math
import shutil
import subprocess
import sys
from copy import copy
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from sglang_gen import log
from sglang_gen.backends.diffusers import engine as diffusers
from sglang_gen.backends.native import engine as native
from sglang_gen.backends.native import memory_policy
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.debug import command, report, tensor_match
from sglang_gen.debug import parity as parity_of_engines
from sglang_gen.debug.correspondence import correspond
from sglang_gen.debug.verdict import PARITY_TOLERANCES, Report, Row, Tolerance, Verdict
from sglang_gen.engine.cfg import Guidance
from sglang_gen.models import flux as flux_model
from sglang_gen.models import sd3 as sd3_model
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.perf.flops import CallLog

MODULES = {"sd15": 134, "sdxl": 283, "sd3": 66, "flux": 60}  # with weights and an output like that of a partner
DECODER = {"sd15": 44, "sdxl": 44, "sd3": 43, "flux": 43}  # the same of the autoencoder while it decodes


@pytest.fixture
def parity(pipelines, sglang):
    """`sglang debug parity` on a tiny model in 32 x 48 pixels; at a scale of 3, where SDXL's rounding stays small."""

    def run(name, *words: object, steps: int = 1, dtype: str = "float32"):
        scale = () if "--guidance-scale" in words else ("--guidance-scale", "3")
        return sglang("debug", "parity", "--model-path", pipelines.get(name, name), "--prompt", "a cat", "--seed", "7",
                      "--height", 32, "--width", 48, "--num-inference-steps", steps, f"dtype={dtype}", *scale,
                      *words)  # fmt: skip

    return run


@pytest.fixture(scope="module")
def loaded(pipelines):
    """Of a tiny model: the native engine's plan, and diffusers' engine, which is loaded once."""
    known = {}
    log.setup("error")

    def load(name):
        if name not in known:
            flags = {"model.path": str(pipelines.get(name, name)), "sampling.prompt": "a cat", "sampling.seed": 7,
                     "sampling.height": 32, "sampling.width": 48, "sampling.num_inference_steps": 2,
                     "sampling.guidance_scale": 3.0}  # fmt: skip
            ours, theirs = command.plans(compose(Choices(overrides=("dtype=float32",), flags=flags)))
            known[name] = ours, diffusers.load(theirs, Mesh(), CallLog())
        return known[name]

    return load


@pytest.fixture
def found(loaded):
    """The report on a tiny model, whose native engine is changed once it is loaded."""

    def compare(name, change=lambda engine: None) -> Report:
        plan, theirs = loaded(name)
        ours, tolerance = native.load(plan, Mesh(), CallLog()), PARITY_TOLERANCES["float32"]
        with torch.no_grad():
            change(ours)
        return parity_of_engines.compare(parity_of_engines.beside(plan, ours, theirs, tolerance), tolerance)

    return compare


@pytest.fixture
def planted(monkeypatch):
    """Change the native engine that the command loads."""

    def plant(change):
        load = native.load

        def changed(*args):
            engine = load(*args)
            with torch.no_grad():
                change(engine)
            return engine

        monkeypatch.setattr(native, "load", changed)

    return plant


def verdict(done) -> str:
    """The last line."""
    return done.out.splitlines()[-1]


@pytest.mark.whole
@pytest.mark.parametrize("name", MODULES)
def test_the_backends_are_equal_and_nearly_all_modules_are_compared(parity, name):
    done = parity(name, "--json", steps=2)
    assert done.code == 0, done.out
    content = json.loads(done.out)
    assert content["verdict"] in ("bit-exact", "numerically equal")
    assert (content["first"], content["exit_code"]) == (None, 0)
    assert content["compared"] == MODULES[name] + DECODER[name]
    rows = [row for row in content["rows"] if row["step"] == 1 and row["stage"] == "network"]
    assert len({row["ours"] for row in rows}) == len(rows) == MODULES[name]
    decoder = [row["ours"] for row in content["rows"] if row["stage"] == "decoder"]
    assert len(set(decoder)) == len(decoder) == DECODER[name]
    assert [name for name in content["left_out"] if "decoder" in name] == [
        "decoder.up.0.upsample",
    ]
    assert {row["stage"] for row in content["rows"]} == {
        "text encoding", "schedule", "latents", "network", "prediction", "scheduler", "decoder", "decoding",
        "end to end",
    }  # fmt: skip
    assert [row["step"] for row in content["rows"] if row["stage"] == "scheduler"][:2] == [1, 2]


def with_scheduler(folder: Path, name: str) -> Path:
    copied = Path("model")
    shutil.copytree(folder, copied)
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **betas}))
    return copied


@pytest.mark.whole
@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
def test_schedulers_that_draw_noise_or_evaluate_twice_are_equal_for_a_batch(parity, pipelines, scheduler):
    model = with_scheduler(pipelines["sd15"], scheduler)
    done = parity(str(model), "--num-samples", 2, "sampling.batch_size=2", "--negative-prompt", "a dog", steps=2)
    assert done.code == 0, done.out + done.err


@pytest.mark.whole
def test_a_pipeline_that_calls_its_network_once_for_each_prompt_is_followed(parity):
    words = ("--diffusers-kwargs", '{"true_cfg_scale": 3.0}', "--negative-prompt", "a dog")
    done = parity("flux", *words, "--json", steps=2)
    assert done.code == 0, done.out
    rows = [row for row in json.loads(done.out)["rows"] if row["stage"] == "network" and row["step"] == 1]
    assert len(rows) == 2 * MODULES["flux"]


@pytest.mark.whole
def test_the_models_own_dtype_has_a_tolerance_of_its_own(parity):
    done = parity("sd3", dtype="bfloat16")
    assert done.code == 0, done.out
    assert "in bfloat16: 0.02 for a module, 0.2 for a whole network" in done.out


def swap_heads(weight: torch.Tensor, width: int = 16) -> None:
    """Of the queries of a fused projection with two heads."""
    weight[: 2 * width] = weight[: 2 * width].roll(width, 0)


def silence(attend) -> None:
    attend.register_forward_hook(lambda module, args, attended: torch.zeros_like(attended))


# Model, our module, theirs, and what breaks it.


def shown(value: object) -> str:
    """The id of a parameter: the same in every process, which a function's address is not."""
    return "" if callable(value) else str(value)[:40]


IN_A_MODULE = [
    ("flux", "single_blocks.1.to_out", "single_transformer_blocks.1.proj_out", lambda m: m.bias.mul_(2)),
    ("flux", "blocks.0.image.to_qkv",
     ", ".join(f"transformer_blocks.0.attn.to_{part}" for part in "qkv"), lambda m: swap_heads(m.weight)),
    ("flux", "single_blocks.0.norms.norm_k", "single_transformer_blocks.0.attn.norm_k", lambda m: m.weight.fill_(1)),
    ("sd3", "pooled_embedder.linear_2", "time_text_embed.text_embedder.linear_2", lambda m: m.weight.zero_()),
    ("sd3", "blocks.2.modulation.linear", "transformer_blocks.2.norm1.linear", lambda m: m.bias.mul_(1.01)),
    ("sdxl", "down.1.transformers.0.blocks.1.cross_attention.to_kv",
     ", ".join(f"down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_{part}" for part in "kv"),
     lambda m: m.weight.zero_()),
    ("sdxl", "up.1.residuals.2.time", "up_blocks.1.resnets.2.time_emb_proj", lambda m: m.bias.mul_(2)),
    ("sd15", "middle.transformers.0.project_in", "mid_block.attentions.0.proj_in", lambda m: m.bias.mul_(2)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ours", "theirs", "change"), IN_A_MODULE, ids=shown)
def test_a_defect_in_a_module_is_named_by_both_names(found, name, ours, theirs, change):
    differs = found(name, lambda engine: change(engine.network.get_submodule(ours)))
    start, end = report.sentence(differs).split(" by ")
    assert start == f"different: step 1, network, {ours} (diffusers: {theirs})"
    assert float(end) > 1e-4
    others = [row.ours for row in differs.rows if row.stage == "network" and row.verdict is Verdict.different]
    assert set(others) == {ours}  # and no module behind it is blamed
    lines = [line for line in report.text(differs).splitlines() if line.startswith("step 1, network")]
    assert next(line.split()[3] for line in lines if "different" in line) == ours


IN_THE_DECODER = [
    ("sd15", "post_quant_conv", "post_quant_conv", lambda m: m.bias.mul_(2)),
    ("sdxl", "decoder.up.0.upsample.conv", "decoder.up_blocks.0.upsamplers.0.conv", lambda m: m.bias.zero_()),
    ("sd3", "decoder.up.1.residuals.0.shortcut", "decoder.up_blocks.1.resnets.0.conv_shortcut",
     lambda m: m.weight.zero_()),
    ("flux", "decoder.middle.attention.to_qkv", "decoder.mid_block.attentions.0.to_q, "
     "decoder.mid_block.attentions.0.to_k, decoder.mid_block.attentions.0.to_v", lambda m: m.bias.mul_(2)),
    ("flux", "decoder.norm_out", "decoder.conv_norm_out", lambda m: m.weight.fill_(1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ours", "theirs", "change"), IN_THE_DECODER, ids=shown)
def test_a_defect_in_the_decoder_is_named_by_both_names(found, name, ours, theirs, change):
    differs = found(name, lambda engine: change(engine.components["vae"].get_submodule(ours)))
    start, end = report.sentence(differs).split(" by ")
    assert start == f"different: decoder, {ours} (diffusers: {theirs})"
    assert float(end) > 1e-4
    wrong = {(row.stage, row.ours) for row in differs.rows if row.verdict is Verdict.different}
    assert wrong == {("decoder", ours), ("decoding", "image of the same latents"), ("end to end", "image")}


def test_an_attention_without_effect_is_found_in_the_middle_of_the_decoder(found):
    sentence = report.sentence(
        found("sd3", lambda engine: silence(engine.components["vae"].decoder.middle.attention.attend))
    )
    assert sentence.startswith(
        "different: decoder, decoder.middle.attention.to_out (diffusers: decoder.mid_block.attentio"
    )
    assert sentence.endswith(
        "look inside decoder.middle.attention (diffusers: decoder.mid_block.attentions.0) before it"
    )


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore:.upcast_vae. is deprecated:FutureWarning")
def test_a_decoder_that_is_at_work_in_float32_alone_is_compared_in_it(parity):
    done = parity("sdxl", "--json", dtype="float16")
    assert done.out, done.err
    rows = [row for row in json.loads(done.out)["rows"] if row["stage"] == "decoder"]
    assert len(rows) == DECODER["sdxl"]
    assert max(row["error"] for row in rows) <= 1e-5


# Model, the first module that can show it, where to look, and a defect between modules.
BETWEEN_MODULES = [
    ("sd3", "blocks.1.attention.to_out", "blocks.1.attention (diffusers: transformer_blocks.1.attn)",
     lambda engine: silence(engine.network.blocks[1].attention.attend)),
    ("sdxl", "middle.transformers.0.blocks.0.self_attention.to_out",
     "middle.transformers.0.blocks.0.self_attention (diffusers: mid_block.attentions.0.transformer_blocks.0.attn1)",
     lambda engine: silence(engine.network.middle.transformers[0].blocks[0].self_attention.attend)),
    ("flux", "single_blocks.1.to_out", "single_blocks.1 (diffusers: single_transformer_blocks.1)",
     lambda engine: silence(engine.network.single_blocks[1].attend)),
]  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize(("name", "first", "inside", "change"), BETWEEN_MODULES, ids=shown)
def test_a_defect_between_modules_is_named_by_the_next_and_by_the_one_around(found, name, first, inside, change):
    sentence = report.sentence(found(name, change))
    assert sentence.startswith(f"different: step 1, network, {first} (diffusers: ")
    assert sentence.endswith(f"; its input differs already, so look inside {inside} before it")


@pytest.mark.whole
def test_a_forgotten_modulation_is_found_in_the_first_block(found, monkeypatch):
    monkeypatch.setattr(sd3_model, "modulate", lambda x, shift, scale: x)
    sentence = report.sentence(found("sd3"))
    assert "step 1, network, blocks.0.attention.image.to_qkv (diffusers: transformer_blocks.0.attn.to_q" in sentence
    assert sentence.endswith("look inside blocks.0 (diffusers: transformer_blocks.0) before it")


def test_turned_positions_are_found_in_the_first_block(found, monkeypatch):
    table = flux_model.rotary_table
    monkeypatch.setattr(flux_model, "rotary_table", lambda positions, axes: table(positions[:, [0, 2, 1]], axes))
    sentence = report.sentence(found("flux"))
    assert "step 1, network, blocks.0." in sentence
    assert sentence.endswith("look inside blocks.0 (diffusers: transformer_blocks.0) before it")


def test_conditioning_of_the_wrong_step_shows_at_the_second(found, monkeypatch):
    forward = sd3_model.SD3.forward
    monkeypatch.setattr(sd3_model.SD3, "forward", lambda self, latents, c, step: forward(self, latents, c, 0))
    sentence = report.sentence(found("sd3"))
    assert sentence.startswith("different: step 2, prediction, guided prediction (diffusers: noise_pred) by ")


def test_numbers_that_are_not_finite_do_not_end_the_comparison(found):
    differs = found("sd3", lambda engine: engine.network.blocks[1].ff.up.bias.fill_(math.nan))
    content = report.as_json(differs)
    json.dumps(content, allow_nan=False)
    assert (content["first"]["ours"], content["first"]["error"]) == ("blocks.1.ff.up", None)
    assert content["sentence"].endswith("(diffusers: transformer_blocks.1.ff.net.0.proj) is not finite")
    assert "NaN or infinite values" in content["rows"][-1]["note"]


def louder(function):
    @wraps(function)
    def changed(*args, **kwargs):
        return (function(*args, **kwargs)[0] * 1.01,)

    return changed


def change_scheduler(engine) -> None:
    scheduler = engine.components["scheduler"]
    engine.components["scheduler"] = type(scheduler).from_config(scheduler.config, shift=2.0)


def one_more_step(function):
    def schedule(config, scheduler, request):
        return function(config, scheduler, SimpleNamespace(**{**request_values(request), "steps": 3}))

    return schedule


def request_values(request) -> dict:
    return {**vars(request), "latent_size": request.latent_size}


def changed_pipeline(**functions):
    """Replace methods of the family's pipeline by what `functions` make of them."""

    def change(engine) -> None:
        engine.pipeline = copy(engine.pipeline)
        for name, made in functions.items():
            setattr(engine.pipeline, name, made(getattr(engine.pipeline, name)))

    return change


def louder_pooled(text, pooled):
    return text, pooled * 1.5


def scaled(by: float):
    return lambda function: lambda *args: function(*args) * by


# The stage that the last line names, and a defect in it.
IN_A_STAGE = [
    ("text encoding, pooled text (diffusers: pooled_projections or text_embeds) by 0.",
     changed_pipeline(encode=lambda encode: lambda *args, **more: louder_pooled(*encode(*args, **more)))),
    ("text encoding, text (diffusers: encoder_hidden_states) the shapes are [2, 93, 64] and [2, 333, 64]",
     changed_pipeline(encode=lambda encode: lambda parts, config, texts, length: encode(parts, config, texts, 16))),
    ("schedule, timesteps (diffusers: timesteps) by 0.", change_scheduler),
    ("schedule, timesteps (diffusers: timesteps) the shapes are [3] and [2]", changed_pipeline(schedule=one_more_step)),
    ("latents, initial latents (diffusers: latents) by 0.1", changed_pipeline(start=scaled(1.1))),
    ("step 1, scheduler, next latents (diffusers: latents) by 0.01",
     lambda engine: setattr(engine.components["scheduler"], "step", louder(engine.components["scheduler"].step))),
    ("decoding, image of the same latents (diffusers: images) by ", changed_pipeline(decode=scaled(0.5))),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "change"), IN_A_STAGE, ids=shown)
def test_a_defect_outside_of_the_network_is_named_by_its_stage(found, stage, change):
    assert report.sentence(found("sd3", change)).startswith(f"different: {stage}")


def test_a_wrong_scale_of_guidance_shows_in_the_prediction_and_not_in_a_module(found, monkeypatch):
    monkeypatch.setattr(memory_policy, "guidance", lambda *args, **kwargs: Guidance(3.5))
    sentence = report.sentence(found("sd3"))
    assert sentence.startswith("different: step 1, prediction, guided prediction (diffusers: noise_pred) by ")


@pytest.mark.whole
def test_generators_that_have_gone_on_show_in_the_noise_that_a_scheduler_draws(found, pipelines):
    def drawn(draw):
        def and_one_more(config, request, generators, dtype):
            noise = draw(config, request, generators, dtype)
            torch.randn(1, generator=generators[0])
            return noise

        return and_one_more

    differs = found(
        str(with_scheduler(pipelines["sd15"], "EulerAncestralDiscreteScheduler")),
        changed_pipeline(draw=drawn),
    )
    assert report.sentence(differs).startswith("different: step 1, scheduler, next latents (diffusers: latents) by ")


def test_rounding_that_grows_over_the_steps_is_told_from_a_defect():
    latents = Row("end to end", "final latents", "latents", 2e-5, Verdict.different)
    step = Row("scheduler", "next latents", "latents", 2e-6, Verdict.equal, step=1)
    whole = Report("model", "float32", "cpu", Tolerance(1e-5, 1e-5), (step, latents), 1, 1, ())
    assert report.sentence(whole).startswith("different: end to end, final latents (diffusers: latents) by 2e-05; ")
    assert report.sentence(whole).endswith("so rounding accumulated over the steps")
    assert report.sentence(replace(whole, rows=(step,))) == "numerically equal: at most 2e-06"
    assert report.sentence(replace(whole, rows=(replace(step, error=0.0, verdict=Verdict.exact),))) == "bit-exact"


@pytest.mark.whole
def test_the_tolerance_decides(parity, planted):
    planted(lambda engine: engine.network.out.bias.mul_(1.5))
    done = parity("flux", "--tolerance", "0.0001")
    assert (done.code, verdict(done)[:59]) == (1, "different: step 1, network, out (diffusers: proj_out) by 0.")
    done = parity("flux", "--tolerance=10")
    assert (done.code, verdict(done).partition(":")[0]) == (0, "numerically equal")


WRONG = [
    (["debug", "parity", "--tolerance", "-1"], "--tolerance: '-1' is not a number of at least 0"),
    (["debug", "parity", "--tolerance", "tight"], "--tolerance: 'tight' is not a number of at least 0"),
    (["debug", "parity", "--tolerance", "nan"], "--tolerance: 'nan' is not a number of at least 0"),
    (["debug", "parity", "--tolerance"], "--tolerance needs a value"),
    (["debug", "parity", "--tolerence", "1"], "Unknown option --tolerence; did you mean '--tolerance'?"),
    (["debug", "parity", "-m"], "sglang debug parity compares one run; leave out --multirun"),
    (["debug", "parity", "--cfg", "job"], "sglang debug parity compares one run; leave out --cfg"),
    (["debug", "parity", "sampling.sed=1"], "Unknown key 'sampling.sed'"),
    (["debug", "parity", "--model-path", "nowhere/at-all"], "A prompt is needed"),
    (["debug", "parity", "--prompt", "x", "--num-gpus", "2", "--dp-size", "2", "--num-samples", "2", "device=cpu"],
     "sglang debug parity runs on one rank; leave out the settings of parallel"),
    (["debug", "parity", "--prompt", "x", "quant=int8"],
     "sglang debug parity runs both backends, and the native engine cannot run this: it has no quantized weights yet"),
    (["debug", "party"], "Unknown command 'debug party'; did you mean 'parity'?"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "sentence"), WRONG, ids=lambda value: str(value)[-40:])
def test_a_wrong_request_is_one_sentence_and_exit_code_2(sglang, argv, sentence):
    done = sglang(*argv)
    assert done.code == 2, done.err
    errors = [line for line in done.lines if not line.startswith("INFO: ")]
    assert len(errors) == 1
    assert errors[0].startswith("ERROR: ")
    assert sentence in errors[0]
    assert done.out == ""


def test_a_model_that_the_native_engine_does_not_have_is_refused_with_its_reason(parity):
    done = parity(tiny.wan(Path("wan")))
    assert (done.code, done.out) == (2, "")
    assert "the native engine cannot run this: it has no WanPipeline (it has StableDiffusion3Pip" in done.lines[-1]


def test_what_has_no_effect_is_a_warning_and_nothing_is_saved(parity):
    done = parity("flux", "--output-path", "pictures", "--backend", "sglang", "--num-samples", "2", "dry_run=true")
    assert done.code == 0, done.err
    warnings = [line for line in done.lines if line.startswith("WARNING: ")]
    for sentence in (
        "output.path has no effect on sglang debug parity",
        "backend.name has no effect on sglang debug parity",
        "dry_run has no effect on sglang debug parity",
        "Only the first of 2 batches is compared",
    ):
        assert f"WARNING: {sentence}" in warnings
    assert list(Path().iterdir()) == []


@pytest.mark.whole
def test_help_imports_no_heavy_library():
    code = (
        "import sys; from sglang_gen.cli import main;"
        "assert main(['debug', '--help']) == 0 and main(['debug', 'parity', '--help']) == 0 and main(['debug']) == 2;"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'hydra', 'omegaconf', 'numpy') "
        "if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "--tolerance X" in done.stdout


def test_modules_correspond_by_the_weights_that_they_hold():
    from diffusers import UNet2DConditionModel

    from sglang_gen.families import unet_shared

    config = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 32, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 2,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    with torch.device("meta"):
        ours, theirs = unet_shared.build(config), UNet2DConditionModel(**config)
    pairs = correspond(ours, theirs, unet_shared.sources)
    assert pairs[""] == ("",)
    assert pairs["down.1.residuals.0"] == ("down_blocks.1.resnets.0",)
    block = "attentions.0.transformer_blocks.0"
    assert pairs["middle.transformers.0.blocks.0"] == (f"mid_block.{block}",)
    assert pairs["middle.transformers.0.blocks.0.cross_attention"] == (f"mid_block.{block}.attn2",)
    assert pairs["middle.transformers.0.blocks.0.self_attention.to_qkv"] == tuple(
        f"mid_block.{block}.attn1.to_{part}" for part in "qkv"
    )
    layers = [name for name, module in ours.named_modules() if module._parameters and not list(module.children())]
    assert set(layers) <= pairs.keys()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, TEXT, PICTURE = draw(2, 6, 8), draw(2, 3, 8), draw(2, 8, 4, 5)
LAYOUTS = {
    "another order": ([X, TEXT], [TEXT, X]),
    "one of several": ([X], [TEXT, X]),
    "tokens behind each other": ([torch.cat([TEXT, X], dim=1)], [TEXT, X]),
    "channels behind each other": ([torch.cat([X, 2 * X, 3 * X], dim=-1)], [X, 2 * X, 3 * X]),
    "an axis of one timestep": ([X[None, :, 0]], [X[:, 0]]),
    "one row for all": ([X[:1, 0]], [X[:1, 0].expand(4, 8)]),
    "a picture as tokens": ([PICTURE.flatten(2).transpose(1, 2)], [PICTURE]),
    "heads behind tokens": ([PICTURE.transpose(1, 2)], [PICTURE]),
    "two streams of one length": ([X, 2 * X], [2 * X, X]),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_same_numbers_in_another_layout_are_the_same(case):
    ours, theirs = LAYOUTS[case]
    found = tensor_match.partners(ours, theirs)
    assert set(found) == set(range(len(ours)))
    for place, partner in found.items():
        assert partner.error == 0
        assert torch.equal(partner.theirs, ours[place])  # in our layout, to be handed on
    other = tensor_match.partners([1.1 * tensor for tensor in ours], theirs)
    assert tensor_match.worst(other) == pytest.approx(0.1, rel=1e-4)


def test_outputs_that_cannot_be_brought_to_one_shape_have_no_error():
    assert tensor_match.partners([X], [draw(2, 5, 8)]) == {}
    assert tensor_match.partners([X], []) == {}
    assert tensor_match.partners([draw(2, 6, 9)], [X, X, X]) == {}
    assert tensor_match.relative_error(X, torch.zeros_like(X)) == math.inf
    assert tensor_match.relative_error(X * math.nan, X) == math.inf


@pytest.mark.whole
def test_flux_rounds_times_and_guidance_in_half_precision_where_diffusers_does(parity):
    done = parity("flux", "--json", dtype="bfloat16")
    rows = json.loads(done.out)["rows"]
    errors = {row["ours"]: row["error"] for row in rows if row["stage"] == "network" and row["step"] == 1}
    for embedder in ("timestep_embedder", "guidance_embedder"):
        assert errors[f"{embedder}.linear_1"] == 0
