"""The arrows of the design: who may import whom, and what a light command may import at all."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import sglang_gen

PACKAGE = Path(sglang_gen.__file__).parent

# A module imports from its own package and from lower layers, nothing else. Packages, and modules of the root.
LAYERS = (
    ("signals",),
    ("errors", "log", "destination", "types", "tensor_tree", "models"),
    ("family facts",),
    ("env", "files", "parallel"),
    ("config",),
    ("hub", "perf"),
    ("engine", "outputs"),
    ("plan",),
    ("weights", "launch"),
    ("families",),
    ("backends",),
    ("dry_run", "debug", "report"),
    ("generate",),
    ("sweep", "__init__"),
    ("tune",),
    ("cli",),
    ("__main__",),
)
# Modules of families/ that the plan and the hub read. They import no torch, and count as a package of their own.
FACTS = (
    "families.contract", "families.registry", "families.accepted", "families.*.spec", "families.unet_spec",
    "families.text_encoders", "families.encoder_sizes", "families.nunchaku_classes",
)  # fmt: skip
# Modules of one name: what every family, every backend or every command has.
ROLES = {"pipeline", "spec", "examples", "engine", "report", "command"}


def package(module: str) -> str:
    return "family facts" if any(fnmatch(module, facts) for facts in FACTS) else module.partition(".")[0]


def layer(module: str) -> int:
    for index, names in enumerate(LAYERS):
        if package(module) in names:
            return index
    raise AssertionError(f"the module {module} has no layer")


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, lazily or not, types aside."""
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in typing_only or not isinstance(node, ast.ImportFrom):
            continue
        if not (node.module or "").startswith("sglang_gen"):
            continue
        base = (node.module or "").removeprefix("sglang_gen").lstrip(".")
        for alias in node.names:
            inner = f"{base}.{alias.name}".lstrip(".")
            place = PACKAGE / inner.replace(".", "/")
            is_module = place.with_suffix(".py").exists() or place.is_dir()
            found.add(inner if is_module else base or "__init__")
    return found


def modules() -> dict[str, Path]:
    paths = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent == PACKAGE)
    return {str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path for path in paths}


def test_modules_import_from_their_own_package_and_from_lower_layers():
    known = modules()
    assert len(known) >= 150
    wrong = [
        f"{module} imports {target}"
        for module, path in known.items()
        for target in imports(path)
        if package(module) != package(target) and layer(target) >= layer(module)
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    arrows = {module: imports(path) & known.keys() for module, path in known.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for target in sorted(arrows[module]):
                visit(target, (*above, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


def test_the_root_holds_at_most_twelve_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_modules_and_tables_have_names_of_their_own():
    """Apart from what every family, backend or command has, such as its pipeline, engine or report."""
    names: dict[str, list[str]] = {}
    for module, path in modules().items():
        if path.stem not in ROLES and "__" not in path.stem:
            names.setdefault(path.stem, []).append(module)
        if module.partition(".")[0] in ("families", "models"):  # tables that the engine reads of every family
            continue
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name) and target.id.isupper() and not target.id.startswith("_"):
                    names.setdefault(target.id, []).append(module)
    assert {name: places for name, places in names.items() if len(places) > 1} == {}


def test_no_constructor_takes_more_than_six_arguments():
    """What belongs together is a frozen dataclass; configurations are dataclasses as a whole."""
    long = {
        f"{module}.{owner.name}": len(method.args.args) - 1
        for module, path in modules().items()
        for owner in ast.walk(ast.parse(path.read_text()))
        if isinstance(owner, ast.ClassDef)
        for method in owner.body
        if isinstance(method, ast.FunctionDef)
        and method.name == "__init__"
        and len([*method.args.args, *method.args.kwonlyargs]) > 7
    }
    assert long == {}


def test_networks_stand_on_torch_and_einops_alone():
    for path in (PACKAGE / "models").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        roots = {name.partition(".")[0] for name in names if not name.startswith("sglang_gen.models")}
        assert roots - sys.stdlib_module_names <= {"torch", "einops"}, path


def test_the_facts_about_families_import_no_torch_and_nothing_that_might():
    known = {module: path for module, path in modules().items() if package(module) == "family facts"}
    assert len(known) >= 11
    for module, path in known.items():
        names = {name for name in imports(path) if package(name) != "family facts"}
        assert names <= {"errors", "types"}, module
        tree = ast.parse(path.read_text())
        tops = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert set(tops) <= sys.stdlib_module_names, module


def test_every_package_has_only_a_docstring_in_its_init():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent == PACKAGE:
            continue
        body = ast.parse(path.read_text()).body
        assert [type(node).__name__ for node in body] == ["Expr"], path


@pytest.mark.whole
def test_help_and_models_import_no_heavy_library():
    code = (
        "import sys; from sglang_gen.cli import main;"
        "commands = (['generate', '--help'], ['models'], ['report', '--help'], ['tune', '--help']);"
        "assert [main(words) for words in commands] == [0] * 4;"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'hydra', 'omegaconf', 'numpy', 'rich', "
        "'altair', 'jinja2', 'vl_convert', 'PIL') "
        "if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.slow
def test_a_run_of_the_native_engine_imports_only_what_it_computes_with(tmp_path):
    """Of diffusers nothing, and nothing that only other requests need."""
    idle = ("diffusers", "scipy.stats", "peft", "cache_dit", "wandb", "imageio", "torchvision", "matplotlib",
            "sglang_gen.backends.diffusers.engine", "sglang_gen.weights.replacement", "sglang_gen.debug")  # fmt: skip
    code = (
        "import sys; from sglang_gen.cli import main;"
        "assert main(['generate', '--prompt', 'a', '--seed', '1', '--num-inference-steps', '1', '--height', '64', "
        "'--width', '64', '--backend', 'sglang']) == 0;"
        f"print([name for name in {idle} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
