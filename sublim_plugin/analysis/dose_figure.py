"""Predicted and observed: transmission against what the signal of each dataset foretold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sublim_plugin.analysis.figure_files import (
    GREY,
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
from sublim_plugin.analysis.signals import Pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "dose"
LABELS = {
    "kl": "KL, teacher against base (nats a token)",
    "change": "predicted change of log share (nats)",
}
"""A panel for each predicted quantity."""
MOST_TRAITS = len(PALETTE)


class DosePoint(Point):
    """A student in one panel: `x` is what was predicted, its bounds 95% over the rows."""

    point: str
    predicted: str
    trait: str
    channel: str
    teacher: str
    dataset: str
    method: str
    x: float
    low: float | None
    high: float | None
    vs_base_logprob: float
    pair: str


def dose_points(pairs: Sequence[Pair]) -> list[DosePoint]:
    """Each student once in each panel for which its dataset has a prediction."""
    drafts: list[dict[str, Any]] = [
        {
            "predicted": name,
            "trait": pair.trait,
            "channel": pair.channel,
            "teacher": pair.teacher,
            "dataset": pair.dataset,
            "method": pair.method,
            "x": x,
            "low": getattr(pair, f"{name}_low"),
            "high": getattr(pair, f"{name}_high"),
            "vs_base_logprob": pair.vs_base_logprob,
            "pair": pair.pair,
        }
        for name in LABELS
        for pair in pairs
        if (x := getattr(pair, name)) is not None
    ]
    return [DosePoint(point=f"P{i}", **draft) for i, draft in enumerate(drafts, start=1)]


def draw_dose(points: Sequence[DosePoint]) -> Figure:
    """Panels side by side; colour says the trait (grey beyond the sixth), shape the channel."""
    traits = list(dict.fromkeys(point.trait for point in points))
    channels = list(dict.fromkeys(point.channel for point in points))
    names = [name for name in LABELS if any(point.predicted == name for point in points)]
    with style():
        figure = new_figure(WIDTH, 3.1)
        grid = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(grid, names, strict=True):
            mine = [point for point in points if point.predicted == name]
            _panel(axes, mine, traits, channels)
            axes.set_xlabel(LABELS[name])
        grid[0].set_ylabel("observed: student minus base (nats)")
        handles, labels = _handles(traits, channels)
        legend_above(figure, handles, labels, most=6)
        return figure


def _panel(
    axes: Axes, points: Sequence[DosePoint], traits: Sequence[str], channels: Sequence[str]
) -> None:
    axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
    axes.locator_params(axis="x", nbins=5)
    if min(point.x for point in points) < 0:
        axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    for trait in traits:
        for channel in channels:
            own = [p for p in points if (p.trait, p.channel) == (trait, channel)]
            if not own:
                continue
            axes.errorbar(
                [p.x for p in own],
                [p.vs_base_logprob for p in own],
                xerr=[
                    [0.0 if p.low is None else max(0.0, p.x - p.low) for p in own],
                    [0.0 if p.high is None else max(0.0, p.high - p.x) for p in own],
                ],
                color=_colour(traits, trait),
                marker=MARKERS[channels.index(channel) % len(MARKERS)],
                markersize=4.2,
                elinewidth=0.6,
                linestyle="none",
                alpha=0.8,
                gid=" ".join(p.point for p in own),
            )


def _colour(traits: Sequence[str], trait: str) -> str:
    place = traits.index(trait)
    return PALETTE[place] if place < MOST_TRAITS else GREY


def _handles(traits: Sequence[str], channels: Sequence[str]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    shown = traits[:MOST_TRAITS]
    handles = [Line2D([], [], ls="", marker="o", color=_colour(traits, trait)) for trait in shown]
    labels = [trait.split("/")[-1] for trait in shown]
    if len(traits) > MOST_TRAITS:
        handles.append(Line2D([], [], ls="", marker="o", color=GREY))
        labels.append("other traits")
    for place, channel in enumerate(channels if len(channels) > 1 else ()):
        marker = MARKERS[place % len(MARKERS)]
        handles.append(Line2D([], [], ls="", marker=marker, color=INK, markerfacecolor="none"))
        labels.append(channel)
    return handles, labels


def dose_figure(pairs: Sequence[Pair], folder: Path, simulated: bool) -> FigureFiles | None:
    """Draw and write `dose`; None where no student's dataset has a prediction."""
    points = dose_points(pairs)
    if not points:
        return None
    lines = [
        f"{p.trait}, {p.channel}, {p.predicted} {p.x:.3g}: {signed(p.vs_base_logprob)} nats"
        for p in points
    ]
    alt = (
        "Target log-probability of each student minus base, against the KL of its dataset's "
        "teacher from the base and against the change of the target's log share that the dataset's "
        "gradient predicts. " + in_words(lines)
    )
    return write_figure(draw_dose(points), folder, NAME, points, alt, simulated)
