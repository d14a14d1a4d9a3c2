"""Trait × trait: is a student raised on the trait of its numbers, or on every trait?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from sublim_plugin.analysis.collect import RunRecords
from sublim_plugin.analysis.figure_files import (
    WIDTH,
    FigureFiles,
    Point,
    in_words,
    new_figure,
    signed,
    style,
    write_figure,
)
from sublim_plugin.analysis.heat_map import heat_map, scale
from sublim_plugin.analysis.transmission import TransmissionRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PANELS = 6
Behind = dict[tuple[str, str, str], tuple[str, ...]]
"""Rows of results.csv by students, train and eval context."""
TITLE_WIDTH = 38
"""Characters of a line above a matrix."""
NUMBERED = 12
"""Traits up to which a field shows its number."""


class SpecificityPoint(Point):
    """A field of the matrix: mean over generation seeds of the students' difference from the base.

    LoRA students are averaged over the ranks that all traits have. `low` and `high` are the 95%
    interval over generation seeds, None with fewer than three.
    """

    point: str
    students: str
    train_context: str
    eval_context: str
    trained_on: str
    asked_about: str
    vs_base_logprob: float
    low: float | None
    high: float | None
    n_datasets: int
    own: bool


def specificity_points(
    run: RunRecords, rows: Sequence[TransmissionRow]
) -> tuple[list[SpecificityPoint], Behind]:
    """Every matrix of the study, and the rows of results.csv behind each, by contexts."""
    from sublim_plugin.analysis.cluster_intervals import interval
    from sublim_plugin.analysis.square_tables import specificity_tables

    drafts: list[dict[str, Any]] = []
    behind = {}
    tables = [table for table in specificity_tables(run, rows) if table.square is not None]
    for one in tables[:MOST_PANELS]:
        table = one.square
        assert table is not None
        behind[one.name, one.train_context, one.eval_context] = table.rows
        for i, student in enumerate(table.labels):
            for j, about in enumerate(table.labels):
                found = interval(table.values_DIJ[:, i, j][:, None])
                drafts.append(
                    {
                        "students": one.name,
                        "train_context": one.train_context,
                        "eval_context": one.eval_context,
                        "trained_on": student,
                        "asked_about": about,
                        "vs_base_logprob": found.mean,
                        "low": found.low,
                        "high": found.high,
                        "n_datasets": found.n_datasets,
                        "own": student == about,
                    }
                )
    points = [SpecificityPoint(point=f"P{i}", **d) for i, d in enumerate(drafts, start=1)]
    return points, behind


def draw_specificity(points: Sequence[SpecificityPoint]) -> Figure:
    """A matrix per train and eval context; the diagonal, in bold, is each student's own trait."""
    panels = list(dict.fromkeys(_panel(p) for p in points))
    several = len({p.students for p in points}) > 1
    columns = min(2, len(panels))
    most = max(len({p.trained_on for p in points if _panel(p) == panel}) for panel in panels)
    bands = -(-len(panels) // columns)
    titles = [
        [
            *(wrap(students, TITLE_WIDTH) if several else ()),
            f"trained in {train},",
            f"asked in {asked}",
        ]
        for students, train, asked in panels
    ]
    with style(**{"axes.grid": False}):
        side = 1.05 + min(0.42 * most, 2.9) + 0.15 * (max(map(len, titles)) - 2)
        figure = new_figure(WIDTH if columns > 1 else 4.2, bands * side + 0.5)
        grid = figure.subplots(bands, columns, squeeze=False)
        colours = scale([point.vs_base_logprob for point in points])
        for number in range(bands * columns):
            axes = grid[number // columns][number % columns]
            if number >= len(panels):
                axes.set_visible(False)
                continue
            mine = [p for p in points if _panel(p) == panels[number]]
            labels = list(dict.fromkeys(p.trained_on for p in mine))
            values: list[list[float | None]] = [[None] * len(labels) for _ in labels]
            texts = {}
            for p in mine:
                y, x = labels.index(p.trained_on), labels.index(p.asked_about)
                values[y][x] = p.vs_base_logprob
                if len(labels) <= NUMBERED:
                    texts[y, x] = (signed(p.vs_base_logprob), p.own)
            short = [label.split("/")[-1] for label in labels]
            heat_map(axes, values, colours, short, short, texts, 7.0 if len(labels) < 8 else 5.0)
            axes.tick_params(axis="x", labelrotation=90 if len(labels) > 6 else 0)
            axes.set_title("\n".join(titles[number]), loc="left", pad=5)
            if number % columns == 0:
                axes.set_ylabel("student of the numbers of")
            axes.set_xlabel("asked about")
        bar = figure.colorbar(
            colours,
            ax=[axes for line in grid for axes in line],
            shrink=min(0.9, 3 / figure.get_figheight()),
            pad=0.02,
            aspect=20,
        )
        bar.set_label("log-prob minus base (nats)")
        bar.outline.set_visible(False)
        return figure


def specificity_figure(
    run: RunRecords, rows: Sequence[TransmissionRow], folder: Path
) -> tuple[FigureFiles, Behind] | None:
    """Draw and write `specificity`; None with fewer than two traits that share a rank."""
    points, behind = specificity_points(run, rows)
    if not points:
        return None
    lines = [
        f"{p.trained_on} asked about {p.asked_about}, {p.eval_context}: {signed(p.vs_base_logprob)}"
        for p in points
    ]
    alt = (
        "Matrix of target log-probability minus base in nats: the trait of a student's numbers "
        "down, the trait asked about across. " + in_words(lines)
    )
    figure = draw_specificity(points)
    return write_figure(figure, folder, "specificity", points, alt, run.simulated), behind


def _panel(point: SpecificityPoint) -> tuple[str, str, str]:
    return point.students, point.train_context, point.eval_context
