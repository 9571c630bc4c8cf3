"""Code and pickles that a component's own files could bring in: refused in the plan, before a weight is read."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = ("--prompt", "a cat", "--height", "32", "--width", "32", "--num-inference-steps", "1", "--seed", "7")


class Bomb:
    """A pickle that leaves a trace where it is read."""

    def __reduce__(self):
        return (open, (str(Path("trace").absolute()), "w"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def code(folder: Path, text: str = "class Own: pass\n") -> None:
    (folder / "own.py").write_text(f"open({str(Path('trace').absolute())!r}, 'w')\n{text}")


def kernel(folder: Path) -> None:
    change(folder / "text_encoder" / "config.json", attn_implementation="somebody/kernel")


def inner_kernel(folder: Path) -> None:
    change(
        folder / "text_encoder" / "config.json", text_config={"_attn_implementation": {"": "a/b@main:f", "x": "sdpa"}}
    )


def automatic_tokenizer(folder: Path) -> None:
    change(folder / "model_index.json", tokenizer=["transformers", "AutoTokenizer"])
    change(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    code(folder / "tokenizer")


def automatic_encoder(folder: Path) -> None:
    change(folder / "model_index.json", text_encoder=["transformers", "AutoModel"])
    change(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "own.Own", "AutoConfig": "own.Own"})
    code(folder / "text_encoder")


def automatic_unet(folder: Path) -> None:
    change(folder / "model_index.json", unet=["diffusers", "AutoModel"])
    change(folder / "unet" / "config.json", auto_map={"AutoModel": "own.Own"})
    code(folder / "unet")


def pipeline(folder: Path) -> None:
    change(folder / "model_index.json", unet=["diffusers", "DiffusionPipeline"])
    (folder / "unet" / "model_index.json").write_text(json.dumps({"_class_name": ["own", "Own"]}))
    code(folder / "unet", "import diffusers\nclass Own(diffusers.StableDiffusionPipeline): pass\n")


@pytest.mark.parametrize("more", [(), ("--backend", "diffusers"), ("dry_run=true",)])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (kernel, "text_encoder/config.json, the kernel somebody/kernel"),
        (inner_kernel, "text_encoder/config.json, the kernel a/b@main:f"),
        (automatic_tokenizer, "tokenizer/tokenizer_config.json, auto_map"),
        (automatic_encoder, "text_encoder/config.json, auto_map"),
        (automatic_unet, "unet/config.json, auto_map"),
        (pipeline, "unet/model_index.json"),
    ],
)
def test_code_that_a_component_names_is_refused(sglang, pipelines, tmp_path, make, what, more):
    folder = shutil.copytree(pipelines["sd15"], tmp_path / "model")
    make(folder)
    done = sglang("generate", "--model-path", folder, *SMALL, *more)
    assert (done.code, len(done.lines)) == (2, 1), done.err
    assert f"{folder} runs code from its repository ({what}): read it, then allow it with" in done.err
    assert not Path("trace").exists()


def test_code_that_a_replaced_component_names_is_refused(sglang, pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd15"], tmp_path / "model")
    kernel(folder)
    paths = json.dumps({"text_encoder": str(folder / "text_encoder")})
    done = sglang("generate", "--model-path", pipelines["sd15"], "--component-paths", paths, *SMALL)
    assert (done.code, len(done.lines)) == (2, 1), done.err
    assert f"--component-paths: {folder}/text_encoder runs code from its repository" in done.err


def test_an_attention_of_the_library_is_no_kernel_and_a_class_of_a_name_reads_no_map(sglang, pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd15"], tmp_path / "model")
    change(folder / "text_encoder" / "config.json", attn_implementation="eager", auto_map={"CLIPTextModel": "own.Own"})
    change(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    code(folder / "text_encoder")
    code(folder / "tokenizer")
    for backend in ("sglang", "diffusers"):
        done = sglang("generate", "--model-path", folder, *SMALL, "--backend", backend)
        assert done.code == 0, done.err
    assert not Path("trace").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.PT", "model.ckpt"])
@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_pickled_weights_are_refused_whatever_the_configuration_says(sglang, pipelines, tmp_path, part, name):
    folder = shutil.copytree(pipelines["sd15"], tmp_path / "model")
    config = json.loads((folder / part / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("_class_name", "architectures")}
    (folder / part / "config.json").write_text(json.dumps(kept))
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    (folder / part / name).write_bytes(pickle.dumps(Bomb()))
    paths = json.dumps({part: str(folder / part)})
    for words in (("--model-path", folder), ("--model-path", pipelines["sd15"], "--component-paths", paths)):
        done = sglang("generate", *words, *SMALL)
        assert done.code == 2, done.err
        assert "offers no safetensors weights, and pickled weights are refused" in done.lines[-1]
    assert not Path("trace").exists()


def test_an_adapter_leads_to_no_other_weights_even_without_a_configuration_beside_it(sglang, pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd15"], tmp_path / "model")
    elsewhere = shutil.copytree(folder / "text_encoder", tmp_path / "elsewhere")
    (folder / "text_encoder" / "config.json").unlink()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(elsewhere)}
    (folder / "text_encoder" / "adapter_config.json").write_text(json.dumps(settings))
    done = sglang("generate", "--model-path", folder, *SMALL)
    assert done.code == 2, done.err
    assert "holds an adapter (adapter_config.json)" in done.lines[-1]


@pytest.mark.parametrize("setting", ["sampling.latents={}", "--image-path={}", "lora.path={}"])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.npy", "x.png"])
def test_no_input_file_is_read_as_a_pickle(sglang, pipelines, setting, name):
    Path(name).write_bytes(pickle.dumps(Bomb()))
    done = sglang("generate", "--model-path", pipelines["sd15"], *SMALL, setting.format(f"./{name}"))
    assert done.code == 2, done.err
    assert not Path("trace").exists()


YAML: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "--config": lambda path: ("--config", path),
    "a mapping named by a file": lambda path: ("--cache-dit-config", path),
    "a primary configuration": lambda path: ("--config-dir", path.parent, "--config-name", path.stem),
}


@pytest.mark.parametrize("way", YAML)
@pytest.mark.parametrize("tag", ["object/apply:builtins.open [trace, w]", "object/new:open [trace, w]", "name:open"])
def test_yaml_makes_no_objects(sglang, tag, way):
    Path("evil.yaml").write_text(f"prompt: !!python/{tag}\n")
    done = sglang("generate", *YAML[way](Path("evil.yaml").absolute()), "--prompt", "a")
    assert done.code != 0
    assert len(done.lines) == 1, done.err
    assert not Path("trace").exists()
