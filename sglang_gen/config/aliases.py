"""Limits the aliases of YAML texts: a few lines of them can stand for billions of values, or for themselves."""

from pathlib import Path
from typing import Any

from sglang_gen.errors import InvalidValueError, UserError

MOST = 100_000  # values of a file in which aliases are written out


def check_aliases(text: str) -> None:
    """Raises InvalidValueError with a clause for aliases that are too many or recursive; ignores invalid YAML."""
    if "&" not in text or "*" not in text:
        return
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        count = 0 if root is None else _count(root, {})
    except (yaml.YAMLError, ValueError, RecursionError):
        return  # whoever reads the text says so
    if count is None:
        raise InvalidValueError("has an alias inside of the value that it stands for")
    if count > MOST:
        raise InvalidValueError(f"has aliases that stand for more than {MOST} values")


def check_folder(folder: Path) -> None:
    """`check_aliases` of all configuration files in a folder. Raises UserError."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            check_aliases(path.read_text(encoding="utf-8", errors="replace"))
        except InvalidValueError as error:
            raise UserError(f"{path} {error}") from None
        except OSError:
            continue


def _count(node: Any, known: dict[int, int | None]) -> int | None:
    """Number of values that a node stands for; None if it holds itself."""
    if id(node) not in known:
        known[id(node)] = None  # until it is counted
        children = node.value if isinstance(node.value, list) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        counts = [_count(part, known) for part in parts]
        known[id(node)] = None if None in counts else 1 + sum(count for count in counts if count is not None)
    return known[id(node)]
