"""Rank or scale? Transmission against rank, size of the update, and learning rate × scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from sublim_plugin.analysis.series import series_names
from sublim_plugin.analysis.transmission import TransmissionRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sublim_plugin.analysis.effects import Effect

PREDICTORS = ("rank", "update norm", "learning rate x scaling")
MOST_TARGETS = 4


class ScalePoint(Point):
    """Students that differ in seeds only, against one predictor: `x`, on a log2 axis.

    The update norm is the geometric mean over them; scaling is alpha / rank, or alpha / sqrt(rank)
    of rsLoRA. Full finetuning has an update norm only. `low` and `high` are as in effects.csv.
    """

    point: str
    predictor: str
    target: str
    train_context: str
    eval_context: str
    method: str
    series: str
    x: float
    vs_base_logprob: float
    low: float | None
    high: float | None
    n_datasets: int
    effect: str
    rows: str


def scale_points(rows: Sequence[TransmissionRow], effects: Sequence[Effect]) -> list[ScalePoint]:
    """Points of the first traits, asked in the context trained in where that was done."""
    by_row = {row.row: row for row in rows}
    names = series_names(rows)
    students = [(i, e) for i, e in enumerate(effects, start=1) if e.role == "student"]
    matched = [pair for pair in students if pair[1].train_context == pair[1].eval_context]
    first = students[0][1].eval_context if students else ""
    shown = matched or [pair for pair in students if pair[1].eval_context == first]
    targets = list(dict.fromkeys(effect.target for _, effect in shown))[:MOST_TARGETS]
    drafts: list[dict[str, Any]] = []
    for number, effect in shown:
        if effect.target not in targets:
            continue
        own = [by_row[row] for row in effect.rows]
        for (predictor, x), series in product(_predictors(own).items(), names[own[0].row]):
            drafts.append(
                {
                    "predictor": predictor,
                    "target": effect.target,
                    "train_context": effect.train_context,
                    "eval_context": effect.eval_context,
                    "method": effect.method,
                    "series": series,
                    "x": x,
                    "vs_base_logprob": effect.vs_base_logprob,
                    "low": effect.low,
                    "high": effect.high,
                    "n_datasets": effect.n_datasets,
                    "effect": f"F{number}",
                    "rows": " ".join(effect.rows),
                }
            )
    return [ScalePoint(point=f"P{i}", **draft) for i, draft in enumerate(drafts, start=1)]


def _predictors(own: Sequence[TransmissionRow]) -> dict[str, float]:
    found: dict[str, float] = {}
    first = own[0]
    if first.rank is not None:
        found["rank"] = float(first.rank)
    norms = [row.update_norm for row in own if row.update_norm]
    if len(norms) == len(own):
        found["update norm"] = math.exp(math.fsum(math.log(norm) for norm in norms) / len(norms))
    if first.step_size:
        found["learning rate x scaling"] = first.step_size
    return found


def draw_scale(points: Sequence[ScalePoint]) -> Figure:
    """A line of panels per target, a panel per predictor."""
    targets = list(dict.fromkeys(point.target for point in points))
    series = list(dict.fromkeys(point.series for point in points))
    with style():
        figure = new_figure(WIDTH, 1.75 * len(targets) + (0.5 if len(series) > 1 else 0.25))
        grid = figure.subplots(len(targets), len(PREDICTORS), sharey=True, squeeze=False)
        for line, target in enumerate(targets):
            for column, predictor in enumerate(PREDICTORS):
                axes = grid[line][column]
                mine = [p for p in points if (p.target, p.predictor) == (target, predictor)]
                axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
                for index, name in enumerate(series):
                    _marks(axes, [p for p in mine if p.series == name], index)
                _log_axis(axes, [p.x for p in points if p.predictor == predictor])
                if line == len(targets) - 1:
                    label = {"update norm": "size of the update ‖ΔW‖", "rank": "LoRA rank"}
                    axes.set_xlabel(label.get(predictor, "learning rate × scaling"))
                if column == 0:
                    axes.set_ylabel(f"{target.split('/')[-1]}: minus base (nats)")
        if len(series) > 1:
            handles, labels = _handles(series)
            legend_above(figure, handles, labels, most=3)
        return figure


def _marks(axes: Axes, points: Sequence[ScalePoint], index: int) -> None:
    colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
    for full in (False, True):
        mine = [p for p in points if (p.method == "full") == full]
        if not mine:
            continue
        values = [p.vs_base_logprob for p in mine]
        axes.errorbar(
            [math.log2(p.x) for p in mine],
            values,
            yerr=[
                [0.0 if p.low is None else p.vs_base_logprob - p.low for p in mine],
                [0.0 if p.high is None else p.high - p.vs_base_logprob for p in mine],
            ],
            color=colour,
            marker="D" if full else marker,
            markersize=4.2,
            elinewidth=0.9,
            capsize=2,
            linestyle="none",
            gid=" ".join(p.point for p in mine),
        )


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at powers of two, at most 6, written as the numbers they are."""
    if not values:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center")
        return
    low, high = math.log2(min(values)), math.log2(max(values))
    step = max(1, math.ceil((high - low) / 5))
    ticks = [float(t) for t in range(math.floor(low), math.ceil(high) + 1, step)]
    if high - low < 1e-9:
        ticks = [low]
    axes.set_xticks(ticks, [f"{2**tick:.3g}" for tick in ticks])
    room = max(0.5, 0.06 * (high - low))
    axes.set_xlim(low - room, high + room)


def _handles(series: Sequence[str]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], ls="", marker=MARKERS[i % len(MARKERS)], color=PALETTE[i % len(PALETTE)])
        for i in range(len(series))
    ]
    return handles, [name or "as recorded" for name in series]


def scale_figure(
    rows: Sequence[TransmissionRow], effects: Sequence[Effect], folder: Path, simulated: bool
) -> FigureFiles | None:
    """Draw and write `scale`; None where no student has more to it than a rank."""
    points = scale_points(rows, effects)
    if not {point.predictor for point in points} - {"rank"}:
        return None
    lines = [
        f"{p.target}, {p.method}, {p.predictor} {p.x:.3g}: {signed(p.vs_base_logprob)} nats"
        for p in points
    ]
    alt = (
        "Target log-probability minus base against LoRA rank, against the size of the weights' "
        "update, and against learning rate times scaling, on log axes. " + in_words(lines)
    )
    return write_figure(draw_scale(points), folder, "scale", points, alt, simulated)
