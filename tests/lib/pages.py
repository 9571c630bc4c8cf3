"""The pages: README.md and docs/, their ```bash blocks, and the files that they show.

A block's word says how its commands end: `bash` with exit code 0, `bash slow` the same after a minute of compilation,
`bash refused` with exit code 2 and the sentence in the comment below each command. Commands of `bash added` need the
files that their page adds to the sources; tests/test_adding_a_model.py runs them in a copy.
"""

import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
GROUP_PAGES = sorted((ROOT / "docs" / "groups").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *GROUP_PAGES]
SWEEP = ["generate", "--config-dir", "sweeps", "--config-name"]  # and a name: a whole shipped sweep


@dataclass(frozen=True)
class Command:
    """One line of a page: what follows `sglang`, and the sentence of its refusal where it is refused."""

    page: Path
    line: str
    kind: str = ""
    sentence: str = ""

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.line, comments=True)
        return words[words.index("sglang_gen" if self.launcher else "sglang") + 1 :]

    @property
    def launcher(self) -> list[str]:
        """Options of torchrun, where the line is one of torchrun's; nothing else starts with it."""
        words = shlex.split(self.line, comments=True)
        return words[1 : words.index("sglang_gen") + 1] if words[0] == "torchrun" else []

    @property
    def whole_sweep(self) -> str | None:
        return self.words[4] if self.words[:4] == SWEEP and len(self.words) == 5 else None


def commands(page: Path) -> list[Command]:
    """Lines that start with `sglang` or `torchrun`, in the page's ```bash blocks, in order."""
    found = []
    for kind, block in re.findall(r"^```bash ?(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.M):
        lines = [*block.splitlines(), ""]
        for line, following in pairwise(lines):
            if line.startswith(("sglang ", "torchrun ")):
                found.append(Command(page, line, kind, following.removeprefix("# ") if kind == "refused" else ""))
    return found


def sources(page: Path) -> dict[str, str]:
    """Files of the checkout that the page shows whole: Python and YAML blocks that start with `# path`."""
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r"^```(?:python|yaml)\n# (\S+/\S+\.(?:py|yaml))\n(.*?)^```$", text, re.DOTALL | re.M))


def files(page: Path) -> dict[str, str]:
    """Files that the page shows whole: YAML blocks that start with `# name`, and JSON or text blocks after "`name`"."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"```yaml\n# (\S+\.yaml)\n(.*?)```", text, re.DOTALL)
    named += re.findall(r"`([\w./]+)`[^`\n]*:\n\n```(?:json|text)\n(.*?)```", text, re.DOTALL)
    return dict(named)
