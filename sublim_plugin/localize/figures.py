"""Figures of a localization: the prompt as a heat strip, bars per part, and a layer × module map.

Each is written as PNG and SVG with the numbers behind it as CSV. Colour runs from blue (towards the
base's other side) over white (no effect) to red (towards the student); the colours of bars
and lines are Okabe and Ito's (2008). Both can be told apart with any common colour blindness.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sublim_plugin.core.atomic import write_bytes, write_text
from sublim_plugin.core.errors import MissingDependencyError
from sublim_plugin.localize.results import (
    Localization,
    Measured,
    MeasureResult,
    PartResult,
    Spectrum,
)
from sublim_plugin.localize.sweep import Kind
from sublim_plugin.localize.tables import csv_text, flat

WIDTH = 7.0
"""Inches: two columns of a paper; text is 8 pt at this size."""
COLUMNS = 82
"""Characters in a line of the strip."""
ALONE, LEFT_OUT = "#D55E00", "#0072B2"
LINES = (LEFT_OUT, ALONE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BARS: dict[Kind, str] = {
    "span": "spans",
    "layers": "layers",
    "module": "modules",
    "gate": "gates",
}
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "sublim",
    "svg.fonttype": "path",
}


def draw(localization: Localization, out: Path) -> list[Path]:
    """Every figure that the parts allow, in `out`; the paths of all files.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    written: list[Path] = []
    with _style():
        for result in localization.measures:
            prefix = "" if result.measure == "logprob" else f"{result.measure}-"
            kinds = {part.kind for part in result.parts}
            if "token" in kinds:
                rows = strip_rows(localization, result)
                written += _write(_strip(rows, result), rows, out / f"{prefix}strip")
            for kind in (kind for kind in BARS if kind in kinds):
                parts = [part for part in result.parts if part.kind == kind]
                table = [flat(part) for part in parts]
                written += _write(_bars(parts, result), table, out / f"{prefix}{BARS[kind]}")
            if "cell" in kinds:
                cells = [part for part in result.parts if part.kind == "cell"]
                table = [flat(part) for part in cells]
                written += _write(_map(cells, result), table, out / f"{prefix}map")
        if localization.spectra is not None:
            found = localization.spectra
            rows = [_spectrum_row(one) for one in found.modules]
            written += _write(_spectra(rows), rows, out / "spectra")
            if found.beside:
                each = {localization.student: found.modules} | found.beside
                rows = [
                    {"student": name} | _spectrum_row(one)
                    for name, modules in each.items()
                    for one in modules
                ]
                written += _write(_side_by_side(rows), rows, out / "spectra-students")
    return written


def figure_names() -> list[str]:
    """Every file that `draw` may write."""
    stems = [f"{p}{stem}" for p in ("", "sampled-") for stem in ("strip", "map", *BARS.values())]
    return [
        f"{stem}.{kind}"
        for stem in (*stems, "spectra", "spectra-students")
        for kind in ("png", "svg", "csv")
    ]


def strip_rows(localization: Localization, result: MeasureResult) -> list[dict[str, Any]]:
    """One row a token of the first prompt: its text, and the effect of the part that holds it.

    The tokens of the question share one part; without spans in the sweep they have none.
    """
    count = len(localization.tokens)
    single = {int(p.name) % count: p for p in result.parts if p.kind == "token"}
    question = localization.spans["question"]
    whole = next(
        (p for p in result.parts if p.kind == "span" and localization.spans[p.name] == question),
        None,
    )
    rows = []
    for index, text in enumerate(localization.tokens):
        part = single.get(index) or (whole if index in question else None)
        rows.append(
            {
                "token": index,
                "text": text,
                "part": part and (part.name if part is whole else "token"),
                "sufficiency": part and part.sufficiency.value,
                "necessity": part and part.necessity and part.necessity.value,
            }
        )
    return rows


@contextmanager
def _style() -> Iterator[None]:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError(
            'figures need matplotlib: pip install "sublim[analysis]"; results.json is complete, '
            "and the same command draws them once it is there"
        ) from error
    rc_context: Any = matplotlib.rc_context
    with rc_context(STYLE):
        yield


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _write(figure: Any, rows: Sequence[dict[str, Any]], path: Path) -> list[Path]:
    """A figure as PNG and SVG, and its numbers as CSV; their paths."""
    write_text(path.with_suffix(".csv"), csv_text(rows))
    for kind in ("png", "svg"):
        data = io.BytesIO()
        figure.savefig(data, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else {})
        write_bytes(path.with_suffix(f".{kind}"), data.getvalue())
    return [path.with_suffix(f".{kind}") for kind in ("png", "svg", "csv")]


def _scale(values: Sequence[float | None]) -> Any:
    """Colours symmetric around no effect, as far as the largest value."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    reach = max([abs(v) for v in values if v is not None], default=0) or 1.0
    return ScalarMappable(Normalize(-reach, reach), "RdBu_r")


def _strip(rows: Sequence[dict[str, Any]], result: MeasureResult) -> Any:
    lines = _layout([str(row["text"]) for row in rows])
    ways = (
        ("sufficiency", "the student at this token alone (alone - base"),
        ("necessity", "this token left out (student - left out"),
    )
    figure = _figure(0.75 + 2 * (0.21 * len(lines) + 0.3))
    scale = _scale([result.total.value, *(row[way] for row in rows for way, _ in ways)])
    panels = figure.subplots(2, 1)
    for axes, (way, title) in zip(panels, ways, strict=True):
        axes.set_axis_off()
        axes.set(xlim=(0, COLUMNS), ylim=(len(lines), 0))
        axes.set_title(f"{way}: {title}, {result.unit}); the question is one part", loc="left")
        for y, line in enumerate(lines):
            for x, index, text in line:
                value = rows[index][way]
                colour = "#FFFFFF" if value is None else scale.to_rgba(value)
                _token(axes, x, y, text, colour)
    bar = figure.colorbar(scale, ax=panels, shrink=0.6, aspect=25, pad=0.01)
    bar.set_label(f"effect on {result.metric}, {result.unit}")
    bar.ax.axhline(result.total.value, color="black", linewidth=1)
    bar.ax.text(1.15, result.total.value, "total", va="center", fontsize=6.5, clip_on=False,
                transform=bar.ax.get_yaxis_transform(), ha="left", color="black",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
    return figure


def _layout(texts: Sequence[str]) -> list[list[tuple[int, int, str]]]:
    """Lines of (column, token, text): broken where the prompt is, and where a line is full."""
    lines: list[list[tuple[int, int, str]]] = [[]]
    column = 0
    for index, text in enumerate(texts):
        shown = text.replace("\n", "↵").replace("\t", "→").replace("$", r"\$")
        width = len(shown.replace(r"\$", "$"))
        if column and column + width > COLUMNS:
            lines.append([])
            column = 0
        lines[-1].append((column, index, shown))
        column += width
        if text.endswith("\n") and index < len(texts) - 1:
            lines.append([])
            column = 0
    return lines


def _token(axes: Any, x: int, y: int, text: str, colour: Any) -> None:
    from matplotlib.patches import Rectangle

    width = len(text.replace(r"\$", "$"))
    box = Rectangle(
        (x, y + 0.06), width, 0.88, facecolor=colour, edgecolor="#BBBBBB", linewidth=0.4
    )
    axes.add_patch(box)
    dark = not isinstance(colour, str) and sum(colour[:3]) < 1.5
    for offset, character in enumerate(text.replace(r"\$", "$")):
        axes.text(
            x + offset + 0.5,
            y + 0.52,
            character.replace("$", r"\$"),
            family="DejaVu Sans Mono",
            fontsize=6.3,
            color="white" if dark else "black",
            ha="center",
            va="center",
        )


def _bars(parts: Sequence[PartResult], result: MeasureResult) -> Any:
    figure = _figure(0.9 + 0.34 * len(parts))
    axes = figure.subplots()
    series: list[tuple[str, str, list[Measured | None]]] = [
        ("alone - base (sufficiency)", ALONE, [part.sufficiency for part in parts]),
        ("student - left out (necessity)", LEFT_OUT, [part.necessity for part in parts]),
    ]
    for offset, (label, colour, values) in zip((-0.19, 0.19), series, strict=True):
        there = [(y, value) for y, value in enumerate(values) if value is not None]
        if not there:
            continue
        spread = [[v.value - v.low for _, v in there], [v.high - v.value for _, v in there]]
        axes.barh(
            [y + offset for y, _ in there],
            [v.value for _, v in there],
            0.36,
            xerr=[[max(0.0, x) for x in side] for side in spread],
            color=colour,
            label=label,
            error_kw={"elinewidth": 0.7, "capsize": 1.5},
        )
    axes.axvline(0, color="#222222", linewidth=0.7)
    axes.axvline(result.total.value, color="#222222", linewidth=0.7, linestyle="--", label="total")
    axes.set_yticks(range(len(parts)), [_label(part) for part in parts])
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set_xlabel(f"effect on {result.metric} ({result.unit}); bars: 95% over questions")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return figure


def _label(part: PartResult) -> str:
    text = (part.text or "").replace("$", r"\$")
    text = text if len(text) <= 30 else f"{text[:14]}…{text[-14:]}"
    return f"{part.name}\n{text}" if text else part.name


def _map(cells: Sequence[PartResult], result: MeasureResult) -> Any:
    bands = list(dict.fromkeys(part.band for part in cells))
    modules = list(dict.fromkeys(part.module for part in cells))
    bands.sort(key=lambda band: int(str(band).partition("-")[0]))
    by = {(part.module, part.band): part for part in cells}
    none = float("nan")  # where the student changes nothing
    values: dict[str, list[list[float]]] = {"alone - base": [], "student - left out": []}
    for module in modules:
        row = [by.get((module, band)) for band in bands]
        values["alone - base"].append([part.sufficiency.value if part else none for part in row])
        values["student - left out"].append(
            [part.necessity.value if part and part.necessity else none for part in row]
        )
    figure = _figure(0.9 + 0.26 * len(modules))
    shown = [v for grid in values.values() for line in grid for v in line]
    scale = _scale([v for v in shown if not math.isnan(v)])
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, grid) in zip(panels, values.items(), strict=True):
        axes.imshow(grid, cmap=scale.cmap, norm=scale.norm, aspect="auto")
        axes.set_title(title, loc="left")
        axes.set_xticks(range(len(bands)), bands)
        axes.set_yticks(range(len(modules)), modules)
        axes.set_xlabel("layers")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if math.isnan(value):
                    continue
                dark = sum(scale.to_rgba(value)[:3]) < 1.5
                axes.text(x, y, f"{value:+.2f}", ha="center", va="center", fontsize=6,
                          color="white" if dark else "black")  # fmt: skip
    bar = figure.colorbar(scale, ax=panels, aspect=25, pad=0.01)
    bar.set_label(f"effect on {result.metric}, {result.unit}")
    return figure


def _spectrum_row(one: Spectrum) -> dict[str, Any]:
    fields = one.model_dump(exclude={"singular_values", "shape"})
    values = " ".join(f"{value:.6g}" for value in one.singular_values)
    return fields | {"shape": "x".join(map(str, one.shape)), "singular_values": values}


def _spectra(rows: Sequence[dict[str, Any]]) -> Any:
    modules = list(dict.fromkeys(row["module"] for row in rows))
    layers = sorted({row["layer"] for row in rows})
    by = {(row["module"], row["layer"]): row for row in rows}
    figure = _figure(0.7 + 2 * (0.35 + 0.19 * len(modules)))
    panels = figure.subplots(2, 1, sharex=True)
    for axes, what in zip(panels, ("norm", "effective_rank"), strict=True):
        grid = [
            [by[m, layer][what] if (m, layer) in by else float("nan") for layer in layers]
            for m in modules
        ]
        shown = axes.imshow(grid, cmap="viridis", vmin=0, aspect="auto")
        axes.set_title(f"dW: {what.replace('_', ' ')}", loc="left")
        axes.set_yticks(range(len(modules)), modules)
        figure.colorbar(shown, ax=axes, pad=0.01, aspect=12)
    step = max(1, len(layers) // 15)
    panels[-1].set_xticks(range(0, len(layers), step), [str(x) for x in layers[::step]])
    panels[-1].set_xlabel("layer")
    return figure


def _side_by_side(rows: Sequence[dict[str, Any]]) -> Any:
    """Norm and effective rank by layer, a panel for each module and a line for each student."""
    modules = list(dict.fromkeys(row["module"] for row in rows))
    students = list(dict.fromkeys(row["student"] for row in rows))
    ways = ("norm", "effective_rank")
    figure = _figure(3.2 + 0.14 * len(students))
    panels = figure.subplots(2, len(modules), sharex=True, sharey="row", squeeze=False)
    for line, what in zip(panels, ways, strict=True):
        for axes, module in zip(line, modules, strict=True):
            for number, student in enumerate(students):
                own = [row for row in rows if (row["module"], row["student"]) == (module, student)]
                own.sort(key=lambda row: int(row["layer"]))
                axes.plot(
                    [row["layer"] for row in own],
                    [row[what] for row in own],
                    color=LINES[number % len(LINES)],
                    marker="o",
                    markersize=1.8,
                    linewidth=0.9,
                    label=student,
                )
            axes.set_yscale("log")
            if what == ways[0]:
                axes.set_title(module)
            else:
                axes.set_xlabel("layer")
        line[0].set_ylabel(f"dW: {what.replace('_', ' ')}")
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels[0]), key=len)
    figure.legend(handles, labels, loc="outside upper left", frameon=False)
    return figure
