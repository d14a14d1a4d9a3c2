"""Two studies side by side: the differences by scipy's own tests, and what cannot be compared."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats
from synthetic_run import SyntheticRun

from sublim_plugin.analysis.compare import Difference, Side, answer_pairs, differences, side
from sublim_plugin.cli import main


def study(
    root: Path, seeds: Sequence[int], shift: float, rng: int, rate: float | None = None
) -> Path:
    run = SyntheticRun(root, seed=rng, n_questions=6)
    run.probe(None, "none")
    for seed in seeds:
        dataset = run.dataset("animals/cat", seed)
        for rank in (2, 8, None):
            recipe = {"learning_rate": rate} if rate else None
            student = run.student(dataset, "animals/cat", rank, seed, steps=1, recipe=recipe)
            run.probe(student, "none", shift=shift + 0.2 * run.rng.normal())
    return root


def values_of(one: Side, name: str) -> dict[str, float]:
    """Transmission by dataset of the effect that a difference names."""
    effect = one.effects[int(name[1:]) - 1]
    rows = {row.row: row for row in one.rows}
    return {str(rows[r].dataset): rows[r].vs_base_logprob or 0.0 for r in effect.rows}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Side:
    root = study(tmp_path_factory.mktemp("runs") / "four", range(4), 0.0, rng=1)
    return side("four", root, None)


def test_other_datasets_are_compared_by_welchs_test(four: Side, tmp_path: Path) -> None:
    other = side("other", study(tmp_path / "other", range(10, 15), 1.0, rng=2), None)
    found = differences(four, other)
    assert len(found) == 3 and {one.test for one in found} == {"Welch's t over datasets"}
    for one in found:
        a, b = list(values_of(four, one.a).values()), list(values_of(other, one.b).values())
        assert (one.a_datasets, one.b_datasets) == (4, 5)
        expected = stats.ttest_ind(b, a, equal_var=False)
        assert one.p == pytest.approx(expected.pvalue)
        assert one.difference == pytest.approx(np.mean(b) - np.mean(a))
        bounds = expected.confidence_interval(0.95)
        assert (one.low, one.high) == pytest.approx((bounds.low, bounds.high))
    adjusted = stats.false_discovery_control([one.p for one in found])
    assert [one.p_adjusted for one in found] == pytest.approx(list(adjusted))


def test_shared_datasets_are_compared_by_pairs(four: Side, tmp_path: Path) -> None:
    """The other study has one dataset less and one of its own."""
    other = side("other", study(tmp_path / "other", (1, 2, 3, 9), 1.0, rng=3), None)
    for one in differences(four, other):
        a, b = values_of(four, one.a), values_of(other, one.b)
        shared = sorted(a.keys() & b.keys())
        assert len(shared) == 3 and one.test == "paired t over 3 shared datasets"
        expected = stats.ttest_rel([b[s] for s in shared], [a[s] for s in shared])
        assert one.p == pytest.approx(expected.pvalue)
        assert one.difference == pytest.approx(np.mean([b[s] - a[s] for s in shared]))


@pytest.mark.parametrize(
    ("seeds", "reason"),
    [
        ((20, 21), "2 datasets, at least 3 are needed"),
        ((0, 1, 20), "the studies share 2 datasets: too few for pairs, not independent"),
    ],
)
def test_no_interval_without_datasets_to_carry_it(
    four: Side, tmp_path: Path, seeds: tuple[int, ...], reason: str
) -> None:
    other = side("other", study(tmp_path / "other", seeds, 1.0, rng=4), None)
    found = differences(four, other)
    assert {one.reason for one in found} == {reason}
    for one in found:
        assert one.difference is not None
        assert (one.low, one.high, one.p, one.p_adjusted) == (None,) * 4


def test_a_study_differs_from_itself_in_nothing(four: Side) -> None:
    found = differences(four, four)
    assert {(one.difference, one.reason) for one in found} == {(0.0, "the datasets do not vary")}
    assert all(pair.agree for pair in answer_pairs(four, four))


def test_recipes_are_not_mixed(four: Side, tmp_path: Path) -> None:
    """Two learning rates in one study: told apart by them, and not compared with a third."""
    root = study(tmp_path / "both", range(3), 0.0, rng=5, rate=1e-3)
    study_again(root)
    both = side("both", root, None)
    found = differences(both, both)
    rates = {one.settings.split("learning rate ")[1].split(",")[0] for one in found}
    assert rates == {"0.001", "0.002"}
    assert all(one.difference == 0 for one in found) and len(found) == 6
    alone: list[Difference] = list(differences(four, both))
    assert {one.reason for one in alone} == {"not in both studies"} and len(alone) == 9


def study_again(root: Path) -> None:
    """The same datasets and base, students of another learning rate."""
    run = SyntheticRun(root, seed=5, n_questions=6)
    for path in sorted(root.glob("cells/dataset-*")):
        seed = json.loads((path / "manifest.json").read_text())["spec"]["generation_seed"]
        for rank in (2, 8, None):
            name = path.name.rsplit("-", 1)[1]
            recipe = {"learning_rate": 2e-3}
            student = run.student(name, "animals/cat", rank, seed, steps=1, recipe=recipe)
            run.probe(student, "none")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_writes_one_page_and_its_tables(tmp_path: Path) -> None:
    a = study(tmp_path / "runs" / "a", range(3), 0.0, rng=6)
    b = study(tmp_path / "runs" / "b", range(5, 9), 1.5, rng=7, rate=1e-3)
    result = CliRunner().invoke(main, ["report", "--compare", str(a), str(b)])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "runs" / "compare-a-b"
    assert str(folder / "index.html") in result.output
    page = (folder / "index.html").read_text(encoding="utf-8")
    found = read_csv(folder / "differences.csv")
    for line in found:
        assert f"{float(line['difference']):+.4f}" in page
        assert f"[{float(line['low']):+.3f}, {float(line['high']):+.3f}]" in page
    told = {line["setting"]: line for line in read_csv(folder / "settings.csv")}
    rates = told["lora: learning_rate"]
    assert (rates["a"], rates["b"], rates["differs"]) == ("0.0002", "0.001", "True")
    assert told["base model"]["differs"] == "False"
    assert "lora: learning_rate" in page and "base model" not in page
    for line in read_csv(folder / "answers.csv"):
        assert line["a_sentence"] in page.replace("&#x27;", "'").replace("&lt;", "<")
    assert {p.suffix for p in folder.glob("transmission.*")} == {".png", ".svg", ".pdf", ".csv"}
    # written again over itself, and over nothing else
    assert CliRunner().invoke(main, ["report", "--compare", str(a), str(b)]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A"], "--compare takes two studies, found 1"),
        (["A", "missing"], "missing: neither a study file nor a run folder"),
        (["A", "EMPTY"], "no run folder (it holds no cells/)"),
        (["A", "A", "--out", "A"], "holds something that is no comparison"),
    ],
)
def test_what_cannot_be_compared_is_said(
    four: Side, tmp_path: Path, arguments: list[str], message: str
) -> None:
    names = {"A": str(four.run.run_dir), "EMPTY": str(tmp_path)}
    given = [names.get(argument, argument) for argument in arguments]
    result = CliRunner().invoke(main, ["report", "--compare", *given])
    assert result.exit_code == 2 and message in result.output
