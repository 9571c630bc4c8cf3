"""Converts flag values, from the command line or keywords of `sglang_gen.generate`, to the types of the schema."""

from typing import Any

from sglang_gen.config.config_file import typed
from sglang_gen.config.flags import BY_KEY, FLAGS, Flag
from sglang_gen.errors import InvalidValueError, UserError, nearest


def flag_values(options: dict[str, Any]) -> dict[str, Any]:
    """Config path -> typed value for every flag that was given.

    Raises UserError, which names the flag, for a value of the wrong type.
    """
    return {flag.path: _typed(flag, options[flag.path]) for flag in FLAGS if flag.path and flag.path in options}


def python_flags(keywords: dict[str, Any]) -> dict[str, Any]:
    """Config path -> typed value for keywords of `sglang_gen.generate` (flag names with underscores)."""
    for name in keywords:
        if name not in BY_KEY or BY_KEY[name].path is None:
            raise UserError(f"generate() takes no keyword '{name}'{nearest(name, BY_KEY)}")
    return flag_values({str(BY_KEY[name].path): value for name, value in keywords.items()})


def _typed(flag: Flag, text: Any) -> Any:
    try:
        return typed(str(flag.path), text)
    except UserError:
        raise
    except InvalidValueError as error:
        shown = text if len(str(text)) <= 60 else f"{str(text)[:57]}..."
        raise UserError(f"{flag.option}: '{shown}' {error}") from None
