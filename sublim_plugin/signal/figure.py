"""The figure of a signal: where in the completions it sits, and what a step along it would do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sublim_plugin.analysis.figure_files import (
    GREY,
    INK,
    MARKERS,
    PALETTE,
    WIDTH,
    FigureFiles,
    Point,
    in_words,
    new_figure,
    signed,
    style,
    write_figure,
)
from sublim_plugin.signal.results import STEP, Group, Signal
from sublim_plugin.signal.tables import LOSS_NAMES, ON, ranked, reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "signal"
Panel = Literal["position", "kind", "candidate", "layer"]


class SignalPoint(Point):
    """A mark: in nats a token, for a candidate in nats, for a layer a cosine."""

    panel: Panel
    at: str
    series: str
    value: float
    low: float | None = None
    high: float | None = None


def points(found: Signal) -> list[SignalPoint]:
    """The marks of every panel that there is something for."""
    marks: list[SignalPoint] = []
    if found.where is not None:
        number = found.constrained
        divergence = found.where.number_divergence if number else found.where.divergence
        named = [
            *found.where.by_kind,
            *(g.model_copy(update={"name": DIVERGENCE[g.name]}) for g in divergence),
        ]
        marks += _groups("position", found.where.by_position, number)
        marks += _groups("kind", named, number)
    if found.alignments and found.alignments[0].candidates:
        for name in ranked(found.alignments):
            for one in found.alignments:
                change = next(c.log_share for c in one.candidates if c.name == name)
                bar = one.target if name == found.trait.rpartition("/")[2] else None
                marks.append(
                    SignalPoint(
                        panel="candidate",
                        at=name,
                        series=LOSS_NAMES[one.loss],
                        value=change,
                        low=None if bar is None else bar.low,
                        high=None if bar is None else bar.high,
                    )
                )
    for one in found.alignments:
        for layer, cosine in (one.update.by_layer if one.update else {}).items():
            if cosine is not None:
                marks.append(
                    SignalPoint(
                        panel="layer", at=str(layer), series=LOSS_NAMES[one.loss], value=cosine
                    )
                )
    return marks


DIVERGENCE = {"divergent": "divergent", "other": "not divergent"}
SERIES = ("log ratio", "KL")


def _groups(panel: Panel, groups: Sequence[Group], number: bool) -> list[SignalPoint]:
    return [
        SignalPoint(
            panel=panel,
            at=group.name,
            series=series,
            value=quantity.mean.value,
            low=quantity.mean.low,
            high=quantity.mean.high,
        )
        for group in groups
        for series, measure in zip(SERIES, ON[number], strict=True)
        if (quantity := group.measures.get(measure)) is not None
    ]


def signal_figure(found: Signal, folder: Path) -> FigureFiles | None:
    """Draw and write `signal`; None where there is nothing to draw.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    marks = points(found)
    if not marks:
        return None
    lines = [
        f"{mark.panel} {mark.at}, {mark.series}: {signed(mark.value, 4)}"
        for mark in marks
        if mark.panel in ("kind", "candidate")
    ]
    return write_figure(
        draw(found, marks), folder, NAME, marks, f"{reading(found)} {in_words(lines)}"
    )


def draw(found: Signal, marks: Sequence[SignalPoint]) -> Figure:
    """Two panels a line: by position and kind above, candidates and layers below."""
    panels: list[Panel] = [p for p in TITLES if any(mark.panel == p for mark in marks)]
    upper = [p for p in panels if p in UPPER]
    lower = [p for p in panels if p not in upper]
    rows = [line for line in (upper, lower) if line]
    with style():
        figure = new_figure(WIDTH, 0.3 + 2.6 * len(rows))
        parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
        for part, line in zip(parts, rows, strict=True):
            ratios = [SHARES[panel] for panel in line]
            grid = part.subplots(
                1, len(line), sharey=line is upper, squeeze=False, width_ratios=ratios
            )
            for axes, panel in zip(grid[0], line, strict=True):
                _panel(axes, panel, [m for m in marks if m.panel == panel], found)
            grid[0][0].legend(frameon=False, loc="best")
        return figure


UPPER: tuple[Panel, ...] = ("position", "kind")
TITLES: dict[Panel, str] = {
    "position": "place in the completion",
    "kind": "kind of token",
    "candidate": f"a step of norm {STEP:g} down the gradient",
    "layer": "against the teacher's update",
}
SHARES: dict[Panel, float] = {"position": 1.7, "kind": 1, "candidate": 2, "layer": 1}
"""Widths of the panels in a line."""
LABELS: dict[Panel, str] = {
    "position": "teacher against base (nats a token)",
    "kind": "",
    "candidate": "change of log share (nats)",
    "layer": "cosine",
}


def _panel(axes: Axes, panel: Panel, marks: Sequence[SignalPoint], found: Signal) -> None:
    places = list(dict.fromkeys(mark.at for mark in marks))
    series = list(dict.fromkeys(mark.series for mark in marks))
    target = found.trait.rpartition("/")[2]
    axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
    for index, name in enumerate(series):
        own = [mark for mark in marks if mark.series == name]
        shift = 0.0 if panel == "layer" else (index - (len(series) - 1) / 2) * 0.24
        colour = PALETTE[index if panel in UPPER else index + 2]
        axes.errorbar(
            [places.index(mark.at) + shift for mark in own],
            [mark.value for mark in own],
            yerr=[
                [0.0 if mark.low is None else max(0.0, mark.value - mark.low) for mark in own],
                [0.0 if mark.high is None else max(0.0, mark.high - mark.value) for mark in own],
            ],
            color=colour,
            marker=MARKERS[index],
            markersize=3.8,
            linestyle="none",
            elinewidth=1.0,
            capsize=1.8,
            label=name,
        )
    step = max(1, len(places) // 8) if panel == "layer" else 1
    axes.set_xticks(range(0, len(places), step), places[::step])
    if panel != "layer":
        axes.tick_params(axis="x", rotation=50)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")
            if panel == "candidate" and label.get_text() == target:
                label.set_fontweight("bold")
            if panel == "candidate":
                label.set_fontsize(6.5)
    else:
        axes.set_xlabel("layer")
    if panel == "candidate" and target in places:
        axes.axvspan(
            places.index(target) - 0.5, places.index(target) + 0.5, color=GREY, alpha=0.15, lw=0
        )
    axes.set_title(TITLES[panel], loc="left")
    axes.set_ylabel(LABELS[panel])
