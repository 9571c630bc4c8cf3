"""PEFT's settings of an adapter: each is honoured, has no effect on a merge, or is refused by name."""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_gen import log
from sglang_gen.errors import UserError, in_our_words
from sglang_gen.types import DENOISERS, TEXT_ENCODERS

PREFIX = "base_model.model."  # of module names in PEFT's own files
NETWORK_COMPONENTS = (*DENOISERS, *TEXT_ENCODERS)
PEFT_ALPHA = 8  # LoraConfig's default lora_alpha
ADVICE = "merge it into its model with PEFT (merge_and_unload) and give that model"

# Settings that `Settings` and `_refuse_values` below read.
HONOURED = ("peft_type", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights")

# Settings of training, which do not matter for a merge or are already reflected in the file's tensors. PEFT itself
# treats fan_in_fan_out as false in linear layers. A trained bias is refused when its tensor is found.
NEUTRAL_SETTINGS = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out",
    "bias", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying",
)  # fmt: skip

OTHER_PEFT_KINDS = {
    "use_dora": "DoRA", "use_qalora": "QA-LoRA", "use_bdlora": "BD-LoRA", "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow", "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA", "velora_config": "VeLoRA",
}  # fmt: skip
MORE_THAN_FACTORS = (
    "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication",
    "megatron_config",
)  # fmt: skip

# Initialisations of PEFT that do not change the base weights; the others subtract the initial B A, or more, from them.
PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Settings:
    """An adapter's settings by component: PEFT's apply to all modules (component ""), diffusers' metadata to one."""

    name: str
    source: str
    components: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA, as in PEFT; 1 if no settings apply to this module.

        Raises UserError if alpha is not a finite number, or if the settings give another rank than the factors have.
        """
        component, name = _split(module)
        own = {**self.components.get("", {}), **self.components.get(component, {})}
        if not own:
            return 1.0
        given = self._pattern(own, "rank_pattern", name, own.get("r", rank))
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise self._odd("rank", given, module, "a whole number above 0")
        if given != rank:
            raise UserError(
                f"lora: {self.source} gives {module} the rank {given} (r, rank_pattern), but its factors have rank "
                f"{rank}; the settings belong to another file"
            )
        alpha = self._pattern(own, "alpha_pattern", name, own.get("lora_alpha", PEFT_ALPHA))
        if not _is_finite(alpha):
            raise self._odd("alpha", alpha, module, "a finite number")
        return float(alpha / math.sqrt(rank) if own.get("use_rslora") else alpha / rank)

    def _pattern(self, own: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
        """The value of the first pattern that matches the module's whole name or a dotted end of it."""
        patterns = own.get(key)
        if patterns is None:
            return default
        if not isinstance(patterns, Mapping):
            raise UserError(f"lora: {key} in {self.source} is {patterns!r}, not a mapping of module names to numbers")
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise UserError(
                    f"lora: {key} in {self.source} holds {pattern!r}, which is not a regular expression"
                ) from error
        return patterns.get(module, default)

    def _odd(self, what: str, value: Any, module: str, wanted: str) -> UserError:
        return UserError(f"lora: {self.source} gives the {what} {value!r} for {module}; it must be {wanted}")


def load(name: str, path: Path, config: Path | None) -> Settings:
    """Settings from adapter_config.json, else from diffusers' metadata in the file, such as `transformer.lora_alpha`.

    Raises UserError for settings that cannot be read, and for those that plain factors cannot express.
    """
    from safetensors import safe_open

    source = str(config or f"the metadata of {path}")
    try:
        if config is not None:
            values = json.loads(config.read_text(encoding="utf-8"))
        else:
            with safe_open(path, framework="np") as file:
                values = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, ValueError) as error:
        raise UserError(f"lora: the settings of {config or path} cannot be read: {in_our_words(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"lora: {source} does not hold a mapping of settings")
    components: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component, _, setting = key.rpartition(".")
        components.setdefault(component, {})[setting] = value
    for own in components.values():
        _refuse(name, source, own)
    return Settings(name, source, components)


def warn_of_unused(settings: Settings, modules: Iterable[str]) -> None:
    """Warn of settings for a component of which the file has no module."""
    for component in sorted(set(settings.components) - {""} - {_split(module)[0] for module in modules}):
        log.warn_once(f"lora: {settings.source} has settings for {component}, of which the file holds no module")


def _split(module: str) -> tuple[str, str]:
    """(component, module name in that network) of a module name in the file; component "" if it names none."""
    module = module.removesuffix(".lora").removesuffix("_lora")
    if module.startswith(PREFIX):
        return "", module.removeprefix(PREFIX)
    component, _, name = module.partition(".")
    return (component, name) if component in NETWORK_COMPONENTS else ("", module)


def _refuse(name: str, source: str, own: Mapping[str, Any]) -> None:
    _refuse_values(name, source, own)
    for key, kind in OTHER_PEFT_KINDS.items():
        if _is_set(own.get(key)):
            raise UserError(
                f"lora: {name} is an adapter of the kind {kind}, and only LoRA is applied ({key} in {source})"
            )
    for key in MORE_THAN_FACTORS:
        if _is_set(own.get(key)):
            raise UserError(
                f"lora: {name} needs more than LoRA factors ({key}={json.dumps(own[key])} in {source}); {ADVICE}"
            )
    known = {*HONOURED, *NEUTRAL_SETTINGS, *OTHER_PEFT_KINDS, *MORE_THAN_FACTORS}
    for key in sorted(set(own) - known):
        value = own[key]
        if value is True or (isinstance(value, (dict, list)) and value):
            raise UserError(
                f"lora: {source} sets {key}={json.dumps(value)}, which is not known here and may change what the "
                f"adapter does; {ADVICE}, or remove the setting"
            )
        if _is_set(value):  # a number or a string, which alone does not enable anything in PEFT
            log.warn_once(f"lora: {source} sets {key}={json.dumps(value)}, which is not known here and has no effect")


def _refuse_values(name: str, source: str, own: Mapping[str, Any]) -> None:
    kind = str(own.get("peft_type") or "LORA").upper()
    if kind != "LORA":
        raise UserError(f"lora: {name} is an adapter of the kind {kind}, and only LoRA is applied")
    stabilized = own.get("use_rslora")
    if stabilized is not None and not isinstance(stabilized, bool):
        raise UserError(f"lora: use_rslora in {source} is {stabilized!r}; it must be true or false")
    start = own.get("init_lora_weights", True)
    if start is None or isinstance(start, bool) or str(start).lower() in PLAIN_INITIALISATIONS:
        return
    raise UserError(
        f"lora: {name} was trained from init_lora_weights={json.dumps(start)} ({source}), which changes the weights "
        "under the adapter too; save it from PEFT with path_initial_model_for_weight_conversion, which makes it plain"
    )


def _is_set(value: Any) -> bool:
    return not (value is None or value is False or value in ("", 0) or value == {} or value == [])


def _is_finite(value: Any) -> bool:
    """Whether `value` is a finite number; booleans do not count."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
