"""Every example of the command's page, word for word except for the model's path, which is a tiny pipeline here."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from sglang_gen.launch import launcher

BASIC = '--prompt "A serene landscape with mountains and a lake at sunset"'
HIGH_QUALITY = """--prompt "A futuristic city with flying cars" --negative-prompt "blurry, low quality, distorted"
  --num-inference-steps 100 --guidance-scale 9.0 --height 1024 --width 1024 --seed 42"""
MULTI_GPU = '--prompt "A beautiful forest scene" --num-gpus 4 --sp-degree 2 --tp-size 2'
BATCH = '--prompt "Abstract art with vibrant colors" --num-samples 4 --seed 42'
LORA = '--prompt "Anime style character portrait" --lora-path path/to/anime-lora --lora-scale 0.8'
OFFLOAD = """--prompt "A detailed photograph of nature" --dit-cpu-offload --vae-cpu-offload
  --text-encoder-cpu-offload"""
BENCHMARK = '--prompt "Test image" --perf-dump-path performance_metrics.json --warmup --warmup-steps 3'


@pytest.fixture
def example(pipelines, sglang):
    """Run one example with the tiny SDXL in place of the model's path."""

    def run(words: str):
        return sglang("generate", "--model-path", pipelines["sdxl"], *shlex.split(words))

    return run


def test_basic_image_generation_logs_the_lines_of_the_page(example):
    done = example(BASIC)
    assert done.code == 0, done.err
    told = ("INFO: Seed: ", "INFO: Backend: ")  # a drawn seed, and why another backend was taken
    lines = [line for line in done.lines if not line.startswith(told)]
    assert lines[0].startswith("INFO: Loading model: ")
    assert lines[1] == "INFO: Model loaded successfully"
    assert lines[2] == 'INFO: Generating with prompt: "A serene landscape with mountains and a lake at sunset"'
    assert "INFO: Progress: 100% [50/50 steps]" in lines
    assert lines[-2] == "INFO: Generated image saved to: outputs/generated_image_0.png"
    assert lines[-1].startswith("INFO: Total generation time: ")
    assert lines[-1].endswith("s")
    record = json.loads(Path("outputs/generated_image_0.json").read_text())
    sampling = record["run"]["sampling"]
    assert (sampling["num_inference_steps"], sampling["guidance_scale"]) == (50, 7.5)


def test_high_quality_generation_with_custom_settings(example):
    done = example(HIGH_QUALITY.replace("1024", "64"))  # the tiny pipeline's own size is 32
    assert done.code == 0, done.err
    assert "INFO: Progress: 100% [100/100 steps]" in done.lines


def test_batch_generation_numbers_pictures_and_seeds(example):
    done = example(f"{BATCH} --num-inference-steps 2")
    assert done.code == 0, done.err
    seeds = [json.loads(path.read_text())["sample"]["seed"] for path in sorted(Path("outputs").glob("*.json"))]
    assert seeds == [42, 43, 44, 45]
    assert len(list(Path("outputs").glob("generated_image_*.png"))) == 4


@pytest.mark.whole
def test_configuration_file(pipelines, sglang):
    content = {
        "model_path": str(pipelines["sdxl"]),
        "prompt": "A majestic dragon flying over mountains",
        "negative_prompt": "blurry, low quality",
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "height": 32,  # 1024 on the page
        "width": 32,
        "seed": 12345,
        "num_samples": 2,
    }
    Path("generation_config.json").write_text(json.dumps(content))
    done = sglang("generate", "--config", "generation_config.json")
    assert done.code == 0, done.err
    records = [json.loads(path.read_text()) for path in sorted(Path("outputs").glob("*.json"))]
    assert [record["sample"]["seed"] for record in records] == [12345, 12346]
    assert records[0]["sample"]["negative_prompt"] == "blurry, low quality"
    assert records[0]["sources"]["sampling.prompt"] == "file"


def test_performance_benchmarking_writes_the_dump(example):
    done = example(BENCHMARK)
    assert done.code == 0, done.err
    dump = json.loads(Path("performance_metrics.json").read_text())
    assert dump["warmup"]["steps"] == 3
    assert len(dump["denoise_steps_ms"]) == 50
    assert [stage["name"] for stage in dump["steps"]] == [
        "load", "text_encoding", "latents", "denoising", "decoding", "saving",
    ]  # fmt: skip


def test_using_lora_adapters(pipelines, example):
    weights = {}
    unet = UNet2DConditionModel.from_pretrained(pipelines["sdxl"], subfolder="unet")
    for name, module in unet.named_modules():
        if name.endswith(("attn1.to_q", "attn2.to_k")):
            weights[f"{name}.lora_A.weight"] = torch.ones(2, module.in_features)
            weights[f"{name}.lora_B.weight"] = torch.ones(module.out_features, 2)
    StableDiffusionXLPipeline.save_lora_weights("path/to/anime-lora", unet_lora_layers=weights)
    done = example(f"{LORA} --num-inference-steps 2")
    assert done.code == 0, done.err
    (adapter,) = json.loads(Path("outputs/generated_image_0.json").read_text())["effective"]["lora"]
    assert (adapter["path"], adapter["scale"], adapter["nickname"]) == ("path/to/anime-lora", 0.8, "default")
    assert adapter["modules"] == len(weights) // 2


def test_cpu_offloading_for_large_models(example):
    done = example(f"{OFFLOAD} --num-inference-steps 2")
    assert done.code == 0, done.err
    record = json.loads(Path("outputs/generated_image_0.json").read_text())
    assert record["requested"]["offload"] == ["dit_cpu_offload", "text_encoder_cpu_offload", "vae_cpu_offload"]


@pytest.mark.slow
def test_multi_gpu_inference_runs_natively_on_four_ranks(example, pool, monkeypatch):
    monkeypatch.setattr(launcher, "open_ranks", pool.open)
    done = example(f"{MULTI_GPU} --num-inference-steps 2")
    assert done.code == 0, done.err
    record = json.loads(Path("outputs/generated_image_0.json").read_text())
    assert record["effective"]["backend"] == "sglang"
    assert record["effective"]["parallel"] == {"dp": 1, "cfg": 1, "ring": 1, "ulysses": 2, "tp": 2}
    assert not any(line.startswith("INFO: Backend: ") for line in done.lines)
