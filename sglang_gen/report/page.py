"""Assembles the HTML page of a report from a template, in which Jinja escapes every value."""

import base64
import datetime
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sglang_gen import env, log
from sglang_gen.report import bar_plots, scatter_plots, vega_scripts
from sglang_gen.report.cell_metrics import Metrics, memory_column, metrics, states_quality
from sglang_gen.report.cell_table import table
from sglang_gen.report.cells import SWEEP, Cell, short_names
from sglang_gen.report.conclusion import Conclusion, conclude, duration
from sglang_gen.report.gallery import SAMPLE, items
from sglang_gen.report.image_data import FACTORS, Embedded, amplification, embed
from sglang_gen.report.job_reader import read_tuning_conclusion
from sglang_gen.report.plots import Plot
from sglang_gen.report.prediction_table import predicted_table
from sglang_gen.report.setting_pairs import shared_and_own

MARK = "sglang-gen report"  # by which a file is recognized as a report that may be replaced
FOLDER = Path(__file__).parent
MOST_COLUMNS = 24  # values of a key that may be the columns of the grid


@dataclass(frozen=True)
class Content:
    """Everything that the page shows."""

    cells: list[Cell]
    shown: list[Embedded]
    metrics: list[Metrics]
    conclusion: Conclusion
    stages: list[Plot]
    pareto: list[Plot]
    cache: Plot | None
    absent: list[str] = field(default_factory=list)  # sentences about the sections that this page does not have


def collect(cells: list[Cell]) -> Content:
    """Read and compare the images of the cells, and draw the plots."""
    shown = embed(items(cells))
    found = metrics(cells, shown)
    column = memory_column(cells)
    pareto = [
        plot
        for plot in (scatter_plots.quality_plot(found), scatter_plots.memory_plot(found, column))
        if plot is not None
    ]
    stages, cache = bar_plots.stage_plots(cells), bar_plots.cache_plot(cells)
    content = Content(cells, shown, found, _conclusion(found, column), stages, pareto, cache)
    content.absent.extend(_absent(content))
    return content


def _conclusion(found: Sequence[Metrics], column: str | None) -> Conclusion:
    """The verdict on the cells: that of `sglang tune` on its candidates, which it compared in rounds, else our own."""
    folders = {one.cell.folder for one in found}
    stated = read_tuning_conclusion(folders.pop()) if len(folders) == 1 else []
    if not stated:
        return conclude(found, column)
    return Conclusion(f"{stated[0]}.", tuple(f"{sentence}." for sentence in stated[1:]))


def _absent(content: Content) -> list[str]:
    """Why sections are missing, a sentence each."""
    sentences = []
    timed = sum(one.time is not None for one in content.metrics)
    reason = "no cell was measured" if not timed else "only one cell was measured"
    if not any(one.data for one in content.shown):
        sentences.append("Images: no cell generated an image, a video or a sound that can be shown.")
    elif not any(one.difference for one in content.shown):
        sentences.append("Differences: no two images have the same prompt, seed and size, or they are not images.")
    if not content.stages:
        sentences.append("Stage times: no cell was measured.")
    titles = {plot.title for plot in content.pareto}
    if any(cell.has_random_weights for cell in content.cells):
        sentences.append("Time and quality: the weights are random, so images mean nothing.")
    elif "Time and quality" not in titles:
        sentences.append(
            f"Time and quality: {'no two images differ' if timed > 1 else reason}."
            if any(one.psnr is not None for one in content.metrics) or timed < 2
            else "Time and quality: no two cells have images that can be compared."
        )
    if "Time and memory" not in titles:
        sentences.append(f"Time and memory: {'memory was not measured' if timed > 1 else reason}.")
    if content.cache is None:
        sentences.append("Step cache: no cell used a step cache that records its decisions.")
    return sentences


def render(content: Content, folders: Sequence[Path], output: Path) -> str:
    """The page. Links to files are relative to the folder of `output`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    charts = [*content.stages, *content.pareto, *([content.cache] if content.cache else [])]
    scripts = (
        [vega_scripts.bundle(), (FOLDER / "page.js").read_text(encoding="utf-8")] if charts or content.shown else []
    )
    if not charts:
        scripts = scripts[1:]
    shared, own = shared_and_own(content.cells)
    values = {
        "mark": MARK,
        "title": _title(folders),
        "scripts": scripts,
        "hashes": [_hash(script) for script in scripts],
        "css": (FOLDER / "page.css").read_text(encoding="utf-8"),
        "content": content,
        "figures": _figures(content, output),
        "data": {**_grid_data(content), "plots": [{**plot.spec, "description": plot.title} for plot in charts]},
        "has_images": any(one.data for one in content.shown),
        "has_differences": any(one.difference for one in content.shown),
        "factors": FACTORS,
        "factor": amplification(content.shown),
        "reference": _reference(content),
        "scaled": _scaled(content),
        "naming": _naming(content.cells),
        "most_bars": bar_plots.MOST_BARS,
        "facts": _facts(content.cells),
        "requested": [setting for setting in shared if setting.requested is not None],
        "more_effective": [setting for setting in shared if setting.requested is None],
        "table": table(content.metrics, own),
        "predictions": predicted_table(content.cells),
        "machines": _machines(content.cells),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": env.VERSION,
    }
    return environment.get_template("page.html").render(values)


def _title(folders: Sequence[Path]) -> str:
    names = [log.visible(folder.resolve().name) for folder in folders]
    return f"Sweep {names[0]}" if len(names) == 1 else f"Sweeps {', '.join(names)}"


def _hash(script: str) -> str:
    """The source of a script for the page's content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _figures(content: Content, output: Path) -> list[dict[str, Any]]:
    """One entry per item, for the template."""
    known = {id(one.cell): one for one in content.metrics}
    figures = []
    for one in content.shown:
        path = one.item.path
        link = None if path is None else quote(os.path.relpath(path.resolve(), output.parent.resolve()))
        figures.append({"one": one, "link": link, "caption": _caption(one, known[id(one.item.cell)]),
                        "label": one.item.cell.label, "row": one.item.cell.row})  # fmt: skip
    return figures


def _caption(one: Embedded, measured: Metrics) -> str:
    words = [] if measured.time is None else [duration(measured.time.median)]
    if one.is_reference:
        words.append("reference")
    elif one.squared_error == 0:
        words.append("identical")
    elif one.squared_error is not None:
        from sglang_gen.perf.quality import decibels

        words.append(f"{decibels(one.squared_error):.1f} dB")
    return " · ".join(words)


def _grid_data(content: Content) -> dict[str, Any]:
    """The keys and values of the grid, the position of each item, and the keys of rows and columns at first."""
    found = [one.item for one in content.shown]
    keys = list(dict.fromkeys(key for item in found for key in item.values))
    values = {key: list(dict.fromkeys(item.values[key] for item in found)) for key in keys}
    names = short_names([key for key in keys if key not in (SWEEP, SAMPLE)]) | {SWEEP: SWEEP, SAMPLE: SAMPLE}
    rows, columns = axes(values, len(found))
    return {
        "keys": [{"name": names[key], "values": values[key]} for key in keys],
        "items": [[values[key].index(item.values[key]) for key in keys] for item in found],
        "rows": keys.index(rows) if rows else -1,
        "columns": keys.index(columns) if columns else -1,
    }


def axes(values: dict[str, list[str]], count: int) -> tuple[str | None, str | None]:
    """The keys of the rows and columns of the grid of `count` items; None where the items do not fill one.

    Columns are the key with the most values that fit, rows the first other key. A random search, in which every cell
    has its own values, has no grid.
    """
    fitting = [key for key in values if 1 < len(values[key]) <= MOST_COLUMNS]
    columns = max(fitting, key=lambda key: len(values[key]), default=None)
    rows = next((key for key in values if key in fitting and key != columns), None)
    if rows and columns and len(values[rows]) * len(values[columns]) > 3 * count:
        return None, None
    return rows, columns


def _reference(content: Content) -> str:
    if states_quality(content.cells):
        return "the image of quality.reference with the same prompt and seed"
    return "the first image of this sweep with the same prompt, seed and size"


def _naming(cells: Sequence[Cell]) -> str:
    """A sentence about the short names of cells."""
    keys = list(cells[0].values)
    names = [key if key == SWEEP else name for key, name in short_names(keys).items()]
    return f"Cells are named by {' · '.join(names)}." if len(keys) > 1 else ""


def _scaled(content: Content) -> str:
    """A sentence about images that are embedded with fewer pixels."""
    smaller = [one for one in content.shown if one.shown and one.size and one.shown != one.size]
    if not smaller:
        return ""
    longest = max(max(one.shown) for one in smaller if one.shown)
    return (f"{len(smaller)} images are shown with at most {longest} pixels on their longer side; "
            "each links to its file. Differences and PSNR are computed at full size.")  # fmt: skip


def _facts(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """What all measured cells have in common: model, prompt, size, steps, repeats, overrides."""
    dumps = [cell.row.dump for cell in cells if cell.row.dump]
    columns: dict[str, list[Any]] = {
        "model": [dump.get("meta", {}).get("model") for dump in dumps],
        "weights": [cell.row.effective.get("model.weights") for cell in cells if cell.row.dump],
        "prompt": [dump.get("meta", {}).get("prompt") for dump in dumps],
        "size": [_size(dump.get("effective", {})) for dump in dumps],
        "steps": [dump.get("fingerprint", {}).get("fields", {}).get("steps") for dump in dumps],
        "images per cell": [len(dump.get("samples") or ()) or None for dump in dumps],
        "repeats": [len(dump.get("repeats") or [dump]) for dump in dumps],
    }
    facts = [(name, str(values[0])) for name, values in columns.items()
             if values and values[0] is not None and all(value == values[0] for value in values)]  # fmt: skip
    words = [cell.row.overrides for cell in cells if cell.row.overrides]
    shared = [word for word in words[0] if all(word in own for own in words)] if words else []
    if shared and len(cells) > 1:
        facts.append(("overrides", " ".join(shared)))
    return [(name, log.visible(text)) for name, text in facts]


def _size(effective: dict[str, Any]) -> str | None:
    if "width" not in effective:
        return None
    frames = f", {effective['num_frames']} frames" if "num_frames" in effective else ""
    return f"{effective['width']} x {effective['height']}{frames}"


def _machines(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Machine, versions and commit, once if they are the same in all cells, with the cells otherwise."""
    groups: dict[str, dict[str, Any]] = {}
    for cell in cells:
        dump = cell.row.dump
        if not dump.get("machine"):
            continue
        machine = dump["machine"]
        facts = {
            "processor": f"{machine.get('cpu')}, cores: {machine.get('cpu_count')}, threads: {machine.get('threads')}",
            "GPUs": ", ".join(map(str, machine.get("gpus") or ())) or "none",
            "commit": str(dump.get("commit_hash")),
            "versions": ", ".join(f"{name} {version}" for name, version in (machine.get("versions") or {}).items()),
        }
        group = groups.setdefault(json.dumps(facts), {"facts": facts, "cells": []})
        group["cells"].append(cell.label)
    return list(groups.values())
