"""Downloads the files of a model from Hugging Face or ModelScope.

Raises UserError for a repository or revision that does not exist or is not allowed, RunError if the hub fails.
"""

import errno
import sys
from pathlib import Path

from sglang_gen import env, log
from sglang_gen.config.schema import Model
from sglang_gen.errors import RunError, UserError, in_our_words
from sglang_gen.families import registry
from sglang_gen.hub import remote_code
from sglang_gen.hub.component_folder import read_json

CONFIGS = ["model_index.json", "*/config.json", "*/scheduler_config.json"]
CONFIGS_AND_TOKENIZERS = ["*.json", "*/*.json", "*/*.txt", "*/*.model"]
ROOT_CONFIGS = ["config.json", "scheduler_config.json", "tokenizer_config.json"]
STEMS = ("diffusion_pytorch_model", "model")
COMPONENT = [  # weights without variants, and the files of a tokenizer
    *(f"{stem}{end}" for stem in STEMS for end in (".safetensors", "-*-of-*.safetensors")), "*.json", "*.txt", "*.model"
]  # fmt: skip
OTHER_FORMATS = ["*.bin", "*.ckpt", "*.pt", "*.msgpack", "*.onnx*", "*openvino*", "*.fp16.*"]


def fetch(model: Model, name: str, weights: bool, patterns: list[str] = CONFIGS) -> Path:
    """Download a hub repository: with `weights` all files that its pipeline needs, else only those in `patterns`."""
    hub = _download_modelscope if env.use_modelscope() else _download_huggingface
    return hub(model, name, weights, patterns)


def _download_huggingface(model: Model, name: str, weights: bool, patterns: list[str]) -> Path:
    """Download from Hugging Face. If a first request fails, use the cache, without the library's 23 s of retries."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    failures = (OSError, ValueError, errors.HTTPError)  # type: ignore[attr-defined] # raised by its HTTP client
    refusal = None
    try:
        get_hf_file_metadata(hf_hub_url(name, "model_index.json", revision=model.revision))
    except errors.EntryNotFoundError:
        weights, patterns = False, [*patterns, "config.json"]  # not a pipeline; config.json names its kind
    except failures as error:
        refusal = error
    local = refusal is not None
    try:
        folder = _download_pipeline(model, name, local) if weights else _snapshot(model, name, local, patterns)
    except UserError:
        raise
    except failures as error:
        raise hub_error(refusal or error, name, model.revision) from error
    if refusal and weights:
        log.warning(f"{_reason(refusal)}: using the copy of {name} in the local cache")
    return folder


def _snapshot(model: Model, name: str, local: bool, patterns: list[str]) -> Path:
    """The folder with the files of a hub repository that match `patterns`; `local`: from the cache alone."""
    from huggingface_hub import snapshot_download

    revision = model.revision
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local))


def _download_pipeline(model: Model, name: str, local: bool) -> Path:
    """Download the files that diffusers selects for the pipeline: safetensors of one variant, no other formats.

    The pipeline of a family that diffusers lacks is downloaded component by component.
    """
    import diffusers

    native_only = {spec.pipeline_class for spec in registry.specs()}.difference(dir(diffusers))
    if native_only:
        index = read_json(_snapshot(model, name, local, CONFIGS) / "model_index.json")
        if index.get("_class_name") in native_only:
            components = [key for key, entry in index.items() if isinstance(entry, list) and any(entry)]
            patterns = [f"{key}/{pattern}" for key in components for pattern in COMPONENT]
            return _snapshot(model, name, local, [*CONFIGS, *patterns])
    folder = diffusers.DiffusionPipeline.download(
        name,
        revision=model.revision,
        use_safetensors=True,
        trust_remote_code=model.trust_remote_code,
        local_files_only=local,
    )
    return Path(folder)


def hub_error(error: Exception, name: str, revision: str | None) -> Exception:
    """The exception for a failed download: UserError if the request must change, RunError if the hub failed."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{name} is gated: accept its license on its page on the hub, then log in with 'hf auth login'"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{name} has no revision '{revision or 'main'}'")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{name} is neither a local folder nor a model on the hub (if it is private, log in with 'hf auth login')"
        )
    if isinstance(error, errors.HFValidationError):
        return UserError(f"'{name}' is neither a local folder nor a possible hub id")
    if "trust_remote_code" in str(error):
        return UserError(remote_code.refusal(name, "code of its own"))
    if "necessary `safetensors` weights" in str(error):
        return UserError(
            f"{name} offers no safetensors weights without a variant (such as fp16), and pickled weights are refused"
        )
    return RunError(
        f"{name} is not a local folder, is incomplete in the local cache, and could not be downloaded: {_reason(error)}"
    )


def _reason(error: BaseException) -> str:
    """Why a download failed, from the innermost cause."""
    from huggingface_hub import errors

    while not isinstance(error, errors.HfHubHTTPError) and (inner := error.__cause__ or error.__context__):
        error = inner
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub answers {error.response.status_code} {error.response.reason_phrase}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return f"the cache cannot be written ({error.strerror})"
    return f"the hub cannot be reached ({in_our_words(error)})"


def _download_modelscope(model: Model, name: str, weights: bool, patterns: list[str]) -> Path:
    """Download from ModelScope: first the configs, then the folders of the pipeline's components in safetensors."""
    try:
        from modelscope import snapshot_download
        from modelscope.hub import errors
    except ImportError:
        raise UserError("SGLANG_USE_MODELSCOPE=1 needs ModelScope: pip install 'sglang-gen[modelscope]'") from None
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    failures: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *kinds)
    try:
        folder = snapshot_download(name, revision=model.revision, allow_patterns=["config.json", *patterns])
        index = Path(folder) / "model_index.json"
        if weights and index.is_file():
            components = [f"{key}/*" for key, entry in read_json(index).items() if isinstance(entry, list)]
            code = ["*.py"] if model.trust_remote_code else []
            folder = snapshot_download(
                name,
                revision=model.revision,
                allow_patterns=[*CONFIGS, *components, *code],
                ignore_patterns=OTHER_FORMATS,
            )
    except UserError:
        raise
    except errors.NotExistError as error:
        raise UserError(f"ModelScope has no {name}") from error
    except failures as error:
        raise RunError(f"ModelScope cannot provide {name}: {in_our_words(error)}") from error
    return Path(folder)
