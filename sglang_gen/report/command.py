"""The command `sglang report`: writes the report of one or more sweeps."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sglang_gen import files, log
from sglang_gen.errors import UserError, nearest

REPORT_HELP = """\
usage: sglang report DIR [DIR ...] [--output FILE]

Write the report of a sweep: one HTML page with the fastest cell in words, the images in a grid over any two swept keys,
difference maps, stage times, plots of time against quality and memory, and all settings. The page needs no network. DIR
is the folder of a sweep (sglang generate -m ...); with several, their cells are compared in one report. grid.png, the
labelled grid of images alone, is written beside the page.

Every sweep writes its report when it ends. Reports need more packages: pip install 'sglang-gen[report]'

options:
  --output FILE   the page (default: report.html in the first DIR); an existing file is replaced if it is a report
  -h, --help      show this help"""


def main(argv: Sequence[str]) -> int:
    """Run `sglang report ARGV...`; returns the exit code. Raises UserError, or RunError if a file cannot be written."""
    given = _parse(argv)
    if given.help or not argv:
        files.print_result(REPORT_HELP)
        return 0 if given.help else 2
    if not given.folders:
        raise UserError("sglang report needs the folder of a sweep")
    for path in (*given.folders, *([] if given.output is None else [given.output])):
        if not path.strip() or "\0" in path:
            raise UserError(f"sglang report: DIR and --output must be paths, not {path!r}")
    if given.output is not None and (given.output.endswith("/") or Path(given.output).is_dir()):
        raise UserError(f"sglang report: --output must name a file, and {given.output} is a folder")
    folders = [Path(os.path.expanduser(folder)) for folder in given.folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("sglang report: a folder is given twice")
    from sglang_gen.report.write import write_report

    output = None if given.output is None else Path(os.path.expanduser(given.output))
    for path in write_report(folders, output):
        log.info(f"Report saved to: {path}")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"sglang report: {message}")


class _Once(argparse.Action):
    def __call__(
        self, _parser: object, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            raise UserError(f"{option} is given twice")
        setattr(namespace, self.dest, values)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--output", action=_Once)
    parser.add_argument("-h", "--help", action="store_true")
    given, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        name = unknown[0].partition("=")[0]
        options = ("--output", "--help")
        raise UserError(f"Unknown option {name}{nearest(name, options)} (sglang report --help lists all)")
    return given
