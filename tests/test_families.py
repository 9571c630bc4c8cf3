"""A family is described by its folder alone: the contract holds, and no module elsewhere names a model."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = re.compile(r"flux|sd3|sdxl|stable.?diffusion|unet|clip|t5", re.IGNORECASE)
# Words that hold the name of a model by chance: the setting of schedulers, what is cut, and the hexadecimal or plain
# names in which two letters meet.
APART = re.compile(r"clip_skip|clip_sample|clipp(ed|ing)|eclipse|cliff", re.IGNORECASE)


def texts(tree: ast.AST) -> Iterator[str]:
    """Identifiers and strings of a module, docstrings included; `clip` as a function of numbers is left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute) and node.attr != "clip":
            yield node.attr
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.arg, ast.keyword)):
            yield node.arg or ""
        elif isinstance(node, ast.alias):
            yield node.name
            yield node.asname or ""
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def names_of_models(path: Path) -> list[str]:
    return [text for text in texts(ast.parse(path.read_text())) if MODEL.search(APART.sub("", text))]
