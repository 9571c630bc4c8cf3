"""Whole runs of the native engine on a fake GPU: no tensor on the wrong device, and no wait inside of the loop.

The fake GPU (tests/lib/fake_cuda) has CPU values, so a run computes the images that it computes on the CPU.
"""

import json
import shutil
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import tiny
from cases import mostly_slow
from fake_cuda import FakeCuda, fake_cuda, guard
from native import error, record, tensors, with_scheduler
from PIL import Image
from repeated import Repeated
from whole import plan_of

from sglang_gen.backends.native import engine
from sglang_gen.engine import cuda_graphs
from sglang_gen.families import registry
from sglang_gen.models import flux
from sglang_gen.parallel import collectives
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.perf.clock import Clock, timer
from sglang_gen.perf.flops import CallLog
from sglang_gen.perf.memory import Memory

pytestmark = [
    pytest.mark.whole,  # compiles the guard
    pytest.mark.skipif(guard.compiler() is None, reason="the device guard of the fake GPU needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:Should have ta>=t0:UserWarning"),  # torchsde, of a bound in single precision
]

# Where a run may wait for the GPU: (stage, file). None of it lies in the loop.
MAY_WAIT = {
    ("load", "sglang_gen/weights/load.py"),  # weights
    ("load", "transformers/modeling_utils.py"),
    ("text_encoding", "sglang_gen/families/text_encoding.py"),  # token ids
    ("latents", "sglang_gen/backends/native/engine.py"),  # noise
    ("latents", "sglang_gen/families/img2img.py"),  # the input image, and the noise of its posterior
    ("latents", "sglang_gen/models/vae.py"),
    ("latents", "diffusers/schedulers/scheduling_euler_discrete.py"),  # the levels of noise to add to it
    ("latents", "diffusers/schedulers/scheduling_pndm.py"),
    ("latents", "sglang_gen/engine/flow_match_euler.py"),
    ("denoising", "sglang_gen/models/unet.py"),  # timesteps, once for all steps
    ("denoising", "sglang_gen/models/sd3.py"),
    ("denoising", "sglang_gen/models/flux.py"),
    ("denoising", "sglang_gen/families/sdxl/pipeline.py"),  # sizes
    ("decoding", "sglang_gen/backends/finite.py"),  # the check of the latents
    ("decoding", "sglang_gen/backends/native/engine.py"),  # the images
    ("saving", "sglang_gen/files.py"),  # the latents, with output.latents
}
BATCHED, IN_TURN = "sampling.guidance_batching=batched", "sampling.guidance_batching=sequential"
TWO = ("--num-samples", "2", "sampling.batch_size=2")


@pytest.fixture(scope="module")
def folders(pipelines, tmp_path_factory):
    """The tiny pipelines, and one of Stable Diffusion 2.1."""
    folder = tmp_path_factory.mktemp("sd21") / "tiny-sd21"
    shutil.copytree(pipelines["sd15"], folder)
    config = dict(registry.examples(registry.by_name("sd")).variants["sd21"]) | {"cross_attention_dim": 32}
    tiny.fill(diffusers.UNet2DConditionModel(**config), 15).save_pretrained(folder / "unet")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    return pipelines | {"sd21": folder}


@pytest.fixture
def run(folders, sglang):
    """Generate on the fake GPU, or on the CPU; what the GPU noted."""

    def generate(
        name, *words: object, steps: int = 3, dtype: str = "float32", device: str = "cuda", backend: str = "sglang"
    ) -> FakeCuda:
        argv = ("generate", "--model-path", folders.get(name, name), "--prompt", "a cat", "--seed", 7,
                "--height", 32, "--width", 48, "--num-inference-steps", steps, "--dtype", dtype, "--backend", backend,
                "output.latents=true", f"device={device}", "--output-path", device, *words)  # fmt: skip
        if device == "cpu":
            gpu, done = FakeCuda(), sglang(*argv)
        else:
            with fake_cuda() as gpu:
                done = sglang(*argv)
        assert done.code == 0, done.err
        return gpu

    return generate


def assert_placed(gpu: FakeCuda) -> None:
    """The loop ran on the GPU, every tensor was where it belongs, and only what may wait waited."""
    assert gpu.operators["loop"] > 100
    assert gpu.of("device") == []
    assert gpu.of("wait", "loop") == []
    assert gpu.places("wait") <= MAY_WAIT, gpu.of("wait")


CASES = [
    ("sd15", (*TWO, BATCHED), "float16"),
    ("sd15", (IN_TURN,), "bfloat16"),
    ("sd21", (BATCHED,), "float16"),
    ("sd21", (*TWO, IN_TURN), "bfloat16"),
    ("sdxl", (*TWO, BATCHED), "float16"),
    ("sdxl", (IN_TURN, "--diffusers-kwargs", '{"guidance_rescale": 0.7}'), "bfloat16"),
    ("sdxl", ("sampling.guidance_interval=[0.3,0.7]", "--negative-prompt", "a dog"), "float32"),
    ("sd3", (*TWO, BATCHED), "bfloat16"),
    ("sd3", (IN_TURN,), "float16"),
    ("flux", TWO, "bfloat16"),
    ("flux", ("--negative-prompt", "a dog", "--diffusers-kwargs", '{"true_cfg_scale": 3.0}', IN_TURN), "float16"),
    ("flux", ("--negative-prompt", "a dog", "--diffusers-kwargs", '{"true_cfg_scale": 3.0}', BATCHED), "bfloat16"),
]


@pytest.mark.parametrize(("name", "words", "dtype"), mostly_slow(CASES, *CASES[::3]))
def test_every_family_computes_on_the_gpu_and_waits_for_it_outside_of_the_loop_only(run, name, words, dtype):
    gpu = run(name, "attention=sdpa", *words, dtype=dtype)
    assert_placed(gpu)
    assert gpu.of("copy", "loop") == []


@pytest.mark.parametrize("name", mostly_slow(("sd15", "sdxl", "sd3", "flux"), "sdxl"))
def test_the_diffusers_backend_computes_on_the_gpu(run, name):
    """How often diffusers' own loop waits is not ours to say."""
    gpu = run(name, backend="diffusers", dtype="bfloat16")
    assert gpu.operators["denoising"] > 100
    assert gpu.of("device") == []


@pytest.mark.parametrize("name", mostly_slow(("sd15", "sd21", "sdxl", "sd3", "flux"), "sd15", "flux"))
def test_the_fake_gpu_makes_the_latents_and_the_image_of_the_cpu(run, name):
    for device in ("cuda", "cpu"):
        run(name, *TWO, "attention=math", "--guidance-scale", "3", device=device)
    for number in range(2):
        ours, theirs = tensors("cuda", number), tensors("cpu", number)
        assert np.array_equal(ours["noise"], theirs["noise"])
        assert error(ours["latents"], theirs["latents"]) <= 1e-5
    assert record("cuda")["effective"]["device"] == "cuda"


@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_slow([("sd15", "bfloat16"), ("sd21", "float16"), ("sdxl", "float16"), ("sd3", "bfloat16"),
                 ("flux", "bfloat16")], ("sdxl", "float16")),
)  # fmt: skip
def test_an_input_image_is_encoded_on_the_gpu(run, name, dtype):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("start.png")
    gpu = run(name, "--image-path", "start.png", "--diffusers-kwargs", '{"strength": 0.6}', "attention=sdpa",
              steps=5, dtype=dtype)  # fmt: skip
    assert_placed(gpu)
    assert gpu.operators["latents"] > 50


@pytest.mark.parametrize(
    "words",
    mostly_slow(
        (
            "attention=auto",
            "perf.blocks=true",
            "--warmup",
            "perf.repeat=2",
            "attention=cudnn",
            "perf.repeat=2 --warmup",
        ),
        "attention=auto",
    ),
)
def test_what_measures_a_run_does_not_wait_inside_of_the_loop(run, words):
    gpu = run("sd15", *words.split(), "--perf-dump-path", "perf.json", "machine=h100", dtype="bfloat16")
    assert gpu.of("device") == []
    assert gpu.of("wait", "loop") == []


@pytest.mark.parametrize("name", mostly_slow(("sdxl", "sd3", "flux", "sd15"), "flux"))
def test_an_evaluation_that_is_captured_copies_nothing_from_the_host(run, name):
    """A copy from pageable memory ends the capture of a CUDA graph."""
    made: list[Repeated] = []
    with patch.object(cuda_graphs, "Recorder", Repeated), patch.object(Repeated, "made", made, create=True):
        gpu = run(name, "compile.cuda_graphs=true", "attention=sdpa", dtype="bfloat16")
    assert len(made) == 1
    assert made[0].replays >= 3
    assert_placed(gpu)
    assert gpu.of("copy", "loop") == []


BETAS_OF_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
DIFFUSION = [(name, {}) for name in sorted(kind.__name__ for kind in diffusers.PNDMScheduler().compatibles)] + [
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"thresholding": True}),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "clip_sample": True}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
]
FLOW = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_karras_sigmas": True}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    *((name, BETAS_OF_FLOW) for name in ("UniPCMultistepScheduler", "SASolverScheduler", "DEISMultistepScheduler")),
]
SLOW_BUT = [("DPMSolverSDEScheduler", {}), ("EulerAncestralDiscreteScheduler", {}), ("UniPCMultistepScheduler", {})]


@pytest.mark.parametrize(("scheduler", "settings"), mostly_slow(DIFFUSION, *SLOW_BUT))
def test_no_scheduler_of_diffusion_waits_for_the_gpu(pipelines, run, scheduler, settings):
    common = {} if scheduler == "EDMEulerScheduler" else {"steps_offset": 1}
    gpu = run(with_scheduler(pipelines["sd15"], scheduler, **common, **settings), "attention=sdpa", *TWO, steps=6)
    assert_placed(gpu)


@pytest.mark.parametrize("scheduler", mostly_slow(("DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler"),
                                                   "EulerAncestralDiscreteScheduler"))  # fmt: skip
def test_noise_that_is_copied_without_a_wait_is_the_noise_of_the_cpu(pipelines, run, scheduler):
    model = with_scheduler(pipelines["sd15"], scheduler, steps_offset=1)
    for device in ("cuda", "cpu"):
        gpu = run(model, *TWO, "attention=math", "--guidance-scale", "3", steps=4, device=device)
        assert len(gpu.of("copy", "loop")) == (1 if device == "cuda" else 0)
    for number in range(2):
        assert error(tensors("cuda", number)["latents"], tensors("cpu", number)["latents"]) <= 1e-5


@pytest.mark.parametrize(("scheduler", "settings"), mostly_slow(FLOW, FLOW[0]))
def test_no_scheduler_of_a_flow_waits_for_the_gpu(pipelines, run, scheduler, settings):
    gpu = run(with_scheduler(pipelines["sd3"], scheduler, **settings), "attention=sdpa", *TWO, steps=6)
    assert_placed(gpu)


def test_text_encoders_that_make_room_for_the_network_come_back_for_the_next_batch(folders, sglang):
    with fake_cuda(free=0) as gpu:
        done = sglang("generate", "--model-path", folders["sd3"], "--prompt", "a cat", "--height", 32, "--width", 32,
                      "--num-inference-steps", 2, "--num-samples", 2, "--backend", "sglang", "device=cuda",
                      "dtype=bfloat16", "attention=sdpa", "sampling.batch_size=1")  # fmt: skip
    assert done.code == 0, done.err
    assert len(record("outputs")["effective"]["released"]) == 3
    assert gpu.of("device") == []
    assert gpu.of("wait", "loop") == []


OFFLOADED = [
    (name, f"offload{words}")
    for name in ("sd15", "sdxl", "sd3", "flux")
    for words in ("=model", ".dit_cpu_offload=true", ".vae_cpu_offload=true")
]


@pytest.mark.parametrize(("name", "words"), mostly_slow(OFFLOADED, ("sdxl", "offload=model")))
def test_offloaded_components_are_on_the_gpu_while_they_compute(run, name, words):
    gpu = run(name, words, "attention=sdpa", "--num-samples", "2", "sampling.batch_size=1", dtype="bfloat16")
    assert record("cuda")["effective"]["offload"] != []
    assert gpu.of("device") == []
    assert gpu.of("copy", "loop") == []
    assert gpu.of("wait", "loop") == []


RANKS = [
    ("sdxl", "parallel.tp_size=2", 1),
    ("sdxl", "parallel.ring_degree=2", 0),
    ("sdxl", "parallel.ulysses_degree=2", 1),
    ("sd3", "parallel.tp_size=2", 1),
    ("sd3", "parallel.ring_degree=2", 0),
    ("sd3", "parallel.ulysses_degree=2", 0),
    ("flux", "parallel.tp_size=2", 0),
    ("flux", "parallel.ring_degree=2", 1),
    ("flux", "parallel.ulysses_degree=2", 0),
    ("sd15", "parallel.enable_cfg_parallel=true", 1),
]


@pytest.mark.parametrize(("name", "words", "rank"), mostly_slow(RANKS, RANKS[1], RANKS[3], RANKS[8]))
def test_a_rank_of_every_axis_computes_on_its_gpu(folders, monkeypatch, name, words, rank):
    """One rank alone, to which every other rank sends what it sends itself."""
    alone(monkeypatch)
    given = ("device=cuda", "dtype=bfloat16", "attention=math", "sampling.prompt=a", words)
    scale = () if name == "flux" else ("sampling.guidance_scale=3",)
    with fake_cuda(count=2) as gpu:
        plan = plan_of(f"model.path={folders[name]}", *given, *scale)
        assert plan.layout.ranks == 2
        gpu.stage = "load"
        loaded = engine.load(plan, Mesh(plan.layout, rank), CallLog())
        loaded.sample(plan.batches[0], 2, Clock(timer("cuda"), Memory("cuda")))
    assert_placed(gpu)


def alone(monkeypatch) -> None:
    """Stand-ins for what a rank asks of the others."""

    class Done:
        def wait(self) -> None: ...

    def all_gather(out, x, group, async_op):
        out.copy_(x.repeat(len(out) // len(x)))
        return Done()

    def all_to_all(out, x, received, sent, group, async_op):
        out.zero_()
        return Done()

    monkeypatch.setattr(collectives, "_group", lambda axis: None)
    monkeypatch.setattr(collectives.dist, "all_reduce", lambda x, group: x)
    monkeypatch.setattr(collectives.dist, "all_gather_into_tensor", all_gather)
    monkeypatch.setattr(collectives.dist, "all_to_all_single", all_to_all)
    monkeypatch.setattr(Mesh, "broadcast", lambda self, item: item)
    monkeypatch.setattr(Mesh, "gather_all", lambda self, item: [item])


# Bugs of the kinds that these tests look for


def test_a_table_that_is_left_on_the_cpu_is_found(run, monkeypatch):
    table = flux.rotary_table
    monkeypatch.setattr(flux, "rotary_table", lambda *args: tuple(each.cpu() for each in table(*args)))
    with pytest.raises(AssertionError, match=r"a tensor .* on cpu meets one on cuda at sglang_gen/models/flux.py"):
        assert_placed(run("flux", "attention=sdpa"))


def test_a_step_that_reads_a_number_of_the_gpu_is_found(run, monkeypatch):
    inner = engine.denoise

    def reading(predict, *rest):
        def read(latents, index):
            prediction = predict(latents, index)
            assert prediction.abs().max().item() > 0
            return prediction

        return inner(read, *rest)

    monkeypatch.setattr(engine, "denoise", reading)
    with pytest.raises(AssertionError, match=r"_local_scalar_dense\.default reads values of the GPU"):
        assert_placed(run("sd3", "attention=sdpa"))
