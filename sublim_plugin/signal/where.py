"""Where in the completions the signal sits: means, intervals and shares of positions. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sublim_plugin.preference.intervals import interval
from sublim_plugin.signal.positions import Position
from sublim_plugin.signal.results import MEASURES, Group, Measure, Measured, Quantity, Where

TENTHS = 10
FIRST = "first token"
BINS = (FIRST, *(f"{10 * i}-{10 * i + 10}%" for i in range(TENTHS)))
KINDS = ("digit", "separator", "end of turn", "other")


def measured(values: Sequence[float]) -> Measured:
    """The mean of one value a row, with its interval over rows."""
    low, high = interval(values)
    return Measured(value=math.fsum(values) / len(values), low=low, high=high)


def pooled(rows: Sequence[Sequence[float]]) -> Measured:
    """The mean over all values of all rows, with its interval over rows.

    With S the sum and n the number of a row's values, the mean m is a ratio of sums, and the
    interval is that of m + (S - m n) / mean(n), the ratio's linearization (Cochran, Sampling
    Techniques, 3rd ed., 6.3).
    """
    sums, counts = [math.fsum(row) for row in rows], [len(row) for row in rows]
    mean = math.fsum(sums) / sum(counts)
    size = sum(counts) / len(rows)
    low, high = interval([mean + (s - mean * n) / size for s, n in zip(sums, counts, strict=True)])
    return Measured(value=mean, low=low, high=high)


def where(positions: Sequence[Position]) -> Where:
    """All positions, and cut by place, kind and divergence; empty parts are left out."""
    overall = _group("all", positions, positions, None)

    def cut(names: Sequence[str], name: Callable[[Position], str | None]) -> tuple[Group, ...]:
        parts: dict[str, list[Position]] = {each: [] for each in names}
        for position in positions:
            part = name(position)
            if part is not None:
                parts[part].append(position)
        return tuple(_group(each, part, positions, overall) for each, part in parts.items() if part)

    apart = ("divergent", "other")
    return Where(
        overall=overall,
        by_position=cut(BINS, bin_of),
        by_kind=cut(KINDS, lambda position: position.kind),
        divergence=cut(apart, lambda position: apart[not position.divergent]),
        number_divergence=cut(
            apart,
            lambda position: (
                None if position.number_divergent is None else apart[not position.number_divergent]
            ),
        ),
    )


def bin_of(position: Position) -> str:
    """The first token, or the tenth of the rest of the completion that the token lies in."""
    if position.place == 0:
        return FIRST
    return BINS[1 + TENTHS * (position.place - 1) // (position.of - 1)]


def by_row(positions: Sequence[Position], measure: Measure) -> dict[int, list[float]]:
    """The values of a measure by row, for the rows that have one."""
    rows: dict[int, list[float]] = {}
    for position in positions:
        if measure in position.measures:
            rows.setdefault(position.row, []).append(position.measures[measure])
    return rows


def _group(
    name: str, part: Sequence[Position], every: Sequence[Position], overall: Group | None
) -> Group:
    found: dict[Measure, Quantity] = {}
    for measure in MEASURES:
        rows = list(by_row(part, measure).values())
        if not rows:
            continue
        mean = pooled(rows)
        total = math.fsum(value for row in rows for value in row)
        whole = overall.measures[measure] if overall else None
        share = None
        if whole and not whole.mean.low <= 0 <= whole.mean.high:
            share = total / whole.total
        found[measure] = Quantity(
            positions=sum(map(len, rows)), mean=mean, total=total, share=share
        )
    return Group(
        name=name,
        positions=len(part),
        rows=len({position.row for position in part}),
        share=len(part) / len(every),
        measures=found,
    )
