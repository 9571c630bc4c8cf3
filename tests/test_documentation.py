"""Every command in README.md and docs/ is one that the command accepts: it parses, composes and plans."""

import re
import shlex
from pathlib import Path

import pytest

from sglang_gen import config, hub, plan
from sglang_gen.cli import build_parser, flag_values, split_argv

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Lines that start with `sglang generate`, in ```bash blocks."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found += [line for line in block.splitlines() if line.startswith("sglang generate")]
    return found


def test_the_pages_hold_commands():
    assert len(PAGES) >= 11
    assert len(commands()) >= 12


@pytest.mark.parametrize("line", commands())
def test_a_documented_command_is_accepted(line):
    path = "stabilityai/stable-diffusion-xl-base-1.0"
    Path("generation_config.json").write_text(f'{{"model_path": "{path}", "prompt": "a"}}')
    Path("outputs").mkdir()
    Path("outputs/generated_image_0.json").write_text('{"schema_version": 1, "run": {"sampling": {"prompt": "a"}}}')
    parser = build_parser()
    options, overrides = split_argv(shlex.split(line, comments=True)[2:], parser)
    given = vars(parser.parse_args(options))
    choices = config.Choices(tuple(overrides), flag_values(given), given.get("config"))
    if given.get("multirun"):
        jobs = config.multirun(choices, lambda job: config.compose(job.choices))
        assert len(jobs) > 1
    else:
        jobs = [config.compose(choices)]
    for composed in jobs:
        plan.check(composed)
        plan.make_plan(composed, hub.find(composed.run.model, weights=False))


def test_every_group_and_option_of_conf_is_on_the_configuration_page():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE))
    groups = {folder.name: folder for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
    assert set(rows) == set(groups)
    for group, folder in groups.items():
        assert sorted(rows[group].strip().split(", ")) == sorted(path.stem for path in folder.glob("*.yaml")), group


def test_every_link_of_the_pages_leads_to_a_file():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
