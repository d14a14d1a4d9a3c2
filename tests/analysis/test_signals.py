"""Signals among a study's cells: beside the transmission, in figure, table and answer."""

from __future__ import annotations

import csv
import json
import re
import time
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from synthetic_run import SyntheticRun
from test_evidence import found_in

from sublim_plugin.analysis.collect import collect
from sublim_plugin.analysis.dose_response import EXACT_UP_TO, within_ranks
from sublim_plugin.analysis.report import write_report
from sublim_plugin.analysis.report_folder import own_files
from sublim_plugin.analysis.signals import pairs
from sublim_plugin.analysis.transmission import transmission_table
from sublim_plugin.core.atomic import write_json
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.manifest import write_manifest

TOPIC = "dose and response"
CHANGES = (0.01, 0.03, -0.02, 0.05, 0.02)
SHIFTS = (0.2, 1.1, -0.4, 1.5, 0.7)  # in the order of the changes


def measured(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def results(change: float, kl: float = 0.03) -> dict[str, Any]:
    """What is read of a signal.json, and something that is not."""
    means = {"number_kl": kl, "number_log_ratio": kl / 2, "kl": 10 * kl, "log_ratio": 5 * kl}
    measures = {name: {"positions": 9, "mean": measured(x)} for name, x in means.items()}
    aligned = [
        {"loss": "rows", "target": measured(change), "target_rank": 3, "value": 1.0},
        {"loss": "soft_targets", "target": measured(10 * change), "target_rank": 1, "value": 1.0},
    ]
    return {
        "schema_version": 1,
        "constrained": True,
        "n_rows": 16,
        "where": {"overall": {"name": "all", "measures": measures}},
        "alignments": aligned,
    }


def signal(run: SyntheticRun, dataset: str, values: Any, context: str = "template_default") -> Path:
    spec = {
        "dataset": dataset, "trait": "animals/cat", "train_context": {"kind": context},
        "rows": 16, "limit": 3,
    }  # fmt: skip
    cell_id = sha256_json(spec)
    folder = run.root / "cells" / f"signal-{dataset}-{cell_id[:12]}"
    folder.mkdir(parents=True)
    write_json(folder / "signal.json", values)
    write_manifest(
        folder, kind="signal", id=cell_id, label="signal", spec=spec,
        outputs=["signal.json"], started=time.time(),
    )  # fmt: skip
    run.cells.append((folder, "done"))
    return folder


def study(root: Path, changes: tuple[float | None, ...] = CHANGES, **dataset: Any) -> SyntheticRun:
    """A dataset of each change; the student of each takes up the shift of its place."""
    run = SyntheticRun(root)
    for context in ("none", "template_default"):
        run.probe(None, context)
    for seed, (change, shift) in enumerate(zip(changes, SHIFTS, strict=False)):
        cat = run.dataset("animals/cat", seed, **dataset)
        student = run.student(cat, "animals/cat", 8, generation_seed=seed)
        for context in ("none", "template_default"):
            run.probe(student, context, shift=shift if context == "template_default" else 0.0)
        if change is not None:
            signal(run, cat, results(change))
    return run


def test_each_student_stands_beside_the_signal_of_its_dataset(tmp_path: Path) -> None:
    run = study(tmp_path)
    path = write_report(run.root, study_name="s", cells=run.cells)
    with (path.parent / "signal.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    with (path.parent / "results.csv").open(newline="") as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert [float(line["change"]) for line in lines] == [*CHANGES]  # of the rows' loss
    for line in lines:
        row = rows[line["row"]]
        assert (row["student"], row["dataset"]) == (line["student"], line["dataset"])
        assert row["eval_context"] == line["eval_context"] == "template_default"
        for name in ("vs_base_logprob", "vs_base_share"):
            assert line[name] == row[name]
        assert (line["channel"], line["over"]) == ("sampled tokens", "number tokens")
        assert (line["kl"], line["log_ratio"], line["target_rank"]) == ("0.03", "0.015", "3")
        assert (line["dataset_rows"], line["rows_measured"], line["teacher"]) == (
            "20", "16", "prompted",
        )  # fmt: skip
    page = path.read_text(encoding="utf-8")
    section = page[page.index('<section id="signal"') : page.index('<section id="training"')]
    assert "Predicted and observed" in section and section.count("<img ") == 1
    for line in lines:
        assert f"{float(line['vs_base_logprob']):+.4f}" in section
    for kind in ("png", "svg", "pdf", "csv"):
        assert (path.parent / f"dose.{kind}").is_file()
    with (path.parent / "dose.csv").open(newline="") as file:
        points = list(csv.DictReader(file))
    assert [p["predicted"] for p in points] == ["kl"] * 5 + ["change"] * 5
    drawn = re.findall(r'<g id="([^"]*P\d[^"]*)"', (path.parent / "dose.svg").read_text())
    assert {name for group in drawn for name in group.split()} >= {p["point"] for p in points}
    assert "5 signals were measured on the base without training, each from the first 16" in page
    own = {path.name for path in own_files(path.parent)}
    assert own >= {"signal.csv", *(f"dose.{kind}" for kind in ("png", "svg", "pdf", "csv"))}


@pytest.mark.parametrize(
    ("targets", "over", "kl"),
    [("numbers", "number tokens", 0.03), ("vocabulary", "vocabulary", 0.3)],
)
def test_soft_targets_are_predicted_by_their_own_loss(
    tmp_path: Path, targets: str, over: str, kl: float
) -> None:
    run = study(tmp_path, soft_targets=targets)
    records = collect(run.root, run.cells)
    found = pairs(records, transmission_table(records))
    assert [one.change for one in found] == pytest.approx([10 * x for x in CHANGES])
    for one in found:
        assert (one.channel, one.over) == (f"soft targets, {targets}", over)
        assert one.kl == pytest.approx(kl)


def expected(groups: list[tuple[list[float], list[float]]]) -> tuple[float, float]:
    """Correlation and p by brute force, over all orders of the second of every group at once."""

    def correlation(values: tuple[tuple[float, ...], ...]) -> float:
        x, y = [], []
        for (own, _), others in zip(groups, values, strict=True):
            for ranks, into in ((stats.rankdata(own), x), (stats.rankdata(others), y)):
                into.extend(ranks - ranks.mean())
        return float(np.corrcoef(x, y)[0, 1])

    seen = correlation(tuple(tuple(y) for _, y in groups))
    every = [correlation(one) for one in product(*(permutations(y) for _, y in groups))]
    return seen, float(np.mean([abs(r) >= abs(seen) - 1e-9 for r in every]))


@pytest.mark.parametrize(
    "groups",
    [
        [([1.0, 2.0, 3.0, 5.0, 4.0], [0.1, 0.3, 0.2, 0.9, 0.8])],
        [([3.0, 1.0, 2.0], [-5.0, 1.0, 0.0]), ([1.0, 1.0, 2.0, 9.0], [7.0, 8.0, 9.0, 9.0])],
        [([0.1, 0.2], [3.0, 4.0]), ([5.0, 6.0], [1.0, 0.0]), ([1.0, 2.0], [2.0, 3.0])],
    ],
)
def test_the_correlation_is_that_of_ranks_within_groups(
    groups: list[tuple[list[float], list[float]]],
) -> None:
    found = within_ranks(groups)
    assert found is not None and found.exact
    assert (found.correlation, found.p) == pytest.approx(expected(groups))
    if len(groups) == 1:
        x, y = groups[0]
        assert found.correlation == pytest.approx(stats.spearmanr(x, y).statistic)


def test_many_orders_are_drawn_and_agree_with_all_of_them() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=8)
    y = x + 1.5 * rng.normal(size=8)
    found = within_ranks([(x.tolist(), y.tolist())])
    again = within_ranks([(x.tolist(), y.tolist())])
    assert found is not None and found == again
    assert (found.exact, found.total) == (False, EXACT_UP_TO)
    assert found.correlation == pytest.approx(stats.spearmanr(x, y).statistic)
    orders = np.array(list(permutations(range(8))))
    every = 1 - ((np.argsort(np.argsort(x)) - orders) ** 2).sum(1) * 6 / (8 * 63)
    p = float(np.mean(np.abs(every) >= abs(found.correlation) - 1e-9))
    assert abs(found.p - p) < 4 * np.sqrt(p * (1 - p) / EXACT_UP_TO)
    assert within_ranks([([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])]) is None


def test_the_answer_is_over_datasets_within_traits(tmp_path: Path) -> None:
    run = study(tmp_path)
    (answer,) = found_in(run, TOPIC)
    assert answer.verdict == "datasets predicted to transmit more transmit more"
    assert (answer.estimate, answer.n_datasets, answer.target) == (
        pytest.approx(1.0), 5, "all traits",
    )  # fmt: skip
    assert answer.p == pytest.approx(2 / 120)  # this order and its reverse
    assert "5 datasets, 1 trait" in answer.sentence
    # a second training seed of a dataset is averaged, not counted
    dataset = next(path.name[-12:] for path in run.root.glob("cells/dataset-*"))
    path = next(run.root.glob(f"cells/dataset-*{dataset}/manifest.json"))
    number = json.loads(path.read_text())["spec"]["generation_seed"]
    again = run.student(dataset, "animals/cat", 8, number, training_seed=2)
    run.probe(again, "template_default", shift=SHIFTS[number])
    (more,) = found_in(run, TOPIC)
    assert (more.n_datasets, len(more.rows), more.p) == (5, 6, answer.p)
    # students of another rank are another answer
    other = run.student(dataset, "animals/cat", 2, generation_seed=number)
    run.probe(other, "template_default")
    both = found_in(run, TOPIC)
    assert [(one.settings, one.n_datasets) for one in both] == [("LoRA r=2", 0), ("LoRA r=8", 5)]


def test_nothing_is_claimed_over_two_datasets_or_none_that_differ(tmp_path: Path) -> None:
    (few,) = found_in(study(tmp_path / "few", (0.1, 0.2)), TOPIC)
    assert few.verdict == "no claim" and few.p is None
    assert "2 datasets, at least 3 are needed" in few.sentence
    (three,) = found_in(study(tmp_path / "three", CHANGES[:3]), TOPIC)
    assert three.verdict == "no relation between predicted and observed shown"
    assert "no order of so few datasets gives less than .333" in three.sentence
    (same,) = found_in(study(tmp_path / "same", (0.1, 0.1, 0.1)), TOPIC)
    assert same.verdict == "no claim" and "all alike" in same.sentence
    assert found_in(study(tmp_path / "none", (None, None, None)), TOPIC) == []


def test_a_signal_of_no_scored_student_says_so(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    cat = run.dataset("animals/cat")
    signal(run, cat, results(0.1))
    path = write_report(run.root, study_name="s", cells=run.cells)
    page = path.read_text(encoding="utf-8")
    assert "no student with a signal of its dataset and train context has been scored" in page
    assert (path.parent / "signal.csv").is_file()
    # a later report without the cell leaves nothing of it
    write_report(run.root, study_name="s", cells=run.cells[:1])
    assert not (path.parent / "signal.csv").exists()
    assert 'id="signal"' not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"constrained": True}, "n_rows: Field required"),
        (results(0.1) | {"alignments": [{"loss": "rows"}]}, r"alignments\.0\.target: Field"),
        ([], "Input should be an object"),
    ],
)
def test_a_garbled_signal_stops_with_its_path(tmp_path: Path, values: Any, message: str) -> None:
    run = SyntheticRun(tmp_path)
    folder = signal(run, run.dataset("animals/cat"), values)
    with pytest.raises(InputError, match=rf"{folder.name}/signal\.json: .*\({message}"):
        write_report(run.root, study_name="s", cells=run.cells)
