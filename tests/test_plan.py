"""The plan: numbers and sizes that cannot be, prompts, batches, device and dtype, warnings, and the dry run."""

import json
import socket
from pathlib import Path

import pytest
import torch
from cases import mostly_slow

from sglang_gen import env
from sglang_gen.config import presets
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import Composed, compose
from sglang_gen.config.schema import Device, DType
from sglang_gen.errors import UserError
from sglang_gen.families import registry
from sglang_gen.hub import resolve
from sglang_gen.launch import rank
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.plan import backend_choice, checks, make
from sglang_gen.types import Layout, Plan, Size


def composed(*words: str, model: str = "sdxl", **flags: object) -> Composed:
    return compose(Choices((f"model={model}", *words), {"sampling.prompt": "x", "sampling.seed": 7, **flags}))


def planned(*words: str, model: str = "sdxl", **flags: object) -> Plan:
    found = composed(*words, model=model, **flags)
    checks.check_request(found)
    return make.make_plan(found, resolve.read_card(env.preset_configs(model), model, weights=False))


def from_file(text: str, *words: str) -> Plan:
    Path("p.txt").write_text(text, "utf-8")
    found = compose(Choices(("model=sdxl", "sampling.prompts_file=p.txt", "sampling.seed=7", *words)))
    checks.check_request(found)
    return make.make_plan(found, resolve.read_card(env.preset_configs("sdxl"), "sdxl", weights=False))


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("sampling.num_inference_steps=0", "sampling.num_inference_steps is 0; it must be at least 1"),
        ("sampling.num_inference_steps=100001", "it must be at most 100000"),
        ("sampling.num_samples=100000000", "sampling.num_samples is 100000000; it must be at most 1000000"),
        ("sampling.batch_size=-1", "sampling.batch_size is -1; it must be at least 1"),
        ("sampling.height=0", "sampling.height is 0; it must be at least 1"),
        ("sampling.width=80000", "sampling.width is 80000; it must be at most 65536"),
        ("sampling.max_sequence_length=0", "sampling.max_sequence_length is 0"),
        ("compile.warmup_steps=0", "compile.warmup_steps is 0; it must be at least 1"),
        ("sampling.guidance_scale=inf", "sampling.guidance_scale is inf; it must be a finite number"),
        ("machine.matmul_tflops=nan", "machine.matmul_tflops is nan; it must be a finite number"),
        ("backend.diffusers_kwargs.eta=nan", "backend.diffusers_kwargs.eta is nan; it must be a finite number"),
        ("backend.diffusers_kwargs.eta=99999999999999999999999", "is an integer of more than 64 bits"),
        ("dry_run=maybe", "dry_run is 'maybe'; it must be false, true or json"),
        ("perf.tag=' '", "perf.tag is blank"),
        (
            "parallel.tp_size=4",
            "parallel.tp_size is 4 and this network has layers of 10 heads: take tp_size 1 or 2, such as "
            "parallel.ring_degree=2 parallel.tp_size=2 or ",
        ),
        ("parallel.num_gpus=0", "parallel.num_gpus is 0; a degree is at least 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(word, sentence):
    with pytest.raises(UserError) as error:
        planned(word)
    assert sentence in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_outside_its_range_is_refused(seed):
    with pytest.raises(UserError, match=r"sampling\.seed is"):
        planned(**{"sampling.seed": seed})


def test_the_last_seed_of_the_samples_stays_in_the_range():
    assert planned(**{"sampling.seed": 2**63 - 1}).batches[0][0].seed == 2**63 - 1
    with pytest.raises(UserError, match="exceed the largest seed"):
        planned("sampling.num_samples=2", **{"sampling.seed": 2**63 - 1})


@pytest.mark.parametrize(
    ("model", "word", "sentence"),
    [
        (
            "sdxl",
            "sampling.width=1023",
            "sampling.width is 1023; this model takes multiples of 8, such as 1016 or",
        ),
        ("sdxl", "sampling.height=5", "sampling.height is 5; this model takes multiples of 8, such as 8"),
        ("sd3_medium", "sampling.height=1032", "multiples of 16, such as 1024 or 1040"),
        ("flux_dev", "sampling.width=1000", "multiples of 16, such as 992 or 1008"),
    ],
)
def test_a_size_that_the_model_does_not_take_names_the_nearest(model, word, sentence):
    with pytest.raises(UserError) as error:
        planned(word, model=model)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("config", "side"),
    [
        ({"sample_size": 32, "_diffusers_version": "0.8.1"}, 512),
        ({"sample_size": 96, "_diffusers_version": "0.6.0"}, 768),
        ({"sample_size": 32, "_diffusers_version": "0.9.0"}, 256),
        ({"sample_size": 32, "_diffusers_version": "0.10.0.dev0"}, 256),
        ({"sample_size": 32, "_diffusers_version": "1.0.0"}, 256),
        ({"sample_size": 32}, 256),
        ({"sample_size": [40, 40], "_diffusers_version": "0.8.1"}, 320),
    ],
)
def test_only_a_configuration_of_before_0_9_is_an_old_one(config, side):
    """What those say of the size is wrong where it is small."""
    assert registry.by_name("sd").default_size(config, 8) == Size(side, side)


def test_sd3_is_not_asked_for_more_than_its_table_of_positions():
    assert planned("sampling.height=3072", model="sd3_medium").run.sampling.height == 3072
    with pytest.raises(UserError, match=r"sampling.height is 3088; this model supports at most 3072 pixels per side"):
        planned("sampling.height=3088", model="sd3_medium")


def test_samples_count_seeds_and_fill_batches():
    found = planned("sampling.num_samples=5", "sampling.batch_size=2")
    assert [[sample.seed for sample in batch] for batch in found.batches] == [[7, 8], [9, 10], [11]]
    assert [sample.index for batch in found.batches for sample in batch] == [0, 1, 2, 3, 4]


def test_a_batch_of_every_length_is_warmed_up():
    found = planned("sampling.num_samples=5", "sampling.batch_size=2")
    assert sorted(len(batch) for batch in rank._kinds(found, Mesh())) == [1, 2]
    second = Mesh(Layout(dp=2), 1)
    assert [len(batch) for batch in rank._kinds(found, second)] == [2]


def test_prompts_with_and_without_a_negative_prompt_are_not_mixed():
    found = from_file('a\n{"prompt": "b", "negative_prompt": "n"}\nc\n', "sampling.batch_size=4")
    assert [[sample.prompt for sample in batch] for batch in found.batches] == [["a"], ["b"], ["c"]]


def test_a_prompts_file_is_read_verbatim_and_pinned():
    found = from_file("\ufeff  a\u2028 b \r\n\n" + '{"prompt": "{c}", "seed": 3}', "sampling.num_samples=2")
    assert [(sample.prompt, sample.seed) for batch in found.batches for sample in batch] == [
        ("  a\u2028 b ", 7), ("  a\u2028 b ", 8), ("{c}", 3), ("{c}", 4),
    ]  # fmt: skip
    assert found.run.sampling.prompts_file is None
    assert len(found.run.sampling.prompts) == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("\n \n", "p.txt holds no prompt"),
        ('a\n{"prompt": ', "p.txt, line 2 is not valid JSON"),
        ('{"prompt": "a", "prompt": "b"}', "line 1 gives the key 'prompt' twice"),
        ('{"prompt": "\\ud800"}', "line 1 prompt holds characters that are not Unicode text"),
        ('{"promt": "a"}', "A prompt has the unknown key 'promt'; did you mean 'prompt'?"),
        ('a\n{"prompt": 1}', "p.txt, line 2: A prompt's 'prompt' is 1; it must be text"),
        ('{"prompt": "a", "seed": true}', "A prompt's 'seed' is True; it must be an integer"),
        ('{"prompt": "a", "seed": -1}', "A prompt's seed is -1; it must lie between 0 and"),
        ('{"seed": 1}', "A prompt entry has no 'prompt'"),
        ('{"prompt": "a", "seed": 9223372036854775807}\n', "exceed the largest seed"),
    ],
)
def test_a_wrong_prompts_file_is_one_sentence(text, sentence):
    with pytest.raises(UserError) as error:
        from_file(text, "sampling.num_samples=2")
    assert sentence in str(error.value)


def test_offloading_chooses_a_backend_where_it_has_an_effect_alone():
    run = composed("offload.dit_layerwise_offload=true").run
    card = resolve.read_card(env.preset_configs("sdxl"), "sdxl", weights=False)
    reason = "it does not stream a network block by block yet"
    assert backend_choice.choose(run, card, "cuda") == ("diffusers", reason)
    assert backend_choice.choose(composed("offload=model").run, card, "cuda") == ("sglang", None)
    assert backend_choice.choose(run, card, "cpu") == ("sglang", None)
    found = planned("offload.vae_cpu_offload=true", "offload.dit_cpu_offload=true", "device=cpu")
    assert "dit_cpu_offload, vae_cpu_offload: no effect, the run computes on the CPU" in found.warnings
    assert (found.requested["offload"], found.effective["offload"]) == (["dit_cpu_offload", "vae_cpu_offload"], [])


def test_a_cache_is_requested_by_its_method_or_by_its_settings():
    for words, name in (
        (("cache=dbcache",), "dbcache"),
        (("cache.cache_dit_config={Fn_compute_blocks: 1}",), "dbcache"),
        (("cache=deepcache",), "deepcache"),
        ((), "none"),
    ):
        assert planned(*words).requested["cache"] == name


@pytest.mark.whole
def test_a_prompts_file_that_cannot_be_read(sglang):
    Path("bytes.txt").write_bytes(b"\xff")
    for name, sentence in (
        ("nowhere.txt", "No such file"),
        (".", "Is a directory"),
        ("bytes.txt", "is not UTF-8 text"),
    ):
        done = sglang("generate", "model=sdxl", f"sampling.prompts_file={name}")
        assert (done.code, sentence in done.err) == (2, True)
    Path("p.txt").write_text("a")
    both = sglang("generate", "model=sdxl", "--prompt", "x", "sampling.prompts_file=p.txt")
    assert (both.code, "exclude each other; give one" in both.err) == (2, True)


def test_more_pictures_than_memory_holds_are_refused():
    with pytest.raises(UserError, match="2 prompts x 1000000 samples are more than 1000000 images"):
        from_file("a\nb\n", "sampling.num_samples=1000000")


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float32")])
def test_dtype_auto_follows_the_gpus_capability(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert make.choose_dtype(DType.auto, "cuda", "sglang") == (dtype, {})


def test_device_auto_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [make.choose_device(wanted) for wanted in Device] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert make.choose_device(Device.auto) == "cpu"
    with pytest.raises(UserError, match="device=cuda: torch sees no CUDA device; run with device=cpu"):
        make.choose_device(Device.cuda)


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (("compile.warmup_steps=3",), "--warmup-steps has no effect without --warmup"),
        (("lora.scale=0.5", "lora.adapters=[{path: a}]"), "--lora-scale has no effect without lora.path"),
        (("sampling.latents=a.safetensors", "sampling.num_samples=2"),
         "sampling.latents: all samples start from the same noise, so samples of one prompt differ only if the "
         "scheduler draws noise in its steps"),
        (("perf.tag=a",), "perf.tag has no effect without --perf-dump-path"),
        (("machine=h200",), "machine.name has no effect without --perf-dump-path"),
        (("model.path=.", "model.revision=main"), "--revision has no effect: the model is a local folder or file"),
        (("machine=h200", "perf.machine_rates=false", "output.perf_dump_path=p.json"),
         "perf.machine_rates has no effect: the rates are those of machine=h200"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_a_warning(words, warning):
    assert list(planned(*words).warnings) == [warning]


def test_nothing_is_warned_of_without_a_reason():
    assert (
        planned(
            "compile.warmup=true", "compile.warmup_steps=3", "output.perf_dump_path=p.json", "machine=h200"
        ).warnings
        == ()
    )


@pytest.mark.whole
def test_a_record_of_other_versions_is_a_warning(sglang):
    record = {
        "schema_version": 1,
        "run": {"model": "sdxl", "prompt": "x"},
        "versions": {**env.versions(), "torch": "0.1"},
    }
    Path("record.json").write_text(json.dumps(record))
    done = sglang("generate", "--config", "record.json", "dry_run=true")
    assert done.code == 0, done.err
    assert f"other versions, so the result may differ: torch 0.1 (here {env.versions()['torch']})" in done.err


PRESETS = [preset.name for preset in presets.load() if preset.path]


@pytest.mark.whole
@pytest.mark.parametrize("model", mostly_slow(PRESETS, "sdxl"))
def test_a_dry_run_of_a_preset_needs_neither_hub_nor_weights(sglang, monkeypatch, model):
    def unreachable(*_args, **_kwargs):
        raise AssertionError("a dry run asks nobody")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    table, content = (
        sglang("generate", f"model={model}", "dry_run=true"),
        sglang("generate", f"model={model}", "dry_run=json"),
    )
    if model.startswith("wan") and table.code == 2:
        assert content.code == 2
        assert "not available in this version" in table.err
        return
    assert table.code == 0, table.err
    rows = dict(line.split("  ", 1) for line in table.out.splitlines())
    assert rows["model"].strip().count("/") == 1
    assert "(from preset)" in rows["sampling.prompt"]
    found = json.loads(content.out)
    assert found["run"]["model"]["preset"] == model
    assert found["layout"]["ranks"] == 1
    assert set(found["requested"]) <= set(found["effective"])
    assert not Path("outputs").exists()


@pytest.mark.whole
def test_the_table_of_a_dry_run_keeps_a_row_a_line(sglang):
    done = sglang("generate", "model=sdxl", "dry_run=true", "--prompt", "a\nb", "--seed", "3", "compile.warmup_steps=2")
    rows = done.out.splitlines()
    assert next(row for row in rows if row.startswith("sampling.prompt ")).endswith("a\\nb  (from flag)")
    assert any(row.startswith("steps, guidance, seed") and row.endswith("50, 7.5, 3") for row in rows)
    assert any(row.startswith("warning") for row in rows)
