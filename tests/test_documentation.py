"""What the pages must hold: every group, option and key, commands that a test runs, and links that lead somewhere."""

import re
from pathlib import Path

import group_pages
import pages
import pytest

from sglang_gen import env
from sglang_gen.config.schema import leaves

GROUPS = {folder.name: folder for folder in (pages.ROOT / "conf").iterdir() if folder.is_dir()}


def options(group: str) -> list[str]:
    """Options of a group that the pages must list: of presets those whose component configs are packaged.

    A model that is added brings one preset and no page; `sglang models` lists it.
    """
    names = sorted(path.stem for path in GROUPS[group].glob("*.yaml"))
    shipped = {"custom", "landscape"}
    return [name for name in names if group != "model" or name in shipped or env.preset_configs(name).is_dir()]


def test_the_pages_hold_commands():
    found = [command for page in pages.PAGES for command in pages.commands(page)]
    assert len(pages.PAGES) >= 22
    assert {command.kind for command in found} == {"", "slow", "refused", "added"}
    assert len(found) >= 75


def test_the_configuration_file_of_the_pages_is_in_the_repository():
    shown = pages.files(pages.ROOT / "docs" / "command.md")["generation_config.json"]
    assert shown == (pages.ROOT / "generation_config.json").read_text(encoding="utf-8")


def test_every_group_has_a_page():
    assert {page.stem for page in pages.GROUP_PAGES} == set(GROUPS)


@pytest.mark.parametrize("page", pages.GROUP_PAGES, ids=lambda page: page.stem)
def test_a_group_page_has_its_keys_options_commands_and_refusals(page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Group `{page.stem}`\n")
    rows = [group_pages.start_of_row(path) for path in group_pages.keys(page.stem)]
    missing = [f"{row} ... |" for row in rows if not re.search(rf"^{re.escape(row)} \S.* \|$", text, re.M)]
    assert not missing, "\n".join([f"{page.name} lacks these rows:", *missing])
    assert set(re.findall(rf"^\| `({page.stem}\.\w+)`", text, re.M)) == set(group_pages.keys(page.stem))
    assert sorted(re.findall(rf"^\| `{page.stem}=(\w+)` \| \S", text, re.M)) == options(page.stem)
    assert {"", "refused"} <= {command.kind for command in pages.commands(page)}
    assert "`effective" in text


def test_every_key_of_the_root_is_on_the_configuration_page():
    text = (pages.ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for path in group_pages.keys(""):
        assert f"\n{group_pages.start_of_row(path)} " in text


def test_every_key_belongs_to_a_page():
    assert {path.partition(".")[0] for path in leaves() if "." in path} | {"experiment"} == set(GROUPS)


def test_every_group_and_option_of_conf_is_on_the_configuration_page():
    text = (pages.ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (?:\[`|`)(\w+)`(?:\]\(groups/\1\.md\))? \| ([^|]+) \| [^|]+ \|$", text, re.M)
    rows = dict(found)
    assert set(rows) == set(GROUPS)
    for group in GROUPS:
        assert sorted(rows[group].strip().split(", ")) == options(group), group
    for page in pages.GROUP_PAGES:
        assert f"(groups/{page.name})" in text


def test_a_whole_sweep_on_a_page_is_one_that_is_shipped():
    named = {command.whole_sweep for page in pages.PAGES for command in pages.commands(page)} - {None}
    assert named
    assert named <= {path.stem for path in (pages.ROOT / "sweeps").glob("*.yaml")}


def anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_every_link_of_the_pages_leads_to_a_file_and_a_title():
    for page in pages.PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
        for target in re.findall(r"\]\(([^)]+)\)", prose):
            if "://" in target:
                continue
            name, _, title = target.partition("#")
            there = Path(page.parent / name) if name else page
            assert there.exists(), f"{page.name}: {target}"
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M) if title else []
            assert not title or title in map(anchor, titles), f"{page.name}: {target}"
