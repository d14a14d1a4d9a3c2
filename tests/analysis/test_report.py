"""The page: complete, self-contained, safe, and honest about what is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import CONTEXTS, SyntheticRun

from sublim_plugin.analysis.collect import CellRef, collect
from sublim_plugin.analysis.effects import effects
from sublim_plugin.analysis.findings import findings
from sublim_plugin.analysis.methods import CONSTRAINED
from sublim_plugin.analysis.report import write_report
from sublim_plugin.analysis.transmission import question_differences, transmission_table
from sublim_plugin.core.errors import InputError

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> SyntheticRun:
    return SyntheticRun(tmp_path / "quickstart")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = SyntheticRun(tmp_path_factory.mktemp("run"))
    run.quickstart()
    return write_report(run.root, study_name="quickstart", cells=run.cells, study_text="a: <b>")


FILES = ("png", "svg", "csv")


def test_every_file_is_there(quickstart: Path) -> None:
    names = {path.name for path in quickstart.parent.iterdir()}
    figures = {f"{f}.{x}" for f in ("transmission", "contexts", "losses") for x in FILES}
    assert names == {"index.html", "results.csv", "effects.csv", "evidence.csv"} | figures


def test_nothing_is_fetched(quickstart: Path) -> None:
    page = read(quickstart)
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "form", "base"}
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in {"src", "srcset", "poster", "data", "background"}:
                assert value and value.startswith("data:image/svg+xml;base64,")
            if name == "href" and value and "://" in value:
                assert tag == "a"
                assert value.startswith("https://arxiv.org/abs/")
    text = quickstart.read_text()
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_links_lead_somewhere(quickstart: Path) -> None:
    page = read(quickstart)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for attrs in page.named("a"):
        href = attrs["href"] or ""
        if href.startswith("#"):
            assert href[1:] in ids
        elif "://" not in href:
            assert (quickstart.parent / href).is_file()


def test_readable_without_sight_of_the_figures(quickstart: Path) -> None:
    page = read(quickstart)
    assert page.named("html")[0]["lang"] == "en"
    images = page.named("img")
    assert len(images) == 3
    assert all(len(image["alt"] or "") > 60 for image in images)
    assert all(attrs.get("scope") in {"col", "row"} for attrs in page.named("th"))
    assert len(page.named("caption")) == len(page.named("table"))
    assert any(attrs.get("name") == "viewport" for attrs in page.named("meta"))


def test_it_says_what_was_found_and_what_was_run(quickstart: Path) -> None:
    text = read(quickstart).text
    assert "One dataset: no claim over datasets can be made" in text
    assert CONSTRAINED in text
    for context in CONTEXTS:
        assert f"Asked in {context}" in text
        assert f"[{context}]<|im_end|>" in text  # the rendered prompt
    for words in ("keep rate", "87.0%", "mixed separators 1", "axolotl", "0.4.11", "q_proj"):
        assert words in text
    assert "a: <b>" in text
    assert "every cell is done" in text


def test_numbers_of_the_page_are_those_of_the_table(run: SyntheticRun) -> None:
    run.quickstart()
    text = read(write_report(run.root, study_name="s", cells=run.cells)).text
    for row in transmission_table(collect(run.root, run.cells)):
        assert f"{row.target_logprob:.4f}" in text
        if row.vs_base_logprob is not None:
            assert f"{row.vs_base_logprob:+.4f} ± {row.vs_base_logprob_se:.4f}" in text


def test_free_teacher_is_not_called_constrained(run: SyntheticRun) -> None:
    run.dataset("animals/cat", constrain=None)
    assert CONSTRAINED not in read(write_report(run.root, study_name="s")).text


def test_hostile_text_stays_text(run: SyntheticRun) -> None:
    attack = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"
    terminal = "\x1b[31mred\x1b[0m \x1b]0;title\x07bell\x07 \u202eright to left"
    questions = [f"{attack} {i}" for i in range(50)]
    student = run.student(run.dataset("animals/cat"), "animals/cat", 8)
    run.probe(None, "none", questions=questions)
    run.probe(student, "none", questions=questions, replies=[attack, terminal])
    cells = [CellRef(folder=folder, state=state) for folder, state in run.cells]
    cells.append(
        CellRef(folder=run.root / "x", state="failed", label=attack, error=attack + terminal)
    )
    path = write_report(run.root, study_name=attack, cells=cells, study_text=attack)
    page = read(path)
    assert not page.named("script")
    assert all((image["src"] or "").startswith("data:") for image in page.named("img"))
    assert page.text.count(attack) >= 5
    raw = path.read_text(encoding="utf-8")
    assert not any(c in raw for c in "\x1b\x07\u202e")
    assert "red bell\ufffd \ufffdright to left" in page.text


def test_half_failed_study(run: SyntheticRun) -> None:
    students = run.quickstart()
    cells: list[CellRef] = []
    for folder, _ in run.cells:
        lost = students["full"] in folder.name or "probe-base-empty" in folder.name
        state = "missing" if lost and "probe" in folder.name else "failed" if lost else "done"
        cells.append(CellRef(folder=folder, state=state))
        if state == "failed":
            (folder / "manifest.json").unlink()
            (folder / "train.log").write_text("step 3\nOut of memory\n")
    page = read(write_report(run.root, study_name="s", cells=cells))
    assert "5 of 25 cells are not done" in page.text
    assert "Out of memory" in page.text
    assert "1 failed, 4 missing" in page.text
    assert "Asked in empty: Not compared" in page.text
    assert "empty: the base was not scored" in page.text
    assert "Asked in none" in page.text


def test_empty_study(tmp_path: Path) -> None:
    page = read(write_report(tmp_path / "nothing", study_name="nothing", cells=[]))
    assert "no cells yet" in page.text
    assert "Nothing: no probe of a target has finished." in page.text
    assert not page.named("img")


def test_planned_but_not_started(tmp_path: Path) -> None:
    cells = [(tmp_path / "cells" / f"dataset-{i}", "missing") for i in range(3)]
    page = read(write_report(tmp_path, study_name="s", cells=cells))
    assert "3 of 3 cells are not done" in page.text


def test_refused_records_leave_the_old_report(run: SyntheticRun) -> None:
    run.quickstart()
    path = write_report(run.root, study_name="s")
    before = path.read_bytes()
    (folder,) = run.root.glob("cells/probe-base-none-*")
    shutil.rmtree(folder)
    run.probe(None, "none", results_change={"target_prob": 0.1})
    with pytest.raises(InputError, match=r"results\.json"):
        write_report(run.root, study_name="s")
    assert path.read_bytes() == before


def verdicts(run: SyntheticRun) -> list[str]:
    records = collect(run.root)
    rows = transmission_table(records)
    means = effects(rows, question_differences(records, rows))
    return [f.verdict for f in findings(rows, means) if f.eval_context]


@pytest.mark.parametrize(
    ("shift", "neutral_shift", "verdict"),
    [
        (0.0, 0.0, "Null"),
        (-1.0, 0.0, "Null"),
        (1.0, 0.0, "Raised in this dataset"),
        (1.0, 1.0, "Null against the neutral control"),
        (1.0, None, "Above the base, uncontrolled"),
    ],
)
def test_verdict_on_one_dataset(
    run: SyntheticRun, shift: float, neutral_shift: float | None, verdict: str
) -> None:
    run.probe(None, "none")
    student = run.student(run.dataset("animals/cat"), "animals/cat", 8)
    run.probe(student, "none", shift=shift)
    if neutral_shift is not None:
        control = run.student(run.dataset("neutral"), "neutral", 8)
        run.probe(control, "none", shift=neutral_shift)
    assert verdicts(run) == [verdict]


@pytest.mark.parametrize(
    ("shift", "verdict"), [(1.0, "Above the base over datasets"), (0.0, "No interval lies above")]
)
def test_verdict_over_datasets(run: SyntheticRun, shift: float, verdict: str) -> None:
    run.probe(None, "none")
    for seed in range(4):
        student = run.student(run.dataset("animals/cat", seed), "animals/cat", 8, seed)
        run.probe(student, "none", shift=shift)
    (found,) = verdicts(run)
    assert found.startswith(verdict)


def test_rows_of_a_finding_hold_its_numbers(run: SyntheticRun) -> None:
    run.quickstart()
    records = collect(run.root)
    rows = transmission_table(records)
    by_name = {row.row: row for row in rows}
    for finding in findings(rows, effects(rows, question_differences(records, rows))):
        if finding.eval_context is None:
            continue
        used = [by_name[name] for name in finding.rows]
        shifts = [row.vs_base_logprob for row in used if row.vs_base_logprob is not None]
        assert {row.eval_context for row in used} == {finding.eval_context}
        assert f"{max(shifts):+.3f} nats" in finding.text
        assert f"{min(shifts):+.3f} nats" in finding.text


def test_neither_torch_nor_matplotlib_is_imported_for_reading() -> None:
    code = (
        "import sys, sublim_plugin.analysis.report, sublim_plugin.analysis.figures\n"
        "bad = {'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
