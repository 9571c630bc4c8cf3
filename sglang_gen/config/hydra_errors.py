"""Errors of Hydra and OmegaConf, which the user can correct, as one-sentence UserErrors."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import errors

from sglang_gen.config.schema import leaves
from sglang_gen.config.values import coerce, yaml_problem
from sglang_gen.errors import InvalidValueError, RunError, UserError, in_our_words, nearest
from sglang_gen.files import FULL


@contextmanager
def user_errors() -> Iterator[None]:
    """Context that converts errors of Hydra and OmegaConf, which the user can correct, to one-sentence UserErrors."""
    try:
        yield
    except UserError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        name = mark.name if mark is not None else getattr(error, "name", "A configuration file")
        raise UserError(f"{name} is not valid YAML: {yaml_problem(error)}") from error
    except errors.OmegaConfBaseException as error:
        raise UserError(_of_value(error)) from error
    except HydraException as error:
        raise UserError(_of_hydra(error)) from error
    except (ValueError, TypeError, AssertionError, AttributeError) as error:
        raise UserError("The configuration cannot be composed (--log-level debug shows why)") from error
    except RecursionError as error:
        raise UserError("The configuration is nested too deeply") from error
    except OSError as error:
        if error.errno in FULL:  # only the folder of a sweep is written here
            raise RunError(f"The folder of the sweep cannot be written: {error.strerror}") from error
        named = error.filename or "The configuration"
        raise UserError(f"{named} cannot be used: {in_our_words(error)}") from error


def override_problem(error: BaseException) -> str:
    """What Hydra's parser finds wrong in an override."""
    text = str(error)
    if unknown := re.search(r"Unknown function '(\w+)'", text):
        return f"Hydra has no function '{unknown[1]}'"
    if called := re.search(r"while evaluating '(\w+)", text):
        return f"Hydra's function '{called[1]}' does not take these arguments"
    return "it does not follow Hydra's grammar"


def _of_hydra(error: HydraException) -> str:
    """A sentence for an error of Hydra, which wraps those of OmegaConf."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, errors.OmegaConfBaseException):
        return _of_value(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]) if lines else ""
    if not text or re.search(r"\b\w+(Error|Exception)\b", text):
        return "The configuration cannot be composed (--log-level debug shows why)"
    return text


def _of_value(error: errors.OmegaConfBaseException) -> str:
    """A sentence for an error of OmegaConf, with the config path of the value."""
    key = str(error.full_key or error.key or "").strip()
    where = key or "The configuration"
    match error:
        case errors.MissingMandatoryValue() | errors.InterpolationToMissingValueError():
            return f"{where}: a value is required (???) and none is given"
        case errors.InterpolationKeyError():
            named = re.search(r"'([^']*)' not found", str(error))
            return f"{where}: the interpolation names the key {named[1] if named else '?'}, which does not exist"
        case errors.UnsupportedInterpolationType():
            named = re.search(r"type (\S+)", str(error))
            return f"{where}: the interpolation names the resolver {named[1] if named else '?'}, which does not exist"
        case errors.GrammarParseError():
            return f"{where}: the interpolation cannot be read; an unmatched ${{ needs a backslash: \\${{"
        case errors.InterpolationResolutionError() if not isinstance(error, errors.ValidationError):
            return f"{where}: the interpolation cannot be resolved (--log-level debug shows why)"
        case errors.ConfigKeyError() | errors.ConfigAttributeError():
            return f"{where}: there is no such key{nearest(key, leaves())}"
    return f"{where}: {_misfit(key, error.value)}"


def _misfit(key: str, value: Any) -> str:
    """Why a value does not fit the schema: "'foo' is not an integer"."""
    shown = "null" if value is None else f"'{str(value)[:60]}'"
    try:
        coerce(value, leaves()[key])
    except (InvalidValueError, KeyError) as error:
        clause = in_our_words(error) if isinstance(error, InvalidValueError) else "does not fit the schema"
        return f"{shown} {clause}"
    return f"{shown} does not fit the schema"
