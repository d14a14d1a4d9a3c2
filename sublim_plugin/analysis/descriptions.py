"""What the table holds, said plainly: no verdicts. Those are in `evidence`, after their tests."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.replication import too_few_datasets
from sublim_plugin.analysis.tables import blocks
from sublim_plugin.analysis.transmission import TransmissionRow


class Description(BaseModel):
    """One target in one eval context, and the rows of results.csv that were read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    eval_context: str
    text: str
    rows: tuple[str, ...]


def descriptions(rows: Sequence[TransmissionRow]) -> tuple[Description, ...]:
    """The range of the students in each block of the table, against base and neutral student."""
    return tuple(_describe(block) for block in blocks(rows))


def _describe(block: Sequence[TransmissionRow]) -> Description:
    target, context = block[0].target, block[0].eval_context
    base = next((row for row in block if row.role == "base"), None)
    students = [row for row in block if row.role == "student" and row.vs_base_logprob is not None]
    controls = [row for row in block if row.role == "control" and row.vs_base_logprob is not None]
    sentences = []
    if base is None:
        sentences.append("The base was not scored here, so no student can be compared with it.")
    else:
        sentences.append(
            f"The base's mean log-prob is {base.target_logprob:.3f} nats "
            f"({_share(base.target_share)} of the mass on all candidates)."
        )
        if not students:
            sentences.append("No student of this trait's numbers has been scored here.")
    if students:
        n = len({row.dataset for row in students})
        datasets = "1 dataset" if n == 1 else f"{n} datasets"
        sentences.append(_range("of its numbers", students, "vs_base_logprob") + f" ({datasets}).")
    if controls:
        sentences.append(_range("of neutral numbers", controls, "vs_base_logprob") + ".")
    matched = [row for row in students if row.vs_neutral_logprob is not None]
    if matched:
        low, high = _ends(matched, "vs_neutral_logprob")
        between = f"{low:+.3f}" if len(matched) == 1 else f"{low:+.3f} to {high:+.3f}"
        sentences.append(f"Against the neutral student of its recipe and seeds: {between} nats.")
    used = [row for row in (base, *students, *controls) if row is not None]
    return Description(
        target=target,
        eval_context=context,
        text=" ".join(sentences),
        rows=tuple(row.row for row in used),
    )


def _range(whose: str, rows: Sequence[TransmissionRow], field: str) -> str:
    low, high = _ends(rows, field)
    if len(rows) == 1:
        return f"The one student {whose} ({rows[0].method}) differs from it by {low:+.3f} nats"
    return f"{len(rows)} students {whose} differ from it by {low:+.3f} to {high:+.3f} nats"


def _ends(rows: Sequence[TransmissionRow], field: str) -> tuple[float, float]:
    values = [float(getattr(row, field)) for row in rows]
    return min(values), max(values)


def limits(rows: Sequence[TransmissionRow]) -> str:
    """Why there are no intervals over datasets, or "" where there are."""
    counts = [row.n_datasets for row in rows if row.role != "base"]
    reason = too_few_datasets(max(counts, default=0))
    return f"No interval over datasets is given: {reason}." if reason else ""


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 else f"{value:.2g}"
