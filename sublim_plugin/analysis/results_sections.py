"""Sections of the report that show results: figures, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sublim_plugin.analysis import page
from sublim_plugin.analysis.descriptions import descriptions, limits
from sublim_plugin.analysis.figure_files import FigureFiles
from sublim_plugin.analysis.page import Html
from sublim_plugin.analysis.tables import blocks
from sublim_plugin.analysis.transmission import TransmissionRow

if TYPE_CHECKING:
    from sublim_plugin.analysis.effects import Effect

MOST_ROWS, MOST_EFFECTS, MOST_DESCRIPTIONS, MOST_BASES, MOST_WARNINGS = 400, 200, 40, 60, 8
MOST_SAMPLED = 100
"""Lines that are printed; the CSV files have all."""

SEEDS_AND_CONTEXT: dict[str, Callable[[TransmissionRow], object]] = {
    "generation seed": lambda row: row.generation_seed,
    "training seed": lambda row: row.training_seed,
    "trained in": lambda row: row.train_context,
}


def rank_section(files: FigureFiles | None) -> Html:
    """The rank figure, or why there is none."""
    if files is None:
        return page.paragraph("No figure: no student and its base have both been scored.")
    return page.figure(
        files,
        "Student minus base of the same eval context: mean log-probability that the reply begins "
        "with the target. Filled: trained on the target's numbers; hollow: on neutral numbers; "
        "diamonds: full finetuning, which is not a rank and stands apart. What the bars are is "
        "written below the axes and in the column “bar” of the CSV. The first 6 traits and 6 eval "
        "contexts are drawn; effects.csv has all.",
    )


def scale_section(files: FigureFiles | None) -> Html:
    """Transmission against rank, norm and step size, or why there is none."""
    if files is None:
        return page.paragraph("No figure: no student's update norm or learning rate is known.")
    return page.figure(
        files,
        "The same means against three things that a rank may stand for. A curve that is smooth "
        "over the size of the update, and not over rank, speaks of scale. Diamonds: full "
        "finetuning. Bars: 95% over datasets and questions, where there are 3 datasets.",
    )


def context_section(rows: Sequence[TransmissionRow], files: FigureFiles | None) -> Html:
    """The context heat map and the base of each eval context."""
    if files is None:
        return page.paragraph("No table: no student and its base have both been scored.")
    parts = [
        page.figure(
            files,
            "Transmission in nats by train context (down) and eval context (across), each against "
            "the base of that eval context, averaged over the ranks that all fields of a kind of "
            "students have. In brackets: 95% over datasets, where there are 3. Bold: asked in the "
            "context trained in.",
        )
    ]
    bases = [row for row in rows if row.role == "base"]
    head = ["row", "eval context", "target", "log-prob (nats)", "probability", "share", "rank"]
    parts.append(
        page.table(
            "The base by itself, in each eval context",
            [*head, "coverage"],
            [
                [
                    row.row,
                    row.eval_context,
                    row.target,
                    f"{row.target_logprob:.4f}",
                    f"{row.target_prob:.3g}",
                    f"{row.target_share:.2%}",
                    f"{row.target_rank:.2f}",
                    f"{row.coverage:.3g}",
                ]
                for row in bases[:MOST_BASES]
            ],
            numeric=(3, 4, 5, 6, 7),
        )
    )
    if len(bases) > MOST_BASES:
        parts.append(
            page.said("More bases are in", "results.csv", [r.row for r in bases[MOST_BASES:]])
        )
    return page.join(parts)


def specificity_section(
    files: FigureFiles | None, behind: dict[tuple[str, str, str], tuple[str, ...]]
) -> Html:
    """The trait × trait matrix, or why there is none."""
    if files is None:
        return page.paragraph("No matrix: it needs students of two traits that share a rank.")
    parts = [
        page.figure(
            files,
            "Students of each trait's numbers (down), asked about each trait (across), in nats "
            "over the base's own preference for it. A raised diagonal is the trait's own; a raised "
            "line is a student that drifts, a raised column a trait that every student drifts to.",
        )
    ]
    for (students, train, asked), rows in behind.items():
        text = f"{students}, trained in {train}, asked in {asked}: made from"
        parts.append(page.said(text, "results.csv", rows))
    return page.join(parts)


def shown_rows(rows: Sequence[TransmissionRow]) -> list[tuple[list[TransmissionRow], int]]:
    """The rows of each block that the page prints, and how many it leaves to results.csv."""
    groups = blocks(rows)
    if len(rows) <= MOST_ROWS:
        return [(block, 0) for block in groups]
    each = max(6, MOST_ROWS // len(groups))
    most = MOST_ROWS // each
    return [(block[:each], max(0, len(block) - each)) for block in groups[:most]]


def table_section(
    rows: Sequence[TransmissionRow], found: Sequence[Effect], sampled: Sequence[dict[str, Any]]
) -> Html:
    """Means over datasets, then the rows of results.csv, one table per target and eval context."""
    shares = [page.heading("Sampled replies"), *_sampled_table(sampled)] if sampled else []
    if not rows:
        why = page.paragraph("No comparison: no probe of a target's log-probability has finished.")
        return page.join([why, *shares])
    parts = [page.heading("In words")]
    told = descriptions(rows)
    for one in told[:MOST_DESCRIPTIONS]:
        text = Html(
            f"{page.esc(one.target)}, asked in <code>{page.esc(one.eval_context)}</code>: "
            f"{page.esc(one.text)}"
        )
        parts.append(page.said(text, "results.csv", one.rows))
    parts += _warnings(rows)
    if found:
        parts += [page.heading("Means over datasets"), _effects_table(found)]
        if len(found) > MOST_EFFECTS:
            keys = [f"F{i}" for i in range(MOST_EFFECTS + 1, len(found) + 1)]
            parts.append(page.said("The others are in", "effects.csv", keys))
    parts += [page.heading("Every student"), *_row_tables(rows)]
    return page.join([*parts, *shares])


def _sampled_table(lines: Sequence[dict[str, Any]]) -> list[Html]:
    """Rates with what tells whether they mean anything; those to be read with care first."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    ordered = sorted(lines, key=lambda line: not line["warning"])
    head = ["row", "model", "asked in", "target", "named in", "non-answers", "own name"]
    table = page.table(
        "Share of sampled replies that name the target, and what stands beside it",
        [*head, "distinct", "do not read, because"],
        [
            [
                line["sampled"],
                line["name"],
                line["eval_context"],
                line["target"],
                share(line["target_rate"]),
                share(line["non_answer_rate"]),
                share(line["self_name_rate"]),
                share(line["distinct_replies"]),
                line["warning"],
            ]
            for line in ordered[:MOST_SAMPLED]
        ],
        numeric=(4, 5, 6, 7),
    )
    return [table, page.said("All sampled rates:", "sampled.csv")]


def _warnings(rows: Sequence[TransmissionRow]) -> list[Html]:
    """Why a number should not be read, once for each text."""
    by_text: dict[str, list[str]] = {}
    for row in rows:
        if row.warning:
            by_text.setdefault(row.warning, []).append(row.row)
    texts = list(by_text.items())
    parts = [page.notice(text, "results.csv", keys) for text, keys in texts[:MOST_WARNINGS]]
    if len(texts) > MOST_WARNINGS:
        keys = [key for _, more in texts[MOST_WARNINGS:] for key in more]
        text = f"{len(keys)} more rows carry a warning, in the column “warning” of"
        parts.append(page.notice(text, "results.csv", keys))
    return parts


def _effects_table(found: Sequence[Effect]) -> Html:
    head = ["row", "students", "target", "trained in", "asked in", "datasets", "minus base"]
    head += ["95% interval", "p", "minus neutral", "95% interval"]
    return page.table(
        "Student minus base in nats, mean over datasets; intervals over datasets and questions, "
        "p uncorrected, none with fewer than 3 datasets",
        head,
        [
            [
                f"F{number}",
                effect.method + (" neutral" if effect.role == "control" else ""),
                effect.target,
                effect.train_context,
                effect.eval_context,
                effect.n_datasets,
                f"{effect.vs_base_logprob:+.4f}",
                _between(effect.low, effect.high),
                "" if effect.p is None else f"{effect.p:.2g}",
                "" if effect.vs_neutral_logprob is None else f"{effect.vs_neutral_logprob:+.4f}",
                _between(effect.neutral_low, effect.neutral_high),
            ]
            for number, effect in enumerate(found[:MOST_EFFECTS], start=1)
        ],
        numeric=range(5, len(head)),
    )


def _row_tables(rows: Sequence[TransmissionRow]) -> list[Html]:
    students = [row for row in rows if row.role != "base"]
    # Columns with one value for all students move into the sentence above the tables.
    varying = {
        title: read
        for title, read in SEEDS_AND_CONTEXT.items()
        if len({read(row) for row in students}) > 1
    }
    fixed = [
        f"{title} {read(students[0])}"
        for title, read in SEEDS_AND_CONTEXT.items()
        if students and title not in varying
    ]
    head = ["row", "student", *varying, "log-prob", "vs base ± SE", "vs neutral ± SE", "share"]
    head += ["vs base ± SE (pp)", "rank", "coverage"]
    parts = [
        page.said(
            "Log-probs and their differences in nats, shares in percentage points. SE: standard "
            "error over questions of the paired difference, for one pair of models. "
            + limits(rows)
            + (f" All students: {', '.join(fixed)}." if fixed else "")
            + " With every digit, and for statistics programs as results.parquet:",
            "results.csv",
        )
    ]
    shown = shown_rows(rows)
    for block, more in shown:
        first = block[0]
        parts.append(
            page.table(
                f"{first.target}, eval context {first.eval_context}, {first.n_questions} questions",
                head,
                [_row(row, [read(row) for read in varying.values()]) for row in block],
                numeric=range(2 + len(varying), len(head)),
                row_ids=[row.row for row in block],
            )
        )
        if more:
            parts.append(page.said(f"{more} more rows of this table are in", "results.csv"))
    left = len(rows) - sum(len(block) + more for block, more in shown)
    if left:
        parts.append(page.said(f"{left} rows of other traits and contexts are in", "results.csv"))
    uncontrolled = [row for row in rows if row.role == "student" and row.vs_neutral_logprob is None]
    if uncontrolled:
        names = ", ".join(dict.fromkeys(row.method for row in uncontrolled))
        text = (
            f"Empty under “vs neutral” ({names}): the study has no neutral student of the same "
            "method, recipe, context and seeds."
        )
        parts.append(page.said(text, "results.csv", [row.row for row in uncontrolled]))
    return parts


def _row(row: TransmissionRow, seeds: list[object]) -> list[object]:
    return [
        row.row,
        row.name,
        *seeds,
        f"{row.target_logprob:.4f}",
        _with_se(row.vs_base_logprob, row.vs_base_logprob_se),
        _with_se(row.vs_neutral_logprob, row.vs_neutral_logprob_se),
        f"{row.target_share:.2%}",
        _with_se(row.vs_base_share, row.vs_base_share_se, 100, 2),
        f"{row.target_rank:.2f}",
        f"{row.coverage:.3g}",
    ]


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"


def _with_se(value: float | None, se: float | None, scale: float = 1.0, digits: int = 4) -> str:
    if value is None:
        return ""
    text = f"{scale * value:+.{digits}f}"
    return text if se is None else f"{text} ± {scale * se:.{digits}f}"
