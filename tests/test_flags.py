"""The table of flags, frozen: the command's page, in its order, and five named extensions."""

from sglang_gen.config.flags import BY_KEY, BY_PATH, FILE_OR_INLINE, FLAGS
from sglang_gen.config.schema import Run, get, leaves, plain

PAGE = {
    "model-path": "model.path",
    "prompt": "sampling.prompt",
    "config": None,
    "model-id": "model.id",
    "backend": "backend.name",
    "trust-remote-code": "model.trust_remote_code",
    "revision": "model.revision",
    "negative-prompt": "sampling.negative_prompt",
    "num-inference-steps": "sampling.num_inference_steps",
    "guidance-scale": "sampling.guidance_scale",
    "height": "sampling.height",
    "width": "sampling.width",
    "seed": "sampling.seed",
    "num-samples": "sampling.num_samples",
    "num-gpus": "parallel.num_gpus",
    "tp-size": "parallel.tp_size",
    "sp-degree": "parallel.sp_degree",
    "ulysses-degree": "parallel.ulysses_degree",
    "ring-degree": "parallel.ring_degree",
    "dp-size": "parallel.dp_size",
    "dp-degree": "parallel.dp_degree",
    "enable-cfg-parallel": "parallel.enable_cfg_parallel",
    "attention-backend": "attention.backend",
    "attention-backend-config": "attention.backend_config",
    "cache-dit-config": "cache.cache_dit_config",
    "dit-cpu-offload": "offload.dit_cpu_offload",
    "dit-layerwise-offload": "offload.dit_layerwise_offload",
    "text-encoder-cpu-offload": "offload.text_encoder_cpu_offload",
    "image-encoder-cpu-offload": "offload.image_encoder_cpu_offload",
    "vae-cpu-offload": "offload.vae_cpu_offload",
    "lora-path": "lora.path",
    "lora-nickname": "lora.nickname",
    "lora-scale": "lora.scale",
    "lora-target-modules": "lora.target_modules",
    "transformer-weights-path": "quant.transformer_weights_path",
    "nunchaku-config": "quant.nunchaku_config",
    "enable-torch-compile": "compile.enable_torch_compile",
    "warmup": "compile.warmup",
    "warmup-steps": "compile.warmup_steps",
    "disable-autocast": "compile.disable_autocast",
    "output-path": "output.path",
    "perf-dump-path": "output.perf_dump_path",
    "diffusers-kwargs": "backend.diffusers_kwargs",
    "component-paths": "model.component_paths",
    "pipeline-class-name": "model.pipeline_class_name",
}
NAMED = {
    "image-path": "sampling.image_path",
    "num-frames": "sampling.num_frames",
    "dtype": "dtype",
    "fps": "output.fps",
    "log-level": "log_level",
}
DEFAULTS = {
    "backend": "auto",
    "trust-remote-code": False,
    "num-inference-steps": 50,
    "guidance-scale": 7.5,
    "num-samples": 1,
    "num-gpus": 1,
    "dp-size": 1,
    "dp-degree": 1,
    "enable-cfg-parallel": False,
    "lora-nickname": "default",
    "lora-scale": 1.0,
    "enable-torch-compile": False,
    "warmup": False,
    "warmup-steps": 1,
    "output-path": "outputs/",
}


def test_the_documented_flags_are_the_pages_in_its_order():
    documented = {flag.name: flag.path for flag in FLAGS if flag.documented}
    assert len(PAGE) == 45
    assert list(documented.items()) == list(PAGE.items())


def test_the_other_flags_are_the_five_named_ones():
    assert {flag.name: flag.path for flag in FLAGS if not flag.documented} == NAMED


def test_names_and_paths_are_unique_and_every_path_is_in_the_schema():
    assert len(BY_KEY) == len(FLAGS) == 50
    assert len(BY_PATH) == 49
    assert set(BY_PATH) <= set(leaves())
    assert set(FILE_OR_INLINE) <= set(BY_PATH)


def test_the_defaults_of_the_page_are_those_of_the_schema():
    run = Run()
    assert {name: plain(get(run, PAGE[name])) for name in DEFAULTS} == DEFAULTS
    others = set(PAGE) - set(DEFAULTS) - {"config", "attention-backend"}
    empty = [plain(get(run, PAGE[name])) for name in others]
    assert all(value in (None, False, {}, []) for value in empty)


def test_help_lists_every_flag_in_its_section(sglang):
    done = sglang("generate", "--help")
    assert (done.code, done.err) == (0, "")
    section, found = "", {}
    for line in done.out.splitlines():
        if line and not line.startswith(" ") and line.endswith(":"):
            section = line.removesuffix(":")
        elif line.startswith("  --"):
            found[line.split()[0].rstrip(",")] = section
    for flag in FLAGS:
        assert found[flag.option] == flag.section
        assert flag.help.split()[0] in done.out
    sections = list(dict.fromkeys(flag.section for flag in FLAGS))
    assert [name for name in dict.fromkeys(found.values()) if name in sections] == sections


def test_help_shows_defaults_switches_groups_and_keys_without_a_flag(sglang):
    lines = sglang("generate", "--help").out.splitlines()
    text = " ".join(" ".join(lines).split())
    assert "--num-inference-steps N number of denoising steps (default: 50, unless the preset sets it)" in text
    assert "--warmup, --no-warmup" in text
    assert "parallel= cfg2, cfg2_sp2, cfg2_sp2_tp2" in text
    assert "sampling.batch_size" in text
    assert "--multirun" in text
    assert max(map(len, lines)) <= 120


def test_models_lists_every_preset_with_its_hub_id(sglang):
    done = sglang("models")
    assert done.code == 0
    names = [line.split()[0] for line in done.out.splitlines()]
    assert len(names) >= 13
    assert {"landscape", "sdxl", "custom"} <= set(names)
    assert "stabilityai/stable-diffusion-xl-base-1.0" in done.out
