"""Whole runs of a family that masks the padding of its texts."""

import json
from pathlib import Path

import masked_family
import pytest
from cases import mostly_slow
from native import assert_same, record, tensors
from rank_runs import assert_every_rank_as_predicted
from repeated import Repeated
from whole import plan_of

from sglang_gen.dry_run.estimate import estimate
from sglang_gen.engine import attention_autotune, attention_kernels, cuda_graphs
from sglang_gen.plan import make

PROMPTS = 'sampling.prompts=[{prompt: "a cat, a dog and two red foxes in deep snow"},{prompt: lake}]'


@pytest.fixture(scope="module")
def model(pipelines, tmp_path_factory):
    return masked_family.store(pipelines["flux"], tmp_path_factory.mktemp("family") / "model")


@pytest.fixture(autouse=True)
def _registered():
    with masked_family.registered():
        yield


@pytest.fixture
def run(sglang, model):
    def generate(*words: object, folder: str = "outputs", prompts: str = PROMPTS, dtype: str = "float32"):
        return sglang("generate", "--model-path", model, prompts, "--seed", 7, "--dtype", dtype, "--backend", "sglang",
                      "output.latents=true", "--output-path", folder, "--height", 32, "--width", 32,
                      "--num-inference-steps", 2, "--guidance-scale", 3, *words)  # fmt: skip

    return generate


def completed(done) -> None:
    assert done.code == 0, done.err


@pytest.mark.whole
def test_prompts_of_a_batch_give_the_images_that_each_gives_alone(run):
    completed(run("sampling.batch_size=2", folder="batch"))
    completed(run("sampling.batch_size=1", folder="alone"))
    assert_same("batch", "alone", 2)
    assert abs(tensors("alone", 0)["latents"] - tensors("alone", 1)["latents"]).max() > 1e-2


@pytest.mark.whole
def test_guidance_in_one_batch_gives_the_image_of_guidance_in_turn(run):
    words = ("sampling.batch_size=2", "--negative-prompt", "blurred, dark and noisy, with lines of text in it")
    for batching in ("batched", "sequential"):
        completed(run(*words, f"sampling.guidance_batching={batching}", folder=batching))
    assert_same("batched", "sequential", 2)


@pytest.mark.whole
@pytest.mark.parametrize("layout", mostly_slow(["tp2", "ring2", "ulysses2", "cfg2", "usp4"], "tp2"))
def test_ranks_generate_what_one_process_generates_and_send_what_was_predicted(run, model, ranks, layout):
    """The negative prompt is longer than the prompts; one batch of two and one of one."""
    negative = "blurred, dark and noisy, with lines of text in it"
    words = ("sampling.batch_size=2", "sampling.num_samples=1", "--negative-prompt", negative)
    prompts = PROMPTS[:-1] + ",{prompt: dunes at night}]"
    completed(run(*words, folder="alone", prompts=prompts))
    Path(layout).mkdir()
    planned = plan_of(
        f"model.path={model}", prompts, "sampling.batch_size=2", f"sampling.negative_prompt={negative!r}",
        "sampling.guidance_scale=3", f"output.path={Path(layout).absolute()}", f"parallel={layout}",
        f"output.perf_dump_path={Path('perf.json').absolute()}", "perf.machine_rates=false",
    )  # fmt: skip
    found = ranks.run(planned.layout, masked_family.generated, planned)
    assert_same(layout, "alone", 3)
    dump = json.loads(Path("perf.json").read_text())
    assert_every_rank_as_predicted(dump, planned.layout.ranks)
    assert found[0].report["comm"]["denoising"]["collectives"]
    assert dump["work"]["denoising"]["flops"] > 0


MASKS = "takes no mask, and this model masks the padding of its texts; legal: auto, sdpa"


@pytest.mark.parametrize("words", [(), ("dry_run=true",)])
@pytest.mark.parametrize(
    ("kernel", "sentence"),
    [
        ("flex", f"'flex' {MASKS}, flash, math"),
        ("flesh", "did you mean 'flash'? (legal here: auto, sdpa, flash, math)"),
    ],
)
def test_a_kernel_that_takes_no_mask_is_refused_before_a_weight_is_read(run, monkeypatch, words, kernel, sentence):
    monkeypatch.setattr("sglang_gen.backends.native.engine.read_components", None)
    done = run("--attention-backend", kernel, *words)
    assert done.code == 2
    assert sentence in done.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("attention=flash", f"'flash' {MASKS}, math"),
        (
            "attention.backend_config={priority: [flash]}",
            "kernels that run here and take the mask of padded texts: math",
        ),
    ],
)
def test_a_kernel_of_torch_that_takes_no_mask_is_refused(run, monkeypatch, words, sentence):
    """As FlashAttention's on a GPU."""
    original = attention_kernels.inside_sdpa

    def without_mask(order):
        def attend(q, k, v, *mask):
            if mask and order == ["flash"]:
                raise RuntimeError("No available kernel")
            return original(order)(q, k, v, *mask)

        return attend

    monkeypatch.setattr(attention_kernels, "inside_sdpa", without_mask)
    done = run(words, "dry_run=true")
    assert done.code == 2
    assert sentence in done.err


@pytest.mark.whole
def test_auto_times_the_kernels_with_a_mask(run, monkeypatch):
    asked = []

    def answer(kernels, shapes, device, dtype):
        asked.append((list(kernels), shapes))
        return "math"

    monkeypatch.setattr(attention_autotune, "fastest", answer)
    completed(run("sampling.batch_size=2", "sampling.max_sequence_length=16", dtype="bfloat16"))
    ((names, shapes),) = asked
    assert names == ["sdpa", "math"]
    assert {(shape[0], shape[3], *shape[5:]) for shape in shapes} == {(4, 16 + 64, "masked")}
    assert record("outputs")["effective"]["attention"] == "math"


@pytest.mark.whole
def test_an_estimate_counts_texts_of_the_longest_length_and_their_masks(run, model):
    completed(run("dry_run=true", "sampling.max_sequence_length=16"))
    found = [
        estimate(plan_of(f"model.path={model}", "sampling.prompt=a cat", f"sampling.max_sequence_length={length}"))
        for length in (16, 32)
    ]
    assert found[0]["step"]["flops"] < found[1]["step"]["flops"]


@pytest.mark.whole
@pytest.mark.parametrize("regional", mostly_slow(["true", "false"], "false"))
def test_a_block_is_compiled_once_for_each_length_of_text(run, traced, regional):
    """Both branches in one batch have one length; a third prompt of another length is compiled too, expectedly."""
    words = ("--enable-torch-compile", f"compile.regional={regional}", "compile.warmup=false")
    completed(run("sampling.batch_size=2", folder="eager"))
    completed(run("sampling.batch_size=2", *words, folder="compiled"))
    assert_same("compiled", "eager", 2)
    assert len(traced) == 1
    completed(run("sampling.batch_size=1", *words, folder="compiled"))
    assert_same("compiled", "eager", 2)
    assert len(traced) == 1 + 2


@pytest.mark.whole
def test_a_graph_is_captured_for_each_length_and_replayed_with_other_masks(run, monkeypatch):
    monkeypatch.setattr(Repeated, "made", [], raising=False)
    monkeypatch.setattr(cuda_graphs, "Recorder", Repeated)
    monkeypatch.setattr(make, "CAPTURING", ("cuda", "cpu"))
    prompts = "sampling.prompts=[{prompt: abcd efgh},{prompt: a},{prompt: ab},{prompt: ijkl mnop}]"
    for folder, more in (("plain", ()), ("graphs", ("compile.cuda_graphs=true",))):
        completed(run("sampling.batch_size=2", *more, folder=folder, prompts=prompts))
    assert_same("graphs", "plain", 4)
    (recorder,) = Repeated.made
    assert len(recorder.shapes) == 1
