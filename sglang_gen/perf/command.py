"""The command `sglang perf`: its commands, each in a module of its own."""

import importlib
from collections.abc import Sequence

from sglang_gen import files as output
from sglang_gen.errors import UserError, nearest

PERF_COMMANDS = ("compare", "check", "history", "rates")
RATES_COMMAND = "sglang_gen.dry_run.rates_command"  # of a higher layer
HELP = """\
usage: sglang perf COMMAND ...

commands:
  compare    compare perf dumps and report regressions (sglang perf compare --help)
  check      compare perf dumps with a baseline that is kept in a folder (sglang perf check --help)
  history    find the commits that changed the performance (sglang perf history --help)
  rates      measure this machine for predictions (sglang perf rates --help)"""


def main(argv: Sequence[str]) -> int:
    """Run `sglang perf ARGV...`; returns the exit code. Raises UserError, or RunError if a report cannot be written."""
    if not argv or argv[0] in ("-h", "--help"):
        output.print_result(HELP)
        return 0 if argv else 2
    name, words = argv[0], argv[1:]
    if name == "compare":
        from sglang_gen.perf import compare_command

        return compare_command.main(words)
    if name == "check":
        from sglang_gen.perf import check_command

        return check_command.main(words)
    if name == "history":
        from sglang_gen.perf import history_command

        return history_command.main(words)
    if name == "rates":
        code: int = importlib.import_module(RATES_COMMAND).main(words)
        return code
    known = ", ".join(PERF_COMMANDS)
    raise UserError(f"Unknown command 'perf {name}'{nearest(name, PERF_COMMANDS)} (commands: {known})")
