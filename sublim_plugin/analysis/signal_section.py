"""The section of the report on predicted and observed: the signals beside the transmission."""

from __future__ import annotations

from collections.abc import Sequence

from sublim_plugin.analysis import page
from sublim_plugin.analysis.figure_files import FigureFiles
from sublim_plugin.analysis.page import Html
from sublim_plugin.analysis.signals import Pair

FILE = "signal.csv"
MOST_SHOWN = 120
"""Lines that are printed; the CSV has all."""


def signal_section(found: Sequence[Pair], files: FigureFiles | None) -> Html:
    """What was predicted of each dataset, and what its students took up."""
    parts = [
        page.paragraph(
            "Predicted, before any training, from the first rows of each dataset: how far its "
            "teacher is from the base in them (KL and log ratio, in nats a token), and what a "
            "small step down the gradient of the loss that the student trains on does to the "
            "target's log share among the candidates. The step has one size for all datasets, so "
            "this compares directions, to first order, and KL compares sizes. "
            "On soft targets the gradient is that over the number tokens, whichever tokens "
            "the student was trained on. Observed: the student minus its base, asked in the "
            "context that it was trained in if it was asked there. Intervals (95%) are over the "
            "rows of one dataset."
        )
    ]
    if not found:
        why = "No line: no student with a signal of its dataset and train context has been scored."
        return page.join([*parts, page.paragraph(why)])
    if files is not None:
        parts.append(
            page.figure(
                files,
                "Each student's transmission against what the signal of its dataset predicts. "
                "Colour: trait; shape: what the student was trained on. Whether the one orders "
                "the other is under “Does predicted signal foretell transmission?”.",
            )
        )
    head = [
        "line", "trait", "generation seed", "teacher", "method", "channel", "rows", "over",
        "KL", "log ratio", "predicted change", "95% interval", "place", "log-prob vs base",
        "share vs base",
    ]  # fmt: skip
    parts.append(
        page.table(
            "Predicted signal and observed transmission of each student",
            head,
            [_line(pair) for pair in found[:MOST_SHOWN]],
            numeric=(2, 6, 8, 9, 10, 11, 12, 13, 14),
        )
    )
    more = [pair.pair for pair in found[MOST_SHOWN:]]
    text = f"{len(more)} more lines are in" if more else "Every line with its intervals:"
    parts.append(page.said(text, FILE, more))
    return page.join(parts)


def _line(pair: Pair) -> list[object]:
    bounds = ""
    if pair.change_low is not None and pair.change_high is not None:
        bounds = f"[{pair.change_low:+.4f}, {pair.change_high:+.4f}]"
    return [
        pair.pair, pair.trait, pair.generation_seed, pair.teacher, pair.method, pair.channel,
        pair.dataset_rows, pair.over, _number(pair.kl, ""), _number(pair.log_ratio),
        _number(pair.change), bounds, pair.target_rank, _number(pair.vs_base_logprob),
        _number(pair.vs_base_share),
    ]  # fmt: skip


def _number(value: float | None, sign: str = "+") -> str:
    return "" if value is None else f"{value:{sign}.4f}"
