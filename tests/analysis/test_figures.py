"""What is drawn equals the CSV beside it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import SyntheticRun

from sublim_plugin.analysis.collect import RunRecords, collect
from sublim_plugin.analysis.context_figure import context_figure, context_points, draw_contexts
from sublim_plugin.analysis.effects import Effect, effects
from sublim_plugin.analysis.heat_map import contrast
from sublim_plugin.analysis.rank_figure import (
    OVER_DATASETS,
    OVER_QUESTIONS,
    draw_ranks,
    rank_figure,
    rank_points,
)
from sublim_plugin.analysis.scale_figure import draw_scale, scale_figure, scale_points
from sublim_plugin.analysis.series import series_names
from sublim_plugin.analysis.specificity_figure import draw_specificity, specificity_points
from sublim_plugin.analysis.training_figures import (
    MOST_STEPS,
    draw_losses,
    draw_norms,
    loss_figure,
    loss_points,
    norm_figure,
    norm_points,
)
from sublim_plugin.analysis.transmission import (
    TransmissionRow,
    question_differences,
    transmission_table,
)

Rows = tuple[TransmissionRow, ...]


def analysed(run: RunRecords) -> tuple[Rows, tuple[Effect, ...]]:
    rows = transmission_table(run)
    return rows, effects(rows, question_differences(run, rows))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    """One dataset a trait: no interval over datasets."""
    run = SyntheticRun(tmp_path_factory.mktemp("one"))
    run.quickstart()
    return collect(run.root)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    """Four datasets of two traits and of neutral numbers, trained in two contexts."""
    run = SyntheticRun(tmp_path_factory.mktemp("four"), n_questions=8)
    for context in ("empty", "none"):
        run.probe(None, context)
    for seed in range(4):
        for trait in ("animals/cat", "animals/owl", "neutral"):
            dataset = run.dataset(trait, seed)
            for rank in (2, 8, None):
                for train in ("empty", "none"):
                    student = run.student(dataset, trait, rank, seed, train_context=train, steps=3)
                    for context in ("empty", "none"):
                        run.probe(student, context, shift=1.0 if trait == "animals/cat" else 0.0)
    return collect(run.root)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def marks(axes: Any) -> dict[str, tuple[float, float]]:
    """Point name to (x, y) of the mark drawn for it."""
    found = {}
    for line in axes.get_lines():
        names = str(line.get_gid()).split()
        if line.get_marker() in ("_", "|") or not names[0].startswith("P"):
            continue
        for name, x, y in zip(names, line.get_xdata(), line.get_ydata(), strict=True):
            found[name] = (float(x), float(y))
    return found


def bars(axes: Any) -> list[float]:
    """Lengths of the error bars."""
    segments = [segment for bar in axes.containers for segment in bar[2][0].get_segments()]
    return sorted(float(np.ptp(segment[:, 1])) for segment in segments)


@pytest.mark.parametrize("name", ["one", "four"])
def test_rank_figure_draws_what_its_csv_says(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    rows, found = analysed(request.getfixturevalue(name))
    files = rank_figure(rows, found, tmp_path, False)
    assert files is not None
    lines = read_csv(files.csv)
    points = rank_points(rows, found)
    figure = draw_ranks(points)
    panels = iter(figure.axes)
    contexts = list(dict.fromkeys(point.eval_context for point in points))
    drawn_in_all = 0
    for target in dict.fromkeys(point.target for point in points):
        for context in contexts:
            axes = next(panels)
            here = {
                line["point"]: line
                for line in lines
                if (line["target"], line["eval_context"]) == (target, context)
            }
            drawn = marks(axes)
            drawn_in_all += len(drawn)
            assert drawn.keys() == here.keys()
            for point, (x, y) in drawn.items():
                assert y == pytest.approx(float(here[point]["vs_base_logprob"]), abs=1e-12)
                rank = here[point]["rank"]
                assert x > np.log2(8) + 1 if not rank else abs(x - np.log2(int(rank))) < 0.6
            lengths = [
                float(line["high"]) - float(line["low"])
                for line in here.values()
                if line["kind"] != "dataset"
            ]
            assert bars(axes) == pytest.approx(sorted(lengths))
    assert drawn_in_all == len(lines)


def test_bars_are_over_datasets_where_there_are_three(one: RunRecords, four: RunRecords) -> None:
    """They are those of effects.csv; with fewer, standard errors over questions, named so."""
    rows, found = analysed(four)
    means = [point for point in rank_points(rows, found) if point.kind == "mean"]
    assert len(means) == len(found)
    for point in means:
        effect = found[int(point.effect[1:]) - 1]
        assert (point.vs_base_logprob, point.low, point.high, point.n_datasets) == (
            effect.vs_base_logprob,
            effect.low,
            effect.high,
            4,
        )
        assert point.bar == OVER_DATASETS
    dots = [point for point in rank_points(rows, found) if point.kind == "dataset"]
    assert len(dots) == 4 * sum(effect.role == "student" for effect in found)

    rows, found = analysed(one)
    by_row = {row.row: row for row in rows}
    points = rank_points(rows, found)
    assert {point.kind for point in points} == {"student"}
    for point in points:
        row = by_row[point.rows]
        assert row.vs_base_logprob is not None and row.vs_base_logprob_se is not None
        assert point.bar == OVER_QUESTIONS
        assert point.high == row.vs_base_logprob + row.vs_base_logprob_se
        assert point.low == row.vs_base_logprob - row.vs_base_logprob_se
    texts = [text.get_text() for text in draw_ranks(points).texts]
    assert any("say nothing about other datasets" in text for text in texts)


def test_context_table_draws_what_its_csv_says(four: RunRecords, tmp_path: Path) -> None:
    """Each field is the mean over datasets of the mean over ranks, by hand."""
    rows, _ = analysed(four)
    files = context_figure(rows, tmp_path, False)
    assert files is not None
    lines = read_csv(files.csv)
    assert len(lines) == 2 * 4 * 4  # traits, kinds of students, train x eval contexts
    by_row = {row.row: row for row in rows}
    for line in lines:
        own = [by_row[name] for name in line["rows"].split()]
        assert {(row.train_context, row.eval_context) for row in own} == {
            (line["train_context"], line["eval_context"])
        }
        shifts = [row.vs_base_logprob for row in own]
        assert float(line["vs_base_logprob"]) == pytest.approx(np.mean(shifts))
        assert float(line["low"]) < float(line["vs_base_logprob"]) < float(line["high"])
        assert (line["matched"] == "True") == (line["train_context"] == line["eval_context"])
    figure = draw_contexts(context_points(rows))
    texts = [t.get_text().split("\n")[0] for axes in figure.axes[:2] for t in axes.texts]
    values = sorted(float(text.replace("\u2212", "-")) for text in texts)
    assert values == pytest.approx(sorted(float(x["vs_base_logprob"]) for x in lines), abs=5.1e-3)


def test_students_of_other_settings_are_not_averaged(tmp_path: Path) -> None:
    """Two learning rates make two lines of the table and two series of the rank figure."""
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    dataset = run.dataset("animals/cat")
    for rate in (1e-4, 5e-4):
        for rank in (2, 8):
            recipe = {"learning_rate": rate}
            run.probe(run.student(dataset, "animals/cat", rank, steps=1, recipe=recipe), "none")
    rows, found = analysed(collect(tmp_path))
    names = {"learning rate 0.0001", "learning rate 0.0005"}
    assert {name for own in series_names(rows).values() for name in own} == names
    assert {point.students for point in context_points(rows)} == {f"LoRA, {n}" for n in names}
    assert {point.series for point in rank_points(rows, found)} == names
    assert len(norm_points(collect(tmp_path))) == 2 * 2 * 8


def test_a_student_that_two_rules_of_alpha_share_stands_in_both_curves(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, n_questions=4)
    run.probe(None, "none")
    dataset = run.dataset("animals/cat")
    for rank, alpha in ((2, 2), (8, 8), (32, 32), (2, 8), (32, 8)):
        run.probe(run.student(dataset, "animals/cat", rank, steps=1, alpha=alpha), "none")
    rows, found = analysed(collect(tmp_path))
    curves: dict[str, list[int | None]] = {}
    for point in rank_points(rows, found):
        curves.setdefault(point.series, []).append(point.rank)
    assert {name: sorted(ranks, key=str) for name, ranks in curves.items()} == {
        "alpha = rank": [2, 32, 8],
        "alpha 8 at every rank": [2, 32, 8],
    }


def test_specificity_draws_what_its_csv_says(four: RunRecords) -> None:
    rows, _ = analysed(four)
    points, behind = specificity_points(four, rows)
    assert len(points) == 4 * 2 * 2 and len(behind) == 4
    own = [p.vs_base_logprob for p in points if p.own and p.trained_on == "animals/cat"]
    assert all(value == pytest.approx(1.0, abs=0.3) for value in own)
    figure = draw_specificity(points)
    drawn = [axes.get_images()[0].get_array() for axes in figure.axes if axes.get_images()]
    values = np.concatenate([np.asarray(image).ravel() for image in drawn])
    assert list(values) == pytest.approx([p.vs_base_logprob for p in points])


def test_scale_figure_draws_what_its_csv_says(four: RunRecords, tmp_path: Path) -> None:
    rows, found = analysed(four)
    assert scale_figure(rows, found, tmp_path, False) is not None
    points = scale_points(rows, found)
    assert {p.predictor for p in points} == {"rank", "update norm", "learning rate x scaling"}
    by_row = {row.row: row for row in rows}
    for p in points:
        own = [by_row[name] for name in p.rows.split()]
        assert p.train_context == p.eval_context
        if p.predictor == "update norm":
            assert np.log(p.x) == pytest.approx(np.mean([np.log(r.update_norm or 0) for r in own]))
        elif p.predictor == "rank":
            assert p.x == own[0].rank
        else:
            assert p.x == own[0].learning_rate  # alpha = rank
    drawn: dict[str, tuple[float, float]] = {}
    for axes in draw_scale(points).axes:
        drawn |= marks(axes)
    for p in points:
        assert drawn[p.point] == pytest.approx((np.log2(p.x), p.vs_base_logprob))


def test_loss_figure_draws_what_its_csv_says(one: RunRecords, tmp_path: Path) -> None:
    files = loss_figure(one, tmp_path)
    assert files is not None
    lines = read_csv(files.csv)
    drawn = draw_losses(loss_points(one)).axes[0].get_lines()
    assert len(drawn) == 5
    for curve, name in zip(drawn, dict.fromkeys(line["curve"] for line in lines), strict=True):
        losses = [float(line["loss"]) for line in lines if line["curve"] == name]
        assert list(np.asarray(curve.get_ydata(), dtype=float)) == losses
    receipts = {student.spec.method.name: student.receipt.losses for student in one.students}
    assert len(receipts["LoRA r=2"]) == 30


def test_long_and_many_curves_are_thinned_by_averaging(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    dataset = run.dataset("animals/cat")
    for seed in range(21):
        run.student(dataset, "animals/cat", 8, training_seed=seed, steps=1000)
    records = collect(tmp_path)
    points = loss_points(records)
    assert len(points) == MOST_STEPS
    assert {(p.n_students, p.n_steps) for p in points} == {(21, 5)}
    logged = [[point.loss for point in student.receipt.losses] for student in records.students]
    stretches = np.mean(logged, axis=0).reshape(-1, 5).mean(1)
    assert [p.loss for p in points] == pytest.approx(list(stretches))
    assert points[-1].step == 1000


def test_norm_figure_draws_what_its_csv_says(four: RunRecords, tmp_path: Path) -> None:
    files = norm_figure(four, tmp_path)
    assert files is not None
    points = norm_points(four)
    total = next(p for p in points if p.module == "total" and p.rank == 8)
    norms = [s.receipt.update_norm["total"] for s in four.students if s.spec.method.rank == 8]
    assert (total.low, total.high) == (min(norms), max(norms))
    assert total.mean == pytest.approx(np.mean(norms))
    drawn = marks(draw_norms(points).axes[0])
    assert {name: y for name, (_, y) in drawn.items()} == {p.point: p.mean for p in points}
    assert len(read_csv(files.csv)) == len(points) == 3 * 8


def test_numbers_in_colour_can_be_read(four: RunRecords) -> None:
    """4.5:1 between every number of a heat map and the field behind it."""
    from matplotlib.colors import to_rgb

    rows, _ = analysed(four)
    seen = 0
    for figure in (
        draw_contexts(context_points(rows)),
        draw_specificity(specificity_points(four, rows)[0]),
    ):
        for axes in figure.axes:
            for text in axes.texts:
                (image,) = axes.get_images()
                x, y = text.get_position()
                values = image.get_array()
                assert values is not None
                behind = image.to_rgba(values)[round(y), round(x), :3]
                assert contrast(to_rgb(text.get_color()), behind) >= 4.5
                seen += 1
    assert seen == 32 + 16


def test_files_are_images_and_repeatable(one: RunRecords, tmp_path: Path) -> None:
    rows, found = analysed(one)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = rank_figure(rows, found, tmp_path / "a", False)
    second = rank_figure(rows, found, tmp_path / "b", False)
    assert first is not None and second is not None
    assert first.png.read_bytes().startswith(b"\x89PNG")
    assert first.svg.read_text().startswith("<?xml")
    assert first.pdf.read_bytes().startswith(b"%PDF")
    for name in ("png", "svg", "pdf", "csv"):
        assert getattr(first, name).read_bytes() == getattr(second, name).read_bytes()
    assert "LoRA r=8" in first.alt


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    assert rank_figure((), (), tmp_path, False) is None
    assert scale_figure((), (), tmp_path, False) is None
    assert context_figure((), tmp_path, False) is None
    assert specificity_points(collect(tmp_path), ()) == ([], {})
    assert loss_figure(collect(tmp_path), tmp_path) is None
    assert norm_figure(collect(tmp_path), tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", [(None,), (8,), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)])
def test_any_grid_of_ranks_can_be_drawn(tmp_path: Path, ranks: tuple[int | None, ...]) -> None:
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for trait in ("animals/cat", "animals/owl"):
        dataset = run.dataset(trait)
        for rank in ranks:
            run.probe(run.student(dataset, trait, rank, steps=1), "none")
    records = collect(tmp_path)
    rows, found = analysed(records)
    draw_ranks(rank_points(rows, found))
    draw_contexts(context_points(rows))
    draw_scale(scale_points(rows, found))
    draw_losses(loss_points(records))
    draw_norms(norm_points(records))


def test_drawing_leaves_the_callers_matplotlib_alone(one: RunRecords, tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    context_figure(analysed(one)[0], tmp_path, False)
    assert dict(matplotlib.rcParams) == before
