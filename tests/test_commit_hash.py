"""The commit of a checkout that runs name."""

import subprocess
from pathlib import Path

import pytest

from sglang_gen import env


@pytest.mark.whole
def test_asking_for_the_commit_takes_no_lock_of_the_repository(tmp_path, monkeypatch):
    """A run that is killed while git holds the lock would leave it, and git would refuse the next commit."""
    (tmp_path / "package").mkdir()
    (tmp_path / "file").write_text("a")
    for words in (["init", "-q"], ["add", "file"],
                  ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "First"]):  # fmt: skip
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    index = tmp_path / ".git" / "index"
    (tmp_path / "file").write_text("a")  # another time of change, for which git status would refresh the index
    before = index.stat().st_mtime_ns, index.stat().st_ino
    monkeypatch.setattr(env, "__file__", str(Path(tmp_path, "package", "env.py")))
    assert len(env.commit_hash.__wrapped__()) == 40
    assert (index.stat().st_mtime_ns, index.stat().st_ino) == before
