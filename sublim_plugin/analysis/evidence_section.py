"""The answers in words, and evidence.csv."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from sublim_plugin.analysis import page
from sublim_plugin.analysis.answers import Answer
from sublim_plugin.analysis.methods import Statement
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
    "dose and response": "Does predicted signal foretell transmission?",
    "cross-check": "Does a mixed model see the same?",
    "power": "What could be seen?",
}


def write_evidence_csv(answers: Sequence[Answer], path: Path, simulated: bool) -> None:
    """One row per answer; `rows` are ids in results.csv, separated by spaces."""
    lines = [{**answer.model_dump(), "rows": " ".join(answer.rows)} for answer in answers]
    write_lines(lines, path, list(Answer.model_fields), simulated)


def evidence_section(
    answers: Sequence[Answer], on_page: Collection[str], channels: Sequence[Statement] = ()
) -> Html:
    """Every answer under its question, with its row of evidence.csv and the rows it rests on.

    Args:
        on_page: rows of results.csv that the page shows, and that can be linked to.
        channels: statements of the methods on which every answer hangs; they stand above all.
    """
    if not answers:
        return page.paragraph("Nothing to test: no student and its base have both been scored.")
    parts = [
        page.paragraph(
            "Datasets (generation seeds) are the units; training seeds are averaged first, and "
            "questions count as a second cluster where an interval is over questions too. "
            "Intervals are 95%. With fewer than 3 datasets nothing is claimed."
        ),
        *(page.said(one.text, "methods.csv", [one.id]) for one in channels),
    ]
    known = list(dict.fromkeys([*QUESTIONS, *(answer.topic for answer in answers)]))
    for topic in known:
        own = [answer for answer in answers if answer.topic == topic]
        if not own:
            continue
        parts.append(page.heading(QUESTIONS.get(topic, topic.capitalize())))
        own.sort(key=lambda answer: answer.train_context != answer.eval_context)
        for about, entries in _groups(own[:MOST_ANSWERS]):
            if about:
                parts.append(Html(f"<h4>{page.esc(about)}</h4>"))
            listed = "".join(_entry(alike, on_page) for alike in entries)
            parts.append(Html(f'<ul class="findings">{listed}</ul>'))
        if len(own) > MOST_ANSWERS:
            keys = [answer.id for answer in own[MOST_ANSWERS:]]
            text = f"{len(keys)} more answers to this question are in"
            parts.append(page.said(text, "evidence.csv", keys))
    return page.join(parts)


def _groups(answers: Sequence[Answer]) -> list[tuple[str, list[list[Answer]]]]:
    """What answers are about, and under each the answers; several where they say the same.

    Eval contexts of which nothing can be claimed, for the same reasons, stand together.
    """
    groups: dict[tuple[str, str, str], list[Answer]] = {}
    for answer in answers:
        key = (answer.settings, answer.train_context, answer.eval_context)
        groups.setdefault(key, []).append(answer)
    alike: dict[object, list[list[Answer]]] = {}
    for key, group in groups.items():
        said = tuple((one.target, one.verdict, one.sentence) for one in group)
        nothing = all(one.verdict == "no claim" for one in group) and "," not in key[1]
        alike.setdefault((*key[:2], said) if nothing else key, []).append(group)
    return [
        (_about([group[0] for group in same]), [list(entry) for entry in zip(*same, strict=True)])
        for same in alike.values()
    ]


def _about(answers: Sequence[Answer]) -> str:
    """Settings and contexts, under which answers stand together; "" for those on all of them."""
    answer = answers[0]
    settings = answer.settings[:1].upper() + answer.settings[1:]
    name = f"{settings}, t" if settings else "T"
    if not answer.train_context:
        return settings
    if answer.train_context == answer.eval_context and "," in answer.train_context:
        return f"{name}rained and asked in {answer.train_context}"
    asked = ", ".join(one.eval_context for one in answers)
    return f"{name}rained in {answer.train_context}, asked in {asked}"


def _entry(alike: Sequence[Answer], on_page: Collection[str]) -> Html:
    """One answer, or several that say the same; each can be linked to by its id."""
    answer = alike[0]
    about = answer.target.replace("animals/", "")
    rows = list(dict.fromkeys(row for one in alike for row in one.rows))
    shown = ", ".join(
        f'<a href="#{row}">{row}</a>' if row in on_page else row for row in rows[:SHOWN_ROWS]
    )
    more = len(rows) - SHOWN_ROWS
    shown += f" and {more} more" if more > 0 else ""
    verdict, sentence = answer.verdict, answer.sentence
    if sentence.startswith(verdict):  # then it is not said twice
        lead, sentence = f"{about}: {verdict}", sentence[len(verdict) :]
    else:
        lead, sentence = f"{about}, {verdict}:", f" {sentence}"
    ids = [one.id for one in alike]
    anchors = "".join(f'<span id="{page.esc(name)}"></span>' for name in ids[1:])
    return Html(
        f'<li id="{page.esc(ids[0])}" {page.traced("evidence.csv", ids)}>{anchors}'
        f"<strong>{page.esc(lead)}</strong>{page.esc(sentence)}. "
        f'<span class="rows">{page.esc(", ".join(ids))} of '
        f'<a href="evidence.csv">evidence.csv</a>, from {shown} of '
        '<a href="results.csv">results.csv</a>.</span></li>'
    )
