"""The arrows of the design: who may import whom, and what a light command may import at all."""

import ast
import subprocess
import sys
from pathlib import Path

import sglang_gen

PACKAGE = Path(sglang_gen.__file__).parent

# Lower may not import higher. A module stands in the first layer whose prefix fits.
LAYERS = (
    ("errors", "schema", "perf.statistics"),
    ("env", "flags", "types", "values", "perf.memory"),
    ("safetensors_file", "plain_numbers", "component_folder", "nested", "destination"),
    (
        "arithmetic",
        "log",
        "output",
        "presets",
        "overrides",
        "layout",
        "remote_code",
        "record_limits",
        "hydra_code",
        "offloading",
        "single_file",
        "prediction_markers",
        "perf.record",
        "perf.flops",
        "perf.kernels",
        "perf.parameters",
    ),
    ("config_file", "inputs", "kept_prompts", "prompts"),
    ("media", "perf.observations", "perf.compare", "perf.quality", "sweep.report"),
    ("perf.objective", "sweep.recorded"),
    (
        "config",
        "hub",
        "perf.cpu_dtype",
        "perf.machine",
        "perf.place",
        "sweep.table",
        "perf.command",
        "weight_files",
        "help_page",
    ),
    ("quantization", "step_cache", "stored", "requirements", "choice", "guidance", "sizes"),
    ("legal",),
    ("plan",),
    ("parallel", "models", "weights", "engine"),
    ("pipelines",),
    ("perf.dump", "backends", "saving", "sweep.callback", "sweep.tracking"),
    ("rank", "estimate"),
    ("worker", "dry_run"),
    ("launch",),
    ("torchrun",),
    ("generate",),
    ("sweep.jobs", "debug", "__init__"),
    ("cli", "__main__"),
)
# Imported lazily, from below: the Python entry uses the table's typing, and a sweep's job runs the spine.
EXCEPTIONS = {("generate", "cli"), ("help_page", "__init__")}


def layer(module: str) -> int:
    for index, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
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


def test_no_module_imports_upward():
    known = modules()
    assert len(known) >= 23
    wrong = [
        f"{module} imports {target}"
        for module, path in known.items()
        for target in imports(path)
        if layer(target) > layer(module) and (module, target) not in EXCEPTIONS
    ]
    assert wrong == []


def test_networks_stand_on_torch_and_einops_alone():
    for path in (PACKAGE / "models").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        roots = {name.partition(".")[0] for name in names if not name.startswith("sglang_gen.models")}
        assert roots - sys.stdlib_module_names <= {"torch", "einops"}, path


def test_every_package_has_only_a_docstring_in_its_init():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent == PACKAGE:
            continue
        body = ast.parse(path.read_text()).body
        assert [type(node).__name__ for node in body] == ["Expr"], path


def test_help_and_models_import_no_heavy_library():
    code = (
        "import sys; from sglang_gen.cli import main;"
        "assert main(['generate', '--help']) == 0 and main(['models']) == 0;"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'hydra', 'omegaconf', 'numpy', 'rich') "
        "if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_a_run_of_the_native_engine_imports_only_what_it_computes_with(tmp_path):
    """Of diffusers nothing, and nothing that only other requests need."""
    idle = ("diffusers", "scipy.stats", "peft", "cache_dit", "wandb", "imageio", "torchvision", "matplotlib",
            "sglang_gen.backends.diffusers", "sglang_gen.backends.options.weights", "sglang_gen.debug")  # fmt: skip
    code = (
        "import sys; from sglang_gen.cli import main;"
        "assert main(['generate', '--prompt', 'a', '--seed', '1', '--num-inference-steps', '1', '--height', '64', "
        "'--width', '64', '--backend', 'sglang']) == 0;"
        f"print([name for name in {idle} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
