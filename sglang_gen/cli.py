"""The command line: one strict parser reads argv, and `main` turns every exception into a sentence and an exit code.

Exit codes of `main(argv)`: 0 success, 1 the run failed, 2 the request is invalid, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import gc
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

from sglang_gen import env, files, log, signals
from sglang_gen.config import help as help_page
from sglang_gen.config.flags import FLAGS
from sglang_gen.config.schema import LogLevel, leaves
from sglang_gen.errors import UserError, ending, nearest
from sglang_gen.signals import Terminated

if TYPE_CHECKING:
    from sglang_gen.config.choices import Choices

TOPICS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # of --info


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message[0].upper() + message[1:])


def build_parser() -> argparse.ArgumentParser:
    """A parser for the flags of `config.flags` and Hydra's own options. No option has a default here."""
    parser = _Parser(prog="sglang generate", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    kinds = leaves()
    for flag in FLAGS:
        if flag.path and kinds[flag.path] is bool:
            parser.add_argument(flag.option, dest=flag.path, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(flag.option, dest=flag.path or flag.key)
    parser.add_argument("-h", "--help", dest="help", action="store_true")
    parser.add_argument("-m", "--multirun", dest="multirun", action="store_true")
    parser.add_argument("-r", "--run", dest="run", action="store_true")
    parser.add_argument("-c", "--cfg", dest="cfg", choices=("job", "hydra", "all"))
    parser.add_argument("-p", "--package", dest="package")
    parser.add_argument("-i", "--info", dest="info", nargs="?", const="all", choices=TOPICS)
    parser.add_argument("--resolve", dest="resolve", action="store_true")
    parser.add_argument("-cn", "--config-name", dest="config_name")
    parser.add_argument("-cd", "--config-dir", dest="config_dir")
    parser.add_argument("--hydra-help", dest="hydra_help", action="store_true")
    parser.add_argument("--version", dest="version", action="store_true")
    return parser


SWITCHED = ("true", "false", "yes", "no", "on", "off", "0", "1")  # values that other programs' switches take


def split_argv(argv: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Split argv into (options as `--name=value`, overrides). Values are taken verbatim, even with a leading dash.

    Raises UserError for an unknown option, an option given twice, or an option without its value.
    """
    actions: dict[str, argparse.Action] = dict(parser._option_string_actions)
    options, overrides, seen = [], [], set()
    words = deque(argv)
    while words:
        word = words.popleft()
        name = word.partition("=")[0]
        if not word.startswith("-") or word == "-":
            overrides.append(word)
            continue
        if name not in actions:
            raise UserError(f"Unknown option {name}{_instead(name, actions)} (sglang generate --help lists all)")
        if actions[name].dest in seen:
            raise UserError(f"{name} is given twice")
        seen.add(actions[name].dest)
        options.append(_with_value(word, actions, words))
        if actions[name].nargs == 0 and words and words[0].lower() in SWITCHED:
            raise UserError(
                f"{name} is a switch and takes no value, and '{words[0]}' follows it: write one of "
                f"{' and '.join(actions[name].option_strings)}"
            )
    return options, overrides


def _with_value(word: str, actions: dict[str, argparse.Action], following: deque[str]) -> str:
    """The option as `--name=value`, which argparse cannot misread; consumes the next word if it is the value."""
    name, equals, value = word.partition("=")
    action = actions[name]
    if action.nargs == 0:
        if equals:
            raise UserError(f"{name} is a switch and takes no value (write {' or '.join(action.option_strings)})")
        return word
    if not equals and action.nargs == "?":
        if not following or following[0] not in (action.choices or ()):
            return word
        value = following.popleft()
    elif not equals:
        if not following or following[0] in actions:
            hint = f" (write {name}={following[0]} if '{following[0]}' is the value)" if following else ""
            raise UserError(f"{name} needs a value{hint}")
        value = following.popleft()
    return f"{action.option_strings[-1]}={value}"


def _instead(name: str, legal: Iterable[str]) -> str:
    """A clause for an error message that proposes the config key of that name, or else the closest option."""
    key = name.lstrip("-").replace("-", "_")
    paths = [path for path in leaves() if key and path.rpartition(".")[2] == key]
    return f"; write {paths[0]}=..." if len(paths) == 1 else nearest(name, legal)


def command_generate(argv: Sequence[str]) -> int:
    """`sglang generate`: parse, compose and run. Returns the exit code."""
    parser = build_parser()
    options, overrides = split_argv(argv, parser)
    given = vars(parser.parse_args(options))
    if given.get("help"):
        files.print_result(help_page.generate(parser))
        return 0
    choices, place = _choices(given, overrides), env.torchrun()
    if "cfg" not in given and (unused := {"package", "resolve"} & given.keys()):
        raise UserError(f"--{min(unused)} has no effect without --cfg; add --cfg job, hydra or all")
    if given.get("multirun") and given.get("cfg") in ("job", "all"):
        raise UserError("--cfg job shows one job; leave out --multirun and every sweep")
    if given.get("hydra_help") or given.get("info") or given.get("cfg"):
        from sglang_gen.config.show import show

        files.print_result(show(choices, given))
        return 0
    if given.get("version"):
        files.print_result(help_page.version())
        return 0
    if given.get("run") and given.get("multirun"):
        raise UserError("--run and --multirun exclude each other")
    from sglang_gen.sweep.multirun import is_multirun

    if not given.get("run") and is_multirun(choices, bool(given.get("multirun"))):
        if place is not None:
            raise UserError(
                "torchrun has started the ranks of one run, and each job of a multirun starts its own: "
                "sweep without torchrun"
            )
        from sglang_gen.sweep import jobs

        return jobs.run_sweep(choices, argv)
    from sglang_gen.config.compose import compose
    from sglang_gen.generate import execute

    composed = compose(choices)
    if place is not None:
        from sglang_gen.launch import torchrun

        composed = torchrun.fit(composed, place, "parallel=single" in overrides)
    execute(composed)
    return 0


def _choices(given: dict[str, Any], overrides: Sequence[str]) -> "Choices":
    """The `Choices` of a command line. Raises UserError for a value of the wrong type."""
    from sglang_gen.config.choices import Choices
    from sglang_gen.config.flag_values import flag_values

    folder, name = given.get("config_dir"), given.get("config_name", "config")
    if not name or name.startswith("/") or {".", ".."} & {*name.split("/")}:
        raise UserError(
            f"--config-name: '{name}' is not a name in a configuration folder; give the folder as --config-dir and the "
            "name of the file in it"
        )
    return Choices(
        overrides=tuple(overrides),
        flags=flag_values(given),
        file=given.get("config"),
        config_dir=None if folder is None else os.path.expanduser(folder),
        config_name=name,
    )


def command_models(argv: Sequence[str]) -> int:
    """`sglang models`: list the model presets."""
    if argv:
        if set(argv) <= {"-h", "--help"}:
            files.print_result(help_page.MODELS)
            return 0
        raise UserError(f"sglang models takes no arguments, found '{argv[0]}'")
    files.print_result(help_page.models())
    return 0


def command_perf(argv: Sequence[str]) -> int:
    """`sglang perf`: compare perf dumps with each other, with a baseline, and over commits."""
    from sglang_gen.perf import command

    return command.main(argv)


def command_report(argv: Sequence[str]) -> int:
    """`sglang report`: write the report of one or more sweeps."""
    from sglang_gen.report import command

    return command.main(argv)


def command_debug(argv: Sequence[str]) -> int:
    """`sglang debug parity`: find the first module whose outputs differ between the backends, for one request."""
    from sglang_gen.debug import command

    if argv[:1] != ["parity"]:
        return command.main(argv)
    parser = build_parser()
    command.add_options(parser)
    options, overrides = split_argv(argv[1:], parser)
    given = vars(parser.parse_args(options))
    if given.get("help"):
        files.print_result(command.PARITY_HELP)
        return 0
    command.check_parity_options(given)
    from sglang_gen.config.compose import compose

    return command.parity(compose(_choices(given, overrides)), given)


def command_tune(argv: Sequence[str]) -> int:
    """`sglang tune`: find the fastest configuration whose images keep a bound, or the schedule of a step cache."""
    if argv[:1] == ["cache"]:
        return _tune_cache(argv[1:])
    from sglang_gen.tune import tuning_options

    parser = build_parser()
    tuning_options.add_tuning_options(parser)
    options, overrides = split_argv(argv, parser)
    given = vars(parser.parse_args(options))
    if given.get("help"):
        from sglang_gen.tune.tuning_help import TUNE_HELP

        files.print_result(TUNE_HELP)
        return 0
    from sglang_gen.tune import command

    return command.tune(_choices(given, overrides), given)


def _tune_cache(argv: Sequence[str]) -> int:
    from sglang_gen.tune import cache_command, plan_options

    parser = build_parser()
    plan_options.add_plan_options(parser)
    options, overrides = split_argv(argv, parser)
    given = vars(parser.parse_args(options))
    if given.get("help"):
        files.print_result(plan_options.CACHE_PLAN_HELP)
        return 0
    words = plan_options.kept_words(parser, options, overrides)
    return cache_command.tune_cache(_choices(given, overrides), given, words)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "generate": command_generate,
    "models": command_models,
    "perf": command_perf,
    "report": command_report,
    "tune": command_tune,
    "debug": command_debug,
}


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        files.print_result(help_page.TOP)
        return 0 if argv else 2
    if argv[0] == "--version":
        files.print_result(help_page.version())
        return 0
    if argv[0] == "serve":
        raise UserError("'sglang serve' is not part of sglang-gen, which generates with diffusion models only")
    if argv[0] not in COMMANDS:
        raise UserError(f"Unknown command '{argv[0]}'{nearest(argv[0], COMMANDS)} (commands: {', '.join(COMMANDS)})")
    return COMMANDS[argv[0]](argv[1:])


def _level(argv: Sequence[str]) -> str:
    """The log level set in argv, read before argv is parsed. Defaults to info."""
    for level in LogLevel:
        typed = {f"--log-level={level.name}", f"log_level={level.name}"}
        if ("--log-level", level.name) in pairwise(argv) or not typed.isdisjoint(argv):
            return level.name
    return LogLevel.info.name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `argv` (default: this process's arguments) and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    level = _level(argv)
    debug = level == LogLevel.debug.name
    log.setup(level)
    log.capture_warnings()
    try:
        with signals.raised():
            place = env.torchrun()
            if place is None:
                with signals.heeded():
                    return _dispatch(argv)
            from sglang_gen.launch import torchrun

            return torchrun.run(place, partial(_dispatch, argv), partial(_report, debug=debug))
    except (Exception, KeyboardInterrupt, Terminated) as error:  # noqa: BLE001 - the command's outermost handler
        return _report(error, debug)


def _report(error: BaseException, debug: bool) -> int:
    """Log why the command failed. Returns the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader closed the pipe
        return 1
    if debug:
        traceback.print_exc()
    code, sentence = ending(error)
    log.error(sentence.encode(errors="backslashreplace").decode())  # the sentence may quote bytes that are not UTF-8
    return code


def console() -> NoReturn:
    """Entry point of the `sglang` script."""
    signals.leave_quietly()
    env.collect_rarely()
    code = main()
    try:
        if sys.stdout is not None:  # None: the process was started with a closed stdout
            sys.stdout.flush()
    except OSError:  # the reader closed the pipe (`| head`), or the disk is full; the interpreter would print an error
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if code == 130:
        signals.forget_unhandled()
    gc.freeze()  # skips the garbage collection at interpreter exit, 0.7 s of CPU
    sys.exit(code)
