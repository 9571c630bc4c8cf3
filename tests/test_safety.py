"""Safety checkers: what they blank on diffusers, they blank on the native engine; and where there is none to run."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from native import COMMON, edited, record
from PIL import Image
from tiny import fill

NAMES = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}
LINES = '{"prompt": "a cat"}\n{"prompt": "a red fox in the snow at night"}\n'


def checked(folder: Path, threshold: float) -> Path:
    """The pipeline with a tiny checker that flags what is nearer than this to its first concept."""
    model = edited(folder, f"model{threshold}", "model_index.json", **NAMES)
    config = transformers.CLIPConfig(
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 16, "patch_size": 4},
        projection_dim=8,
    )  # fmt: skip
    checker = fill(StableDiffusionSafetyChecker(config), 5)
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        torch.nn.init.constant_(weights, 2.0)  # no cosine is above it
    checker.concept_embeds_weights.data[0] = threshold
    checker.save_pretrained(model / "safety_checker")
    size = {"height": 16, "width": 16}
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(
        model / "feature_extractor"
    )
    return model


def picture(folder: str, number: int) -> np.ndarray:
    return np.asarray(Image.open(f"{folder}/generated_image_{number}.png"))


def scores(folder: Path) -> list[float]:
    """How near the pictures of a run come to the first concept."""
    checker = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker")
    extractor = transformers.CLIPImageProcessor.from_pretrained(folder / "feature_extractor")
    pictures = [Image.open(f"outputs/generated_image_{number}.png") for number in (0, 1)]
    with torch.no_grad():
        pooled = checker.vision_model(extractor(pictures, return_tensors="pt").pixel_values).pooler_output
        return torch.cosine_similarity(checker.visual_projection(pooled), checker.concept_embeds[:1]).tolist()


@pytest.fixture
def run(sglang):
    def generate(model: Path, folder: str = "outputs", *words: object):
        Path("prompts.jsonl").write_text(LINES)
        return sglang("generate", "--model-path", model, "sampling.prompts_file=prompts.jsonl", *COMMON,
                      "sampling.batch_size=2", "--height", 32, "--width", 48, "--num-inference-steps", 2,
                      "--dtype", "float32", "--output-path", folder, *words)  # fmt: skip

    return generate


@pytest.mark.whole
def test_both_backends_blank_the_same_picture_of_a_batch_and_say_so(pipelines, run):
    clear = checked(pipelines["sd15"], 2.0)
    assert run(clear).code == 0
    assert record("outputs")["effective"]["backend"] == "sglang"
    assert record("outputs")["effective"]["components"]["safety_checker"] == "StableDiffusionSafetyChecker"
    plain = [picture("outputs", number) for number in (0, 1)]
    assert all(each.any() for each in plain)
    near = scores(clear)
    model, flagged = checked(pipelines["sd15"], sum(near) / 2), int(near[1] > near[0])
    for backend in ("sglang", "diffusers"):
        done = run(model, backend, "--backend", backend)
        assert done.code == 0, done.err
        assert f"WARNING: The model's safety checker blanked sample {flagged} (seed 7)" in done.lines
        assert not picture(backend, flagged).any()
        assert np.array_equal(picture(backend, 1 - flagged), plain[1 - flagged])


def test_a_checker_without_its_feature_extractor_is_left_to_diffusers(pipelines, run):
    model = edited(pipelines["sd15"], "model", "model_index.json", safety_checker=NAMES["safety_checker"])
    (model / "safety_checker").mkdir()
    done = run(model, "outputs", "--backend", "sglang")
    assert (done.code, "this model has no feature_extractor" in done.err) == (2, True)


def test_a_checker_beside_another_pipeline_is_left_to_diffusers(pipelines, run):
    model = edited(pipelines["sdxl"], "model", "model_index.json", **NAMES)
    for name in NAMES:
        (model / name).mkdir()
    done = run(model, "outputs", "--backend", "sglang")
    assert (done.code, "it does not support a safety checker in this pipeline" in done.err) == (2, True)
