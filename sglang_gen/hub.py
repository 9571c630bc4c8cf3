"""Finding a model: the embedded one, a local folder, a Hugging Face or a ModelScope id; and reading its card.

Every way in which that can fail is one sentence: UserError where the request is wrong, RunError where the hub is.
"""

import json
from pathlib import Path
from typing import Any

from sglang_gen import env
from sglang_gen.errors import RunError, UserError, first_line
from sglang_gen.schema import Model
from sglang_gen.types import Component, ModelCard

LANGUAGE_MODEL = (
    "The generate command is currently only supported for diffusion models. "
    "For language models, use the sglang serve command to start a server and make API requests."
)


def find(model: Model, weights: bool) -> ModelCard:
    """The card of a model; with `weights` its files are on this machine and readable afterwards.

    Without `weights` a preset is described by the component configs in the package and the hub is not asked.
    """
    name = model.path or model.preset
    if name is None:
        raise UserError("No model is named: give --model-path, or a preset such as model=sdxl")
    if model.path is None:
        return read_card(env.embedded_model(), "landscape", weights)
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return read_card(folder, model.path, weights)
    if folder.exists():
        raise UserError(f"{model.path} is a file; --model-path takes a folder or a hub id")
    if model.path.startswith(("/", ".", "~")) or model.path.count("/") != 1 or "\\" in model.path:
        raise UserError(f"The model folder {model.path} does not exist")
    packaged = env.preset_configs(model.preset or "")
    if not weights and model.preset and packaged.is_dir():
        return read_card(packaged, model.path, weights=False)
    return read_card(_download(model, model.path, weights), model.path, weights)


def read_card(folder: Path, name: str, weights: bool) -> ModelCard:
    """The card of a diffusers folder. Raises UserError when it is not one, or a weight file is not whole."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(_not_a_pipeline(folder, name))
    content = _read_json(index)
    components = {
        part: Component(entry[0], entry[1], folder / part, _component_config(folder / part))
        for part, entry in content.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
    }
    if "_class_name" not in content or not components:
        raise UserError(f"{index} names no pipeline class or no components")
    if weights:
        for part in components:
            _check_weights(folder / part)
    pipeline_class = content["_class_name"]
    if isinstance(pipeline_class, list):
        pipeline_class = pipeline_class[1]
    return ModelCard(name, folder if weights else None, pipeline_class, components)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _component_config(folder: Path) -> dict[str, Any]:
    for name in ("config.json", "scheduler_config.json"):
        if (folder / name).is_file():
            return _read_json(folder / name)
    return {}


def _check_weights(folder: Path) -> None:
    """Refuse a truncated or corrupt safetensors file before anything is loaded; only headers are read."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                file.keys()
        except SafetensorError as error:
            raise UserError(f"The weight file {path} is corrupt: {first_line(error)}") from None
        except OSError as error:
            raise UserError(f"The weight file {path} cannot be read: {error.strerror or first_line(error)}") from None


def _not_a_pipeline(folder: Path, name: str) -> str:
    config = folder / "config.json"
    if config.is_file():
        architectures = _read_json(config).get("architectures") or [""]
        if str(architectures[0]).endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")):
            return LANGUAGE_MODEL
    return f"{name} is not a diffusers model: it has no model_index.json"


def _download(model: Model, name: str, weights: bool) -> Path:
    """A local snapshot of a hub repository: everything that its pipeline needs, or its configs alone."""
    if env.use_modelscope():
        return _download_modelscope(model, name, weights)
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        try:
            hf_hub_download(name, "model_index.json", revision=model.revision)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            patterns = ["config.json"]
        else:
            patterns = [] if weights else ["*.json"]
        if patterns:
            return Path(snapshot_download(name, revision=model.revision, allow_patterns=patterns))
        from diffusers import DiffusionPipeline

        return Path(
            DiffusionPipeline.download(
                name, revision=model.revision, use_safetensors=True, trust_remote_code=model.trust_remote_code
            )
        )
    except (OSError, ValueError) as error:
        raise _hub_error(error, name, model.revision) from error


def _hub_error(error: Exception, name: str, revision: str | None) -> Exception:
    """The sentence for a failed download, from the first cause that says something."""
    from huggingface_hub import errors

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for cause in chain:
        if isinstance(cause, errors.GatedRepoError):
            return UserError(
                f"{name} is gated: accept its licence on its page on the hub, then log in with 'hf auth login'"
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return UserError(f"{name} has no revision '{revision}'")
        if isinstance(cause, errors.RepositoryNotFoundError):
            return UserError(f"{name} is neither a local folder nor a model on the hub (or it is private: log in)")
        if isinstance(cause, errors.HFValidationError):
            return UserError(f"'{name}' is neither a local folder nor a possible hub id")
    if any("safetensors" in str(cause) for cause in chain):
        return UserError(f"{name} offers no safetensors weights, and pickled weights are refused")
    return RunError(
        f"{name} is not a local folder, is not in the local cache, and the hub cannot be reached "
        f"({first_line(chain[-1])})"
    )


def _download_modelscope(model: Model, name: str, weights: bool) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise UserError("SGLANG_USE_MODELSCOPE=1 needs ModelScope: pip install 'sglang-gen[modelscope]'") from None
    try:
        patterns = {} if weights else {"allow_patterns": ["*.json", "*/*.json"]}
        return Path(snapshot_download(name, revision=model.revision, **patterns))
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"ModelScope cannot provide {name}: {first_line(error)}") from error
