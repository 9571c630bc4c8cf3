"""The reference images of quality.reference=auto: made once, in a process of their own, and kept in the cache folder.

A reference is a folder of images with their run records, named by a hash of everything that decides the images. The
file reference.json, which lists that, is written last.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_gen import env, files, log
from sglang_gen.config.schema import leaves, plain
from sglang_gen.errors import RunError, UserError, in_our_words
from sglang_gen.hub import resolve
from sglang_gen.launch import launcher
from sglang_gen.outputs import input_digests
from sglang_gen.plan import exact_run, make
from sglang_gen.plan.quality_request import AUTO
from sglang_gen.types import ModelCard, Plan

if TYPE_CHECKING:
    from sglang_gen.config.compose import Composed
    from sglang_gen.launch.session import Session

NOTE = "reference.json"
HASHED_BYTES = 2**26  # bytes of a model's files up to which their contents are compared, else their sizes and times
# Groups whose settings the reference does not take from the run.
OWN = (
    "parallel",
    "quant",
    "attention",
    "cache",
    "compile",
    "output",
    "perf",
    "quality",
    "tracking",
    "machine",
    "sweep",
)


def with_reference(composed: "Composed", plan: Plan, session: "Session | None") -> Plan:
    """The plan with the folder of its reference images, which are made if they are not kept yet.

    Plans whose reference is not `auto` are returned unchanged. Raises RunError if the reference cannot be made.
    """
    if plan.run.quality.reference != AUTO:
        return plan
    run = exact_run.exact(plan)
    card = resolve.find_weights(run)
    described = _described(plan, run, card)
    key = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = env.cache_dir() / "references" / key
    with _locked(folder):
        if (folder / NOTE).is_file():
            log.info(f"Quality reference kept from an earlier run: {folder}")
        else:
            _make(_composed(composed, run), card, described, folder, session)
    return replace(plan, reference=str(folder))


def _composed(composed: "Composed", run: Any) -> "Composed":
    """The reference's run; settings that it does not take from the user's run count as defaults."""
    sources = {
        path: "default" if path.partition(".")[0] in OWN else composed.sources.get(path, "default") for path in leaves()
    }
    return replace(
        composed, run=run, sources=sources, notices=(), warnings=(), versions={}, inputs={}, in_sweep=False, place=None
    )


def _make(
    composed: "Composed", card: ModelCard, described: Mapping[str, Any], folder: Path, session: "Session | None"
) -> None:
    started, temporary = time.perf_counter(), folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    composed.run.output.path = str(temporary)
    plan = make.make_plan(composed, card)
    count = sum(map(len, plan.batches))
    log.info(
        f"Making the quality reference: {log.quantity(count, 'image')} without cache, quantization and other "
        f"approximations, in one process ({plan.backend}, {plan.dtype}); it is kept in {folder}"
    )
    try:
        files.prepare_folder(temporary)
        if session is not None:
            session.alone(plan, started)
        else:
            launcher.launch(plan, started, fresh=True)
        files.save_json(temporary / NOTE, {**described, "commit_hash": env.commit_hash()})
        temporary.rename(folder)
    except (UserError, RunError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise type(error)(f"quality.reference=auto: the reference cannot be made: {error}") from error
    except OSError as error:
        raise RunError(f"quality.reference=auto: {folder} cannot be written: {in_our_words(error)}") from error
    log.info(f"Quality reference made in {time.perf_counter() - started:.3g} s")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Context in which no other process makes the same reference."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            yield
    except OSError as error:
        raise RunError(f"quality.reference=auto: {folder} cannot be written: {in_our_words(error)}") from error


def _described(plan: Plan, run: Any, card: ModelCard) -> dict[str, Any]:
    """Everything that decides the reference's images."""
    from sglang_gen.perf import machine

    facts = machine.describe(plan.device)
    return {
        "samples": [[sample.prompt, sample.negative_prompt, sample.seed] for batch in plan.batches for sample in batch],
        "settings": exact_run.settings(run),
        "inputs": input_digests.digests(run),
        "model": _identity(card, run),
        "pipeline": plan.pipeline_class,
        "scheduler": plain(card.components["scheduler"].config) if "scheduler" in card.components else None,
        "hardware": facts["gpus"] or facts["cpu"],
        "versions": dict(env.versions()) | {"peft": env.package_version("peft")},
    }


def _identity(card: ModelCard, run: Any) -> dict[str, Any]:
    """The state of the files of the model, its replaced components and its adapters."""
    places = {
        "": card.folder,
        "file": card.file,
        **{f"component.{name}": part.file or part.folder for name, part in card.components.items()},
        "network": run.quant.transformer_weights_path,
        "lora": run.lora.path,
        **{f"lora.{index}": adapter.path for index, adapter in enumerate(run.lora.adapters)},
    }
    return {name: _state(Path(place).expanduser()) for name, place in places.items() if place is not None}


def _state(place: Path) -> Any:
    """A digest of a file or folder; the name if it is not local."""
    if place.is_file():
        found = [place]
    elif place.is_dir():
        found = sorted(path for path in place.rglob("*") if path.is_file() and ".git" not in path.parts)
    else:
        return str(place)
    whole = sum(path.stat().st_size for path in found) <= HASHED_BYTES
    digest = hashlib.sha256()
    for path in found:
        name = str(path.relative_to(place)) if place.is_dir() else path.suffix
        digest.update(json.dumps([name, path.stat().st_size]).encode())
        digest.update(path.read_bytes() if whole else str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()
