"""Help texts of the command. Imports no heavy library."""

import textwrap
from typing import Any

from sglang_gen import env
from sglang_gen.config import presets
from sglang_gen.config.flags import FLAGS
from sglang_gen.config.schema import Run, get, leaves, plain

TOP = """\
usage: sglang COMMAND ...

commands:
  generate   generate images, videos or sound with a diffusion model (sglang generate --help)
  models     list the model presets
  perf       compare perf dumps (sglang perf compare --help)
  debug      find where the native engine and diffusers differ (sglang debug parity --help)

options:
  -h, --help   show this text
  --version    show the version"""

MODELS = """\
usage: sglang models

List the model presets: sglang generate model=NAME, and the hub id whose settings the preset holds."""

_HYDRA = (
    ("-m, --multirun", "run every combination of the choices (model=sdxl,sd15 sampling.seed=1,2)"),
    ("-c, --cfg {job,hydra,all}", "print the composed configuration, flags applied, and exit"),
    ("-p, --package PATH", "the part of the configuration that --cfg prints"),
    ("--resolve", "resolve interpolations in the hydra part that --cfg prints (the job part always is)"),
    ("-cd, --config-dir DIR", "folder with own configuration files, searched first"),
    ("-cn, --config-name NAME", "primary configuration, such as a sweep file"),
    ("-i, --info [TOPIC]", "Hydra's information: all, config, defaults, defaults-tree, plugins, searchpath"),
    ("--hydra-help", "Hydra's own config groups"),
    ("-r, --run", "one run (the default)"),
    ("--version", "show the version"),
    ("-h, --help", "show this text"),
)


def version() -> str:
    return f"sglang-gen {env.VERSION}"


def generate(_parser: Any = None) -> str:
    """The help page of `sglang generate`: flags by section, config groups and keys, Hydra's options."""
    lines = [
        "usage: sglang generate --model-path MODEL --prompt TEXT [options] [group=option ...] [key.path=value ...]",
        "",
        "Generate images, videos or sound with a diffusion model, from text and, where the model takes one, an image.",
        "Without a model: the embedded model 'landscape'.",
        "",
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
        lines += _entry(_spelling(flag.option, flag.path), f"{flag.help}{_default(flag.path)}")
    lines += ["", "Config groups (group=option; the files are in conf/):"]
    for group, options in _groups().items():
        lines += _entry(f"{group}=", ", ".join(options))
    lines += ["", "Config keys without a flag (key.path=value):"]
    flagged = {flag.path for flag in FLAGS}
    keys = [path for path in leaves() if path not in flagged]
    lines += textwrap.wrap(", ".join(keys), width=110, initial_indent="  ", subsequent_indent="  ")
    lines += ["", "Hydra's options:"]
    for name, text in _HYDRA:
        lines += _entry(name, text)
    return "\n".join(lines)


def _spelling(option: str, path: str | None) -> str:
    kind = leaves()[path] if path else str
    if kind is bool:
        return f"{option}, --no-{option.lstrip('-')}"
    return f"{option} {_metavar(kind)}"


def _metavar(kind: Any) -> str:
    text = str(getattr(kind, "__name__", kind))
    for part, word in (("int", "N"), ("float", "X"), ("dict", "JSON"), ("list", "A,B")):
        if part in text:
            return word
    return "TEXT"


def _default(path: str | None) -> str:
    value = plain(get(Run(), path)) if path else None
    if value in (None, {}, []):
        return ""
    return f" (default: {str(value).lower() if isinstance(value, bool) else value})"


def _entry(name: str, text: str) -> list[str]:
    width = 34
    wrapped = textwrap.wrap(text, width=78) or [""]
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
    embedded = {"landscape": "(inside the package)", "custom": "(--model-path)"}
    rows = [
        f"{preset.name.ljust(width)}  {(preset.path or embedded.get(preset.name, '')).ljust(where)}  "
        f"{preset.description}"
        for preset in known
    ]
    return "\n".join(rows)
