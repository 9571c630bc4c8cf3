"""Output of `--cfg`, `--info` and `--hydra-help`."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict, read_write

from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose_partly
from sglang_gen.config.hydra_errors import user_errors
from sglang_gen.config.hydra_loader import open_loader
from sglang_gen.config.schema import plain
from sglang_gen.errors import UserError


def show(choices: Choices, given: Mapping[str, Any]) -> str:
    """The text printed by --cfg, --info or --hydra-help."""
    hydra = Hydra(task_name="generate", config_loader=open_loader(choices.config_dir))
    mode = RunMode.MULTIRUN if given.get("multirun") else RunMode.RUN
    with user_errors():
        if given.get("hydra_help"):
            return _hydra_help(hydra)
        if given.get("info"):
            with _root_logger_kept():
                hydra.show_info(given["info"], choices.config_name, list(choices.overrides), mode)
            return ""
        return _show_cfg(hydra, choices, given, mode)


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Context that restores the root logger, to which Hydra adds a handler when it prints its information."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _hydra_help(hydra: Hydra) -> str:
    groups = hydra.config_loader.list_groups("hydra")
    lines = [f"  hydra/{name}: {', '.join(hydra.config_loader.get_group_options(f'hydra/{name}'))}" for name in groups]
    return "Hydra's own config groups, chosen as overrides (hydra/launcher=basic):\n" + "\n".join(lines)


def _show_cfg(hydra: Hydra, choices: Choices, given: Mapping[str, Any], mode: RunMode) -> str:
    import yaml

    shown: dict[str, Any] = {}
    if given["cfg"] in ("job", "all"):
        shown = plain(compose_partly(choices)[0].run)
    if given["cfg"] in ("hydra", "all"):
        cfg = hydra.compose_config(choices.config_name, list(choices.overrides), mode, with_log_configuration=False)
        if given.get("resolve"):
            with read_write(cfg.hydra), open_dict(cfg.hydra):  # values that Hydra sets for each job
                cfg.hydra.job.update({"num": 0, "id": "0"})
                cfg.hydra.runtime.output_dir = cfg.hydra.run.dir
        HydraConfig.instance().set_config(cfg)
        shown["hydra"] = OmegaConf.to_container(cfg.hydra, resolve=bool(given.get("resolve")), enum_to_str=True)
    for name in [] if given.get("package") in (None, "_global_") else given["package"].split("."):
        if not isinstance(shown, dict) or name not in shown:
            raise UserError(f"--package: the configuration has no '{given['package']}'")
        shown = shown[name]
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).removesuffix("...\n").rstrip("\n")
