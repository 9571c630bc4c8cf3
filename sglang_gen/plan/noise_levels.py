"""Settings of a scheduler with which its noise levels are not defined."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from sglang_gen.config.schema import Run
from sglang_gen.errors import UserError
from sglang_gen.types import ModelCard

FILE = "scheduler_config.json"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _fraction(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _betas(value: Any) -> bool:
    return value is None or (isinstance(value, list) and bool(value) and all(map(_number, value)))


def _end(value: Any) -> bool:
    return value is None or (_number(value) and 0 <= value < 1)


SETTING_LIMITS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("shift", "flow_shift"), (_positive, "a number above 0")),
    **dict.fromkeys(("base_shift", "max_shift"), (_number, "a finite number")),
    **dict.fromkeys(("beta_start", "beta_end"), (_fraction, "a number between 0 and 1")),
    **dict.fromkeys(("prediction_type", "beta_schedule", "timestep_spacing"), (_text, "a text")),
    **dict.fromkeys(
        ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_dynamic_shifting"),
        (_switch, "true, false or null"),
    ),
    "trained_betas": (_betas, "null or a list of numbers"),
    **dict.fromkeys(("num_train_timesteps", "base_image_seq_len", "max_image_seq_len"), (_whole, "an integer above 0")),
    "shift_terminal": (_end, "null, or a number of at least 0 and below 1"),
}


def check_scheduler_settings(run: Run, card: ModelCard) -> None:
    """Raises UserError for a setting in the scheduler's config, or in --diffusers-kwargs, that is out of its range."""
    scheduler = card.components.get("scheduler")
    if scheduler is None:
        return
    file = str(scheduler.folder / FILE) if scheduler.folder else f"{card.name}, {FILE}"
    given = {key: value for key, value in run.backend.diffusers_kwargs.items() if key in SETTING_LIMITS}
    for key, value in {**scheduler.config, **given}.items():
        allows, range_of = SETTING_LIMITS.get(key, (None, ""))
        if allows is not None and not allows(value):
            where = "--diffusers-kwargs" if key in given else file
            raise UserError(f"{where}: {key} is {_shown(value)}; it must be {range_of}")
    few, many = (scheduler.config.get(f"{name}_image_seq_len") for name in ("base", "max"))
    if few is not None and few == many and scheduler.config.get("use_dynamic_shifting"):
        raise UserError(f"{file}: base_image_seq_len and max_image_seq_len are both {few}; they must differ")


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)[:40]
