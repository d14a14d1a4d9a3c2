"""The report in a real browser: what it asks for, how it looks to a reader of any kind."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, NO_BROWSER, Browser, browser
from large_run import write_large_run
from synthetic_run import SyntheticRun

from sublim_plugin.analysis.collect import CellRef
from sublim_plugin.analysis.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)

MEGABYTES = 1_000_000

SMALLEST_CONTRAST = """
(() => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const colour = text => text.match(/[0-9.]+/g).map(Number);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const found = colour(getComputedStyle(node).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  let least = [99, ''], seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.getClientRects().length) continue;
    const pair = [light(colour(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    seen += 1;
    if (ratio < least[0]) least = [ratio, node.outerHTML.slice(0, 200)];
  }
  return {ratio: least[0], where: least[1], seen};
})()
"""

OVERFLOWING = """
[...document.querySelectorAll('body *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
  .filter(e => !e.parentElement.closest('.scroll'))
  .map(e => e.outerHTML.slice(0, 100)).slice(0, 5)
"""

FOCUSED = """
(() => {
  const e = document.activeElement, style = getComputedStyle(e);
  const all = [...document.querySelectorAll('a[href], [tabindex="0"]')];
  return {at: all.indexOf(e), text: e.textContent.slice(0, 40), id: e.id,
          outline: style.outlineStyle, count: all.length};
})()
"""


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three datasets of two traits, two contexts, replies, a failed cell: all sections."""
    run = SyntheticRun(tmp_path_factory.mktemp("run"), n_questions=5)
    for context in ("empty", "none"):
        run.probe(None, context)
    for seed in range(3):
        for trait in ("animals/cat", "animals/owl", "neutral"):
            dataset = run.dataset(trait, seed)
            for rank in (8, 64, None):
                student = run.student(dataset, trait, rank, seed, train_context="none", steps=3)
                for context in ("empty", "none"):
                    run.probe(student, context, shift=0.5, replies=["Cat", "x" * 2000])
    cells = [CellRef(folder=folder, state=state) for folder, state in run.cells]
    lost = run.root / "cells" / f"student-{'lost' * 30}"
    cells.append(CellRef(folder=lost, state="failed", label="lost", error="e" * 3000))
    study = "name: s\n# " + "long-line" * 40
    return write_report(run.root, study_name="s", cells=cells, study_text=study)


def complaints(tab: Browser) -> list[Any]:
    """What the console said and what failed, since the page was opened."""
    kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    failed = "Network.loadingFailed"
    return [params for method, params in tab.events if method in (*kinds, failed)]


def test_it_asks_for_nothing_and_complains_of_nothing(tab: Browser, report: Path) -> None:
    tab.open(report)
    asked = [p["request"]["url"] for m, p in tab.events if m == "Network.requestWillBeSent"]
    assert asked[0] == report.resolve().as_uri()
    assert len(asked) > 5  # the figures are inside
    assert all(url.startswith("data:image/svg+xml;base64,") for url in asked[1:])
    assert complaints(tab) == []
    images = tab.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(images) == 6
    assert all(complete and width > 100 for complete, width in images)


def test_the_probes_of_these_tests_see_what_is_wrong(tab: Browser, tmp_path: Path) -> None:
    """A page with a blocked image, a script that fails, faint text, and something too wide."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width">'
        '<img src="https://nowhere.invalid/x.png"><script>console.error("no"); nothing()</script>'
        '<p style="color:#999">faint</p><p style="width:500px">wide</p>'
    )
    tab.open(page, 360)
    time.sleep(0.2)
    assert len(complaints(tab)) >= 2
    assert any("nowhere.invalid" in json.dumps(params) for _, params in tab.events)
    assert tab.evaluate(SMALLEST_CONTRAST)["ratio"] < 3
    assert tab.evaluate("document.documentElement.scrollWidth") > 360


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_no_width_scrolls_sideways(tab: Browser, report: Path, width: int) -> None:
    tab.open(report, width, 800)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(OVERFLOWING) == []


@pytest.mark.parametrize("media", [{}, {"scheme": "dark"}, {"type": "print"}], ids=str)
def test_every_text_has_contrast(tab: Browser, report: Path, media: dict[str, str]) -> None:
    tab.open(report, **media)
    found = tab.evaluate(SMALLEST_CONTRAST)
    assert found["seen"] > 500
    assert found["ratio"] >= 4.5, found
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(22, 24, 28)") == (media == {"scheme": "dark"})


def test_paper_has_no_navigation_and_is_not_cut(tab: Browser, report: Path) -> None:
    tab.open(report, 718, 1000, type="print")  # A4 less margins of 1 cm, in CSS pixels
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert tab.evaluate("getComputedStyle(document.querySelector('.skip')).display") == "none"
    wide = """[...document.querySelectorAll('table, img, pre')]
      .filter(e => e.getBoundingClientRect().right > innerWidth)
      .map(e => e.outerHTML.slice(0, 120))"""
    assert tab.evaluate(wide) == []
    pages = tab.pdf()
    assert pages.startswith(b"%PDF") and pages.count(b"/Type /Page\n") > 5


def test_a_keyboard_reaches_everything_in_order(tab: Browser, report: Path) -> None:
    tab.open(report)
    tab.press("Tab", 9)
    first = tab.evaluate(FOCUSED)
    assert first["text"] == "Skip to the answers" and first["at"] == 0
    tab.press("Enter", 13)
    assert tab.evaluate(FOCUSED)["id"] == "main"
    tab.open(report)
    order = []
    for _ in range(60):
        tab.press("Tab", 9)
        focused = tab.evaluate(FOCUSED)
        assert focused["outline"] != "none", focused
        order.append(focused["at"])
    assert order == list(range(60)) and first["count"] > 60
    assert tab.evaluate("[...document.querySelectorAll('[tabindex]')].every(e => e.tabIndex <= 0)")


def test_a_screen_reader_finds_names_for_everything(tab: Browser, report: Path) -> None:
    """The accessibility tree that the browser makes: figures, tables, regions, headings."""
    tab.open(report)
    tab.send("Accessibility.enable")
    nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
    tab.send("Accessibility.disable")
    by_role: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            name = str(node.get("name", {}).get("value", ""))
            by_role.setdefault(str(node.get("role", {}).get("value")), []).append(name)
    for role in ("image", "table", "region", "heading", "link", "columnheader", "rowheader"):
        names = by_role[role]
        assert names and all(name.strip() for name in names), (role, names)
    assert len(by_role["image"]) == 6 and min(map(len, by_role["image"])) > 60
    assert len(by_role["main"]) == 1 and by_role["navigation"] == ["Sections"]
    levels = tab.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_an_empty_and_a_failed_study_open_too(tab: Browser, tmp_path: Path) -> None:
    lost = [CellRef(folder=tmp_path / "a" / f"student-{i}", state="failed", error="no memory")
            for i in range(3)]  # fmt: skip
    for name, cells in (("empty", []), ("failed", lost)):
        tab.open(write_report(tmp_path / name, study_name=name, cells=cells), 360)
        assert complaints(tab) == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert tab.evaluate("document.querySelector('h1').textContent").startswith(name)


def test_a_comparison_opens_on_a_phone(tab: Browser, report: Path, tmp_path: Path) -> None:
    from sublim_plugin.analysis.compare import side
    from sublim_plugin.analysis.compare_page import write_comparison

    shutil.copytree(report.parents[1] / "cells", tmp_path / "b" / "cells")
    for folder in list((tmp_path / "b" / "cells").glob("*-neutral-*")):
        shutil.rmtree(folder)
    kept = [p for p in (tmp_path / "b" / "cells").glob("probe-*") if not _student_is_there(p)]
    for folder in kept:
        shutil.rmtree(folder)
    a, b = side("a", report.parents[1], None), side("b", tmp_path / "b", None)
    for width, scheme in ((360, "light"), (1280, "dark")):
        tab.open(write_comparison(a, b, tmp_path / "c"), width, scheme=scheme)
        assert complaints(tab) == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(SMALLEST_CONTRAST)["ratio"] >= 4.5


def _student_is_there(probe: Path) -> bool:
    student = json.loads((probe / "manifest.json").read_text())["spec"]["student"]
    return student is None or any(probe.parent.glob(f"student-*{student[:12]}"))


@pytest.mark.slow
def test_five_thousand_cells(tab: Browser, tmp_path: Path) -> None:
    """Under 10 MB, and open within 3 s: from the start of navigation to the end of loading."""
    cells = write_large_run(tmp_path, n_datasets=28, failed=110)
    assert len(cells) > 5000
    started = time.monotonic()
    path = write_report(tmp_path, study_name="large", cells=cells, equivalence_margin=0.5)
    seconds = time.monotonic() - started
    size = path.stat().st_size
    times = []
    for _ in range(3):
        tab.open(path)
        times.append(tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    tab.open(path, 360, 800)
    print(f"{len(cells)} cells: written in {seconds:.1f} s, {size} bytes, opened in {times} ms")
    assert size < 10 * MEGABYTES
    assert min(times) < 3000
    assert complaints(tab) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert tab.evaluate("document.images.length") == 6
