"""The report's figures. Each is drawn from points that are also written as its CSV.

`*_points` turns records into points, `draw_*` turns points into a matplotlib figure, and
`write_figure` writes PNG, SVG and CSV side by side. Colours are Okabe and Ito's (2008), told apart
by readers with any common colour blindness; shapes and labels repeat what colour says.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.collect import RunRecords, in_order
from sublim_plugin.analysis.tables import csv_text
from sublim_plugin.analysis.transmission import TransmissionRow
from sublim_plugin.core.atomic import write_bytes, write_text
from sublim_plugin.core.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#6B6B6B",
)
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY)
MARKERS = ("o", "s", "^", "v", "P", "X")
INK = "#222222"
PANELS_A_ROW = 3
WIDTH = 7.0
"""Inches: two columns of a paper; text is 8 pt at this size."""

STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "sublim",
    "svg.fonttype": "path",
}


class _Point(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RankPoint(_Point):
    """A student in the rank figure: differences from its base, in nats and in share."""

    row: str
    target: str
    role: str
    method: str
    rank: int | None
    train_context: str
    eval_context: str
    generation_seed: int
    training_seed: int
    vs_base_logprob: float
    vs_base_logprob_se: float | None
    vs_base_share: float
    vs_base_share_se: float | None


class ContextPoint(_Point):
    """A field of the context table: rows are what was trained, columns the eval context.

    The value is the mean over the students (datasets and seeds) of that field, in nats.
    """

    target: str
    student: str
    train_context: str
    eval_context: str
    vs_base_logprob: float
    n_students: int
    matched: bool
    rows: str


class LossCurvePoint(_Point):
    student: str
    label: str
    trait: str
    step: int
    loss: float
    learning_rate: float | None


class FigureFiles(_Point):
    """Where a figure was written, its text alternative, and its width in inches."""

    png: Path
    svg: Path
    csv: Path
    alt: str
    width: float

    def data_uri(self) -> str:
        """The SVG as a data URI, for a page that opens without a network."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.read_bytes()).decode()


def rank_points(rows: Iterable[TransmissionRow]) -> list[RankPoint]:
    """Every student and control that has a base, in the table's order."""
    return [
        RankPoint(
            row=row.row,
            target=row.target,
            role=row.role,
            method=row.method,
            rank=row.rank,
            train_context=row.train_context or "",
            eval_context=row.eval_context,
            generation_seed=row.generation_seed or 0,
            training_seed=row.training_seed or 0,
            vs_base_logprob=row.vs_base_logprob,
            vs_base_logprob_se=row.vs_base_logprob_se,
            vs_base_share=row.vs_base_share,
            vs_base_share_se=row.vs_base_share_se,
        )
        for row in rows
        if row.role != "base" and row.vs_base_logprob is not None and row.vs_base_share is not None
    ]


def context_points(rows: Iterable[TransmissionRow]) -> list[ContextPoint]:
    """One point per target, training and eval context, averaged over seeds."""
    groups: dict[tuple[str, str, str, str], list[TransmissionRow]] = {}
    for row in rows:
        if row.role != "base" and row.vs_base_logprob is not None:
            key = (row.target, row.name, row.train_context or "", row.eval_context)
            groups.setdefault(key, []).append(row)
    return [
        ContextPoint(
            target=target,
            student=student,
            train_context=train,
            eval_context=evaluated,
            vs_base_logprob=math.fsum(row.vs_base_logprob or 0.0 for row in group) / len(group),
            n_students=len(group),
            matched=train == evaluated,
            rows=" ".join(row.row for row in group),
        )
        for (target, student, train, evaluated), group in groups.items()
    ]


def loss_points(run: RunRecords) -> list[LossCurvePoint]:
    """Every logged training step of every student, students by trait and method."""
    return [
        LossCurvePoint(
            student=student.id,
            label=f"{student.spec.trait.split('/')[-1]} {student.spec.method.name}",
            trait=student.spec.trait,
            step=point.step,
            loss=point.loss,
            learning_rate=point.learning_rate,
        )
        for student in in_order(run.students)
        for point in student.receipt.losses
        if math.isfinite(point.loss)
    ]


def draw_transmission(points: Sequence[RankPoint]) -> Figure:
    """Transmission against rank: a column per eval context, nats above and share below.

    LoRA ranks lie on a log2 axis; full finetuning stands apart behind a gap, as it is not a rank.
    Filled marks are students of the target's numbers, hollow ones neutral controls; the zero line
    is the base of that eval context. Error bars are one standard error over questions.
    """
    contexts = list(dict.fromkeys(point.eval_context for point in points))
    # A colour per target; where students were trained in several contexts, per pair of both.
    series = list(dict.fromkeys((point.target, point.train_context) for point in points))
    ranks = sorted({point.rank for point in points if point.rank is not None})
    columns = min(len(contexts), PANELS_A_ROW)
    bands = -(-len(contexts) // PANELS_A_ROW)
    with _rc_context():
        figure = _new_figure(WIDTH if columns > 1 else WIDTH / 2, 4.1 * bands + 0.35)
        grid = figure.subplots(2 * bands, columns, sharex=True, squeeze=False)
        limits = {name: _limits(points, f"vs_base_{name}") for name in ("logprob", "share")}
        for number in range(bands * columns):
            band, column = divmod(number, columns)
            for offset, name in enumerate(("logprob", "share")):
                axes = grid[2 * band + offset][column]
                if number >= len(contexts):
                    axes.set_visible(False)
                    continue
                here = [point for point in points if point.eval_context == contexts[number]]
                _rank_axis(axes, ranks, any(point.rank is None for point in points))
                axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
                for index, key in enumerate(series):
                    mine = [p for p in here if (p.target, p.train_context) == key]
                    shift = (index - (len(series) - 1) / 2) * 0.16
                    _rank_series(axes, mine, ranks, name, index, shift)
                axes.set_ylim(*limits[name])
                if offset == 0:
                    axes.set_title(f"eval context: {contexts[number]}", pad=6)
                if offset == 1:
                    axes.set_xlabel("LoRA rank (log scale)")
                if column == 0:
                    axes.set_ylabel(
                        "log-prob minus base (nats)"
                        if name == "logprob"
                        else "share minus base (pp)"
                    )
                else:
                    axes.tick_params(labelleft=False)
        _rank_legend(figure, series, points)
        return figure


def draw_contexts(points: Sequence[ContextPoint]) -> Figure:
    """Table of transmission: trained students down, eval contexts across, one panel per target."""
    targets = list(dict.fromkeys(point.target for point in points))
    contexts = list(dict.fromkeys(point.eval_context for point in points))
    extent = max((abs(point.vs_base_logprob) for point in points), default=0.0) or 1.0
    line_counts = [
        len({(p.train_context, p.student) for p in points if p.target == target})
        for target in targets
    ]
    with _rc_context(**{"axes.grid": False}):
        from matplotlib.colors import TwoSlopeNorm

        norm = TwoSlopeNorm(0.0, -1.15 * extent, 1.15 * extent)
        figure = _new_figure(min(WIDTH, 2.4 + 1.35 * len(contexts)), 0.95 + 0.34 * sum(line_counts))
        grid = figure.subplots(len(targets), 1, height_ratios=line_counts, squeeze=False)
        image: Any = None
        for axes, target in zip(grid[:, 0], targets, strict=True):
            mine = [point for point in points if point.target == target]
            lines = list(dict.fromkeys((p.train_context, p.student) for p in mine))
            values = [[math.nan] * len(contexts) for _ in lines]
            several = len({train for train, _ in lines}) > 1
            for point in mine:
                y = lines.index((point.train_context, point.student))
                x = contexts.index(point.eval_context)
                values[y][x] = point.vs_base_logprob
                axes.text(
                    x,
                    y,
                    f"{point.vs_base_logprob:+.3f}".replace("-", "\u2212"),
                    ha="center",
                    va="center",
                    color="white" if abs(point.vs_base_logprob) > 0.6 * extent else INK,
                    weight="bold" if point.matched else "normal",
                )
            image = axes.imshow(values, cmap="PuOr_r", norm=norm, aspect="auto")
            axes.set_xticks(range(len(contexts)), contexts)
            axes.set_yticks(
                range(len(lines)),
                [f"{train} · {student}" if several else student for train, student in lines],
            )
            axes.tick_params(length=0)
            for edge in range(1, len(contexts)):
                axes.axvline(edge - 0.5, color="white", linewidth=2)
            for edge in range(1, len(lines)):
                axes.axhline(edge - 0.5, color="white", linewidth=2)
            axes.spines[:].set_visible(False)
            axes.set_title(f"{target}: log-prob minus base (nats)", loc="left", pad=6)
        grid[-1, 0].set_xlabel("eval context (bold: the one trained in)")
        if image is not None:
            height = figure.get_figheight()
            bar = figure.colorbar(
                image, ax=list(grid[:, 0]), shrink=min(0.9, 3 / height), pad=0.02, aspect=20
            )
            bar.outline.set_visible(False)
        return figure


def draw_losses(points: Sequence[LossCurvePoint]) -> Figure:
    """Training loss against step, one line per student, named at its end."""
    students = list(dict.fromkeys(point.student for point in points))
    labels = {point.student: point.label for point in points}
    traits = {point.student: point.trait for point in points}
    with _rc_context():
        figure = _new_figure(WIDTH * 0.75, 2.9)
        axes = figure.add_subplot()
        dashes = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
        for index, student in enumerate(students):
            mine = [point for point in points if point.student == student]
            neutral = traits[student] == "neutral"
            axes.plot(
                [point.step for point in mine],
                [point.loss for point in mine],
                color=GREY if neutral else PALETTE[index % len(PALETTE)],
                linestyle=dashes[2] if neutral else dashes[(index // len(PALETTE)) % 2],
                linewidth=1.3,
                marker="o" if len(mine) < 3 else None,
                markersize=3,
                label=labels[student],
                zorder=2 if neutral else 3,
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("training loss (nats per completion token)")
        if len(students) <= 24:
            figure.legend(loc="outside right upper", frameon=False, title="student")
        return figure


def write_figure(
    figure: Figure,
    folder: Path,
    name: str,
    points: Sequence[BaseModel],
    alt: str,
    simulated: bool = False,
) -> FigureFiles:
    """Write `name`.png (300 dpi), .svg and .csv into `folder`, each atomically.

    Args:
        simulated: write SIMULATED across the figure, in its text and in a column of the CSV.
    """
    if simulated:
        alt = f"Simulated data. {alt}"
        mark: dict[str, Any] = {"ha": "center", "va": "center", "rotation": 20, "zorder": 20}
        figure.text(0.5, 0.5, "SIMULATED", fontsize=40, color=GREY, alpha=0.25, **mark)
    files = FigureFiles(
        png=folder / f"{name}.png",
        svg=folder / f"{name}.svg",
        csv=folder / f"{name}.csv",
        alt=alt,
        width=float(figure.get_figwidth()),
    )
    with _rc_context():
        for path, metadata in ((files.png, {"Software": None}), (files.svg, {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=path.suffix[1:], dpi=300, metadata=metadata)
            write_bytes(path, buffer.getvalue())
    columns = list(type(points[0]).model_fields)
    lines = [point.model_dump() for point in points]
    if simulated:
        columns.append("simulated")
        lines = [line | {"simulated": True} for line in lines]
    write_text(files.csv, csv_text(lines, columns))
    return files


def transmission_figure(rows: Sequence[TransmissionRow], folder: Path) -> FigureFiles | None:
    """Draw and write `transmission`; None without a single comparison."""
    points = rank_points(rows)
    if not points:
        return None
    lines = [
        f"{p.target}, {p.method}{' neutral' if p.role == 'control' else ''}, "
        f"eval {p.eval_context}: {p.vs_base_logprob:+.3f} nats"
        for p in points[:24]
    ]
    alt = (
        "Students' target log-probability and share minus the base of the same eval context, "
        "against LoRA rank on a log axis, full finetuning apart at the right. " + "; ".join(lines)
    )
    return write_figure(
        draw_transmission(points), folder, "transmission", points, alt, _simulated(rows)
    )


def context_figure(rows: Sequence[TransmissionRow], folder: Path) -> FigureFiles | None:
    """Draw and write `contexts`; None without a single comparison."""
    points = context_points(rows)
    if not points:
        return None
    alt = (
        "Table of target log-probability minus base in nats, students down and eval contexts "
        "across; the same numbers are in the transmission table."
    )
    return write_figure(draw_contexts(points), folder, "contexts", points, alt, _simulated(rows))


def loss_figure(run: RunRecords, folder: Path) -> FigureFiles | None:
    """Draw and write `losses`; None if no receipt logged a loss."""
    points = loss_points(run)
    if not points:
        return None
    ends = {point.student: point for point in points}
    alt = "Training loss against optimizer step. Last logged loss: " + "; ".join(
        f"{point.label} {point.loss:.3f}" for point in list(ends.values())[:24]
    )
    return write_figure(draw_losses(points), folder, "losses", points, alt, run.simulated)


def _simulated(rows: Sequence[TransmissionRow]) -> bool:
    return any(row.simulated for row in rows)


def _rc_context(**changes: Any) -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError(
            "the report's figures need matplotlib: pip install matplotlib"
        ) from error
    settings: Any = STYLE | changes
    return matplotlib.rc_context(settings)


def _new_figure(width: float, height: float) -> Figure:
    """A figure on the Agg canvas, outside pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _position(rank: int | None, ranks: Sequence[int]) -> float:
    """x of a rank: log2, and full finetuning 1.6 octaves right of the largest rank."""
    if rank is not None:
        return math.log2(rank)
    return (math.log2(ranks[-1]) + 1.6) if ranks else 0.0


def _rank_axis(axes: Axes, ranks: Sequence[int], full: bool) -> None:
    ticks = [_position(rank, ranks) for rank in ranks]
    labels = [str(rank) for rank in ranks]
    if len(ranks) > 6:
        labels = [label if i % 2 == 0 else "" for i, label in enumerate(labels)]
    if full:
        ticks.append(_position(None, ranks))
        labels.append("full")
        if ranks:
            middle = math.log2(ranks[-1]) + 0.8
            axes.plot(
                [middle - 0.12, middle + 0.12],
                [0, 0],
                transform=axes.get_xaxis_transform(),
                color="white",
                linewidth=4,
                clip_on=False,
                zorder=9,
                solid_capstyle="butt",
            )
            for x in (middle - 0.14, middle + 0.14):
                axes.plot(
                    [x - 0.08, x + 0.08],
                    [-0.025, 0.025],
                    transform=axes.get_xaxis_transform(),
                    color=INK,
                    linewidth=0.8,
                    clip_on=False,
                    zorder=10,
                )
    axes.set_xticks(ticks, labels)
    if ticks:
        axes.set_xlim(min(ticks) - 0.7, max(ticks) + 0.7)


def _limits(points: Sequence[RankPoint], field: str) -> tuple[float, float]:
    """Shared y limits that hold every error bar and the zero line, with an eighth of room."""
    scale = 100.0 if field.endswith("share") else 1.0
    ends = [0.0]
    for point in points:
        value, se = getattr(point, field), getattr(point, f"{field}_se") or 0.0
        ends += [scale * (value - se), scale * (value + se)]
    low, high = min(ends), max(ends)
    room = (high - low) / 8 or 0.1
    return low - room, high + room


def _rank_series(
    axes: Axes,
    points: Sequence[RankPoint],
    ranks: Sequence[int],
    name: str,
    index: int,
    shift: float,
) -> None:
    scale = 100.0 if name == "share" else 1.0
    colour = PALETTE[index % len(PALETTE)]
    marker = MARKERS[index % len(MARKERS)]
    students = [p for p in points if p.role == "student" and p.rank is not None]
    by_rank: dict[int, list[float]] = {}
    for point in students:
        by_rank.setdefault(point.rank or 0, []).append(scale * getattr(point, f"vs_base_{name}"))
    axes.plot(
        [_position(rank, ranks) + shift for rank in sorted(by_rank)],
        [math.fsum(by_rank[rank]) / len(by_rank[rank]) for rank in sorted(by_rank)],
        color=colour,
        linewidth=1.1,
        alpha=0.8,
        zorder=2,
        gid="mean",
    )
    # Where datasets share a rank their marks shrink, so that the mean line stays visible.
    size = 5.2 if all(len(values) == 1 for values in by_rank.values()) else 3.2
    kinds = dict.fromkeys((point.role == "control", point.rank is None) for point in points)
    for control, full in kinds:
        mine = [p for p in points if (p.role == "control", p.rank is None) == (control, full)]
        errors = [getattr(point, f"vs_base_{name}_se") for point in mine]
        axes.errorbar(
            [_position(p.rank, ranks) + shift + (0.22 if control else 0.0) for p in mine],
            [scale * getattr(p, f"vs_base_{name}") for p in mine],
            yerr=[math.nan if se is None else scale * se for se in errors],
            color=colour,
            marker="D" if full else marker,
            markersize=size,
            markerfacecolor="white" if control else colour,
            markeredgewidth=1.1,
            elinewidth=1.0,
            capsize=2.2,
            linestyle="none",
            zorder=4 if control else 3,
            gid=" ".join(p.row for p in mine),
        )


def _rank_legend(
    figure: Figure, series: Sequence[tuple[str, str]], points: Sequence[RankPoint]
) -> None:
    from matplotlib.lines import Line2D

    several = len({train for _, train in series}) > 1
    handles = []
    for index, (target, train) in enumerate(series):
        mine = [p for p in points if (p.target, p.train_context) == (target, train)]
        colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        name = target.split("/")[-1] + (f", trained in {train}" if several else "")
        shared: dict[str, Any] = {"color": colour, "markersize": 5.2}
        if any(p.role == "student" and p.rank is not None for p in mine):
            handles.append(Line2D([], [], marker=marker, label=f"{name} numbers, LoRA", **shared))
        if any(p.role == "student" and p.rank is None for p in mine):
            handles.append(
                Line2D([], [], marker="D", ls="", label=f"{name} numbers, full", **shared)
            )
        if any(p.role == "control" for p in mine):
            handles.append(
                Line2D(
                    [],
                    [],
                    marker=marker,
                    ls="",
                    mfc="white",
                    mew=1.1,
                    label="neutral numbers" + (f", scored on {name}" if len(series) > 1 else ""),
                    **shared,
                )
            )
    handles.append(Line2D([], [], color=INK, lw=0.9, label="base, same eval context"))
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=4 if len(series) == 1 else 3,
        frameon=False,
    )
    figure.supxlabel(
        "Bars: ±1 standard error over questions, for one dataset each; "
        "they say nothing about other datasets.",
        fontsize=7.5,
        color="#555555",
    )
