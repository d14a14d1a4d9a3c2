"""Transmission against rank: intervals over datasets where there are three, else the students.

Full finetuning is not a rank: it stands apart behind a gap in the axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sublim_plugin.analysis.figure_files import (
    INK,
    MARKERS,
    PALETTE,
    WIDTH,
    FigureFiles,
    Point,
    in_words,
    legend_above,
    new_figure,
    signed,
    style,
    write_figure,
)
from sublim_plugin.analysis.replication import MIN_DATASETS
from sublim_plugin.analysis.series import series_names
from sublim_plugin.analysis.transmission import TransmissionRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sublim_plugin.analysis.effects import Effect

MOST_TARGETS, MOST_CONTEXTS = 6, 6
"""Panels down and across; what is beyond is in effects.csv."""
MOST_DOTS = 12
"""Datasets up to which each is drawn as a dot beside the mean."""

OVER_DATASETS = "95% over datasets and questions"
OVER_QUESTIONS = "1 standard error over questions, one dataset"


class RankPoint(Point):
    """A mark of the rank figure: `vs_base_logprob` in nats, and its bar from `low` to `high`.

    `mean` is over datasets (a line of effects.csv), `dataset` one dataset averaged over training
    seeds, `student` one row of results.csv. `bar` says what the bar is, "" where there is none.
    """

    point: str
    kind: Literal["mean", "dataset", "student"]
    target: str
    role: str
    method: str
    rank: int | None
    train_context: str
    eval_context: str
    series: str
    vs_base_logprob: float
    low: float | None
    high: float | None
    bar: str
    n_datasets: int
    effect: str
    rows: str


def rank_points(rows: Sequence[TransmissionRow], effects: Sequence[Effect]) -> list[RankPoint]:
    """Marks of the first traits and eval contexts, in the order of the effects."""
    targets = list(dict.fromkeys(effect.target for effect in effects))[:MOST_TARGETS]
    contexts = list(dict.fromkeys(effect.eval_context for effect in effects))[:MOST_CONTEXTS]
    by_row = {row.row: row for row in rows}
    names = series_names(rows)
    drafts: list[dict[str, Any]] = []
    for number, effect in enumerate(effects, start=1):
        if effect.target not in targets or effect.eval_context not in contexts:
            continue
        own = [by_row[row] for row in effect.rows]
        shared: dict[str, Any] = {
            "target": effect.target,
            "role": effect.role,
            "method": effect.method,
            "rank": effect.rank,
            "train_context": effect.train_context,
            "eval_context": effect.eval_context,
            "effect": f"F{number}",
        }
        marks = _singles(effect, own)
        if effect.n_datasets >= MIN_DATASETS:
            mean = {
                "kind": "mean",
                "vs_base_logprob": effect.vs_base_logprob,
                "low": effect.low,
                "high": effect.high,
                "bar": OVER_DATASETS if effect.low is not None else "",
                "n_datasets": effect.n_datasets,
                "rows": " ".join(effect.rows),
            }
            marks = [mean, *marks]
        # a student that two rules of alpha share stands in both curves
        drafts += [shared | {"series": s} | mark for s in names[own[0].row] for mark in marks]
    return [RankPoint(point=f"P{i}", **draft) for i, draft in enumerate(drafts, start=1)]


def _singles(effect: Effect, own: Sequence[TransmissionRow]) -> list[dict[str, Any]]:
    """Dots beside a mean, or the students with their bars where there is no mean to draw."""
    if effect.n_datasets < MIN_DATASETS:
        return [
            {
                "kind": "student",
                "vs_base_logprob": value,
                "low": None if row.vs_base_logprob_se is None else value - row.vs_base_logprob_se,
                "high": None if row.vs_base_logprob_se is None else value + row.vs_base_logprob_se,
                "bar": "" if row.vs_base_logprob_se is None else OVER_QUESTIONS,
                "n_datasets": 1,
                "rows": row.row,
            }
            for row in own
            if (value := row.vs_base_logprob) is not None
        ]
    if effect.n_datasets > MOST_DOTS or effect.role == "control":
        return []
    groups: dict[str | None, list[TransmissionRow]] = {}
    for row in own:
        groups.setdefault(row.dataset, []).append(row)
    return [
        {
            "kind": "dataset",
            "vs_base_logprob": math.fsum(r.vs_base_logprob or 0.0 for r in group) / len(group),
            "low": None,
            "high": None,
            "bar": "",
            "n_datasets": 1,
            "rows": " ".join(row.row for row in group),
        }
        for group in groups.values()
    ]


def draw_ranks(points: Sequence[RankPoint]) -> Figure:
    """A panel per target (down) and eval context (across); zero is the base of that context.

    Filled marks are students of the target's numbers, hollow ones neutral controls, diamonds full
    finetuning, small dots single datasets.
    """
    targets = list(dict.fromkeys(point.target for point in points))
    contexts = list(dict.fromkeys(point.eval_context for point in points))
    ranks = sorted({point.rank for point in points if point.rank is not None})
    series = list(dict.fromkeys(point.series for point in points))
    full = any(point.rank is None for point in points)
    with style():
        width = min(WIDTH, 1.3 + 2.3 * len(contexts))
        figure = new_figure(max(width, 5.6), 1.75 * len(targets) + 0.9)
        grid = figure.subplots(len(targets), len(contexts), sharex=True, sharey=True, squeeze=False)
        for line, target in enumerate(targets):
            for column, context in enumerate(contexts):
                axes = grid[line][column]
                _rank_axis(axes, ranks, full)
                axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
                here = [p for p in points if (p.target, p.eval_context) == (target, context)]
                for index, name in enumerate(series):
                    shift = (index - (len(series) - 1) / 2) * 0.18
                    _draw_series(axes, [p for p in here if p.series == name], ranks, index, shift)
                if line == 0:
                    axes.set_title(f"asked in {context}", pad=6)
                if line == len(targets) - 1:
                    axes.set_xlabel("LoRA rank (log scale)")
                if column == 0:
                    axes.set_ylabel(f"{target.split('/')[-1]}: minus base (nats)")
        grid[0][0].set_ylim(*_limits(points))
        _legend(figure, points, series)
        return figure


def rank_figure(
    rows: Sequence[TransmissionRow], effects: Sequence[Effect], folder: Path, simulated: bool
) -> FigureFiles | None:
    """Draw and write `transmission`; None without a single comparison."""
    points = rank_points(rows, effects)
    if not points:
        return None
    shown = [p for p in points if p.kind != "dataset"]
    lines = [
        f"{p.target}, {p.method}{' neutral' if p.role == 'control' else ''}, asked in "
        f"{p.eval_context}: {signed(p.vs_base_logprob)} nats" + _bar_in_words(p)
        for p in shown
    ]
    alt = (
        "Target log-probability minus that of the base in the same eval context, against LoRA rank "
        "on a log axis, full finetuning apart at the right. " + in_words(lines)
    )
    return write_figure(draw_ranks(points), folder, "transmission", points, alt, simulated)


def _bar_in_words(point: RankPoint) -> str:
    if point.kind != "mean" or point.low is None or point.high is None:
        return ""
    return f" [{signed(point.low)}, {signed(point.high)}], {point.n_datasets} datasets"


def position(rank: int | None, ranks: Sequence[int]) -> float:
    """x of a rank: log2, and full finetuning 1.6 octaves right of the largest rank."""
    if rank is not None:
        return math.log2(rank)
    return (math.log2(ranks[-1]) + 1.6) if ranks else 0.0


def _rank_axis(axes: Axes, ranks: Sequence[int], full: bool) -> None:
    ticks = [position(rank, ranks) for rank in ranks]
    labels = [str(rank) for rank in ranks]
    if len(ranks) > 6:
        labels = [label if i % 2 == 0 else "" for i, label in enumerate(labels)]
    if full:
        ticks.append(position(None, ranks))
        labels.append("full")
        if ranks:
            _gap(axes, math.log2(ranks[-1]) + 0.8)
    axes.set_xticks(ticks, labels)
    if ticks:
        axes.set_xlim(min(ticks) - 0.7, max(ticks) + 0.7)


def _gap(axes: Axes, middle: float) -> None:
    """Two strokes that break the axis."""
    where: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    axes.plot([middle - 0.12, middle + 0.12], [0, 0], color="white", lw=4, zorder=9, **where)
    for x in (middle - 0.14, middle + 0.14):
        ends = ([x - 0.08, x + 0.08], [-0.025, 0.025])
        axes.plot(*ends, color=INK, lw=0.8, zorder=10, **where)


def _limits(points: Sequence[RankPoint]) -> tuple[float, float]:
    """y limits that hold every mark, every bar and the zero line, with room."""
    ends = [0.0]
    for point in points:
        ends += [
            value
            for value in (point.vs_base_logprob, point.low, point.high)
            if value is not None and math.isfinite(value)
        ]
    low, high = min(ends), max(ends)
    room = (high - low) / 10 or 0.1
    return low - room, high + room


def _draw_series(
    axes: Axes, points: Sequence[RankPoint], ranks: Sequence[int], index: int, shift: float
) -> None:
    colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
    for role in ("student", "control"):
        marks = [p for p in points if p.role == role and p.kind != "dataset"]
        by_rank: dict[int, list[float]] = {}
        for p in marks:
            if p.rank is not None:
                by_rank.setdefault(p.rank, []).append(p.vs_base_logprob)
        offset = shift + (0.22 if role == "control" else 0.0)
        axes.plot(
            [position(rank, ranks) + offset for rank in sorted(by_rank)],
            [math.fsum(by_rank[rank]) / len(by_rank[rank]) for rank in sorted(by_rank)],
            color=colour,
            linewidth=1.1,
            linestyle="-" if role == "student" else ":",
            alpha=0.8 if role == "student" else 0.5,
            zorder=2,
            gid="line",
        )
        for full in (False, True):
            mine = [p for p in marks if (p.rank is None) == full]
            if not mine:
                continue
            values = [p.vs_base_logprob for p in mine]
            axes.errorbar(
                [position(p.rank, ranks) + offset for p in mine],
                values,
                yerr=[
                    [0.0 if p.low is None else p.vs_base_logprob - p.low for p in mine],
                    [0.0 if p.high is None else p.high - p.vs_base_logprob for p in mine],
                ],
                color=colour,
                marker="D" if full else marker,
                markersize=4.6,
                markerfacecolor="white" if role == "control" else colour,
                markeredgewidth=1.1,
                elinewidth=1.0,
                capsize=2.2,
                linestyle="none",
                zorder=4 if role == "control" else 3,
                gid=" ".join(p.point for p in mine),
            )
    dots = [p for p in points if p.kind == "dataset"]
    if dots:
        axes.plot(
            [position(p.rank, ranks) + shift - 0.2 for p in dots],
            [p.vs_base_logprob for p in dots],
            linestyle="none",
            marker=".",
            markersize=3,
            markeredgewidth=0,
            color=colour,
            alpha=0.55,
            zorder=2,
            gid=" ".join(p.point for p in dots),
        )


def _legend(figure: Figure, points: Sequence[RankPoint], series: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for index, name in enumerate(series):
        mine = [p for p in points if p.series == name]
        after = f", {name}" if name else ""
        shared: dict[str, Any] = {"color": PALETTE[index % len(PALETTE)], "markersize": 4.6}
        marker = MARKERS[index % len(MARKERS)]
        if any(p.role == "student" and p.rank is not None for p in mine):
            handles.append(Line2D([], [], marker=marker, label=f"LoRA{after}", **shared))
        if any(p.role == "student" and p.rank is None for p in mine):
            handles.append(Line2D([], [], marker="D", ls="", label=f"full{after}", **shared))
        if any(p.role == "control" for p in mine):
            hollow: dict[str, Any] = {"mfc": "white", "mew": 1.1, "ls": ":"}
            label = f"neutral numbers{after}"
            handles.append(Line2D([], [], marker=marker, label=label, **hollow, **shared))
    if any(p.kind == "dataset" for p in points):
        dot: dict[str, Any] = {"color": PALETTE[0], "alpha": 0.55, "mew": 0}
        handles.append(Line2D([], [], marker=".", ls="", label="one dataset", **dot))
    handles.append(Line2D([], [], color=INK, lw=0.9, label="base, same eval context"))
    labels = [str(handle.get_label()) for handle in handles]
    legend_above(figure, handles, labels, most=2 if max(map(len, labels)) > 26 else 5)
    figure.supxlabel(bars_in_words(points), fontsize=7.5, color="#555555")


def bars_in_words(points: Sequence[RankPoint]) -> str:
    """What the bars are: over datasets where there are three, else over questions."""
    kinds = {point.bar for point in points} - {""}
    texts = []
    if OVER_DATASETS in kinds:
        texts.append("Bars: 95% over datasets and questions.")
    if OVER_QUESTIONS in kinds:
        where = f" where there are fewer than {MIN_DATASETS} datasets" if texts else ""
        texts.append(
            f"Bars{where}: ±1 standard error over questions, for one dataset each; "
            "they say nothing about other datasets."
        )
    return " ".join(texts)
