"""Every number of the table against an independent computation with numpy."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import ANIMALS, CONTEXTS, SyntheticRun, host_numbers

from sublim_plugin.analysis.cluster_intervals import interval
from sublim_plugin.analysis.collect import CellRef, collect
from sublim_plugin.analysis.effects import Effect, effects
from sublim_plugin.analysis.probe_metrics import METRICS
from sublim_plugin.analysis.replication import MIN_DATASETS
from sublim_plugin.analysis.tables import format_table, write_results_csv
from sublim_plugin.analysis.transmission import (
    TransmissionRow,
    question_differences,
    transmission_table,
)
from sublim_plugin.core.errors import InputError


def read_table(folder: Path) -> np.ndarray:
    """questions.jsonl of a probe as an array (questions, candidates)."""
    lines = (folder / "questions.jsonl").read_text().splitlines()
    return np.array([[json.loads(line)["logprobs"][a] for a in ANIMALS] for line in lines])


def probe_folder(run: SyntheticRun, student: str | None, context: str) -> Path:
    (folder,) = (run.root / "cells").glob(f"probe-{student or 'base'}-{context}-*")
    return folder


def table_and_effects(
    run: SyntheticRun,
) -> tuple[tuple[TransmissionRow, ...], tuple[Effect, ...]]:
    records = collect(run.root)
    rows = transmission_table(records)
    return rows, effects(rows, question_differences(records, rows))


@pytest.fixture
def run(tmp_path: Path) -> SyntheticRun:
    return SyntheticRun(tmp_path / "runs" / "quickstart")


def test_every_number_equals_numpy(run: SyntheticRun) -> None:
    students = run.quickstart()
    rows = transmission_table(collect(run.root, run.cells))
    assert len(rows) == len(CONTEXTS) * (1 + len(students))
    for row in rows:
        table_QC = read_table(probe_folder(run, row.student, row.eval_context))
        for name, value in host_numbers(table_QC, 0).items():
            assert getattr(row, name) == pytest.approx(value, abs=1e-12)
        if row.role == "base":
            assert row.vs_base_logprob is None
            continue
        base_QC = read_table(probe_folder(run, None, row.eval_context))
        for name, value in host_numbers(base_QC, 0).items():
            assert getattr(row, f"base_{name}") == pytest.approx(value, abs=1e-12)
        comparisons = [("base", base_QC)]
        if row.student == students["r8"]:
            neutral = read_table(probe_folder(run, students["neutral"], row.eval_context))
            comparisons.append(("neutral", neutral))
        else:
            assert row.vs_neutral_logprob is None
            assert row.neutral_reason
        for name, other_QC in comparisons:
            logprob_Q = table_QC[:, 0] - other_QC[:, 0]
            share_Q = _share(table_QC) - _share(other_QC)
            for measure, difference_Q in (("logprob", logprob_Q), ("share", share_Q)):
                field = f"vs_{name}_{measure}"
                se = difference_Q.std(ddof=1) / np.sqrt(len(difference_Q))
                assert getattr(row, field) == pytest.approx(difference_Q.mean(), abs=1e-12)
                assert getattr(row, f"{field}_se") == pytest.approx(se, abs=1e-12)


def _share(table_QC: np.ndarray) -> np.ndarray:
    share_Q: np.ndarray = np.exp(table_QC[:, 0]) / np.exp(table_QC).sum(1)
    return share_Q


def test_order_is_base_then_ranks_then_full(run: SyntheticRun) -> None:
    run.quickstart()
    rows = transmission_table(collect(run.root, run.cells))
    first = [row for row in rows if row.eval_context == rows[0].eval_context]
    assert [row.name for row in first] == [
        "base",
        "LoRA r=2",
        "LoRA r=8",
        "LoRA r=8 neutral",
        "LoRA r=64",
        "full",
    ]
    assert [row.row for row in rows] == [f"R{i}" for i in range(1, len(rows) + 1)]


def test_one_dataset_gives_no_interval_and_says_why(run: SyntheticRun) -> None:
    run.quickstart()
    rows, found = table_and_effects(run)
    for effect in found:
        assert (effect.low, effect.high) == (None, None)
        assert effect.reason == "1 dataset, at least 3 are needed"
    for row in rows:
        if row.role != "base":
            assert row.n_datasets == 1
            assert "at least 3" in row.dataset_interval
            assert "not an interval over datasets" in row.se_unit


def test_interval_over_datasets_averages_training_seeds_first(run: SyntheticRun) -> None:
    run.probe(None, "none")
    by_dataset = []
    for generation_seed in range(MIN_DATASETS):
        dataset = run.dataset("animals/cat", generation_seed)
        values = []
        # One dataset has more students than the others; it must not weigh more.
        for training_seed in range(1 + (generation_seed == 0)):
            student = run.student(dataset, "animals/cat", 8, generation_seed, training_seed)
            probe = run.probe(student, "none", shift=0.3 * generation_seed)
            base = read_table(probe_folder(run, None, "none"))
            values.append((read_table(probe) - base)[:, 0])
        by_dataset.append(np.mean(values, axis=0))
    table_DQ = np.array(by_dataset)
    rows, found = table_and_effects(run)
    (effect,) = found
    means = table_DQ.mean(1)
    half = 4.302652729911275 * np.std(means, ddof=1) / np.sqrt(3)  # t, 2 degrees, 97.5%
    assert effect.n_datasets == 3
    assert effect.n_students == 4
    assert effect.vs_base_logprob == pytest.approx(np.mean(means), abs=1e-12)
    # questions add to the width; datasets alone are its floor
    assert effect.low is not None and effect.high is not None and effect.p is not None
    assert effect.high - effect.vs_base_logprob >= half - 1e-9
    assert effect.high == pytest.approx(interval(table_DQ).high, abs=1e-9)
    assert effect.sd_over_datasets == pytest.approx(np.std(means, ddof=1), abs=1e-12)
    assert {row.n_datasets for row in rows if row.role == "student"} == {3}


def test_students_of_other_ranks_are_not_pooled(run: SyntheticRun) -> None:
    run.probe(None, "none")
    for seed, rank in ((1, 8), (2, 8), (3, 16)):
        dataset = run.dataset("animals/cat", seed)
        run.probe(run.student(dataset, "animals/cat", rank, seed), "none")
    assert sorted(effect.n_datasets for effect in table_and_effects(run)[1]) == [1, 2]


def test_neutral_student_of_another_seed_or_data_setting_is_no_control(run: SyntheticRun) -> None:
    run.probe(None, "none")
    cat = run.dataset("animals/cat", 42)
    run.probe(run.student(cat, "animals/cat", 8), "none")
    other_seed = run.dataset("neutral", 43)
    run.probe(run.student(other_seed, "neutral", 8, 43), "none")
    free = run.dataset("neutral", 42, constrain=None)
    run.probe(run.student(free, "neutral", 8), "none")
    rows = transmission_table(collect(run.root))
    (student,) = [row for row in rows if row.role == "student"]
    assert student.vs_neutral_logprob is None
    assert "no neutral student" in student.neutral_reason


def test_a_student_without_its_base_keeps_its_row(run: SyntheticRun) -> None:
    dataset = run.dataset("animals/cat")
    run.probe(run.student(dataset, "animals/cat", 8), "none")
    (row,) = transmission_table(collect(run.root))
    assert row.vs_base_logprob is None
    assert "base was not scored" in row.warning
    assert math.isfinite(row.target_logprob)


def test_low_coverage_is_flagged(run: SyntheticRun) -> None:
    run.dataset("animals/cat")
    run.probe(None, "none", level=-9.0)
    (row,) = transmission_table(collect(run.root))
    assert row.coverage < 0.01
    assert "coverage" in row.warning


def test_share_survives_underflow(run: SyntheticRun) -> None:
    run.dataset("animals/cat")
    run.probe(None, "none", level=-600.0)
    (row,) = transmission_table(collect(run.root))
    assert 0.0 < row.target_share < 1.0


def test_one_question_has_no_standard_error(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, n_questions=1)
    run.quickstart()
    rows = transmission_table(collect(run.root))
    assert all(row.vs_base_logprob_se is None for row in rows)
    format_table(rows)


@pytest.mark.parametrize("metric", METRICS)
def test_a_number_that_differs_from_the_hosts_is_refused(run: SyntheticRun, metric: str) -> None:
    run.dataset("animals/cat")
    run.probe(None, "none", results_change={metric: 1e-4})
    with pytest.raises(InputError, match=rf"results.json: animals/cat {metric}"):
        transmission_table(collect(run.root))


def test_a_difference_below_the_tolerance_is_accepted(run: SyntheticRun) -> None:
    run.dataset("animals/cat")
    run.probe(None, "none", results_change={"target_share": 5e-7})
    assert len(transmission_table(collect(run.root))) == 1


def test_base_and_student_must_have_seen_the_same_prompts(run: SyntheticRun) -> None:
    run.probe(None, "none")
    student = run.student(run.dataset("animals/cat"), "animals/cat", 8)
    run.probe(student, "none", prompt_note="!")
    with pytest.raises(InputError, match="question_id 0 was rendered otherwise"):
        transmission_table(collect(run.root))


def test_a_probe_of_an_unfinished_student_is_refused(run: SyntheticRun) -> None:
    student = run.student(run.dataset("animals/cat"), "animals/cat", 8)
    run.probe(student, "none")
    cells = [cell for cell in run.cells if "student" not in cell[0].name]
    with pytest.raises(InputError, match="not among the finished cells"):
        transmission_table(collect(run.root, cells))


def test_csv_holds_every_field_and_digit(run: SyntheticRun, tmp_path: Path) -> None:
    run.quickstart()
    rows = transmission_table(collect(run.root))
    path = tmp_path / "results.csv"
    write_results_csv(rows, path)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == list(TransmissionRow.model_fields)
    for line, row in zip(read, rows, strict=True):
        assert float(line["target_logprob"]) == row.target_logprob
        assert line["vs_base_logprob"] == (
            "" if row.vs_base_logprob is None else repr(row.vs_base_logprob)
        )


def test_terminal_table_fits_and_shows_four_decimals(run: SyntheticRun) -> None:
    run.quickstart()
    rows = transmission_table(collect(run.root))
    text = format_table(rows)
    assert max(len(line) for line in text.splitlines()) <= 100
    for row in rows:
        assert f"{row.target_logprob:.4f}" in text
    assert text.index("base ") < text.index("LoRA r=2") < text.index("LoRA r=64")
    assert text.index("LoRA r=64") < text.index("full ")
    assert format_table(()) == "No probe has finished yet: nothing to compare.\n"


def test_terminal_table_fits_with_many_seeds_and_contexts(run: SyntheticRun) -> None:
    run.probe(None, "none")
    for seed in (101, 102):
        for trait in ("animals/cat", "neutral"):
            dataset = run.dataset(trait, seed)
            for context in ("none", "template_default"):
                for training_seed in (11, 42):
                    student = run.student(dataset, trait, 512, seed, training_seed, context)
                    run.probe(student, "none")
    text = format_table(transmission_table(collect(run.root)))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "LoRA r=512 neutral g101 t11" in text
    assert "trained in none:" in text


def test_cells_that_are_not_done_are_not_read(run: SyntheticRun) -> None:
    run.quickstart()
    cells = [
        CellRef(folder=folder, state="failed" if "probe" in folder.name else state)
        for folder, state in run.cells
    ]
    for cell in cells:
        if cell.state == "failed":
            (cell.folder / "manifest.json").write_text("{")
    assert transmission_table(collect(run.root, cells)) == ()
