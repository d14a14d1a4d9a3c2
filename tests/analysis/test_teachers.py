"""Matched students and students as teachers: what is pooled, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from sublim_plugin.analysis.collect import collect, student_names
from sublim_plugin.analysis.report import write_report
from sublim_plugin.analysis.square_tables import specificity_tables
from sublim_plugin.analysis.transmission import transmission_table
from tests.analysis.synthetic_run import SyntheticRun


def test_matched_students_of_different_datasets_are_one_condition(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for seed in range(3):
        dataset = run.dataset("animals/cat", seed)
        run.probe(run.student(dataset, "animals/cat", None, seed), "none")
        for rate in (2e-4, 1e-3):
            lora = run.student(dataset, "animals/cat", 8, seed, recipe={"learning_rate": rate})
            for kind in ("update_norm_of", "loss_of"):
                own = run.student(dataset, "animals/cat", None, seed, matched={kind: lora})
                run.probe(own, "none")
    rows = [row for row in transmission_table(collect(run.root)) if row.role == "student"]
    conditions = {row.condition for row in rows}
    assert len(rows) == 15 and len(conditions) == 5
    assert {row.n_datasets for row in rows} == {3}
    start, end = "full finetuning", ", of the same dataset and seed"
    at = "matched to LoRA r=8, alpha 8, learning rate"
    assert {row.settings_name for row in rows} == {
        f"{start}, not matched, learning rate 2e-05",
        *(
            f"{start}, learning rate 2e-05, {what} {at} {rate}{end}"
            for what in ("update norm", "training loss")
            for rate in ("0.0002", "0.001")
        ),
    }


def test_generations_are_settings_of_their_own_with_controls_of_their_own(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for trait in ("animals/cat", "neutral"):
        for seed in (1, 2):
            teacher = None
            for _ in range(3):
                dataset = run.dataset(trait, seed, taught_by=teacher)
                teacher = run.student(dataset, trait, 8, seed)
                run.probe(teacher, "none")
    rows = transmission_table(collect(run.root))
    cats = [row for row in rows if row.trait == "animals/cat"]
    assert len(cats) == 6 and len({row.condition for row in cats}) == 3
    assert all(row.n_datasets == 2 and row.neutral_probe for row in cats)
    assert len({row.neutral_probe for row in cats}) == 6
    taught = "LoRA, teacher LoRA r=8, generation"
    names = {row.settings_name for row in cats}
    assert names == {"LoRA, prompted teacher", f"{taught} 1", f"{taught} 2"}
    page = write_report(run.root, study_name="chain", cells=run.cells).read_text()
    assert "the weights of this study&#x27;s student" in page


def test_trained_teachers_of_one_recipe_are_one_setting(tmp_path: Path) -> None:
    """Each dataset has a teacher of its own, whose id must not keep the datasets apart."""
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for trait in ("animals/cat", "neutral"):
        run.probe(run.student(run.dataset(trait, 1), trait, 8, 1), "none")
        weak = run.teacher(trait, 1, 1e-4)  # one for both seeds
        for seed in (1, 2):
            for teacher in (run.teacher(trait, seed), weak):
                dataset = run.dataset(trait, seed, taught_by=teacher, taught_as="teacher")
                student = run.student(dataset, trait, 8, seed)
                run.probe(student, "none")
                again = run.dataset(trait, seed, taught_by=student)
                run.probe(run.student(again, trait, 8, seed), "none")
    rows = transmission_table(collect(run.root))
    cats = [row for row in rows if row.trait == "animals/cat"]
    assert len(cats) == 9 and len({row.condition for row in cats}) == 5
    assert sorted(row.n_datasets for row in cats) == [1] + [2] * 8
    # each has the neutral student of a teacher of its own way
    assert len({row.neutral_probe for row in cats} - {None}) == 9
    by = "LoRA, teacher trained by LoRA r=8, learning rate"
    names = {row.settings_name for row in cats}
    assert {f"{by} 0.0005, 192 rows", f"{by} 0.0001, 192 rows, one for all datasets"} < names
    page = write_report(run.root, study_name="trained", cells=run.cells).read_text()
    assert "weights finetuned on answers in words" in page


def test_no_two_kinds_of_teacher_are_pooled(tmp_path: Path) -> None:
    """A student of another study has no settings here: its id keeps it apart."""
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for seed, teacher in ((1, "0123456789ab"), (2, "ba9876543210"), (3, None)):
        dataset = run.dataset("animals/cat", seed, taught_by=teacher)
        run.probe(run.student(dataset, "animals/cat", 8, seed), "none")
    rows = [row for row in transmission_table(collect(run.root)) if row.role == "student"]
    assert len({row.condition for row in rows}) == 3


def test_sampled_replies_are_shown_without_log_probabilities(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    student = run.student(run.dataset("animals/cat"), "animals/cat", 8)
    run.sampled(None, "none", 0.02)
    run.sampled(student, "none", 0.31)
    page = write_report(run.root, study_name="sampled", cells=run.cells).read_text()
    assert "31.0%" in page and "2.0%" in page and "sampled.csv" in page


def test_students_have_names_of_their_own(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    dataset = run.dataset("animals/cat")
    lora = run.student(dataset, "animals/cat", 8)
    ids = [
        run.student(dataset, "animals/cat", 8, alpha=16),
        run.student(dataset, "animals/cat", None),
        run.student(dataset, "animals/cat", None, matched={"update_norm_of": lora}),
        run.student(dataset, "animals/cat", None, matched={"loss_of": lora}),
        run.student(dataset, "animals/cat", 4),
    ]
    names = student_names(collect(run.root))
    full = "animals/cat full, learning rate 2e-05"
    assert [names[one] for one in (lora, *ids)] == [
        "animals/cat LoRA r=8, learning rate 0.0002",
        "animals/cat LoRA r=8, alpha 16, learning rate 0.0002",
        full,
        f"{full}, matched to the update norm of {lora}",
        f"{full}, matched to the loss of {lora}",
        "animals/cat LoRA r=4",
    ]


def test_teachers_of_two_strengths_have_a_square_each(tmp_path: Path) -> None:
    """Weak teachers leave nothing in their students, strong ones 2 nats in those of the cat."""
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for rate in (5e-4, 1e-3):
        for seed in (1, 2):
            for trait in ("animals/cat", "animals/owl"):
                teacher = run.teacher(trait, seed, rate)
                dataset = run.dataset(trait, seed, taught_by=teacher, taught_as="teacher")
                student = run.student(dataset, trait, 8, seed)
                run.probe(student, "none", shift=2.0 * (trait == "animals/cat" and rate == 1e-3))
    records = collect(tmp_path)
    weak, strong = specificity_tables(records, transmission_table(records))
    assert weak.square is not None and strong.square is not None
    assert "0.0005" in weak.name and "0.001" in strong.name
    assert len(weak.square.rows) == len(strong.square.rows) == 4
    assert not {*weak.square.rows} & {*strong.square.rows}
    means = [table.square.values_DIJ[:, 0, 0].mean() for table in (weak, strong) if table.square]
    assert means[0] == pytest.approx(0, abs=0.7) and means[1] == pytest.approx(2, abs=0.7)
