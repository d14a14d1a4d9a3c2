"""Train context × eval context: transmission of each trait's students, by kind of finetuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

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
from sublim_plugin.analysis.series import series_names
from sublim_plugin.analysis.transmission import TransmissionRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_TARGETS, MOST_LINES, MOST_CONTEXTS = 8, 30, 10
MOST_OF_A_LABEL = 44
"""Characters of a line of a label; longer ones go on below."""


class ContextPoint(Point):
    """A field of the table: mean over datasets of the students' difference from the base, in nats.

    LoRA students are averaged over the ranks that all fields of their line's kind have (`ranks`)
    and over training seeds; datasets without all of them are left out. `low` and `high` are the 95%
    interval over datasets, None with fewer than three.
    """

    point: str
    target: str
    students: str
    train_context: str
    eval_context: str
    ranks: str
    vs_base_logprob: float
    low: float | None
    high: float | None
    n_datasets: int
    matched: bool
    rows: str


def context_points(rows: Sequence[TransmissionRow]) -> list[ContextPoint]:
    """Fields by target, kind of students, train and eval context; incomplete ones are left out."""
    import numpy as np

    from sublim_plugin.analysis.cluster_intervals import interval

    names = series_names(rows, context=False)
    kinds: dict[tuple[str, str], list[TransmissionRow]] = {}
    for row in rows:
        if row.pooled:
            kind = "full" if row.rank is None else "LoRA"
            kind = ("neutral " if row.role == "control" else "") + kind
            for series in names[row.row]:
                name = ", ".join(filter(None, [kind, series]))
                kinds.setdefault((row.target, name), []).append(row)
    drafts: list[dict[str, Any]] = []
    for (target, students), own in kinds.items():
        cells: dict[tuple[str, str], list[TransmissionRow]] = {}
        for row in own:
            cells.setdefault((row.train_context or "", row.eval_context), []).append(row)
        shared = set.intersection(*({row.rank for row in cell} for cell in cells.values()))
        for (train, asked), cell in cells.items():
            means, used = _by_dataset(cell, shared)
            if not means:
                continue
            found = interval(np.array([[value] for value in means]))
            drafts.append(
                {
                    "target": target,
                    "students": students,
                    "train_context": train,
                    "eval_context": asked,
                    "ranks": " ".join(str(r) for r in sorted(r for r in shared if r is not None)),
                    "vs_base_logprob": found.mean,
                    "low": found.low,
                    "high": found.high,
                    "n_datasets": len(means),
                    "matched": train == asked,
                    "rows": " ".join(row.row for row in used),
                }
            )
    return [ContextPoint(point=f"P{i}", **draft) for i, draft in enumerate(drafts, start=1)]


def _by_dataset(
    cell: Sequence[TransmissionRow], ranks: set[int | None]
) -> tuple[list[float], list[TransmissionRow]]:
    """Means of the datasets that have every one of `ranks`, and the rows that went in."""
    groups: dict[str | None, list[TransmissionRow]] = {}
    for row in cell:
        if row.rank in ranks:
            groups.setdefault(row.dataset, []).append(row)
    means, used = [], []
    for group in groups.values():
        by_rank: dict[int | None, list[float]] = {}
        for row in group:
            by_rank.setdefault(row.rank, []).append(row.vs_base_logprob or 0.0)
        if ranks and by_rank.keys() == ranks:
            each = [math.fsum(values) / len(values) for values in by_rank.values()]
            means.append(math.fsum(each) / len(each))
            used += group
    return means, used


def drawn(points: Sequence[ContextPoint]) -> list[ContextPoint]:
    """The points that fit: the first traits and eval contexts, and the first lines."""
    targets = list(dict.fromkeys(point.target for point in points))[:MOST_TARGETS]
    contexts = list(dict.fromkeys(point.eval_context for point in points))[:MOST_CONTEXTS]
    kept = [p for p in points if p.target in targets and p.eval_context in contexts]
    lines = list(dict.fromkeys(_line(point) for point in kept))[:MOST_LINES]
    return [point for point in kept if _line(point) in lines]


def draw_contexts(points: Sequence[ContextPoint]) -> Figure:
    """A table per target: students and their train context down, eval context across."""
    targets = list(dict.fromkeys(point.target for point in points))
    contexts = list(dict.fromkeys(point.eval_context for point in points))
    lines = {t: list(dict.fromkeys(_line(p) for p in points if p.target == t)) for t in targets}
    counts = [len(lines[target]) for target in targets]
    intervals = any(point.low is not None for point in points)
    labels = {
        target: [
            fill(f"{students}, trained in {train}", MOST_OF_A_LABEL)
            for _, train, students in lines[target]
        ]
        for target in targets
    }
    longest = max(len(part) for own in labels.values() for one in own for part in one.split("\n"))
    deepest = max(one.count("\n") + 1 for own in labels.values() for one in own)
    # two lines of text in a field need room
    height = max(0.42 if intervals else 0.3, 0.13 * deepest)
    size = 7.0 if len(contexts) <= 5 else 5.5
    with style(**{"axes.grid": False}):
        figure = new_figure(
            min(WIDTH, max(2.6, 0.058 * longest + 1.0) + 1.3 * len(contexts)),
            0.75 + 0.3 * len(targets) + height * sum(counts),
        )
        grid = figure.subplots(len(targets), 1, height_ratios=counts, squeeze=False)
        colours = scale([point.vs_base_logprob for point in points])
        for axes, target in zip(grid[:, 0], targets, strict=True):
            values: list[list[float | None]] = [[None] * len(contexts) for _ in lines[target]]
            texts = {}
            for point in points:
                if point.target != target:
                    continue
                y, x = lines[target].index(_line(point)), contexts.index(point.eval_context)
                values[y][x] = point.vs_base_logprob
                text = signed(point.vs_base_logprob)
                if point.low is not None and point.high is not None:
                    text += f"\n[{signed(point.low)}, {signed(point.high)}]"
                texts[y, x] = (text, point.matched)
            heat_map(axes, values, colours, contexts, labels[target], texts, size)
            axes.set_title(target, loc="left", pad=5)
        grid[-1, 0].set_xlabel("asked in (bold: the context trained in)")
        if len(contexts) > 4:
            for axes in grid[:, 0]:
                axes.tick_params(axis="x", labelrotation=20)
        bar = figure.colorbar(
            colours,
            ax=list(grid[:, 0]),
            shrink=min(0.9, 3 / figure.get_figheight()),
            pad=0.02,
            aspect=20,
        )
        bar.set_label("log-prob minus base (nats)")
        bar.outline.set_visible(False)
        return figure


def context_figure(
    rows: Sequence[TransmissionRow], folder: Path, simulated: bool
) -> FigureFiles | None:
    """Draw and write `contexts`; None without a single comparison."""
    points = drawn(context_points(rows))
    if not points:
        return None
    lines = [
        f"{p.target}, {p.students}, trained in {p.train_context}, asked in {p.eval_context}: "
        f"{signed(p.vs_base_logprob)}"
        for p in points
    ]
    alt = (
        "Table of target log-probability minus base in nats, students and their train context "
        "down, eval contexts across. " + in_words(lines)
    )
    return write_figure(draw_contexts(points), folder, "contexts", points, alt, simulated)


def _line(point: ContextPoint) -> tuple[str, str, str]:
    return point.target, point.train_context, point.students
