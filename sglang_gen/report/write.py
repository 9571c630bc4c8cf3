"""Writes a report: the page, and beside it the labelled grid of images as `grid.png`."""

from collections.abc import Sequence
from pathlib import Path

from sglang_gen import files
from sglang_gen.errors import UserError
from sglang_gen.report import vega_scripts
from sglang_gen.report.cells import read_cells
from sglang_gen.report.grid_image import grid_png
from sglang_gen.report.page import MARK, collect, render

REPORT, GRID = "report.html", "grid.png"  # file names


def write_report(folders: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Write the report of the sweeps in `folders` to `output`, or to report.html in the first folder.

    Returns the paths of the page and, if the sweeps have images, of the grid. Raises UserError without the packages of
    the extra `report`, for a folder without jobs, and for an existing file that is not a report; RunError if a file
    cannot be written.
    """
    if absent := vega_scripts.missing():
        raise UserError(f"A report needs {' and '.join(absent)}: {vega_scripts.INSTALL}")
    page = folders[0] / REPORT if output is None else output
    grid = page.with_name(GRID)
    if page == grid:
        raise UserError(
            f"sglang report: --output names the page, and {GRID} is the image beside it; choose another name"
        )
    cells = read_cells(folders)
    for path in (page, grid):
        _check(path)
    content = collect(cells)
    files.save_bytes(page, render(content, folders, page).encode("utf-8", "replace"))
    image = grid_png(content.shown)
    if image is None:
        return [page]
    files.save_bytes(grid, image)
    return [page, grid]


def _check(path: Path) -> None:
    """Raises UserError for an existing file that is not part of a report, or that cannot be written."""
    files.prepare_file(path)
    if path.exists() and not _is_report(path):
        raise UserError(f"{path} exists and is not a report; choose another place with --output")


def _is_report(path: Path) -> bool:
    """Whether the file starts like a page or a grid of ours."""
    with open(path, "rb") as file:
        return MARK.encode() in file.read(1000)
