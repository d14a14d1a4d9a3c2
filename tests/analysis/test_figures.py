"""What is drawn equals the CSV beside it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import SyntheticRun

from sublim_plugin.analysis.collect import RunRecords, collect
from sublim_plugin.analysis.figures import (
    context_figure,
    context_points,
    draw_contexts,
    draw_losses,
    draw_transmission,
    loss_figure,
    loss_points,
    rank_points,
    transmission_figure,
)
from sublim_plugin.analysis.transmission import TransmissionRow, transmission_table


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    run = SyntheticRun(tmp_path_factory.mktemp("run"))
    run.quickstart()
    return collect(run.root)


@pytest.fixture(scope="module")
def rows(records: RunRecords) -> tuple[TransmissionRow, ...]:
    return transmission_table(records)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def marks(axes: Any) -> dict[str, tuple[float, float]]:
    """Row name to (x, y) of the mark drawn for it."""
    found = {}
    for line in axes.get_lines():
        names = str(line.get_gid()).split()
        if line.get_marker() in ("_", "|") or not names[0].startswith("R"):
            continue
        for name, x, y in zip(names, line.get_xdata(), line.get_ydata(), strict=True):
            found[name] = (float(x), float(y))
    return found


def test_rank_figure_draws_what_its_csv_says(
    rows: tuple[TransmissionRow, ...], tmp_path: Path
) -> None:
    files = transmission_figure(rows, tmp_path)
    assert files is not None
    lines = read_csv(files.csv)
    figure = draw_transmission(rank_points(rows))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 6
    for column, context in enumerate(dict.fromkeys(line["eval_context"] for line in lines)):
        here = [line for line in lines if line["eval_context"] == context]
        for axes, field, scale in (
            (panels[column], "vs_base_logprob", 1),
            (panels[column + 3], "vs_base_share", 100),
        ):
            drawn = marks(axes)
            assert sorted(drawn) == sorted(line["row"] for line in here)
            for line in here:
                x, y = drawn[line["row"]]
                assert y == pytest.approx(scale * float(line[field]), abs=1e-12)
                if line["role"] == "student" and line["rank"]:
                    assert x == pytest.approx(np.log2(int(line["rank"])))
                if not line["rank"]:
                    assert x > np.log2(64) + 1


def test_error_bars_are_one_standard_error(rows: tuple[TransmissionRow, ...]) -> None:
    points = rank_points(rows)
    axes = draw_transmission(points).axes[0]
    segments = [segment for bar in axes.containers for segment in bar[2][0].get_segments()]
    lengths = sorted(float(np.ptp(segment[:, 1])) for segment in segments)
    expected = sorted(
        2 * (point.vs_base_logprob_se or 0)
        for point in points
        if point.eval_context == points[0].eval_context
    )
    assert lengths == pytest.approx(expected)


def test_context_figure_draws_what_its_csv_says(
    rows: tuple[TransmissionRow, ...], tmp_path: Path
) -> None:
    files = context_figure(rows, tmp_path)
    assert files is not None
    values = sorted(float(line["vs_base_logprob"]) for line in read_csv(files.csv))
    figure = draw_contexts(context_points(rows))
    image = figure.axes[0].get_images()[0].get_array()
    assert image is not None
    assert sorted(np.asarray(image).ravel()) == pytest.approx(values)
    texts = [text.get_text().replace("\u2212", "-") for text in figure.axes[0].texts]
    assert sorted(float(text) for text in texts) == pytest.approx(values, abs=5e-4)
    assert {line["matched"] for line in read_csv(files.csv)} == {"True", "False"}


def test_loss_figure_draws_what_its_csv_says(records: RunRecords, tmp_path: Path) -> None:
    files = loss_figure(records, tmp_path)
    assert files is not None
    lines = read_csv(files.csv)
    drawn = draw_losses(loss_points(records)).axes[0].get_lines()
    assert len(drawn) == 5
    for curve, student in zip(drawn, dict.fromkeys(line["student"] for line in lines), strict=True):
        losses = [float(line["loss"]) for line in lines if line["student"] == student]
        assert list(np.asarray(curve.get_ydata(), dtype=float)) == losses


def test_files_are_images_and_repeatable(rows: tuple[TransmissionRow, ...], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = transmission_figure(rows, tmp_path / "a")
    second = transmission_figure(rows, tmp_path / "b")
    assert first is not None and second is not None
    assert first.png.read_bytes().startswith(b"\x89PNG")
    assert first.svg.read_text().startswith("<?xml")
    for name in ("png", "svg", "csv"):
        assert getattr(first, name).read_bytes() == getattr(second, name).read_bytes()
    assert "LoRA r=8" in first.alt


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    assert transmission_figure((), tmp_path) is None
    assert context_figure((), tmp_path) is None
    assert loss_figure(collect(tmp_path), tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", [(None,), (8,), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)])
def test_any_grid_of_ranks_can_be_drawn(tmp_path: Path, ranks: tuple[int | None, ...]) -> None:
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for trait in ("animals/cat", "animals/owl"):
        dataset = run.dataset(trait)
        for rank in ranks:
            run.probe(run.student(dataset, trait, rank, steps=1), "none")
    table = transmission_table(collect(tmp_path))
    assert transmission_figure(table, tmp_path) is not None
    assert context_figure(table, tmp_path) is not None
    assert loss_figure(collect(tmp_path), tmp_path) is not None


def test_drawing_leaves_the_callers_matplotlib_alone(
    rows: tuple[TransmissionRow, ...], tmp_path: Path
) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    transmission_figure(rows, tmp_path)
    assert dict(matplotlib.rcParams) == before
