"""The evidence section: right on a simulated study of known truth, each sentence traceable."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats
from synthetic_run import SyntheticRun

from sublim_plugin.analysis.answers import Answer
from sublim_plugin.analysis.cluster_intervals import interval, p_beyond
from sublim_plugin.analysis.collect import RunRecords, collect
from sublim_plugin.analysis.curves import rank_curves
from sublim_plugin.analysis.effects import effects
from sublim_plugin.analysis.evidence import evidence
from sublim_plugin.analysis.report import write_report
from sublim_plugin.analysis.simulated_run import PEAKS, RANKS, truth, write_simulated_run
from sublim_plugin.analysis.square_tables import context_tables, specificity_tables
from sublim_plugin.analysis.student_settings import scaling_rules
from sublim_plugin.analysis.tables import format_table
from sublim_plugin.analysis.transmission import question_differences, transmission_table
from sublim_plugin.cli import main
from sublim_plugin.core.errors import InputError

MARGIN = 0.5


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("simulated")
    cells = write_simulated_run(root, n_datasets=6, seed=0)
    write_report(root, study_name="known truth", cells=cells, equivalence_margin=MARGIN)
    return root


def evidence_of(records: RunRecords, margin: float | None = None) -> tuple[Answer, ...]:
    """The answers without the page around them."""
    rows = transmission_table(records)
    differences = question_differences(records, rows)
    return evidence(records, rows, differences, effects(rows, differences), margin)


def found_in(run: SyntheticRun, topic: str, margin: float | None = None) -> list[Answer]:
    found = evidence_of(collect(run.root, run.cells), margin)
    return [answer for answer in found if answer.topic == topic]


def answers(root: Path) -> list[dict[str, str]]:
    with (root / "report" / "evidence.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def of(root: Path, topic: str, target: str, asked: str = "template_default") -> dict[str, str]:
    return next(
        a
        for a in answers(root)
        if (a["topic"], a["target"], a["eval_context"]) == (topic, target, asked)
    )


@pytest.mark.parametrize("trait", list(PEAKS))
def test_the_truth_is_found(simulated: Path, trait: str) -> None:
    target, peak = f"animals/{trait}", PEAKS[trait]
    shape, raised = of(simulated, "rank shape", target), of(simulated, "transmission", target)
    if peak is None:
        assert shape["verdict"] == "no inverted U shown"
        assert raised["verdict"] == "no evidence of transmission"
        assert "smallest effect that could have been seen" in raised["sentence"]
    else:
        assert shape["verdict"] == "inverted U"
        assert float(shape["low"]) <= peak <= float(shape["high"])
        assert raised["verdict"] == "raised"
        assert float(raised["neutral_low"]) > 0 and raised["neutral_datasets"] == "6"
        # a parabola need not have the tent's peak; it lies within one rank of it here
        assert peak / 2 < float(shape["fieller_low"]) < float(shape["fieller_high"]) < 2 * peak
        assert of(simulated, "agreement", target)["verdict"] == "the measures agree in order"
        # 0.85 covers the level of six datasets, SD 0.4 each, and the choice of the largest
        assert float(raised["estimate"]) == pytest.approx(truth(trait, peak, "template_default"),
                                                          abs=0.85)  # fmt: skip
    assert of(simulated, "full finetuning", target)["verdict"] == "at the base"
    assert of(simulated, "flat in rank", target, "empty")["verdict"] == "flat in rank"
    assert of(simulated, "transmission", target, "empty")["verdict"].startswith("no evidence")


def test_specificity_and_scale(simulated: Path) -> None:
    all_traits = ", ".join(f"animals/{trait}" for trait in PEAKS)
    assert of(simulated, "specificity", all_traits)["verdict"] == "raised diagonal"
    flat = of(simulated, "specificity", all_traits, "empty")
    assert flat["verdict"].startswith("no raised")
    assert "smallest that could have been seen" in flat["sentence"]
    # beyond its own interval's half width by what a power of 0.8 adds
    assert float(flat["smallest_effect"]) > (float(flat["high"]) - float(flat["low"])) / 2
    scale = of(simulated, "rank or scale", "animals/cat")
    assert scale["verdict"] == "cannot be told apart"  # the norm follows the rank here


def test_every_sentence_is_a_row_of_the_csv_and_names_rows_that_exist(simulated: Path) -> None:
    page = (simulated / "report" / "index.html").read_text(encoding="utf-8")
    with (simulated / "report" / "results.csv").open(newline="") as file:
        known = {row["row"] for row in csv.DictReader(file)}
    section = page[page.index('id="evidence"') : page.index('id="rank"')]
    entries = dict(re.findall(r'<li id="(E\d+)"[^>]*>(.*?)</li>', section, re.S))
    found = answers(simulated)
    assert sorted(entries) == sorted(answer["id"] for answer in found)
    for answer in found:
        text = html.unescape(re.sub(r"<[^>]+>", "", entries[answer["id"]]))
        assert answer["sentence"] in text and answer["verdict"] in text
        assert answer["rows"] and set(answer["rows"].split()) <= known
        assert answer["settings"] or answer["topic"] in ("power", "agreement")
        for name in ("estimate", "low", "high"):
            if answer[name] and answer["unit"] in ("nats", "logits"):
                assert f"{float(answer[name]):+.2f}" in answer["sentence"]
        if answer["low"]:
            assert answer["test"] or answer["verdict"] == "no claim"
        assert answer["n_datasets"] == "6"


def test_an_estimate_is_the_mean_of_its_rows(simulated: Path) -> None:
    with (simulated / "report" / "results.csv").open(newline="") as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    answer = of(simulated, "transmission", "animals/cat")
    values = [float(rows[row]["vs_base_logprob"]) for row in answer["rows"].split()]
    assert len(values) == 6
    assert float(answer["estimate"]) == pytest.approx(np.mean(values), rel=1e-12)


def test_simulated_data_is_marked_everywhere(simulated: Path) -> None:
    page = (simulated / "report" / "index.html").read_text(encoding="utf-8")
    assert "<title>SIMULATED: known truth" in page
    assert "No model was trained or asked" in page
    for path in (simulated / "report").glob("*.csv"):
        with path.open(newline="") as file:
            assert {row["simulated"] for row in csv.DictReader(file)} == {"True"}
    for manifest in (simulated / "cells").glob("*/manifest.json"):
        value = json.loads(manifest.read_text())
        assert value["spec"]["simulated"] is True
        assert value["label"].startswith("simulated ")
    assert page.count('alt="Simulated data.') == page.count("<img ") == 5
    table = format_table(transmission_table(collect(simulated)))
    assert table.startswith("SIMULATED DATA")


def test_simulated_and_measured_cells_do_not_mix(simulated: Path, tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run")
    run.quickstart()
    assert "simulated" not in format_table(transmission_table(collect(run.root))).lower()
    one = next((simulated / "cells").glob("dataset-*"))
    shutil.copytree(one, run.root / "cells" / one.name)
    with pytest.raises(InputError, match="keep simulated cells in a run folder of their own"):
        collect(run.root)


def test_one_dataset_draws_no_interval_and_says_why(tmp_path: Path) -> None:
    cells = write_simulated_run(tmp_path, n_datasets=1)
    found = evidence_of(collect(tmp_path, cells), MARGIN)
    assert {a.topic for a in found} >= {"transmission", "rank shape", "full finetuning"}
    for answer in found:
        if answer.topic == "power":
            assert answer.verdict == "before any result"
            assert "1 dataset, at least 3 are needed" in answer.sentence
            continue
        assert answer.verdict == "no claim"
        assert (answer.low, answer.high, answer.p) == (None, None, None)
        assert "1 dataset, at least 3 are needed" in answer.sentence
    sentences = [a.sentence for a in found if a.topic == "transmission"]
    assert "6 datasets would show an effect of" in sentences[0]


def test_without_a_margin_no_equivalence_is_claimed(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, n_questions=4)
    for context in ("empty", "none"):
        run.probe(None, context)
    for seed in range(3):
        dataset = run.dataset("animals/cat", seed)
        for rank in (2, 8, None):
            student = run.student(dataset, "animals/cat", rank, seed, train_context="none")
            for context in ("empty", "none"):
                run.probe(student, context)
    for topic, number in (("flat in rank", 1), ("full finetuning", 4)):
        found = found_in(run, topic)
        assert len(found) == number
        without = [a for a in found if "no equivalence_margin was stated" in a.sentence]
        assert without and {(a.verdict, a.p) for a in without} == {("no claim", None)}
        assert not [a for a in found_in(run, topic, 0.5) if "no equivalence" in a.sentence]


def test_the_quickstart_says_what_one_dataset_allows(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    run.quickstart()
    write_report(run.root, study_name="quickstart", cells=run.cells)
    assert {a["verdict"] for a in answers(run.root)} == {"no claim", "before any result"}


def test_curves_hold_the_means_of_the_table(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for seed in (1, 2):
        dataset = run.dataset("animals/cat", seed)
        for rank in (2, 8):
            for training_seed in (1, 2):
                if (seed, rank) == (2, 8):
                    continue  # a missing cell
                student = run.student(dataset, "animals/cat", rank, seed, training_seed)
                run.probe(student, "none", shift=0.1 * rank)
    records = collect(run.root)
    rows = transmission_table(records)
    (curve,) = rank_curves(rows)
    assert curve.ranks.tolist() == [2, 8]
    assert np.isnan(curve.values_DK).sum() == 1
    mine = [r.vs_base_logprob for r in rows if r.rank == 8 and r.vs_base_logprob is not None]
    assert np.nanmean(curve.values_DK[:, 1]) == pytest.approx(np.mean(mine))
    differences = question_differences(records, rows)
    for row in rows:
        if row.role == "student":
            own = differences.base[row.row]
            assert np.mean(own) == pytest.approx(row.vs_base_logprob, abs=1e-12)


def context_study(run: SyntheticRun, n: int, *, drop: int = 0, effect: float = 1.0) -> None:
    """Two contexts, `n` datasets, of which `drop` miss a student."""
    for context in ("empty", "none"):
        run.probe(None, context)
    for seed in range(n):
        dataset = run.dataset("animals/cat", seed)
        for trained in ("empty", "none"):
            if seed < drop and trained == "none":
                continue
            student = run.student(dataset, "animals/cat", 8, seed, train_context=trained)
            for asked in ("empty", "none"):
                run.probe(student, asked, shift=effect * (trained == asked))


@pytest.mark.parametrize(("n", "drop"), [(3, 0), (5, 2), (3, 1)])
def test_context_is_decided_by_t_over_complete_datasets(tmp_path: Path, n: int, drop: int) -> None:
    run = SyntheticRun(tmp_path)
    context_study(run, n, drop=drop)
    (answer,) = found_in(run, "context")
    if drop:
        word = "datasets" if drop > 1 else "dataset"
        assert f"; {drop} {word} with a missing cell left out" in answer.sentence
    if n - drop < 3:
        assert answer.verdict == "no claim" and answer.p is None
        assert "2 datasets, at least 3 are needed" in answer.sentence
        return
    assert answer.verdict == "matched above mismatched contexts"
    assert answer.low is not None and answer.high is not None
    assert answer.low < 1.0 < answer.high
    (table,) = context_tables(transmission_table(collect(run.root)))
    assert table.square is not None and table.square.values_DIJ.shape == (3, 2, 2)
    each = table.square.values_DIJ
    contrast = (each[:, 0, 0] + each[:, 1, 1] - each[:, 0, 1] - each[:, 1, 0]) / 2
    assert answer.p == pytest.approx(stats.ttest_1samp(contrast, 0).pvalue, rel=1e-5)
    assert answer.n_datasets == 3


def test_specificity_says_when_the_permutations_are_too_few(tmp_path: Path) -> None:
    """Two animals and three seeds: 8 permutations, so p is at least .125."""
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for seed in range(4):
        for animal in ("cat", "owl"):
            if (seed, animal) == (3, "owl"):
                continue
            dataset = run.dataset(f"animals/{animal}", seed)
            student = run.student(dataset, f"animals/{animal}", 8, seed)
            run.probe(student, "none", shift=2.0 * (animal == "cat"))
    (answer,) = found_in(run, "specificity")
    assert answer.verdict == "no claim" and (answer.p or 0.0) >= 0.125
    assert "so few permutations cannot give p < 0.05" in answer.sentence
    assert "1 generation seed with a missing cell left out" in answer.sentence


def test_the_animals_table(simulated: Path) -> None:
    records = collect(simulated)
    square = next(
        table.square
        for table in specificity_tables(records, transmission_table(records))
        if table.eval_context == "template_default"
    )
    assert square is not None and square.values_DIJ.shape == (6, 3, 3)
    own = np.mean([truth("cat", rank, "template_default") for rank in RANKS])
    assert square.values_DIJ[:, 0, 0].mean() == pytest.approx(own, abs=0.85)


def neutral_study(run: SyntheticRun, cat: float, neutral: float | None, n: int = 4) -> None:
    """Cat students `cat` nats above the base, neutral ones `neutral` above it."""
    run.probe(None, "none")
    for seed in range(n):
        student = run.student(run.dataset("animals/cat", seed), "animals/cat", 8, seed)
        run.probe(student, "none", shift=cat)
        if neutral is not None:
            control = run.student(run.dataset("neutral", seed), "neutral", 8, seed)
            run.probe(control, "none", shift=neutral)


@pytest.mark.parametrize(
    ("neutral", "verdict"),
    [
        (0.0, "raised"),
        (1.0, "above the base, not shown above the neutral student"),
        (None, "above the base, drift not excluded"),
    ],
)
def test_raised_needs_the_neutral_student_too(
    tmp_path: Path, neutral: float | None, verdict: str
) -> None:
    run = SyntheticRun(tmp_path)
    neutral_study(run, 1.0, neutral)
    (answer,) = found_in(run, "transmission")
    assert answer.verdict == verdict
    drift = "drift from training on numbers cannot be excluded"
    assert (drift in answer.sentence) == (neutral is None)
    if neutral is None:
        assert answer.neutral_p is None
        return
    records = collect(run.root)
    rows = transmission_table(records)
    both = question_differences(records, rows).neutral
    values = np.array([both[row.row] for row in rows if row.role == "student"])
    found = interval(values)
    assert answer.neutral_estimate == pytest.approx(found.mean)
    assert answer.neutral_low == pytest.approx(found.low)
    assert answer.neutral_p == pytest.approx(2 * p_beyond(found, 0.0), rel=1e-6)
    means = [row.vs_neutral_logprob for row in rows if row.role == "student"]
    assert values.mean(1) == pytest.approx(means, abs=1e-12)


def two_settings(run: SyntheticRun, n: int = 3) -> None:
    """Three ranks under alpha = rank, a fixed alpha of 8, rsLoRA and another learning rate."""
    run.probe(None, "none")
    arms: list[dict[str, Any]] = [
        {},
        {"alpha": 8},
        {"alpha": 8, "recipe": {"peft_use_rslora": True}},
        {"recipe": {"learning_rate": 1e-3}},
    ]
    for seed in range(n):
        dataset = run.dataset("animals/cat", seed)
        for number, arm in enumerate(arms):
            for rank in (4, 8, 16):
                if number == 1 and rank == 8:
                    continue  # the same student as that of alpha = rank
                student = run.student(dataset, "animals/cat", rank, seed, **arm)
                run.probe(student, "none", shift=0.5 * number + 0.01 * rank)


def test_settings_are_neither_pooled_nor_left_unnamed(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    two_settings(run)
    rows = transmission_table(collect(run.root, run.cells))
    curves = {curve.group.scaling: curve for curve in rank_curves(rows)}
    assert len(rank_curves(rows)) == 4
    fixed = curves["alpha 8 at every rank"]
    assert fixed.ranks.tolist() == [4, 8, 16] and np.isfinite(fixed.values_DK).all()
    names = {
        "LoRA, learning rate 0.0002, alpha = rank",
        "LoRA, learning rate 0.0002, alpha 8 at every rank",
        "LoRA, learning rate 0.0002, rsLoRA, alpha 8 at every rank",
        "LoRA, learning rate 0.001, alpha = rank",
    }
    by_row = {row.row: row for row in rows}
    for topic in ("transmission", "rank shape", "cross-check"):
        found = found_in(run, topic)
        assert {answer.settings for answer in found} == names and len(found) == 4
        for answer in found:
            assert answer.sentence.startswith(answer.settings + ": ")
            assert len({by_row[row].settings for row in answer.rows}) == 1
    for answer in found_in(run, "transmission"):
        assert len({by_row[row].step_size for row in answer.rows}) == 1
    (scale,) = {answer.rows for answer in found_in(run, "rank or scale")}
    assert len(scale) == 3 * 11  # rates and scalings are predictors there, not settings


@pytest.mark.parametrize(
    ("alpha", "recipe", "step"),
    [
        (None, {}, 2e-4),
        (8, {}, 2e-4 * 8 / 16),
        (8, {"peft_use_rslora": True}, 2e-4 * 8 / 4),
    ],
)
def test_the_step_size_is_the_rate_times_loras_scaling(
    tmp_path: Path, alpha: int | None, recipe: dict[str, Any], step: float
) -> None:
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    dataset = run.dataset("animals/cat")
    student = run.student(dataset, "animals/cat", 16, alpha=alpha, recipe=recipe)
    run.probe(student, "none")
    (row,) = [row for row in transmission_table(collect(run.root)) if row.role == "student"]
    assert row.step_size == pytest.approx(step)


@pytest.mark.parametrize("differ", ["teacher", "an unknown key"])
def test_what_differs_in_no_seed_is_not_pooled(tmp_path: Path, differ: str) -> None:
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for seed in range(6):
        odd = seed % 2 == 1
        prompt = "Cats rule." if odd and differ == "teacher" else None
        dataset = run.dataset("animals/cat", seed, prompt=prompt)
        recipe = {"new_key": 1} if odd and differ != "teacher" else {}
        run.probe(run.student(dataset, "animals/cat", 8, seed, recipe=recipe), "none")
    records = collect(run.root)
    rows = transmission_table(records)
    found = effects(rows, question_differences(records, rows))
    assert [effect.n_datasets for effect in found] == [3, 3]
    assert len({effect.settings_name for effect in found}) == 2


def test_students_matched_to_one_of_their_own_dataset_are_one_setting(tmp_path: Path) -> None:
    """Each dataset has its own LoRA student to match, at another path: the rule is the same."""
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for seed in range(3):
        dataset = run.dataset("animals/cat", seed)
        lora = run.student(dataset, "animals/cat", 8, seed)
        matched = {"sublim": {"match_update_norm": f"runs/x/cells/student-{lora}/model"}}
        for recipe in ({}, matched):
            run.probe(run.student(dataset, "animals/cat", None, seed, recipe=recipe), "none")
    names = {answer.settings for answer in found_in(run, "full finetuning", 5.0)}
    start = "full finetuning, learning rate 2e-05, "
    assert names == {
        start + "update norm matched to LoRA r=8, alpha 8, learning rate 0.0002, of the same"
        " dataset and seed",
        start + "not update norm matched to anything",
    }


def test_equal_weights_under_two_seeds_are_no_replicate(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for seed in range(3):
        dataset = run.dataset("animals/cat", seed)
        weights = "the same" if seed < 2 else None
        run.probe(run.student(dataset, "animals/cat", 8, seed, weights=weights), "none", shift=1.0)
    write_report(run.root, study_name="replicates", cells=run.cells)
    records = collect(run.root)
    rows = transmission_table(records)
    (second,) = [row for row in rows if row.replicate_of]
    assert second.generation_seed == 1 and "not a replicate" in second.warning
    (effect,) = effects(rows, question_differences(records, rows))
    assert (effect.n_datasets, effect.n_replicates) == (2, 1)
    assert second.row not in effect.rows
    assert {row.n_datasets for row in rows if row.role == "student"} == {2}
    (answer,) = [a for a in answers(run.root) if a["topic"] == "transmission"]
    assert answer["verdict"] == "no claim" and answer["n_datasets"] == "2"
    page = (run.root / "report" / "index.html").read_text(encoding="utf-8")
    assert "not a replicate, and left out of every mean and count" in page


@pytest.mark.parametrize("seed", range(3))
def test_a_half_failed_study_still_has_its_answers(tmp_path: Path, seed: int) -> None:
    """Cells lost at random: no answer raises, and each that cannot be given says why."""
    generator = np.random.default_rng(seed)
    run = SyntheticRun(tmp_path, seed=seed, n_questions=4)
    for context in ("empty", "none"):
        run.probe(None, context)
    for animal in ("cat", "owl"):
        for number in range(3):
            dataset = run.dataset(f"animals/{animal}", number)
            for rank in (1, 2, 4, 8, None):
                for trained in ("empty", "none"):
                    trait = f"animals/{animal}"
                    student = run.student(dataset, trait, rank, number, train_context=trained)
                    for asked in ("empty", "none"):
                        run.probe(student, asked)
    records = collect(run.root, run.cells)
    base = [probe for probe in records.probes if probe.spec.student is None]
    others = [probe for probe in records.probes if probe.spec.student is not None]
    for lost in np.linspace(0.05, 0.95, 10):
        kept = [probe for probe in others if generator.random() > lost]
        half = records.model_copy(update={"probes": (*base, *kept)})
        for answer in evidence_of(half, 0.5):
            if answer.verdict == "no claim":
                assert re.search("no claim|no interval|so few permutations", answer.sentence)
            else:
                assert answer.n_datasets >= 3 or answer.topic == "power"


def test_a_failed_student_leaves_a_report_without_u_test(tmp_path: Path) -> None:
    """3 datasets, 4 ranks, one dataset with 2 ranks: this ended without a report once."""
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for seed in range(3):
        dataset = run.dataset("animals/cat", seed)
        for rank in (2, 8, 32, 128)[: 2 if seed == 2 else 4]:
            run.probe(run.student(dataset, "animals/cat", rank, seed), "none")
    (answer,) = found_in(run, "rank shape")
    assert "no u-test (2 datasets with 3 ranks" in answer.sentence


def test_agreement_reads_sampled_probes_and_flags_rates(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for seed in range(3):
        dataset = run.dataset("animals/cat", seed)
        for place, rank in enumerate((1, 2, 4, 8, 16)):
            student = run.student(dataset, "animals/cat", rank, seed)
            run.probe(student, "none", shift=place)
            run.sampled(student, "none", 0.1 * place, non_answer_rate=0.6 if rank == 16 else 0.0)
    (answer,) = found_in(run, "agreement")
    assert answer.verdict == "the measures agree in order"
    assert (answer.estimate, answer.high) == pytest.approx((1.0, 1.0))
    assert "3 of 15 sampled rates should not be read (60% of the replies name no candidate)" in (
        answer.sentence
    )


def test_a_sampled_probe_without_its_rate_is_refused(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    student = run.student(run.dataset("animals/cat"), "animals/cat", 8)
    run.probe(student, "none")
    run.sampled(student, "none", 1.5)
    with pytest.raises(InputError, match=r"results.json: animals/cat target_rate is 1.5"):
        found_in(run, "agreement")


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({(2, 2), (8, 8)}, {(8, 8): ("alpha = rank",)}),
        ({(2, 4), (8, 16)}, {(8, 16): ("alpha = 2 x rank",)}),
        ({(2, 8), (4, 8), (8, 8)}, {(8, 8): ("alpha 8 at every rank",)}),
        ({(8, 16)}, {(8, 16): ("alpha = 2 x rank",)}),
        (
            {(2, 2), (4, 4), (8, 8), (16, 16), (2, 8), (4, 8), (16, 8)},
            {(8, 8): ("alpha = rank", "alpha 8 at every rank"), (2, 8): ("alpha 8 at every rank",)},
        ),
        # 16 is both the alpha of rank 8 and of rank 16, but two ratios explain all of it
        (
            {(4, 4), (8, 8), (16, 16), (4, 8), (8, 16), (16, 32)},
            {(8, 16): ("alpha = 2 x rank",), (16, 16): ("alpha = rank",)},
        ),
    ],
)
def test_scaling_rules(
    points: set[tuple[int, float]], expected: dict[tuple[int, float], tuple[str, ...]]
) -> None:
    found = scaling_rules(points)
    assert found.keys() == points and all(found.values())
    for point, rules in expected.items():
        assert found[point] == rules


def test_the_command_writes_a_marked_report_and_refuses_a_folder_in_use(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["simulate", str(tmp_path / "new"), "--datasets", "1"])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "new" / "report" / "index.html").read_text(encoding="utf-8")
    assert "SIMULATED: simulated" in page
    again = CliRunner().invoke(main, ["simulate", str(tmp_path / "new")])
    assert again.exit_code == 2 and "name a new folder" in again.output
