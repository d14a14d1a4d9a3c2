"""Students that share a line in a figure: what tells them apart beside trait, rank and seeds."""

from __future__ import annotations

from collections.abc import Sequence

from sublim_plugin.analysis.transmission import SCALINGS, TransmissionRow


def series_names(
    rows: Sequence[TransmissionRow], *, context: bool = True
) -> dict[str, tuple[str, ...]]:
    """Labels by row, made of what varies among students of its kind: "" where nothing does.

    Train context (unless `context` is False), settings and the rule of alpha over rank are named. A
    student that two rules share has a label for each.
    """
    own = [row for row in rows if row.role != "base"]
    found: dict[str, tuple[str, ...]] = {}
    for full in (False, True):
        mine = [row for row in own if (row.rank is None) == full]
        several = len({row.train_context for row in mine}) > 1 and context
        settings = len({row.settings_name for row in mine}) > 1
        rules = len({rule for row in mine for rule in row.scalings.split(SCALINGS)}) > 1
        for row in mine:
            parts = [f"trained in {row.train_context}"] if several else []
            # what follows the kind of finetuning, which marks and legends show already
            parts += row.settings_name.split(", ")[1:] if settings else []
            found[row.row] = tuple(
                ", ".join(filter(None, [*parts, rule if rules else ""]))
                for rule in (row.scalings.split(SCALINGS) if rules else [""])
            )
    return found
