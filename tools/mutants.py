"""Plants bugs in a copy of the sources, one at a time, and says which test notices each.

    python -m tools.mutants                    # all of them, one after the other
    python -m tools.mutants NAME ...           # those whose name contains one of the words
    python -m tools.mutants --list
    python -m tools.mutants --check-clean      # first run every selection of tests without a bug: all must pass

The bugs stand in `tools.planted`. The copy is made once, in a temporary folder; the working tree is only read. Exits
with 1 where a bug survives its tests, where its text is no longer in the file, or where its tests fail without it.
"""

import argparse
import importlib
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from tools.planted import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("sglang_gen", "conf", "tests", "tools", "pyproject.toml")
LIBRARIES = (
    "diffusers.pipelines.auto_pipeline", "diffusers.hooks", "hydra", "hypothesis", "torch.utils.flop_counter",
)  # fmt: skip
SECONDS = 240.0  # of one selection of tests
FAILED, NO_TESTS = 1, 5  # exit codes of pytest; others are errors of its own, such as a file that does not import


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutants", description="Plant bugs and see which test notices."
    )
    parser.add_argument("names", nargs="*", help="words of the names of bugs; all without one")
    parser.add_argument("--list", action="store_true", help="print the bugs and their tests")
    parser.add_argument("--check-clean", action="store_true", help="first run all tests concerned without a bug")
    given = parser.parse_args(argv)
    chosen = [each for each in MUTANTS if not given.names or any(word in each.name for word in given.names)]
    if given.list:
        for each in chosen:
            print(f"{each.name}  [{each.file}; {each.tests}]")
        return 0
    if not chosen:
        parser.error(f"no bug has {' or '.join(given.names)} in its name")
    _import_libraries()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = copied(Path(folder))
        broken = _check_clean(copy, chosen) if given.check_clean else 0
        return 1 if broken + _run(copy, chosen) else 0


def _import_libraries() -> None:
    """What takes seconds to import, once for all tests, under the variables that `tests/conftest.py` sets."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    errors = os.dup(2)
    with open(os.devnull, "w") as nowhere:  # libraries remark on what they miss
        os.dup2(nowhere.fileno(), 2)
    try:
        for name in LIBRARIES:
            importlib.import_module(name)
    finally:
        os.dup2(errors, 2)
        os.close(errors)


def copied(folder: Path) -> Path:
    """A copy of what the tests need, without compiled files."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    return folder


def _check_clean(copy: Path, chosen: Iterable[Mutant]) -> int:
    """How many selections of tests do not pass without a bug."""
    broken = 0
    for tests in dict.fromkeys(each.tests for each in chosen):
        code, output = run_tests(copy, tests)
        broken += code != 0
        print(f"{'clean' if code == 0 else f'NOT CLEAN ({_why(code, output)})'}: {tests}", flush=True)
    return broken


def _run(copy: Path, chosen: Sequence[Mutant]) -> int:
    """How many of the bugs survive or cannot be planted."""
    bad = 0
    begun = time.monotonic()
    for number, each in enumerate(chosen, start=1):
        started = time.monotonic()
        caught, verdict = judge(copy, each, number)
        bad += not caught
        print(f"{verdict}: {each.name}  [{time.monotonic() - started:.0f} s]", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} caught in {(time.monotonic() - begun) / 60:.1f} minutes")
    return bad


def judge(copy: Path, mutant: Mutant, number: int) -> tuple[bool, str]:
    """Whether the tests notice the bug, and the verdict in words."""
    count = (copy / mutant.file).read_text().count(mutant.before) if (copy / mutant.file).is_file() else 0
    if count != 1:
        return False, f"DOES NOT APPLY ({mutant.file} has the text {count} times)"
    with planted(copy / mutant.file, mutant, number):
        code, output = run_tests(copy, mutant.tests)
    if code == 0:
        return False, f"SURVIVED {mutant.tests}"
    if code in (FAILED, None):
        return True, f"caught by {_why(code, output)}"
    return False, f"DOES NOT APPLY ({_why(code, output)})"


@contextmanager
def planted(path: Path, mutant: Mutant, number: int) -> Iterator[None]:
    """The bug in the file, which is restored afterwards."""
    clean, status = path.read_bytes(), path.stat()
    path.write_text(path.read_text().replace(mutant.before, mutant.after))
    # Compiled files are told to be stale by size and whole seconds of the time, so that each version has its own.
    os.utime(path, (status.st_atime, status.st_mtime + number))
    try:
        yield
    finally:
        path.write_bytes(clean)
        os.utime(path, (status.st_atime, status.st_mtime))


def run_tests(copy: Path, tests: str) -> tuple[int | None, str]:
    """Exit code and output of pytest, which stops at the first failure; None where it took too long.

    It runs in a fork of this process, which has imported what takes long, so that each run has its own modules of ours.
    """
    known = "ignore::pytest.PytestAssertRewriteWarning"  # plugins that are imported already
    words = ["-x", "-q", "-p", "no:cacheprovider", "-W", known, *shlex.split(tests)]
    with tempfile.TemporaryFile("w+") as output:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _be_pytest(copy, words, output.fileno())
        code = _wait(child)
        output.seek(0)
        return code, output.read()


def _be_pytest(copy: Path, words: list[str], output: int) -> None:
    """In the child: run the tests of the copy, as `python -m pytest` would there, and end."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path[:] = [str(copy), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    sys.argv = ["pytest", *words]
    sys.modules["__main__"] = ModuleType("__main__")  # which ranks that are spawned would import
    code = FAILED + 1
    try:
        code = int(pytest.main(words))
    except BaseException:  # noqa: BLE001 - what the parent shows of it is the output
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(child: int) -> int | None:
    """The exit code of a child; None for one that was ended, with its ranks, since it took too long."""
    limit = time.monotonic() + SECONDS
    while time.monotonic() < limit:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _why(code: int | None, output: str) -> str:
    """The test that failed, or what else happened."""
    if code is None:
        return f"the limit of {SECONDS:.0f} seconds"
    if code == NO_TESTS:
        return "no test is selected"
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", output, re.MULTILINE)
    return found[1] if found else f"pytest's exit code {code}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
