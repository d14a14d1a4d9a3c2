"""The report of a study: one HTML file that opens offline, and the files behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sublim_plugin.analysis import page
from sublim_plugin.analysis.answers import Answer
from sublim_plugin.analysis.collect import CellRef, RunRecords, collect
from sublim_plugin.analysis.evidence_section import evidence_section, write_evidence_csv
from sublim_plugin.analysis.figures import (
    FigureFiles,
    context_figure,
    loss_figure,
    transmission_figure,
)
from sublim_plugin.analysis.findings import Finding, findings
from sublim_plugin.analysis.methods import methods_section
from sublim_plugin.analysis.page import Html
from sublim_plugin.analysis.record_sections import (
    cells_section,
    numbers_section,
    prompts_section,
    training_section,
    trouble_section,
)
from sublim_plugin.analysis.results_sections import (
    answers_section,
    context_section,
    rank_section,
    table_section,
)
from sublim_plugin.analysis.tables import csv_text, write_results_csv
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


def write_report(
    run_dir: Path,
    *,
    study_name: str,
    cells: Iterable[CellRef | tuple[Path, str]] | None = None,
    study_text: str | None = None,
    equivalence_margin: float | None = None,
) -> Path:
    """Write `run_dir/report/` and return its `index.html`, which is written last.

    Beside it: results.csv (one row per model, eval context and target), effects.csv (over
    datasets), evidence.csv (one row per answer), and each figure as PNG, SVG and CSV. Failed,
    missing and unfinished cells are listed; a study without any result gets a report that says so.

    Args:
        cells: every cell of the study's grid with its state; without it `run_dir/cells` is read.
        study_text: the study file as run, shown in full.
        equivalence_margin: in nats, as the study file states it; without it no equivalence is
            claimed.

    Raises:
        InputError: a done cell is garbled or contradicts another; nothing is written then.
    """
    # numpy, scipy and statsmodels are imported only where numbers are made.
    from sublim_plugin.analysis.effects import Effect, effects
    from sublim_plugin.analysis.evidence import evidence

    run = collect(run_dir, cells)
    rows = transmission_table(run)
    differences = question_differences(run, rows)
    found = effects(rows, differences)
    answers = evidence(run, rows, differences, found, equivalence_margin)
    folder = run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_results_csv(rows, folder / "results.csv")
    write_text(
        folder / "effects.csv",
        csv_text(
            [
                {**effect.model_dump(), "rows": " ".join(effect.rows), "simulated": run.simulated}
                for effect in found
            ],
            [*Effect.model_fields, "simulated"],
        ),
    )
    write_evidence_csv(answers, folder / "evidence.csv", run.simulated)
    figures = {
        "transmission": transmission_figure(rows, folder),
        "contexts": context_figure(rows, folder),
        "losses": loss_figure(run, folder),
    }
    index = folder / "index.html"
    write_text(index, render_report(run, rows, found, answers, figures, study_name, study_text))
    return index


def render_report(
    run: RunRecords,
    rows: Sequence[TransmissionRow],
    found: Sequence[Effect],
    answers: Sequence[Answer],
    figures: dict[str, FigureFiles | None],
    study_name: str,
    study_text: str | None = None,
) -> str:
    """The page as text; every value that came from data is escaped."""
    sections = [
        ("found", "What was found", _found(rows, findings(rows, found))),
        ("evidence", "Evidence", evidence_section(answers)),
        ("rank", "Transmission against rank", rank_section(figures["transmission"])),
        ("context", "By eval context", context_section(rows, figures["contexts"])),
        ("table", "All comparisons", table_section(rows)),
        ("training", "Training", training_section(run, figures["losses"])),
        ("numbers", "Sample numbers", numbers_section(run)),
        ("answers", "Sample answers", answers_section(run, rows)),
        ("prompts", "Prompts as the model saw them", prompts_section(run)),
        ("cells", "What was run", cells_section(run)),
        ("trouble", "What is missing", trouble_section(run)),
        ("methods", "Methods", methods_section(run)),
    ]
    if study_text:
        sections.append(("study", "Study file", page.pre(study_text, "study file")))
    navigation = "".join(
        f'<li><a href="#{anchor}">{page.esc(name)}</a></li>' for anchor, name, _ in sections
    )
    title = f"SIMULATED: {study_name}" if run.simulated else study_name
    body = page.join(
        [
            Html("<header>"),
            Html(f"<h1>{page.esc(title)}: does the student prefer what the teacher did?</h1>"),
            page.paragraph(_status_line(run), "soft"),
            Html("</header>"),
            Html(f'<nav aria-label="Sections"><ul>{navigation}</ul></nav>'),
            Html("<main>"),
            _warnings(run),
            *[page.section(anchor, name, content) for anchor, name, content in sections],
            Html("</main>"),
        ]
    )
    return page.page(f"{title} · sublim report", body)


def _status_line(run: RunRecords) -> str:
    counts = Counter(cell.state for cell in run.cells)
    states = ", ".join(f"{n} {state}" for state, n in sorted(counts.items())) or "none planned"
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"Cells: {states}. Written {written} by sublim."


def _warnings(run: RunRecords) -> Html:
    unfinished = [cell for cell in run.cells if cell.state != "done"]
    parts = []
    if run.simulated:
        parts.append(page.notice(SIMULATED))
    if not run.cells:
        parts.append(page.notice("This study has no cells yet: nothing has been run."))
    elif unfinished:
        parts.append(
            page.notice(
                Html(
                    f"{len(unfinished)} of {len(run.cells)} cells are not done, so this report is "
                    'incomplete: <a href="#trouble">what is missing</a>.'
                )
            )
        )
    return page.join(parts)


def _found(rows: Sequence[TransmissionRow], found: Sequence[Finding]) -> Html:
    if not found:
        return page.paragraph("Nothing: no probe of a target has finished.")
    parts: list[Html] = []
    listed: list[Html] = []
    for finding in found:
        links = ""
        if finding.rows and finding.eval_context:
            links = ' <span class="rows">Rows ' + ", ".join(
                f'<a href="#{row}">{row}</a>' for row in finding.rows
            )
            links += " of results.csv.</span>"
        if finding.eval_context is None:
            if listed:
                parts.append(_findings_list(listed))
                listed = []
            parts.append(
                Html(
                    f'<p class="target"><strong>{page.esc(finding.target)}: '
                    f"{page.esc(finding.verdict)}.</strong> {page.esc(finding.text)}</p>"
                )
            )
        else:
            listed.append(
                Html(
                    f"<strong>Asked in <code>{page.esc(finding.eval_context)}</code>: "
                    f"{page.esc(finding.verdict)}.</strong> {page.esc(finding.text)}{links}"
                )
            )
    if listed:
        parts.append(_findings_list(listed))
    warnings = dict.fromkeys(row.warning for row in rows if row.warning)
    parts += [page.notice(text) for text in warnings]
    return page.join(parts)


def _findings_list(entries: Sequence[Html]) -> Html:
    return Html('<ul class="findings">' + "".join(f"<li>{e}</li>" for e in entries) + "</ul>")
