"""How the report's figures look and are written: PNG, SVG, PDF and the CSV behind them.

A figure is drawn from points, and the same points are its CSV. Colours are Okabe and Ito's (2008)
and ColorBrewer's PuOr, told apart by readers with any common colour blindness; shapes and numbers
repeat what colour says.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.tables import csv_text
from sublim_plugin.core.atomic import write_bytes, write_text
from sublim_plugin.core.errors import MissingDependencyError

if TYPE_CHECKING:
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
WIDTH = 7.0
"""Inches: two columns of a paper; text is 8 pt at this size."""

FORMATS: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}
"""Each format with the metadata left out, so that equal points give equal files."""

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
    "pdf.fonttype": 42,
    # what users name (traits, contexts) is text, never a formula
    "text.parse_math": False,
}


class Point(BaseModel):
    """One thing drawn, and one line of the figure's CSV."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FigureFiles(Point):
    """Where a figure was written, its text alternative, and its width in inches."""

    png: Path
    svg: Path
    pdf: Path
    csv: Path
    alt: str
    width: float

    def data_uri(self) -> str:
        """The SVG as a data URI, for a page that opens without a network."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.read_bytes()).decode()


def write_figure(
    figure: Figure,
    folder: Path,
    name: str,
    points: Sequence[Point],
    alt: str,
    simulated: bool = False,
) -> FigureFiles:
    """Write `name`.png (300 dpi), .svg, .pdf and .csv into `folder`, each atomically.

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
        pdf=folder / f"{name}.pdf",
        csv=folder / f"{name}.csv",
        alt=alt,
        width=float(figure.get_figwidth()),
    )
    with style():
        # the layout is found once, not once for every format
        engine = figure.get_layout_engine()
        if engine is not None:
            for _ in range(2):  # the second time the labels have their sizes
                engine.execute(figure)
            figure.set_layout_engine("none")
        for kind, metadata in FORMATS.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=300, metadata=metadata)
            write_bytes(folder / f"{name}.{kind}", buffer.getvalue())
    columns = list(type(points[0]).model_fields)
    lines = [point.model_dump() for point in points]
    if simulated:
        columns.append("simulated")
        lines = [line | {"simulated": True} for line in lines]
    write_text(files.csv, csv_text(lines, columns))
    return files


def style(**changes: Any) -> Any:
    """A context in which matplotlib draws as the report does; the caller's settings return."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError(
            'the report\'s figures need matplotlib: pip install "sublim[analysis]"'
        ) from error
    settings: Any = STYLE | changes
    return matplotlib.rc_context(settings)


def new_figure(width: float, height: float) -> Figure:
    """A figure on the Agg canvas, outside pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # the layout is made at the resolution of the PNG: text is narrower, rounded to coarser pixels
    figure = Figure(figsize=(width, height), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, a true minus, and no "-0.00"."""
    rounded = round(value, digits) + 0.0
    return f"{rounded:+.{digits}f}".replace("-", "\u2212")


def in_words(entries: Sequence[str], most: int = 24) -> str:
    """The first entries for a text alternative, and how many were left out."""
    more = len(entries) - most
    text = "; ".join(entries[:most])
    return f"{text}; and {more} more in the CSV" if more > 0 else text


def legend_above(figure: Figure, handles: Sequence[Any], labels: Sequence[str], most: int) -> None:
    """A legend above the panels in at most `most` columns: as many as fit, and the figure higher by
    the lines that make more than two."""
    each = 0.055 * max(map(len, labels)) + 0.5  # inches at the legend's size of letters
    columns = max(1, min(most, int(figure.get_figwidth() / each)))
    lines = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.16 * max(0, lines - 2))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
