"""Localizations among a study's cells: their strips and maps, and their parts in a table.

A localization is a cell folder as `sublim localize` fills one (results.json, figures with their
CSVs) with a manifest of kind `localization`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis import page
from sublim_plugin.analysis.collect import RunRecords
from sublim_plugin.analysis.page import Html
from sublim_plugin.core.atomic import write_bytes
from sublim_plugin.core.errors import InputError

KIND = "localization"
FOLDER = "localization"
RESULTS = "results.json"
FIGURES = {"strip": "the prompt as a heat strip", "map": "layers × modules"}
"""Figures that the page shows; all others are copied beside it."""
MOST_SHOWN, MOST_PARTS, MOST_BYTES = 6, 40, 1_000_000

COLUMNS = ("part", "localization", "student", "trait", "context", "measure", "unit", "kind",
           "name", "sufficiency", "sufficiency_low", "sufficiency_high", "necessity",
           "necessity_low", "necessity_high")  # fmt: skip


class LocalizationFiles(BaseModel):
    """One localization, and its figures' files in the report's folder, by name without suffix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    student: str
    trait: str
    context: str
    n_questions: int
    lines: tuple[dict[str, Any], ...]
    figures: dict[str, dict[str, Path]]


def localizations(run: RunRecords, folder: Path) -> list[LocalizationFiles]:
    """Read every localization of the run and copy its figures into `folder`/localization/.

    Raises:
        InputError: a results.json is not what `sublim localize` writes.
    """
    found: list[LocalizationFiles] = []
    count = 0
    for cell, manifest in run.manifests.items():
        if manifest.kind != KIND:
            continue
        values = _results(cell / RESULTS)
        short = manifest.id[:12]
        lines = []
        for line in _lines(values):
            count += 1
            lines.append({"part": f"L{count}", "localization": short} | line)
        figures: dict[str, dict[str, Path]] = {}
        for path in sorted(cell.iterdir()):
            if path.suffix in (".svg", ".png", ".csv") and path.name in manifest.outputs:
                copy = folder / FOLDER / f"{short}-{path.name}"
                write_bytes(copy, path.read_bytes())
                figures.setdefault(path.stem, {})[path.suffix[1:]] = copy
        found.append(
            LocalizationFiles(
                id=short,
                student=str(values["student"]),
                trait=str(values["trait"]),
                context=_context(values),
                n_questions=int(values["n_questions"]),
                lines=tuple(lines),
                figures=figures,
            )
        )
    return found


def localization_section(found: Sequence[LocalizationFiles]) -> Html:
    """Strips, maps and the parts of each localization; the first ones, where there are many."""
    parts = [
        page.paragraph(
            "The student's change of the base, switched on at one part of the prompt or of the "
            "model at a time. Alone (sufficiency): on there and nowhere else. Left out "
            "(necessity): on everywhere else. Intervals are over questions: they say nothing about "
            "other datasets."
        )
    ]
    for one in found[:MOST_SHOWN]:
        parts.append(page.heading(f"{one.student}, {one.trait}, asked in {one.context}"))
        for name, title in FIGURES.items():
            if files := one.figures.get(name):
                parts.append(_figure(one, files, title))
        kept = [line for line in one.lines if line["kind"] != "token"][:MOST_PARTS]
        unit = f" ({kept[0]['unit']})" if kept else ""
        parts.append(
            page.table(
                f"{one.student}: parts alone and left out, {one.n_questions} questions{unit}",
                ["row", "measure", "kind", "part", "alone", "95% interval", "left out",
                 "95% interval"],
                [
                    [
                        line["part"], line["measure"], line["kind"], line["name"],
                        *_value(line, "sufficiency"), *_value(line, "necessity"),
                    ]
                    for line in kept
                ],
                numeric=(4, 5, 6, 7),
            )
        )  # fmt: skip
    parts.append(page.said("Every part of every localization:", "localization.csv"))
    return page.join(parts)


def _figure(one: LocalizationFiles, files: dict[str, Path], title: str) -> Html:
    svg = files.get("svg")
    links = ", ".join(
        f'<a href="{FOLDER}/{page.esc(path.name)}">{kind.upper()}</a>'
        for kind, path in files.items()
    )
    text = f"{title.capitalize()} of {one.student}, {one.trait}, asked in {one.context}."
    image = ""
    if svg is not None and svg.stat().st_size <= MOST_BYTES:
        data = base64.b64encode(svg.read_bytes()).decode()
        alt = f"{text} The effect of each part, in the table below and in {svg.stem}.csv."
        image = (
            '<div class="scroll" tabindex="0" role="group" aria-label="figure, scrolls">'
            f'<img src="data:image/svg+xml;base64,{data}" alt="{page.esc(alt)}"></div>'
        )
    where = page.traced("localization.csv", [str(line["part"]) for line in one.lines[:1]])
    return Html(
        f"<figure>{image}<figcaption {where}>{page.esc(text)} Files: {links}.</figcaption></figure>"
    )


def _results(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    missing = {"student", "trait", "context", "n_questions", "measures"} - set(values)
    if missing:
        raise InputError(
            f"{path}: no {', '.join(sorted(missing))}; delete the cell's folder and run again"
        )
    return dict(values)


def _lines(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The total and every part of every measure."""
    about = {name: values[name] for name in ("student", "trait")} | {"context": _context(values)}
    lines = []
    for result in values["measures"]:
        shared = about | {"measure": result["measure"], "unit": result["unit"]}
        total = {"kind": "total", "name": "student - base"}
        lines.append(shared | total | _numbers("sufficiency", result["total"]))
        for part in result["parts"]:
            numbers = _numbers("sufficiency", part["sufficiency"])
            numbers |= _numbers("necessity", part["necessity"])
            lines.append(shared | {"kind": part["kind"], "name": part["name"]} | numbers)
    return lines


def _numbers(way: str, measured: dict[str, float] | None) -> dict[str, Any]:
    if measured is None:
        return {}
    return {way: measured["value"], f"{way}_low": measured["low"], f"{way}_high": measured["high"]}


def _value(line: dict[str, Any], way: str) -> tuple[str, str]:
    if line.get(way) is None:
        return "", ""
    return f"{line[way]:+.4f}", f"[{line[f'{way}_low']:+.4f}, {line[f'{way}_high']:+.4f}]"


def _context(values: dict[str, Any]) -> str:
    from sublim_plugin.core.contexts import Context

    return Context.parse(values["context"]).slug
