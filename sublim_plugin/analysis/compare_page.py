"""The page that sets two studies side by side, and the CSV files behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sublim_plugin.analysis import page
from sublim_plugin.analysis.compare import (
    SIZES,
    AnswerPair,
    Difference,
    Setting,
    Side,
    answer_pairs,
    differences,
    settings,
)
from sublim_plugin.analysis.evidence_section import QUESTIONS
from sublim_plugin.analysis.figure_files import FigureFiles, in_words, signed, write_figure
from sublim_plugin.analysis.page import Html
from sublim_plugin.analysis.rank_figure import RankPoint, draw_ranks, rank_points
from sublim_plugin.analysis.report_folder import COMPARISON, building
from sublim_plugin.analysis.tables import write_lines
from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.errors import InputError

MOST_PAIRS, MOST_DIFFERENCES, MOST_SETTINGS = 200, 200, 100
"""Lines that are printed; the CSV files have all."""


def write_comparison(a: Side, b: Side, folder: Path) -> Path:
    """Write index.html, answers.csv, differences.csv, settings.csv and a figure into `folder`.

    Raises:
        InputError: `folder` holds something that is no comparison.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / COMPARISON).is_file():
        raise InputError(f"{folder}: holds something that is no comparison; name a new folder")
    simulated = a.run.simulated or b.run.simulated
    pairs, found, told = answer_pairs(a, b), differences(a, b), settings(a, b)
    with building(folder) as new:
        for name, lines, model in (
            ("answers", pairs, AnswerPair),
            ("differences", found, Difference),
            ("settings", told, Setting),
        ):
            rows = [line.model_dump() for line in lines]
            write_lines(rows, new / f"{name}.csv", list(model.model_fields), simulated)
        files = _figure(a, b, new, simulated)
        write_text(new / "index.html", _render(a, b, pairs, found, told, files))
    return folder / "index.html"


def _figure(a: Side, b: Side, folder: Path, simulated: bool) -> FigureFiles | None:
    """Both studies' rank curves in the same panels."""
    points: list[RankPoint] = []
    for letter, one in (("A", a), ("B", b)):
        for point in rank_points(one.rows, one.effects):
            if point.kind == "dataset" or point.role == "control":
                continue
            series = ", ".join(filter(None, [letter, point.series]))
            rows = f"{letter}: {point.rows}"
            update = {"point": f"P{len(points) + 1}", "series": series, "rows": rows}
            points.append(point.model_copy(update=update))
    if not points:
        return None
    lines = [
        f"{p.series}: {p.target}, {p.method}, asked in {p.eval_context}: "
        f"{signed(p.vs_base_logprob)} nats"
        for p in points
    ]
    alt = "Target log-probability minus base against LoRA rank in both studies. " + in_words(lines)
    return write_figure(draw_ranks(points), folder, "transmission", points, alt, simulated)


def _render(
    a: Side,
    b: Side,
    pairs: Sequence[AnswerPair],
    found: Sequence[Difference],
    told: Sequence[Setting],
    files: FigureFiles | None,
) -> str:
    names = f"A is {a.name}: {_size(a)}. B is {b.name}: {_size(b)}."
    warnings = []
    for letter, one in (("A", a), ("B", b)):
        if one.run.simulated:
            text = f"{letter} is simulated: made up with a known truth, no model was asked."
            warnings.append(page.notice(text))
    curves = (
        page.figure(
            files,
            "Student minus base of the same eval context, in each study. What the bars are is "
            "written below the axes. F numbers in the CSV are those of each study's effects.csv.",
        )
        if files
        else page.paragraph("No figure: neither study has a student and its base.")
    )
    sections = [
        ("answers", "Answers side by side", _answers(pairs)),
        ("settings", "Settings that differ", _settings(told)),
        ("curves", "Transmission against rank", curves),
        ("differences", "Differences", _differences(found)),
    ]
    title = f"{a.name} and {b.name}, side by side"
    if a.run.simulated or b.run.simulated:
        title = f"SIMULATED: {title}"
    status = page.said(names, "settings.csv", SIZES)
    return page.page(
        f"{title} · sublim report", page.body(title, status, page.join(warnings), sections)
    )


def _answers(pairs: Sequence[AnswerPair]) -> Html:
    if not pairs:
        return page.paragraph("Neither study has an answer: nothing was scored.")
    both = [pair for pair in pairs if pair.agree is not None]
    other = [pair for pair in both if not pair.agree]
    parts = [
        page.said(
            f"Of {len(both)} questions that both studies answer, {len(other)} get another answer. "
            "Two verdicts that differ are not yet a difference between the studies: that is "
            "tested below.",
            "answers.csv",
            [pair.id for pair in other],
        )
    ]
    # what differs is read first
    ordered = sorted(pairs, key=lambda pair: (pair.agree is None, pair.agree is True))
    for topic in dict.fromkeys(pair.topic for pair in pairs):
        own = [pair for pair in ordered[:MOST_PAIRS] if pair.topic == topic]
        if not own:
            continue
        parts.append(
            page.table(
                QUESTIONS.get(topic, topic.capitalize()),
                ["row", "about", "A", "B"],
                [
                    [
                        pair.id,
                        Html(
                            f"{page.esc(pair.target)}<br>trained in "
                            f"{page.esc(pair.train_context)},<br>asked in "
                            f"{page.esc(pair.eval_context)}"
                        ),
                        _said(pair.a_verdict, pair.a_sentence),
                        _said(pair.b_verdict, pair.b_sentence),
                    ]
                    for pair in own
                ],
            )
        )
    if len(pairs) > MOST_PAIRS:
        parts.append(page.said(f"{len(pairs) - MOST_PAIRS} more are in", "answers.csv"))
    return page.join(parts)


def _said(verdict: str, sentence: str) -> Html:
    if not verdict:
        return Html("not asked")
    return Html(
        f'<div class="said"><strong>{page.esc(verdict)}</strong><br>{page.esc(sentence)}</div>'
    )


def _settings(told: Sequence[Setting]) -> Html:
    other = [setting for setting in told if setting.differs]
    alike = len(told) - len(other)
    parts = []
    if other:
        parts.append(
            page.table(
                "Settings with other values in A and B; several values are a grid's",
                ["setting", "A", "B"],
                [[s.setting, s.a or "none", s.b or "none"] for s in other[:MOST_SETTINGS]],
            )
        )
    text = f"{alike} further settings are the same in both" if other else "No setting differs"
    if len(other) > MOST_SETTINGS:
        text = f"{len(other) - MOST_SETTINGS} more differ; {text}"
    return page.join([*parts, page.said(f"{text}.", "settings.csv")])


def _differences(found: Sequence[Difference]) -> Html:
    if not found:
        return page.paragraph("Nothing to compare: no student and its base have both been scored.")
    matched = [one for one in found if one.difference is not None]
    tested = [one for one in matched if one.p_adjusted is not None]
    raised = [one for one in tested if (one.p_adjusted or 0.0) < 0.05]
    parts = [
        page.said(
            f"{len(matched)} effects are in both studies; {len(tested)} could be tested (3 "
            f"datasets in each), {len(raised)} of them differ at 5% after adjustment for all of "
            "them. Intervals are over datasets, with questions taken as fixed.",
            COMPARISON,
            [one.id for one in raised],
        ),
        page.table(
            "Student minus base in nats, in A and in B, and B minus A",
            ["row", "students", "target", "trained in", "asked in", "A", "datasets", "B",
             "datasets", "B minus A", "95% interval", "adjusted p", "why not"],
            [
                [
                    one.id,
                    one.method + (" neutral" if one.role == "control" else ""),
                    one.target,
                    one.train_context,
                    one.eval_context,
                    _number(one.a_logprob),
                    one.a_datasets or "",
                    _number(one.b_logprob),
                    one.b_datasets or "",
                    _number(one.difference),
                    "" if one.low is None else f"[{one.low:+.3f}, {one.high:+.3f}]",
                    "" if one.p_adjusted is None else f"{one.p_adjusted:.2g}",
                    one.reason,
                ]
                for one in sorted(found, key=lambda d: d.difference is None)[:MOST_DIFFERENCES]
            ],
            numeric=range(5, 12),
        ),
    ]  # fmt: skip
    if len(found) > MOST_DIFFERENCES:
        parts.append(page.said(f"{len(found) - MOST_DIFFERENCES} more are in", COMPARISON))
    return page.join(parts)


def _size(one: Side) -> str:
    run = one.run
    counts = (len(run.datasets), len(run.students), len(run.probes))
    return ", ".join(f"{n} {what}" for n, what in zip(counts, SIZES, strict=True))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"
