"""Reads prompts from the command line, a file or a record, and makes batches of samples with seeds from them."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_gen.config.schema import BOUNDS, Run
from sglang_gen.config.values import parse_json
from sglang_gen.errors import InvalidValueError, UserError, nearest
from sglang_gen.types import Sample


def pin(run: Run) -> Run:
    """The run with a seed, and with the lines of sampling.prompts_file in sampling.prompts for its record."""
    sampling = run.sampling
    stated = [sampling.prompt is not None, bool(sampling.prompts_file), bool(sampling.prompts)]
    if sum(stated) > 1:
        raise UserError("sampling.prompt, sampling.prompts_file and sampling.prompts exclude each other; give one")
    seed = sampling.seed if sampling.seed is not None else secrets.randbelow(2**32)
    key = "sampling.prompts_file"
    entries = read_lines(sampling.prompts_file, key) if sampling.prompts_file else sampling.prompts
    for entry in entries:
        _check_entry(entry)
    return replace(run, sampling=replace(sampling, seed=seed, prompts=entries, prompts_file=None))


def read_lines(path: str, key: str, only_json: bool = False) -> list[dict[str, Any]]:
    """The prompts in the file that the setting `key` names: a text or a JSON object in each line. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{key}: {path} is not UTF-8 text") from None
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if not only_json and not line.lstrip().startswith("{"):
            entries.append({"prompt": line})
            continue
        try:
            entries.append(parse_json(line))
            if not isinstance(entries[-1], dict):
                raise InvalidValueError("is not a JSON object")
            _check_entry(entries[-1])
        except UserError as error:
            raise UserError(f"{key}: {path}, line {number}: {error}") from None
        except InvalidValueError as error:
            raise UserError(f"{key}: {path}, line {number} {error}") from None
    if not entries:
        raise UserError(f"{key}: {path} holds no prompt")
    return entries


def _check_entry(entry: Mapping[str, Any]) -> None:
    kinds = {"prompt": str, "negative_prompt": str, "seed": int}
    for key, value in entry.items():
        if key not in kinds:
            raise UserError(f"A prompt has the unknown key '{key}'{nearest(key, kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise UserError(f"A prompt's '{key}' is {value!r}; it must be {'an integer' if key == 'seed' else 'text'}")
    if "prompt" not in entry:
        raise UserError(f"A prompt entry has no 'prompt': {json.dumps(dict(entry), ensure_ascii=False)}")
    least, most = BOUNDS["sampling.seed"]
    if not least <= entry.get("seed", 0) <= most:
        raise UserError(f"A prompt's seed is {entry['seed']}; it must lie between {least} and {most}")


def samples(run: Run) -> list[Sample]:
    """All samples of the run. Those of one prompt have consecutive seeds, from its own seed or else the run's."""
    sampling, seed = run.sampling, run.sampling.seed
    assert seed is not None  # set by `pin`
    entries = sampling.prompts or [{"prompt": sampling.prompt}]
    listed: list[Sample] = []
    most = BOUNDS["sampling.num_samples"][1]
    if len(entries) * sampling.num_samples > most:
        raise UserError(f"{len(entries)} prompts x {sampling.num_samples} samples are more than {most} images")
    for entry in entries:
        base = int(entry.get("seed", seed))
        if base + sampling.num_samples - 1 > BOUNDS["sampling.seed"][1]:
            raise UserError(f"{sampling.num_samples} samples from seed {base} on exceed the largest seed")
        negative = entry.get("negative_prompt", sampling.negative_prompt)
        for offset in range(sampling.num_samples):
            listed.append(Sample(len(listed), entry["prompt"], negative, base + offset))
    return listed


def batches(given: list[Sample], size: int) -> tuple[tuple[Sample, ...], ...]:
    """Group consecutive samples into batches of at most `size`, in which all or no samples have a negative prompt."""
    grouped: list[list[Sample]] = []
    for sample in given:
        last = grouped[-1] if grouped else []
        same = bool(last) and (last[-1].negative_prompt is None) == (sample.negative_prompt is None)
        if same and len(last) < size:
            last.append(sample)
        else:
            grouped.append([sample])
    return tuple(tuple(batch) for batch in grouped)
