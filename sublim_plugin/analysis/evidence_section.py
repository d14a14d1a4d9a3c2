"""The answers in words, and evidence.csv."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from sublim_plugin.analysis import page
from sublim_plugin.analysis.answers import Answer
from sublim_plugin.analysis.page import Html
from sublim_plugin.analysis.tables import write_lines

SHOWN_ROWS = 8
MOST_ANSWERS = 60
"""Answers to one question that are printed; all are in evidence.csv."""

QUESTIONS = {
    "transmission": "Is there transmission?",
    "rank shape": "Is it an inverted U over rank?",
    "full finetuning": "Is full finetuning at the base?",
    "rank or scale": "Rank or scale?",
    "context": "Does it depend on the context?",
    "flat in rank": "Is it flat in rank in another context?",
    "specificity": "Is it the trait's own?",
    "agreement": "Do log-probs and sampled replies agree?",
    "cross-check": "Does a mixed model see the same?",
    "power": "What could be seen?",
}


def write_evidence_csv(answers: Sequence[Answer], path: Path, simulated: bool) -> None:
    """One row per answer; `rows` are ids in results.csv, separated by spaces."""
    lines = [{**answer.model_dump(), "rows": " ".join(answer.rows)} for answer in answers]
    write_lines(lines, path, list(Answer.model_fields), simulated)


def evidence_section(answers: Sequence[Answer], on_page: Collection[str]) -> Html:
    """Every answer under its question, with its row of evidence.csv and the rows it rests on.

    Args:
        on_page: rows of results.csv that the page shows, and that can be linked to.
    """
    if not answers:
        return page.paragraph("Nothing to test: no student and its base have both been scored.")
    parts = [
        page.paragraph(
            "Datasets (generation seeds) are the units; training seeds are averaged first, and "
            "questions count as a second cluster where an interval is over questions too. "
            "Intervals are 95%. With fewer than 3 datasets nothing is claimed."
        )
    ]
    known = list(dict.fromkeys([*QUESTIONS, *(answer.topic for answer in answers)]))
    for topic in known:
        own = [answer for answer in answers if answer.topic == topic]
        if not own:
            continue
        parts.append(page.heading(QUESTIONS.get(topic, topic.capitalize())))
        own.sort(key=lambda answer: answer.train_context != answer.eval_context)
        groups: dict[str, list[Answer]] = {}
        for answer in own[:MOST_ANSWERS]:
            groups.setdefault(_about(answer), []).append(answer)
        for about, group in groups.items():
            if about:
                parts.append(Html(f"<h4>{page.esc(about)}</h4>"))
            entries = "".join(_entry(answer, on_page) for answer in group)
            parts.append(Html(f'<ul class="findings">{entries}</ul>'))
        if len(own) > MOST_ANSWERS:
            keys = [answer.id for answer in own[MOST_ANSWERS:]]
            text = f"{len(keys)} more answers to this question are in"
            parts.append(page.said(text, "evidence.csv", keys))
    return page.join(parts)


def _about(answer: Answer) -> str:
    """Settings and contexts, under which answers stand together; "" for those on all of them."""
    settings = answer.settings[:1].upper() + answer.settings[1:]
    name = f"{settings}, t" if settings else "T"
    if not answer.train_context:
        return settings
    if answer.train_context == answer.eval_context and "," in answer.train_context:
        return f"{name}rained and asked in {answer.train_context}"
    return f"{name}rained in {answer.train_context}, asked in {answer.eval_context}"


def _entry(answer: Answer, on_page: Collection[str]) -> Html:
    about = answer.target.replace("animals/", "")
    shown = ", ".join(
        f'<a href="#{row}">{row}</a>' if row in on_page else row for row in answer.rows[:SHOWN_ROWS]
    )
    more = len(answer.rows) - SHOWN_ROWS
    shown += f" and {more} more" if more > 0 else ""
    verdict, sentence = answer.verdict, answer.sentence
    if sentence.startswith(verdict):  # then it is not said twice
        lead, sentence = f"{about}: {verdict}", sentence[len(verdict) :]
    else:
        lead, sentence = f"{about}, {verdict}:", f" {sentence}"
    return Html(
        f'<li id="{page.esc(answer.id)}" {page.traced("evidence.csv", [answer.id])}>'
        f"<strong>{page.esc(lead)}</strong>{page.esc(sentence)}. "
        f'<span class="rows">{page.esc(answer.id)} of '
        f'<a href="evidence.csv">evidence.csv</a>, from {shown} of '
        '<a href="results.csv">results.csv</a>.</span></li>'
    )
