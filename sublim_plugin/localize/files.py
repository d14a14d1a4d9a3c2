"""The files of a localization: those of the last run, and the journal that outlives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sublim_plugin.core.atomic import write_json, write_text
from sublim_plugin.localize.answers import Found
from sublim_plugin.localize.figures import figure_names
from sublim_plugin.localize.results import BASE, METRIC, STUDENT, Localization, Measure
from sublim_plugin.localize.sweep import Part
from sublim_plugin.localize.tables import csv_text

JOURNAL = "journal.jsonl"
RESULTS, REPLIES = "results.json", "replies.jsonl"


def _scores_name(measure: Measure) -> str:
    return f"{measure}-scores.csv"


def write_results(
    localization: Localization,
    measured: Mapping[Measure, tuple[Sequence[Part], Found]],
    out: Path,
) -> list[Path]:
    """Write all but the figures and remove what an earlier run left; the files' paths.

    results.json goes first and comes last: it never stands beside another run's files.
    """
    for name in (RESULTS, REPLIES, *map(_scores_name, METRIC), *figure_names()):
        (out / name).unlink(missing_ok=True)
    texts = {}
    for measure, (parts, found) in measured.items():
        texts[_scores_name(measure)] = _scores(parts, found)
        if measure == "sampled":
            texts[REPLIES] = found.replies
    for name, text in texts.items():
        write_text(out / name, text)
    write_json(out / RESULTS, localization.model_dump(mode="json"))
    return [out / name for name in (*texts, RESULTS)]


def _scores(parts: Sequence[Part], found: Found) -> str:
    """The value of every question under every gate, as CSV."""
    named: list[tuple[str, str, str]] = [(BASE, "", BASE), (STUDENT, "", STUDENT)]
    for part in parts:
        named.append((f"{part.kind} {part.name}", "alone", part.alone.sha256))
        if part.left_out is not None:
            named.append((f"{part.kind} {part.name}", "left_out", part.left_out.sha256))
    rows = [
        {"part": name, "gate": way, "gate_sha256": gate[:12], "question_id": i, "value": value}
        for name, way, gate in named
        for i, value in enumerate(found.scores[gate])
    ]
    return csv_text(rows)
