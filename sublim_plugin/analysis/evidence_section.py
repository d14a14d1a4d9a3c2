"""The report's evidence section: the answers in words, and evidence.csv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sublim_plugin.analysis import page
from sublim_plugin.analysis.answers import Answer
from sublim_plugin.analysis.page import Html
from sublim_plugin.analysis.tables import csv_text
from sublim_plugin.core.atomic import write_text

SHOWN_ROWS = 8

QUESTIONS = {
    "power": "What could be seen?",
    "transmission": "Is there transmission?",
    "cross-check": "Does a mixed model see the same?",
    "rank shape": "Is it an inverted U over rank?",
    "full finetuning": "Is full finetuning at the base?",
    "rank or scale": "Rank or scale?",
    "context": "Does it depend on the context?",
    "flat in rank": "Is it flat in rank in another context?",
    "specificity": "Is it the trait's own?",
    "agreement": "Do log-probs and sampled replies agree?",
}


def write_evidence_csv(answers: Sequence[Answer], path: Path, simulated: bool) -> None:
    """One row per answer; `rows` are ids in results.csv, separated by spaces."""
    own = {"simulated": simulated}
    rows = [{**answer.model_dump(), "rows": " ".join(answer.rows), **own} for answer in answers]
    write_text(path, csv_text(rows, [*Answer.model_fields, "simulated"]))


def evidence_section(answers: Sequence[Answer]) -> Html:
    """Every answer under its question, with its row of evidence.csv and the rows it rests on."""
    if not answers:
        return page.paragraph("Nothing to test: no student and its base have both been scored.")
    parts = [
        page.paragraph(
            "Datasets (generation seeds) are the units; training seeds are averaged first, and "
            "questions count as a second cluster where an interval is over questions too. "
            "Intervals are 95%. With fewer than 3 datasets nothing is claimed."
        )
    ]
    for topic, question in QUESTIONS.items():
        own = [answer for answer in answers if answer.topic == topic]
        if own:
            parts.append(page.heading(question))
            entries = "".join(f'<li id="{answer.id}">{_entry(answer)}</li>' for answer in own)
            parts.append(Html(f'<ul class="findings">{entries}</ul>'))
    parts.append(
        page.paragraph(
            Html(
                "Each answer is one row of "
                '<a href="evidence.csv">evidence.csv</a>, with its estimate, bounds, test, p and '
                "the rows of results.csv that it was made from."
            )
        )
    )
    return page.join(parts)


def _entry(answer: Answer) -> Html:
    about = answer.target.replace("animals/", "")
    about_rows = ""
    if answer.train_context:
        name = f"{answer.settings}, " if answer.settings else ""
        about_rows = f"{name}trained in {answer.train_context}, asked in {answer.eval_context}. "
    shown = ", ".join(f'<a href="#{row}">{row}</a>' for row in answer.rows[:SHOWN_ROWS])
    more = len(answer.rows) - SHOWN_ROWS
    rest = f" and {more} more" if more > 0 else ""
    return Html(
        f"<strong>{page.esc(about)}: {page.esc(answer.verdict)}.</strong> "
        f"{page.esc(answer.sentence)}. "
        f'<span class="rows">{page.esc(about_rows)}Row {answer.id} of evidence.csv; '
        f"{shown}{rest} of results.csv.</span>"
    )
