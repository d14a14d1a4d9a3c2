"""The report of a study: one HTML file that opens offline, and the files behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sublim_plugin.analysis import page
from sublim_plugin.analysis.answers import Answer
from sublim_plugin.analysis.collect import CellRef, RunRecords, collect
from sublim_plugin.analysis.context_figure import context_figure
from sublim_plugin.analysis.dose_figure import dose_figure
from sublim_plugin.analysis.evidence_section import evidence_section, write_evidence_csv
from sublim_plugin.analysis.figure_files import FigureFiles
from sublim_plugin.analysis.localization_section import (
    COLUMNS,
    LocalizationFiles,
    localization_section,
    localizations,
)
from sublim_plugin.analysis.methods import (
    CHANNEL,
    Statement,
    methods_section,
    references,
    statements,
)
from sublim_plugin.analysis.page import Html
from sublim_plugin.analysis.rank_figure import rank_figure
from sublim_plugin.analysis.record_sections import cells_section, training_section, trouble_section
from sublim_plugin.analysis.record_tables import (
    CELL_COLUMNS,
    DATASET_COLUMNS,
    SAMPLED_COLUMNS,
    cell_lines,
    count_lines,
    dataset_lines,
    sampled_lines,
    student_lines,
)
from sublim_plugin.analysis.report_folder import NAME, building
from sublim_plugin.analysis.results_sections import (
    context_section,
    rank_section,
    scale_section,
    shown_rows,
    specificity_section,
    table_section,
)
from sublim_plugin.analysis.sample_sections import answers_section, numbers_section, prompts_section
from sublim_plugin.analysis.scale_figure import scale_figure
from sublim_plugin.analysis.signal_section import FILE, signal_section
from sublim_plugin.analysis.signals import Pair, has_signals, pairs
from sublim_plugin.analysis.specificity_figure import specificity_figure
from sublim_plugin.analysis.tables import (
    effect_lines,
    write_lines,
    write_results_csv,
    write_results_parquet,
)
from sublim_plugin.analysis.training_figures import loss_figure, norm_figure
from sublim_plugin.analysis.transmission import (
    TransmissionRow,
    question_differences,
    transmission_table,
)
from sublim_plugin.core.atomic import write_text

if TYPE_CHECKING:
    from sublim_plugin.analysis.effects import Effect


SIMULATED = (
    "Simulated data: these numbers were made up with a known truth, to show what the report makes "
    "of them. No model was trained or asked; nothing here is a finding."
)
MOST_OF_A_STUDY = 40_000
"""Characters of the study file that are shown."""


@dataclass(frozen=True)
class Contents:
    """All that the page shows."""

    run: RunRecords
    rows: Sequence[TransmissionRow]
    effects: Sequence[Effect]
    answers: Sequence[Answer]
    statements: Sequence[Statement]
    cells: Sequence[dict[str, Any]]
    students: Sequence[dict[str, Any]]
    sampled: Sequence[dict[str, Any]]
    counts: dict[str, object]
    figures: dict[str, FigureFiles | None]
    specificity_rows: dict[tuple[str, str, str], tuple[str, ...]]
    localizations: Sequence[LocalizationFiles]
    signals: Sequence[Pair] | None


def write_report(
    run_dir: Path,
    *,
    study_name: str,
    cells: Iterable[CellRef | tuple[Path, str]] | None = None,
    study_text: str | None = None,
    equivalence_margin: float | None = None,
) -> Path:
    """Write `run_dir/report/` anew and return its `index.html`.

    Beside it: results.csv and results.parquet (one row per model, eval context and target),
    effects.csv (over datasets), evidence.csv (one row per answer), methods.csv (one per statement),
    cells.csv, students.csv, datasets.csv, sampled.csv, counts.csv, references.bib, and each figure
    as PNG, SVG, PDF and CSV. Failed, missing and unfinished cells are listed; a study without any
    result gets a report that says so. The folder is built beside the old one and swapped in whole.

    Args:
        cells: every cell of the study's grid with its state; without it `run_dir/cells` is read.
        study_text: the study file as run, shown in full.
        equivalence_margin: in nats, as the study file states it; without it no equivalence is
            claimed.

    Raises:
        InputError: a done cell is garbled or contradicts another; the old report stays.
    """
    # numpy, scipy and statsmodels are imported only where numbers are made.
    from sublim_plugin.analysis.effects import effects
    from sublim_plugin.analysis.evidence import evidence

    run = collect(run_dir, cells)
    rows = transmission_table(run)
    differences = question_differences(run, rows)
    found = effects(rows, differences)
    answers = evidence(run, rows, differences, found, equivalence_margin)
    told = statements(run, equivalence_margin, study_text)
    folder = run_dir / NAME
    with building(folder) as new:
        contents = _write_files(new, run, rows, found, answers, told)
        write_text(new / "index.html", render_report(contents, study_name, study_text))
    return folder / "index.html"


def _write_files(
    folder: Path,
    run: RunRecords,
    rows: Sequence[TransmissionRow],
    found: Sequence[Effect],
    answers: Sequence[Answer],
    told: Sequence[Statement],
) -> Contents:
    """Everything but the page."""
    from sublim_plugin.analysis.effects import Effect

    simulated = run.simulated
    write_results_csv(rows, folder / "results.csv")
    write_results_parquet(rows, folder / "results.parquet")
    columns = ["effect", *Effect.model_fields]
    write_lines(effect_lines(found), folder / "effects.csv", columns, simulated)
    write_evidence_csv(answers, folder / "evidence.csv", simulated)
    lines = [
        s.model_dump() | {"cites": " ".join(s.cites), "cells": " ".join(s.cells)} for s in told
    ]
    write_lines(lines, folder / "methods.csv", list(Statement.model_fields), simulated)
    cells, counts = cell_lines(run), count_lines(run)
    write_lines(cells, folder / "cells.csv", CELL_COLUMNS, simulated)
    students, student_columns = student_lines(run)
    write_lines(students, folder / "students.csv", student_columns, simulated)
    write_lines(dataset_lines(run), folder / "datasets.csv", DATASET_COLUMNS, simulated)
    traits = [student.spec.trait for student in run.students if student.spec.trait != "neutral"]
    sampled = sampled_lines(run, list(dict.fromkeys([*(row.target for row in rows), *traits])))
    if run.sampled:
        write_lines(sampled, folder / "sampled.csv", SAMPLED_COLUMNS, simulated)
    counted = [{"name": name, "value": value} for name, value in counts.items()]
    write_lines(counted, folder / "counts.csv", ["name", "value"], simulated)
    write_text(folder / "references.bib", references())
    local = localizations(run, folder)
    if local:
        parts = [line for one in local for line in one.lines]
        write_lines(parts, folder / "localization.csv", COLUMNS, simulated)
    foretold = pairs(run, rows) if has_signals(run) else None
    if foretold is not None:
        lines = [pair.model_dump() for pair in foretold]
        write_lines(lines, folder / FILE, list(Pair.model_fields), simulated)
    specificity = specificity_figure(run, rows, folder)
    return Contents(
        run=run,
        rows=rows,
        effects=found,
        answers=answers,
        statements=told,
        cells=cells,
        students=students,
        sampled=sampled,
        counts=counts,
        figures={
            "transmission": rank_figure(rows, found, folder, simulated),
            "scale": scale_figure(rows, found, folder, simulated),
            "contexts": context_figure(rows, folder, simulated),
            "specificity": specificity[0] if specificity else None,
            "losses": loss_figure(run, folder),
            "norms": norm_figure(run, folder),
            "dose": dose_figure(foretold or (), folder, simulated),
        },
        specificity_rows=specificity[1] if specificity else {},
        localizations=local,
        signals=foretold,
    )


def render_report(shown: Contents, study_name: str, study_text: str | None = None) -> str:
    """The page as text; every value that came from data is escaped."""
    run, rows, figures = shown.run, shown.rows, shown.figures
    on_page = {row.row for block, _ in shown_rows(rows) for row in block} if rows else set()
    channels = [one for one in shown.statements if one.topic == CHANNEL]
    specificity = specificity_section(figures["specificity"], shown.specificity_rows)
    sections = [
        ("evidence", "Answers", evidence_section(shown.answers, on_page, channels)),
        ("rank", "Transmission against rank", rank_section(figures["transmission"])),
        ("scale", "Rank or scale", scale_section(figures["scale"])),
        ("context", "Train and eval context", context_section(rows, figures["contexts"])),
        ("specificity", "Trait against trait", specificity),
    ]
    if shown.localizations:
        local = localization_section(shown.localizations)
        sections.append(("localization", "Where it sits", local))
    if shown.signals is not None:
        predicted = signal_section(shown.signals, figures["dose"])
        sections.append(("signal", "Predicted and observed", predicted))
    training = training_section(run, shown.students, figures["losses"], figures["norms"])
    sections += [
        ("training", "Training and size of the updates", training),
        ("table", "All comparisons", table_section(rows, shown.effects, shown.sampled)),
        ("numbers", "Sample numbers", numbers_section(run)),
        ("replies", "Sample answers", answers_section(run, rows)),
        ("prompts", "Prompts as the model saw them", prompts_section(run)),
        ("cells", "What was run", cells_section(run, shown.cells)),
        ("trouble", "What is missing", trouble_section(run, shown.cells)),
        ("methods", "Methods", methods_section(shown.statements)),
    ]
    if study_text:
        text = page.short(study_text, MOST_OF_A_STUDY)
        sections.append(("study", "Study file", page.pre(text, "study file")))
    title = f"SIMULATED: {study_name}" if run.simulated else study_name
    status = Html(
        f"<p {page.traced('counts.csv', list(shown.counts))}>"
        f"{page.esc(_status_line(shown.counts))} {page.source('counts.csv')}</p>"
    )
    return page.page(
        f"{title} · sublim report",
        page.body(
            f"{title}: does the student prefer what the teacher did?",
            status,
            _warnings(run, shown.counts),
            sections,
        ),
    )


def _status_line(counts: dict[str, object]) -> str:
    states = ", ".join(
        f"{number} {name.removeprefix('cells ')}"
        for name, number in counts.items()
        if name.startswith("cells ") and name != "cells not done"
    )
    return f"Cells: {states or 'none planned'}. Written {counts['written']} by sublim."


def _warnings(run: RunRecords, counts: dict[str, object]) -> Html:
    parts = []
    if run.simulated:
        parts.append(page.notice(SIMULATED))
    if not run.cells:
        parts.append(page.notice("This study has no cells yet: nothing has been run."))
    elif counts["cells not done"]:
        text = Html(
            f"{counts['cells not done']} of {len(run.cells)} cells are not done, so this report is "
            'incomplete: <a href="#trouble">what is missing</a>.'
        )
        parts.append(page.notice(text, "counts.csv", ["cells", "cells not done"]))
    return page.join(parts)
