"""The report in a real browser: Debian's Chromium, driven by Playwright. Part of make test-all only.

`.ci/run` installs Chromium. Elsewhere the tests are skipped without it, unless REQUIRE_BROWSER is set.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sweep_folders import cache_and_guidance, dump, job, pixels

from sglang_gen.report.write import write_report

CHROMIUM = Path("/usr/bin/chromium")
SWITCHES = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync")  # fmt: skip
HOSTILE = "</script><script>window.owned=1</script><img src=x onerror='window.owned=2'>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("reports"),
    pytest.mark.skipif(
        not CHROMIUM.exists() and not os.environ.get("REQUIRE_BROWSER"),
        reason="needs /usr/bin/chromium (apt-get install chromium)",
    ),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"), executable_path=CHROMIUM, args=list(SWITCHES), headless=True
        )
        yield context
        context.close()


@pytest.fixture
def opened(browser):
    """Open a page, 1400 pixels wide unless told otherwise; fail on any message of the console and any request."""
    messages: list[str] = []
    pages = []

    def visit(path: Path, width: int = 1400, scheme: str = "light"):
        page = browser.new_page()
        pages.append(page)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or messages.append(request.url))
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.goto(path.resolve().as_uri())
        plots = page.locator("[data-plot]").count()
        page.wait_for_function("count => document.querySelectorAll('.chart svg').length === count", arg=plots)
        return page

    yield visit
    for page in pages:
        page.close()
    assert messages == []


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sglang_gen.report.vega_scripts.missing", list)
        return write_report([cache_and_guidance(tmp_path_factory.mktemp("sweeps") / "caches")])[0]


IMAGES = "images => images.map(image => image.complete && image.naturalWidth > 0)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_every_image_and_every_plot_is_drawn_and_the_page_is_not_wider_than_the_window(opened, caches, width, scheme):
    page = opened(caches, width, scheme)
    assert page.eval_on_selector_all("img", IMAGES) == [True] * 5
    marks = page.eval_on_selector_all(
        ".chart svg", "plots => plots.map(plot => plot.querySelectorAll('.mark-rect path, .mark-symbol path').length)"
    )
    assert len(marks) == 9
    assert all(count > 1 for count in marks)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    widths = page.eval_on_selector_all(
        ".chart", "places => places.map(place => place.clientWidth - place.firstChild.clientWidth)"
    )
    assert all(abs(rest) < 40 for rest in widths)


def test_colours_of_plots_follow_the_scheme(opened, caches):
    colours = {
        scheme: opened(caches, 1400, scheme).eval_on_selector(
            ".chart .role-mark.mark-text text", "text => getComputedStyle(text).fill"
        )
        for scheme in ("light", "dark")
    }
    assert colours == {"light": "rgb(27, 29, 32)", "dark": "rgb(230, 232, 234)"}


def test_the_pointer_on_a_point_shows_its_cell(opened, caches):
    page = opened(caches)
    page.locator('[aria-label="Time and quality"] .role-mark.mark-symbol path').first.hover()
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    assert "cache=none, guidance=3" in tooltip.inner_text()
    assert "identical" in tooltip.inner_text()


def test_the_grid_changes_with_its_keys_and_shows_differences(opened, caches):
    page = opened(caches)
    headings = "cells => cells.map(cell => cell.textContent)"
    assert page.eval_on_selector_all("#grid th", headings) == [
        "cache none",
        "cache dbcache",
        "guidance 3",
        "guidance 7.5",
    ]
    page.get_by_label("Columns", exact=True).first.select_option(label="guidance")
    assert page.eval_on_selector_all("#grid th", headings) == [
        "guidance 3",
        "guidance 7.5",
        "cache none",
        "cache dbcache",
    ]
    page.get_by_label("Rows", exact=True).first.select_option(label="none")
    page.get_by_label("cache", exact=True).first.select_option(label="dbcache")
    assert page.locator("#grid .item").count() == 2
    page.get_by_label("cache", exact=True).first.select_option(label="all")
    assert page.locator("#grid .item").count() == 4
    assert not page.locator("img.difference").first.is_visible()
    page.get_by_label("Differences").check()
    difference = page.locator("img.difference").first
    assert difference.is_visible()
    page.get_by_label("amplified").select_option("32")
    assert difference.evaluate("image => getComputedStyle(image).filter") == "brightness(32)"


def test_the_table_sorts_by_a_column_and_keeps_lost_cells_last(opened, caches):
    page = opened(caches)
    jobs = "rows => rows.map(row => row.cells[0].textContent)"
    page.get_by_role("button", name="time per image").click()
    assert page.eval_on_selector_all("table.cells tbody tr", jobs) == ["2", "0", "1", "3"]
    page.get_by_role("button", name="time per image").click()
    assert page.eval_on_selector_all("table.cells tbody tr", jobs)[-1] == "3"


def test_text_of_users_runs_nothing(opened, tmp_path):
    for index in range(2):
        content = dump([1.0 + index, 1.1 + index], prompt=HOSTILE)
        content["meta"]["model"] = HOSTILE
        job(tmp_path, f"tag={HOSTILE}{index}", f"x={index}", content=content, images=[pixels(index)])
    job(tmp_path, f"tag={HOSTILE}2", "x=2", error=HOSTILE)
    page = opened(write_report([tmp_path])[0])
    page.locator(".role-mark.mark-symbol path").first.hover()
    page.locator("#vg-tooltip-element.visible").wait_for()
    assert page.evaluate("window.owned === undefined")
    assert page.locator("#vg-tooltip-element img").count() == 0


def test_a_hundred_cells_fit_on_a_page(opened, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (320, 320, 3)).astype(np.uint8)
    for index in range(100):
        job(tmp_path, f"x={index % 10}", f"y={index // 10}", content=dump([1.0 + index / 100, 1.1 + index / 100]),
            images=[noise + index])  # fmt: skip
    path, grid = write_report([tmp_path])
    assert path.stat().st_size < 40_000_000
    assert grid.stat().st_size < 30_000_000
    page = opened(path, 400)
    assert page.eval_on_selector_all("img.made", IMAGES) == [True] * 100
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_a_page_prints_on_paper(opened, caches, tmp_path):
    page = opened(caches, scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#controls select").first.is_visible()
    data = page.pdf(format="A4")
    assert data.startswith(b"%PDF")
