"""The report in a real browser: it runs without a word on the console, asks for nothing, and fits narrow and wide windows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.monitoring.report.browser import Browser, Page, find_browser
from tests.unit.monitoring.report.made_up import make_run

from meshbolt.monitoring.report import find_runs, write_report

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium here: apt-get install chromium")
WIDTHS = (390, 1440)
# What is written smaller than this is not read on a telephone.
SMALLEST_PIXELS = 12


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = make_run(tmp_path_factory.mktemp("browser"))
    return write_report(find_runs(directory)[0], directory / "report.html").as_uri()


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, browser: Browser, address: str) -> Page:
    return browser.open(address, width=request.param)


def test_the_console_is_silent_and_only_the_page_is_asked_for(page: Page, address: str) -> None:
    page.evaluate("document.querySelectorAll('.field').forEach(f => f.dispatchEvent(new PointerEvent('pointermove')))")

    assert page.errors == []
    assert page.requests == [address]


def test_nothing_is_wider_than_the_window(page: Page) -> None:
    wide = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, nav, svg, #tip') && "
        "e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 90))"
    )

    assert wide == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.parametrize("width", [390, 640, 800, 1000, 1100, 1440, 2200])
def test_figures_fill_their_rows(width: int, browser: Browser, address: str) -> None:
    page = browser.open(address, width=width)
    size = "(e => e.offsetWidth * e.offsetHeight)"
    boxes = page.evaluate(f"[...document.querySelectorAll('.figure')].map({size})")
    frame = page.evaluate(f"{size}(document.querySelector('.figures'))")

    assert sum(boxes) / frame > 0.96


def test_every_chart_is_drawn_with_its_axes(page: Page) -> None:
    empty = page.evaluate(
        "[...document.querySelectorAll('.chart')].filter(c => !c.querySelector('path.line, path.area') || "
        "c.querySelector('.field').clientWidth < 150 || c.querySelectorAll('.ys span').length < 2 || "
        "c.querySelectorAll('.xs span').length < 2).map(c => c.querySelector('figcaption').textContent)"
    )

    assert empty == []
    assert page.evaluate("document.querySelectorAll('.chart').length") >= 15
    assert page.evaluate("document.querySelectorAll('.lanes span').length") == 64


def test_text_is_large_enough_to_read(page: Page) -> None:
    small = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && "
        f"!e.matches('script') && parseFloat(getComputedStyle(e).fontSize) < {SMALLEST_PIXELS}).length"
    )

    assert small == 0


def test_labels_of_an_axis_do_not_cover_each_other(page: Page) -> None:
    covered = page.evaluate(
        "[...document.querySelectorAll('.xs, .ys')].filter(axis => { const boxes = [...axis.children].map(e => "
        "e.getBoundingClientRect()); return boxes.some((a, i) => boxes.slice(i + 1).some(b => a.left < b.right && "
        "b.left < a.right && a.top < b.bottom && b.top < a.bottom)); }).map(axis => axis.textContent)"
    )

    assert covered == []


def test_a_pointer_on_a_chart_is_told_the_exact_values_of_a_step(page: Page) -> None:
    page.move_to(".field", right=0.5)
    told = page.evaluate("document.getElementById('tip').innerText")

    assert page.evaluate("!document.getElementById('tip').hidden")
    assert "step 1,0" in told
    assert "train_loss" in told
    assert "val_loss" in told
    inside = "(b => b.left >= 0 && b.right <= innerWidth && b.top >= 0)(document.getElementById('tip').getBoundingClientRect())"
    assert page.evaluate(inside)
    lines = "[...document.querySelectorAll('#tip tr')].map(row => row.getBoundingClientRect().height)"
    assert max(page.evaluate(lines)) < 30, "a name and its values stand on one line"
    assert page.evaluate("document.querySelectorAll('.hair').length") > 10, "the same step is marked in all charts"


def test_arrow_keys_go_through_the_steps(page: Page) -> None:
    page.evaluate("document.querySelector('.field').focus()")
    for key in ("Home", "ArrowRight"):
        page.ask("Input.dispatchKeyEvent", type="keyDown", key=key)

    assert "step 20" in page.evaluate("document.getElementById('tip').innerText")
    page.ask("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    assert page.evaluate("document.getElementById('tip').hidden")


def test_a_box_of_the_pipeline_tells_what_it_is(page: Page) -> None:
    page.move_to(".lanes span")

    assert "microbatch 0: forward, 5.5 ms" in page.evaluate("document.getElementById('tip').innerText")


def test_text_stands_out_from_its_ground_by_day_and_by_night(browser: Browser, address: str) -> None:
    """WCAG asks for a contrast of 4.5 for text of this size."""
    script = """(() => {
      const parts = c => c.match(/[\\d.]+/g).map(Number);
      const light = c => {
        const [r, g, b] = parts(c).slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b; };
      const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
        if (parts(c)[3] !== 0) return c; } return 'rgb(255, 255, 255)'; };
      return [...document.querySelectorAll('body *')].filter(e => !e.closest('.share, .lanes div, script, style') &&
        [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
          const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
          return [(a + .05) / (b + .05), e.className || e.tagName]; }).filter(([ratio]) => ratio < 4.5);
    })()"""
    for dark in (False, True):
        page = browser.open(address, width=1440, dark=dark)
        assert page.evaluate(script) == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(16, 19, 23)") == dark


def test_without_javascript_all_is_there_but_what_is_under_the_pointer(browser: Browser, address: str) -> None:
    page = browser.open(address, width=1440, javascript=False)
    picture = page.ask("DOMSnapshot.captureSnapshot", computedStyles=[])
    text = " ".join(picture["strings"])

    assert "train_loss" in text
    assert "reduce_scatter" in text
    assert page.errors == []


def test_it_prints_with_every_section(browser: Browser, address: str) -> None:
    page = browser.open(address, width=1440, dark=True)
    page.ask("Emulation.setEmulatedMedia", media="print", features=[])

    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(page.ask("Page.printToPDF", printBackground=True)["data"]) > 10_000


def test_a_report_of_a_hundred_thousand_steps_opens_at_once(browser: Browser, tmp_path: Path) -> None:
    directory = make_run(tmp_path, ranks=1, steps=100_000, every=20)
    report = write_report(find_runs(directory)[0], directory / "report.html")
    page = browser.open(report.as_uri(), width=1440)
    took = page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart")

    assert report.stat().st_size < 3_000_000
    assert took < 3000, f"{took} ms; it takes about 80 on a quiet machine"
    assert page.errors == []
