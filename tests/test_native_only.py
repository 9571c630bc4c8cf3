"""A family of the native engine whose pipeline and network diffusers does not have."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from little_hub import LittleHub
from native import picture
from original_layout import save

from sglang_gen.families import registry

SMALL = ("--height", "32", "--width", "32", "--num-inference-steps", "1", "--seed", "7", "--dtype", "float32")
PIPELINE, NETWORK = "NativePipeline", "NativeTransformer"


@pytest.fixture
def folder(pipelines, monkeypatch) -> Path:
    """The tiny SD3 pipeline under classes that diffusers lacks, and a family of them."""
    made = shutil.copytree(pipelines["sd3"], Path("native"))
    for path, changes in {
        made / "model_index.json": {"_class_name": PIPELINE, "transformer": ["diffusers", NETWORK]},
        made / "transformer" / "config.json": {"_class_name": NETWORK},
    }.items():
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    known, alike = registry.specs(), registry.by_name("sd3")
    components = {**alike.components, "transformer": (NETWORK,)}
    added = replace(alike, pipeline_class=PIPELINE, components=components)
    monkeypatch.setattr(registry, "specs", lambda: (*known, added))
    return made


@pytest.mark.whole
def test_it_is_downloaded_component_by_component(sglang, folder, tmp_path, monkeypatch):
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    little = LittleHub()
    little.repos["tiny/native"] = {"main": folder}
    little.install(monkeypatch, tmp_path)
    for path in ("tiny/native", folder):
        done = sglang("generate", "--model-path", path, "--prompt", "a", *SMALL)
        assert done.code == 0, done.err
    little.close()
    assert np.array_equal(picture("outputs/generated_image_0.png"), picture("outputs/generated_image_1.png"))
    assert "transformer/diffusion_pytorch_model.safetensors" in little.files_fetched()
    assert not any(name.endswith(".bin") for name in little.files_fetched())


@pytest.mark.whole
def test_its_network_takes_other_weights(sglang, folder):
    common = ("generate", "--model-path", folder, "--prompt", "a", *SMALL)
    for words in ((), ("--transformer-weights-path", folder / "transformer")):
        done = sglang(*common, *words)
        assert done.code == 0, done.err
    assert np.array_equal(picture("outputs/generated_image_0.png"), picture("outputs/generated_image_1.png"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("quant=int8",), "ERROR: The native engine cannot run this: it has no quantized weights yet; and diffusers "),
        (("--backend", "diffusers"), f"has no {PIPELINE}; run with --backend sglang or auto"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("dry_run=true",)], ids=["run", "dry run"])
def test_a_request_for_diffusers_is_refused_with_the_reason(sglang, folder, words, sentence, dry):
    done = sglang("generate", "--model-path", folder, "--prompt", "a", *SMALL, *words, *dry)
    assert done.code == 2
    assert sentence in done.lines[-1]
    assert f"has no {PIPELINE}" in done.lines[-1]


@pytest.mark.parametrize("dry", [(), ("dry_run=true",)], ids=["run", "dry run"])
def test_it_is_not_compared_with_a_backend_that_lacks_it(sglang, folder, dry):
    done = sglang("debug", "parity", "--model-path", folder, "--prompt", "a", *SMALL, *dry)
    assert done.code == 2
    assert done.lines[-1] == (
        f"ERROR: sglang debug parity runs both backends, and only the native engine has {PIPELINE}"
    )


def test_a_setting_of_the_native_engine_is_not_compared(sglang, pipelines):
    words = ("sampling.guidance_interval=[0.1,0.9]",)
    done = sglang("debug", "parity", "--model-path", pipelines["sd3"], "--prompt", "a", *SMALL, *words)
    assert done.code == 2
    assert done.lines[-1].endswith("only the native engine has sampling.guidance_interval; leave it out")


@pytest.mark.whole
def test_a_single_file_is_refused_in_one_sentence(sglang, folder, pipelines):
    file = save(pipelines["sd3"], Path("model.safetensors").absolute())
    for dry in ((), ("dry_run=true",)):
        done = sglang("generate", "--model-path", file, f"model.configs={folder}", "--prompt", "a", *SMALL, *dry)
        assert done.code == 2
        assert done.lines[-1].endswith(f"has no {PIPELINE}; give a folder in diffusers' layout")


def test_random_weights_are_refused_before_a_network_is_built(sglang, folder):
    for more in ((), ("dry_run=true",)):
        done = sglang("generate", "--model-path", folder, "model.weights=random", "--prompt", "a", *SMALL, *more)
        assert done.code == 2
        assert (
            f"has the class {NETWORK}, which diffusers does not have; run with model.weights=pretrained"
            in done.lines[-1]
        )
