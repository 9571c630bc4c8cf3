"""Prompt manifests: files of JSON lines whose prompts and seeds are exactly the samples of a run (quality.manifest)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_gen import env
from sglang_gen.config import prompts
from sglang_gen.config.schema import Run
from sglang_gen.errors import UserError, nearest

SETTING = "quality.manifest"
SHIPPED = env.manifests()


@dataclass(frozen=True)
class Manifest:
    """The name as it was given, the lines in order, and a digest of the lines that does not depend on their layout."""

    name: str
    entries: tuple[Mapping[str, Any], ...]
    digest: str


def shipped() -> list[str]:
    """Names of the manifests in the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.jsonl"))


def read(name: str) -> Manifest:
    """The manifest in a file, or the one of the package that has this name. Raises UserError."""
    path = SHIPPED / f"{name}.jsonl" if name in shipped() else Path(name)
    if not path.exists():
        raise UserError(
            f"{SETTING}: {name} does not exist{nearest(name, shipped())} (names in the package: {', '.join(shipped())})"
        )
    if not path.is_file():  # it is read several times
        raise UserError(f"{SETTING}: {name} is not a regular file")
    entries = prompts.read_lines(str(path), SETTING, only_json=True)
    lines = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in entries)
    return Manifest(name, tuple(entries), hashlib.sha256(lines.encode()).hexdigest())


def pin(run: Run) -> Run:
    """The run with the manifest's samples in sampling.prompts. A run without a manifest is returned unchanged.

    A line without a seed has sampling.seed plus its index. Raises UserError for two equal samples, and if a record's
    prompts are no longer those of the manifest.
    """
    if run.quality.manifest is None:
        return run
    manifest, sampling = read(run.quality.manifest), run.sampling
    seed = sampling.seed or 0
    entries = [{**entry, "seed": entry.get("seed", seed + index)} for index, entry in enumerate(manifest.entries)]
    _check_distinct(manifest.name, entries)
    recorded = prompts.read_lines(sampling.prompts_file, "sampling.prompts_file") if sampling.prompts_file else None
    if (recorded or sampling.prompts or entries) != entries:
        raise UserError(
            f"{SETTING}: the prompts of the configuration file are not those of {manifest.name}, which has changed "
            f"since; leave {SETTING} out of the file to use its prompts"
        )
    return replace(run, sampling=replace(sampling, seed=seed, prompts=entries, prompts_file=None))


def _check_distinct(name: str, entries: Sequence[Mapping[str, Any]]) -> None:
    first: dict[tuple[Any, ...], int] = {}
    for number, entry in enumerate(entries, start=1):
        sample = (entry["prompt"], entry.get("negative_prompt"), entry["seed"])
        if sample in first:
            raise UserError(f"{SETTING}: {name} has one sample twice, in its prompts {first[sample]} and {number}")
        first[sample] = number
