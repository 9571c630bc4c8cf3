"""Finds a model and reads its `ModelCard`: the embedded one, a local folder or file, a Hugging Face or ModelScope id.

Raises UserError with one sentence if the request is wrong, RunError if the hub fails.
"""

import re
from collections.abc import Collection, Container
from dataclasses import replace
from pathlib import Path

from sglang_gen import env, log
from sglang_gen.config import presets
from sglang_gen.config.schema import Model, Run, Weights
from sglang_gen.errors import UserError, nearest
from sglang_gen.families import registry
from sglang_gen.hub import component_classes, download, prediction_markers, remote_code, single_file, vocabulary
from sglang_gen.hub.component_folder import check_files, check_vocabulary, read_config, read_json
from sglang_gen.hub.plain_numbers import require_plain
from sglang_gen.hub.safetensors_header import Header, read_header, refuse_other_formats
from sglang_gen.types import DENOISERS, Component, ModelCard

LANGUAGE_MODEL = (
    "The generate command is currently only supported for diffusion models. "
    "For language models, use the sglang serve command to start a server and make API requests."
)


FILE_CLASSES = ("AutoencoderKL",)  # components whose weights are read from one file too


def find(model: Model, weights: bool, replaced: Collection[str] = ()) -> ModelCard:
    """Find a model and read its card. With `weights`, download its files and check that they are readable.

    Without `weights`, a preset is described by the component configs in the package, without a request to the hub. The
    weight files of components in `replaced` are loaded from elsewhere and may be absent. Components given with
    --component-paths are described by their own configs. With model.weights=random only configs and tokenizers are
    read, those of a preset from the package. Raises UserError or RunError.
    """
    drawn = model.weights is Weights.random
    card = _find(model, weights and not drawn, replaced)
    if weights and drawn:
        card = replace(card, folder=_folder_of(card))
    others = {name: _replacement(card, name, path, weights) for name, path in model.component_paths.items()}
    for name, component in others.items():
        remote_code.check_component(model.component_paths[name], name, component, model.trust_remote_code)
    card = replace(card, components={**card.components, **others})
    vocabulary.check_tokenizers(card.components)
    return card


def find_weights(run: Run) -> ModelCard:
    """Read the card of a run's model and download its files if needed. Raises UserError or RunError."""
    return find(run.model, weights=True, replaced=DENOISERS if run.quant.transformer_weights_path else ())


def _find(model: Model, weights: bool, replaced: Collection[str]) -> ModelCard:
    name = model.path or model.preset
    if name is None:
        raise UserError("No model is named: give --model-path or model=NAME (sglang models lists the names)")
    if model.path is None:
        return read_card(env.embedded_model(), env.EMBEDDED_MODEL, weights)
    folder = Path(model.path).expanduser()
    try:
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except OSError as error:  # a path that is too long, or a loop of links
        raise UserError(f"--model-path: {log.shorten(model.path)}: {error.strerror}") from None
    elsewhere = [*model.component_paths, *replaced]
    if is_folder:
        card = read_card(folder, model.path, weights, elsewhere)
        for component_name in card.components.keys() - {*elsewhere}:
            if not (model.weights is Weights.random and component_name.startswith("tokenizer")):
                _check_present(folder, component_name)
        return _allowed(card, model)
    if is_file:
        return _allowed(_read_single_file(folder, model, weights), model)
    if model.path.startswith(("/", ".", "~")) or model.path.count("/") != 1 or "\\" in model.path:
        raise UserError(f"The model folder {model.path} does not exist{_preset_instead(model.path)}")
    if not weights and (packaged := _packaged(model)) is not None:
        return read_card(packaged, model.path, weights=False)
    return _allowed(read_card(_fetch(model, model.path, weights), model.path, weights, elsewhere), model)


def _fetch(model: Model, path: str, weights: bool) -> Path:
    """Download a hub repository: its configs, with `weights` all that its pipeline needs."""
    if model.weights is Weights.random:
        return download.fetch(model, path, False, download.CONFIGS_AND_TOKENIZERS)
    return download.fetch(model, path, weights)


def _folder_of(card: ModelCard) -> Path:
    """The folder of the card's configs."""
    folder = next(iter(card.components.values())).folder
    assert folder is not None  # `read_card` names the folder of every component
    return folder.parent


def _preset_instead(path: str) -> str:
    """A clause that suggests the preset of that name; empty if there is none."""
    preset = presets.by_id(path, presets.load()) if "/" not in path else None
    return f"; did you mean the preset model={preset}?" if preset else ""


def _packaged(model: Model) -> Path | None:
    """The package's component configs of a preset; None for a model other than the preset's repository."""
    own = {preset.name: preset.path for preset in presets.load()}.get(model.preset or "")
    folder = env.preset_configs(model.preset or "")
    return folder if own == model.path and folder.is_dir() else None


def _allowed(card: ModelCard, model: Model) -> ModelCard:
    """Return the card. Raises UserError if the repository would run code without permission."""
    remote_code.check_trusted(card, model.trust_remote_code)
    return card


def _read_single_file(path: Path, model: Model, weights: bool) -> ModelCard:
    """The card of a single-file model. Its component configs, and with `weights` its tokenizers, come from
    model.configs, else from the preset, else from the repository that matches the file's tensors.
    """
    header = single_file.read(path)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    name = str(model.path)
    folder, preset = Path(model.configs).expanduser() if model.configs else None, None
    if folder is None or not folder.is_dir():
        known = presets.load()
        paths = {entry.name: entry.path for entry in known}
        source = model.configs or paths.get(model.preset or "") or single_file.source_of_configs(path, shapes)
        preset = presets.by_path(source, known)
        if preset and not model.configs:
            source = paths[preset] or source  # the original repository may have been withdrawn
        packaged = env.preset_configs(preset or "")
        if not weights and preset and packaged.is_dir() and not model.configs:
            folder = packaged
        else:
            folder = download.fetch(replace(model, revision=None), source, False, download.CONFIGS_AND_TOKENIZERS)
    if preset and model.preset in (None, "custom") and not weights:
        log.info(f"{path.name} matches the preset {preset}: --model-id {preset} applies the settings of that preset")
    card = read_card(folder, name, weights=False)
    _check_file_readable(path, model.pipeline_class_name or card.pipeline_class)
    if "safety_checker" not in model.component_paths:  # diffusers reads none from a single file
        card = replace(card, components={k: item for k, item in card.components.items() if k != "safety_checker"})
    if "scheduler" not in model.component_paths:
        card = _with_marked_scheduler(card, path, header, tell=not weights)
    single_file.check_whole(path, shapes, card.components, model.component_paths)
    if not weights:
        return card
    for component_name, component in card.components.items():
        if component_name not in model.component_paths and (folder / component_name).is_dir():
            check_vocabulary(folder / component_name, component)
    return replace(card, folder=folder, file=path)


def _check_file_readable(path: Path, kind: str) -> None:
    """Raises UserError for a single file of a pipeline class that only the native engine has."""
    if registry.by_pipeline_class(kind) and not component_classes.in_diffusers(kind):
        raise UserError(
            f"--model-path: {path} is a single file, and diffusers, which reads such files, has no {kind}; give a "
            "folder in diffusers' layout"
        )


def _with_marked_scheduler(card: ModelCard, path: Path, header: Header, tell: bool) -> ModelCard:
    """The card with the scheduler required by markers in the file; `tell` logs the change."""
    if "scheduler" not in card.components:
        return card
    scheduler, notice = prediction_markers.scheduler(card.components["scheduler"], path, header)
    if notice and tell:
        log.info(notice)
    return replace(card, components={**card.components, "scheduler": scheduler})


def read_card(folder: Path, name: str, weights: bool, replaced: Container[str] = ()) -> ModelCard:
    """Read the card of a diffusers folder. Raises UserError for another kind of folder or incomplete weight files.

    Components in `replaced` are loaded from elsewhere.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(_not_a_pipeline(folder, name))
    content = read_json(index)
    components = {
        key: Component(entry[0], entry[1], folder / key, read_config(folder / key))
        for key, entry in content.items()
        if not key.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
    }
    names = content.get("_class_name")
    pipeline_class = names[-1] if isinstance(names, list) and names else names  # a list is [Python file, class]
    code = remote_code.files(folder, names, components)
    if not isinstance(pipeline_class, str) or not components:
        raise UserError(f"{index} names no pipeline class or no components")
    if weights:
        for component_name, component in components.items():
            if component_name not in replaced:
                _check_component(folder, component_name, component)
    settings = {
        key: value for key, value in content.items() if not (key.startswith("_") or isinstance(value, (list, dict)))
    }
    absent = tuple(key for key, entry in content.items() if isinstance(entry, list) and entry == [None, None])
    return ModelCard(name, folder if weights else None, pipeline_class, components, settings, code=code, absent=absent)


def _check_component(folder: Path, name: str, component: Component) -> None:
    """Raises UserError for a component of a model's folder whose files are incomplete."""
    if (folder / name).is_dir():
        check_files(folder / name, component)
    _check_present(folder, name)


def _check_present(folder: Path, name: str) -> None:
    """Raises UserError if a component's folder is missing from the model's folder."""
    if not (folder / name).is_dir() and not (folder / "config.json").is_file():  # diffusers reads it from the root
        raise UserError(f"{folder} lacks the folder '{name}' that its model_index.json names")


def preset_warnings(model: Model, card: ModelCard) -> list[str]:
    """Warns about a preset whose settings are those of another pipeline than the model's."""
    index = env.preset_configs(model.preset or "") / "model_index.json"
    if model.path is None or model.preset in (None, "custom") or not index.is_file():
        return []
    own = read_json(index).get("_class_name")
    if own in (None, model.pipeline_class_name or card.pipeline_class):
        return []
    return [
        f"The preset '{model.preset}' is for models of the class {own}, and {card.name} has the class "
        f"{card.pipeline_class}: the preset's settings may not suit this model"
    ]


def _role(class_name: str) -> str:
    """What a component of diffusers is for, by the name of its class."""
    if class_name.endswith("Scheduler"):
        return "scheduler"
    return "autoencoder" if re.search("Autoencoder|VAE|VQ|Decoder", class_name) else "network"


def _replacement(card: ModelCard, name: str, path: str, weights: bool) -> Component:
    """The component `name` of --component-paths. `path` is the component's folder, or a model's folder or hub id.

    The class of a diffusers component comes from its own config. Raises UserError if the model has no such component.
    """
    known = card.components
    if name not in known:
        raise UserError(f"--component-paths: {card.name} has no component '{name}'{nearest(name, known)}")
    if f"{name}/{known[name].library}.py" in card.code:
        raise UserError(f"--component-paths: '{name}' is defined by the model's own code and cannot be replaced")
    folder = Path(path).expanduser()
    if folder.is_file():
        return _in_one_file(known[name], name, folder)
    if not folder.is_dir():
        if path.startswith(("/", ".", "~")) or path.count("/") != 1:
            raise UserError(f"--component-paths: the folder {path} of '{name}' does not exist")
        folder = _download_component(path, name, weights)
    folder = folder / name if (folder / name).is_dir() else folder
    own, config = known[name], read_config(folder)
    if own.config and not config:
        raise UserError(
            f"--component-paths: {path} holds no '{name}': it has no configuration of the class {own.class_name}"
        )
    kind = config.get("_class_name", own.class_name) if own.library == "diffusers" else own.class_name
    types = [each.get("model_type") for each in (own.config, config)]
    if _role(kind) != _role(own.class_name) or (None not in types and types[0] != types[1]):
        raise UserError(
            f"--component-paths: {path} holds {types[1] or kind}, and '{name}' has the class {own.class_name}"
        )
    component = replace(own, folder=folder, config=config, class_name=kind)
    if weights:
        check_files(folder, component)
    return component


def _in_one_file(own: Component, name: str, file: Path) -> Component:
    """The component with the weights of a file. Raises UserError unless it is an AutoencoderKL with a known config."""
    if own.class_name not in FILE_CLASSES or not own.config:
        raise UserError(
            f"--component-paths: '{name}' is the file {file}; it takes a folder with the weights and config.json of "
            f"the component ({own.class_name}), and only the weights of {FILE_CLASSES[0]} are read from one file"
        )
    refuse_other_formats(file, "--component-paths")
    require_plain(file, read_header(file))
    return replace(own, file=file)


def _download_component(path: str, name: str, weights: bool) -> Path:
    """Download one component, from the repository's folder of that name or else from its root."""
    model = Model(path=path)
    folder = download.fetch(model, path, False, [f"{name}/*.json", *download.ROOT_CONFIGS])
    if not weights:
        return folder
    place = f"{name}/" if (folder / name).is_dir() else ""
    return download.fetch(model, path, False, [f"{place}{pattern}" for pattern in download.COMPONENT])


def _not_a_pipeline(folder: Path, name: str) -> str:
    config = folder / "config.json"
    if config.is_file():
        architectures = read_json(config).get("architectures") or [""]
        if str(architectures[0]).endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")):
            return LANGUAGE_MODEL
    return f"{name} is not a diffusers model: it has no model_index.json"
