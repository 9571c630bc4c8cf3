"""What a perf dump says about its run in words: model, amount of work, prompt, backend and machine."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sglang_gen.log import shorten

FACTS = ("model", "work", "prompt", "backend", "machine")
PROMPT_LENGTH = 300  # characters
_FORMS = {"image": "images", "video": "videos"}


def facts(dump: Mapping[str, Any]) -> dict[str, str]:
    """One phrase for each of FACTS that the dump knows; a dump of an older version may know less."""
    effective = dump.get("effective") or {}
    known = {
        "model": _model(dump, effective),
        "work": _work(dump, effective),
        "prompt": _prompt(dump),
        "backend": effective.get("backend"),
        "machine": _machine(dump.get("machine") or {}, effective),
    }
    return {name: phrase for name, phrase in known.items() if phrase}


def _model(dump: Mapping[str, Any], effective: Mapping[str, Any]) -> str | None:
    name = (dump.get("meta") or {}).get("model")
    model = effective.get("model")
    drawn = isinstance(model, Mapping) and model.get("weights") == "random"
    return f"{name} (random weights)" if name and drawn else name


def _work(dump: Mapping[str, Any], effective: Mapping[str, Any]) -> str | None:
    """For example `4 images of 128 x 128 in 28 steps`; width x height."""
    count, size = len(dump.get("samples") or ()), (effective.get("width"), effective.get("height"))
    if not count or None in size:
        return None
    kind = effective.get("makes", "image")
    words = f"{count} {kind if count == 1 else _FORMS.get(kind, kind)} of {size[0]} x {size[1]}"
    if effective.get("num_frames"):
        words += f" x {effective['num_frames']} frames"
    steps = ((dump.get("fingerprint") or {}).get("fields") or {}).get("steps")
    return words if steps is None else f"{words} in {steps} step{'s' * (steps != 1)}"


def _prompt(dump: Mapping[str, Any]) -> str | None:
    prompts = list(dict.fromkeys(sample.get("prompt") for sample in dump.get("samples") or ()))
    if not prompts or prompts[0] is None:
        return None
    others = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
    return shorten(prompts[0], PROMPT_LENGTH) + others


def _machine(machine: Mapping[str, Any], effective: Mapping[str, Any]) -> str | None:
    if gpus := Counter(machine.get("gpus") or ()):
        return ", ".join(f"{count} x {name}" if count > 1 else str(name) for name, count in gpus.items())
    if not machine.get("cpu"):
        return None
    cores, threads = machine.get("cpu_count"), machine.get("threads")
    words = [str(machine["cpu"])]
    words += [f"{cores} core{'s' * (cores != 1)}"] if cores else []
    words += [f"{threads} thread{'s' * (threads != 1)} a rank"] if threads else []
    return ", ".join(words)
