"""Hydra callback that writes a table and a report of the jobs at the end of a multirun.

hydra:
  callbacks:
    table:
      _target_: sglang_gen.sweep.callback.SweepTable
      report: true
"""

import contextlib
import sys
import traceback
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from sglang_gen import log
from sglang_gen.errors import in_our_words
from sglang_gen.report import vega_scripts
from sglang_gen.sweep import table


class SweepTable(Callback):  # type: ignore[misc]  # Hydra has no types
    """Writes `table.csv`, `table.md` and `report.html` when all jobs have ended or a signal ends the sweep.

    If all jobs have ended, the table is printed too.
    """

    def __init__(self, report: bool = True) -> None:
        self.report = report

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        has_ended = isinstance(sys.exception(), Exception | None)  # a signal is a BaseException
        folder = Path(config.hydra.sweep.dir)
        try:
            saved = table.write_table(folder)
            if not saved:  # a signal came before the first job
                return
            for path in saved:
                log.info(f"Table of the sweep saved to: {path}")
            if has_ended:
                with contextlib.suppress(BrokenPipeError):  # the reader has what it wanted
                    table.print_table(folder)
        except Exception as error:  # noqa: BLE001 - Hydra would discard it; a missing table does not fail the jobs
            log.error(f"The table of the sweep could not be written: {in_our_words(error)}")
            log.debug(traceback.format_exc())
        if self.report:
            _write_report(folder)


def _write_report(folder: Path) -> None:
    if vega_scripts.missing():
        log.info(f"For a report of the sweep with plots: {vega_scripts.INSTALL}, then sglang report {folder}")
        return
    from sglang_gen.report.write import write_report

    try:
        for path in write_report([folder]):
            log.info(f"Report of the sweep saved to: {path}")
    except Exception as error:  # noqa: BLE001 - a missing report does not fail the jobs either
        log.error(f"The report of the sweep could not be written: {in_our_words(error)}")
        log.debug(traceback.format_exc())
