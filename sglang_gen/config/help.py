"""Help texts of the command. Imports no heavy library."""

import textwrap
from enum import Enum
from typing import Any

from sglang_gen import env
from sglang_gen.config import presets
from sglang_gen.config.flags import FLAGS, Flag
from sglang_gen.config.schema import Run, get, leaves, plain

TOP = """\
usage: sglang COMMAND ...

commands:
  generate   generate images, videos or audio with a diffusion model
  models     list the model presets
  perf       compare the performance of runs and commits (sglang perf compare, check, history, rates)
  report     write a page with the images, plots and tables of a sweep
  tune       find the fastest configuration whose images keep a bound (sglang tune --help)
  debug      compare the native engine with diffusers, module by module (sglang debug parity)

options:
  -h, --help   show this help; every command has its own, such as sglang generate --help
  --version    show the version"""

MODELS = """\
usage: sglang models

List the model presets, one per line: name, hub id and description. Use a preset with

  sglang generate model=NAME

or give its hub id as --model-path."""

_HYDRA = (
    ("-m, --multirun", "run every combination of the listed values (parallel=single,tp2 sampling.seed=1,2)"),
    ("-c, --cfg {job,hydra,all}", "print the composed configuration with all flags, and exit"),
    ("-p, --package PATH", "part of the configuration that --cfg prints, such as sampling"),
    ("--resolve", "resolve interpolations in the output of --cfg hydra and --cfg all"),
    ("-cd, --config-dir DIR", "folder with your own configuration files; searched first"),
    ("-cn, --config-name NAME", "primary configuration, such as a sweep file"),
    ("-i, --info [TOPIC]", "print Hydra's all, config, defaults, defaults-tree, plugins or searchpath"),
    ("--hydra-help", "show the help of Hydra and its own config groups"),
    ("-r, --run", "run once (default)"),
    ("--version", "show the version"),
    ("-h, --help", "show this help"),
)

_VARIABLES = (
    ("SGLANG_USE_MODELSCOPE=1", "download models from ModelScope instead of Hugging Face"),
    ("SGLANG_GEN_CPU_DTYPE=DTYPE", "dtype that dtype=auto uses on a CPU: float32 or bfloat16"),
    ("SGLANG_GEN_CACHE=DIR", "cache folder for compiled code and measurements of the machine"),
)


def version() -> str:
    return f"sglang-gen {env.VERSION}"


def generate(_parser: Any = None) -> str:
    """The help page of `sglang generate`: flags by section, config groups and keys, Hydra's options."""
    lines = [
        "usage: sglang generate --model-path MODEL --prompt TEXT [options] [group=option ...] [key.path=value ...]",
        "",
        "Generate images, videos or audio with a diffusion model, from a prompt and optionally an input image. Without",
        f"--model-path or model=NAME, the embedded model '{env.EMBEDDED_MODEL}' is used. dry_run=true prints the plan "
        "of a run.",
        "",
        "Examples:",
        '  sglang generate --prompt "A serene landscape with mountains and a lake at sunset" --seed 42',
        "  sglang generate model=sdxl parallel=sp2_tp2",
        "  sglang generate model=sdxl --prompt 'a red fox in snow' --image-path fox.png",
        "  sglang generate model=wan21_t2v_1_3b --prompt 'a cat on a garden wall' --num-frames 33 --fps 16",
        "  sglang generate --config generation_config.json",
        '  sglang generate -m sampling.num_inference_steps=10,20,28 --prompt "a lake" --seed 1',
    ]
    section = ""
    for flag in FLAGS:
        if flag.section != section:
            section = flag.section
            lines += ["", f"{section}:"]
        lines += _entry(_spelling(flag.option, flag.path), _explained(flag))
    lines += ["", "Config groups (group=option):"]
    for group, options in _groups().items():
        lines += _entry(f"{group}=", ", ".join(options))
    lines += ["", "Config keys without a flag (key.path=value; docs/groups/ describes them):"]
    flagged = {flag.path for flag in FLAGS}
    keys = [path for path in leaves() if path not in flagged]
    lines += textwrap.wrap(", ".join(keys), width=110, initial_indent="  ", subsequent_indent="  ")
    lines += ["", "Hydra's options:"]
    for name, text in _HYDRA:
        lines += _entry(name, text)
    lines += ["", "Environment variables:"]
    for name, text in _VARIABLES:
        lines += _entry(name, text)
    return "\n".join(lines)


def _spelling(option: str, path: str | None) -> str:
    kind = leaves()[path] if path else str
    if kind is bool:
        return f"{option}, --no-{option.lstrip('-')}"
    return f"{option} {_metavar(kind)}"


def _explained(flag: Flag) -> str:
    """The help text of a flag with its default, if there is one."""
    value = plain(get(Run(), flag.path)) if flag.path else None
    default = str(value).lower() if isinstance(value, bool) else str(value)
    if "{default}" in flag.help:
        return flag.help.replace("{default}", default)
    return flag.help if value in (None, {}, []) else f"{flag.help} (default: {default})"


def _metavar(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"{{{','.join(kind.__members__)}}}"
    text = str(getattr(kind, "__name__", kind))
    for part, word in (("int", "N"), ("float", "X"), ("dict", "JSON"), ("list", "A,B")):
        if part in text:
            return word
    return "TEXT"


def _entry(name: str, text: str) -> list[str]:
    width = 34
    wrapped = textwrap.wrap(text, width=86) or [""]
    first = f"  {name}".ljust(width)
    head = [f"{first}{wrapped[0]}"] if len(first) <= width else [first, " " * width + wrapped[0]]
    return head + [" " * width + line for line in wrapped[1:]]


def _groups() -> dict[str, list[str]]:
    folders = sorted(path for path in env.conf_dir().iterdir() if path.is_dir())
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def models() -> str:
    """One line per preset: name, hub id or location of the weights, description."""
    known = presets.load()
    width = max(len(preset.name) for preset in known)
    where = max(len(preset.path or "") for preset in known)

    def place(preset: presets.Preset) -> str:
        return preset.path or ("(inside the package)" if preset.is_embedded else "(--model-path)")

    rows = [f"{each.name.ljust(width)}  {place(each).ljust(where)}  {each.description}" for each in known]
    return "\n".join(rows)
