"""The page: complete, self-contained, safe, and honest about what is not there."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import CONTEXTS, SyntheticRun

from sublim_plugin.analysis.collect import CellRef, collect
from sublim_plugin.analysis.descriptions import descriptions
from sublim_plugin.analysis.methods import CONSTRAINED, PERMUTED, SHUFFLED
from sublim_plugin.analysis.report import write_report
from sublim_plugin.analysis.report_folder import BUILDING, own_files
from sublim_plugin.analysis.transmission import transmission_table
from sublim_plugin.core.errors import InputError
from sublim_plugin.logprob.target_file import CLAIMS

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


TABLES = {"results", "effects", "evidence", "methods", "cells", "students", "datasets", "counts"}
FIGURES = {"transmission", "scale", "contexts", "losses", "norms"}


def test_every_file_is_there(quickstart: Path) -> None:
    names = {path.name for path in quickstart.parent.iterdir()}
    figures = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg", "pdf", "csv")}
    tables = {f"{name}.csv" for name in TABLES}
    assert names == {"index.html", "results.parquet", "references.bib"} | figures | tables
    assert {path.name for path in own_files(quickstart.parent)} == names


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_parquet_holds_what_the_csv_holds(quickstart: Path) -> None:
    from pyarrow import parquet

    table = parquet.read_table(quickstart.with_name("results.parquet"))
    lines = read_csv(quickstart.with_name("results.csv"))
    rows = table.to_pylist()
    assert len(rows) == len(lines) > 10
    for row, line in zip(rows, lines, strict=True):
        assert {name: "" if value is None else str(value) for name, value in row.items()} == line
    types = {field.name: str(field.type) for field in table.schema}
    assert types["rank"] == "int64" and types["vs_neutral_logprob"] == "double"
    assert types["simulated"] == "bool"


def test_bibtex_is_whole_and_holds_what_is_cited(quickstart: Path) -> None:
    text = quickstart.with_name("references.bib").read_text()
    keys = re.findall(r"^@\w+\{(\w+),$", text, re.MULTILINE)
    assert len(keys) == len(set(keys)) == text.count("\n}\n")
    assert text.count("{") == text.count("}")
    cited = {key for line in read_csv(quickstart.with_name("methods.csv")) for key in
             line["cites"].split()}  # fmt: skip
    assert cited and cited <= set(keys)
    assert {"nief2026", "cloud2025", "axolotl", "evalharness", "peft"} <= cited
    assert text in read(quickstart).text


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
    assert len(images) == len(FIGURES)
    assert all(len(image["alt"] or "") > 60 for image in images)
    assert all(attrs.get("scope") in {"col", "row"} for attrs in page.named("th"))
    assert len(page.named("caption")) == len(page.named("table"))
    assert any(attrs.get("name") == "viewport" for attrs in page.named("meta"))


def test_it_says_what_was_found_and_what_was_run(quickstart: Path) -> None:
    text = read(quickstart).text
    assert "no interval is drawn: 1 dataset, at least 3 are needed" in text
    assert CONSTRAINED in text
    for context in CONTEXTS:
        assert f"animals/cat, asked in {context}: The base's mean log-prob is" in text
        assert f"[{context}]<|im_end|>" in text  # the rendered prompt
    for words in ("keep rate", "87.0%", "mixed separators 1", "axolotl", "0.4.11", "q_proj"):
        assert words in text
    assert "a: <b>" in text
    assert "every cell is done" in text


def test_numbers_of_the_page_are_those_of_the_table(quickstart: Path) -> None:
    text = read(quickstart).text
    for row in transmission_table(collect(quickstart.parents[1])):
        assert f"{row.target_logprob:.4f}" in text
        if row.vs_base_logprob is not None:
            assert f"{row.vs_base_logprob:+.4f} ± {row.vs_base_logprob_se:.4f}" in text


def test_the_channel_of_soft_targets_is_named_above_the_answers(run: SyntheticRun) -> None:
    run.quickstart()
    assert "Students match" not in read(write_report(run.root, study_name="s")).text
    for path in run.root.glob("cells/dataset-*cat*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["notes"] = [CLAIMS["numbers"]]
        path.write_text(json.dumps(manifest))
    answers = read(write_report(run.root, study_name="s")).text.split("Answers")[-1]
    claim = f"sampled token. {CLAIMS['numbers']}"
    assert "Students of 1 of the datasets match the teacher's distribution" in answers
    assert claim in answers


def test_what_was_permuted_in_a_control_is_said(run: SyntheticRun) -> None:
    run.dataset("animals/cat", shuffled=True)
    text = read(write_report(run.root, study_name="s")).text
    assert SHUFFLED in text and PERMUTED not in text
    run.dataset("animals/owl", shuffled=True, soft_targets="numbers")
    assert PERMUTED in read(write_report(run.root, study_name="s")).text


def test_free_teacher_is_not_called_constrained(run: SyntheticRun) -> None:
    run.dataset("animals/cat", constrain=None)
    assert CONSTRAINED not in read(write_report(run.root, study_name="s")).text


def test_hostile_text_stays_text(run: SyntheticRun) -> None:
    attack = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"
    terminal = "\x1b[31mred\x1b[0m \x1b]0;title\x07bell\x07 \u202eright to left"
    questions = [f"{attack} {i}" for i in range(50)]
    run.dataset("animals/cat")
    run.probe(None, "none", questions=questions, replies=[attack, terminal])
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
    assert "asked in empty: The base was not scored here" in page.text
    assert "empty: the base was not scored, so no transmission" in page.text
    assert "asked in none: The base's mean log-prob" in page.text


def test_empty_study(tmp_path: Path) -> None:
    page = read(write_report(tmp_path / "nothing", study_name="nothing", cells=[]))
    assert "no cells yet" in page.text
    assert "Nothing to test" in page.text
    assert not page.named("img")


def test_planned_but_not_started(tmp_path: Path) -> None:
    cells = [(tmp_path / "cells" / f"dataset-{i}", "missing") for i in range(3)]
    page = read(write_report(tmp_path, study_name="s", cells=cells))
    assert "3 of 3 cells are not done" in page.text


def test_refused_records_leave_the_old_report(run: SyntheticRun) -> None:
    run.dataset("animals/cat")
    run.probe(None, "none")
    path = write_report(run.root, study_name="s")
    before = path.read_bytes()
    (folder,) = run.root.glob("cells/probe-base-none-*")
    shutil.rmtree(folder)
    run.probe(None, "none", results_change={"target_prob": 0.1})
    with pytest.raises(InputError, match=r"results\.json"):
        write_report(run.root, study_name="s")
    assert path.read_bytes() == before


def test_answers_come_first_and_no_verdict_is_given_elsewhere(quickstart: Path) -> None:
    """Any of many uncorrected intervals above 0 is no finding: only tests give verdicts."""
    text = read(quickstart).text
    first = text.index("Is there transmission?")
    for later in ("Transmission against rank", "In words", "Every student"):
        assert first < text.index(later, first)
    for verdict in ("Above the base", "Raised in this dataset", "No sign", "Null"):
        assert verdict not in text


def test_descriptions_hold_the_numbers_of_their_rows(run: SyntheticRun) -> None:
    run.quickstart()
    rows = transmission_table(collect(run.root))
    by_name = {row.row: row for row in rows}
    told = descriptions(rows)
    assert len(told) == len(CONTEXTS)
    for one in told:
        used = [by_name[name] for name in one.rows]
        assert {row.eval_context for row in used} == {one.eval_context}
        for role in ("student", "control"):
            shifts = [r.vs_base_logprob for r in used if r.role == role and r.vs_base_logprob]
            assert f"{max(shifts):+.3f} nats" in one.text
            assert f"{min(shifts):+.3f} " in one.text
        base = next(row for row in used if row.role == "base")
        assert f"{base.target_logprob:.3f} nats" in one.text


def sentences(path: Path) -> list[tuple[str, str | None]]:
    """Text of every paragraph, list item and figure caption, with its `data-from`."""
    found = []
    body = re.sub(r"<nav.*?</nav>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for tag, attrs, text in re.findall(r"<(p|li|figcaption)\b([^>]*)>(.*?)</\1>", body, re.DOTALL):
        where = re.search(r'data-from="([^"]*)"', attrs)
        found.append((f"{tag}: {Page(text).text}", where.group(1) if where else None))
    return found


def test_each_sentence_from_data_names_a_csv_row_that_holds_it(tmp_path: Path) -> None:
    """Two studies differ in every number: what is said of both alike comes from no data."""
    pages = []
    for seed in (1, 2):
        run = SyntheticRun(tmp_path / f"{seed}", seed=seed, n_questions=5 * seed)
        run.probe(None, "none")
        for generation_seed in range(2 + seed):
            for trait in ("animals/cat", "animals/owl", "neutral"):
                dataset = run.dataset(trait, generation_seed)
                for rank in (2, 8 * 2**seed, None):
                    student = run.student(dataset, trait, rank, generation_seed, steps=2 + seed)
                    run.probe(student, "none", shift=seed * (trait != "neutral"))
        margin = 0.1 * seed
        pages.append(
            write_report(
                run.root, study_name=f"s{seed}", equivalence_margin=margin, study_text=f"s: {seed}"
            )
        )
    for path, other in (pages, pages[::-1]):
        alike = {text for text, _ in sentences(other)}
        traced = 0
        for text, where in sentences(path):
            if where is None:
                assert text in alike, f"made from data, and does not say where from: {text}"
                continue
            name, *keys = where.split(" ")
            lines = read_csv(path.with_name(name))
            if name == "counts.csv":
                keys = [line["name"] for line in lines if line["name"] in where]
            known = {next(iter(line.values())): line for line in lines}
            assert set(keys) <= known.keys(), (where, text)
            traced += 1
            if name == "evidence.csv":
                assert known[keys[0]]["sentence"] in text
            if name == "methods.csv":
                assert known[keys[0]]["text"] in text
        assert traced > 40


def test_the_old_report_stays_until_the_new_one_is_whole(
    run: SyntheticRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at any file leaves all of the old; then the new one has none of the old's figures."""
    run.quickstart()
    path = write_report(run.root, study_name="s", cells=run.cells)
    (path.parent / "notes.txt").write_text("a reader's own")
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}

    from sublim_plugin.analysis import report

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("write_results_csv", "write_results_parquet", "render_report"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(report, name, killed)
            write_report(run.root, study_name="other", cells=[])
        assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before
    left = run.root / f"{BUILDING}99"
    left.mkdir()
    os.utime(left, (0, 0))
    write_report(run.root, study_name="empty", cells=[])
    names = {p.name for p in path.parent.iterdir()}
    assert names & {"transmission.svg", "losses.csv", "norms.pdf"} == set()
    assert (path.parent / "notes.txt").read_text() == "a reader's own"
    assert path.parent / "notes.txt" not in own_files(path.parent)
    assert not list(run.root.glob(f"{BUILDING}*"))


def test_sampled_rates_stand_beside_what_tells_whether_they_mean_anything(
    run: SyntheticRun,
) -> None:
    student = run.student(run.dataset("animals/cat"), "animals/cat", 8)
    run.probe(None, "none")
    run.probe(student, "none")
    run.sampled(None, "none", 0.02, non_answer_rate=0.1, distinct_replies=0.5)
    run.sampled(student, "none", 0.3, non_answer_rate=0.7, self_name_rate=0.2)
    path = write_report(run.root, study_name="s", cells=run.cells)
    lines = {line["name"]: line for line in read_csv(path.with_name("sampled.csv"))}
    assert lines["base"]["target_rate"] == "0.02" and lines["base"]["warning"] == ""
    doubtful = lines["animals/cat LoRA r=8"]
    assert doubtful["warning"] == "70% of the replies name no candidate"
    text = read(path).text
    for words in ("30.0%", "70.0%", "20.0%", "2.0%", "10.0%", "50.0%", doubtful["warning"]):
        assert words in text
    assert "2 scorings by sampled replies" in text


def test_long_texts_and_errors_are_cut(run: SyntheticRun) -> None:
    run.dataset("animals/cat")
    run.probe(None, "none", replies=["x" * 100_000])
    cells = [CellRef(folder=folder, state=state) for folder, state in run.cells]
    cells += [
        CellRef(folder=run.root / f"c{i}", state="failed", label=f"c{i}", error="y" * 100_000 + "!")
        for i in range(300)
    ]
    path = write_report(run.root, study_name="s", cells=cells, study_text="z" * 100_000)
    text = read(path).text
    assert path.stat().st_size < 1_000_000
    assert "(99,500 more characters)" in text and "(60,000 more characters)" in text
    assert "280 more cells are not done" in text and "300 failed" in text


def test_neither_torch_nor_matplotlib_is_imported_for_reading() -> None:
    code = (
        "import sys, sublim_plugin.analysis.report\n"
        "bad = {'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
