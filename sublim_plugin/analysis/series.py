"""Students that share a line in a figure: what tells them apart beside trait, rank and seeds."""

from __future__ import annotations

from collections.abc import Sequence

from sublim_plugin.analysis.transmission import TransmissionRow


def series_names(rows: Sequence[TransmissionRow], *, context: bool = True) -> dict[str, str]:
    """A label by row, made of what varies among the students: "" where nothing does.

    Train context (unless `context` is False), learning rate and scaling are named; students of
    other settings that agree in these get the first digits of their settings' hash.
    """
    own = [row for row in rows if row.role != "base"]
    parts: dict[str, list[str]] = {row.row: [] for row in own}
    for kind in ("lora", "full"):
        mine = [row for row in own if (row.rank is None) == (kind == "full")]
        for name in ("train_context", "learning_rate", "alpha"):
            if name == "train_context" and not context:
                continue
            values = {row.row: _part(row, name) for row in mine}
            if len(set(values.values())) > 1:
                for name_of, text in values.items():
                    parts[name_of].append(text)
    labels = {row: ", ".join(filter(None, texts)) for row, texts in parts.items()}
    alike: dict[tuple[object, ...], set[str]] = {}
    for row in own:
        key = (row.target, row.role, row.rank is None, row.train_context, row.eval_context)
        alike.setdefault((*key, labels[row.row]), set()).add(row.settings)
    for row in own:
        key = (row.target, row.role, row.rank is None, row.train_context, row.eval_context)
        if len(alike[(*key, labels[row.row])]) > 1:
            labels[row.row] = ", ".join(filter(None, [labels[row.row], row.settings[:6]]))
    return labels


def _part(row: TransmissionRow, name: str) -> str:
    if name == "train_context":
        return f"trained in {row.train_context}"
    if name == "learning_rate":
        return "" if row.learning_rate is None else f"learning rate {row.learning_rate:g}"
    if row.alpha is None or row.alpha == row.rank:
        return "alpha = rank"
    return f"alpha {row.alpha:g}"
