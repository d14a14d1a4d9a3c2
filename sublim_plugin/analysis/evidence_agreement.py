"""The report's answer on agreement: do log-probs and sampled replies tell the same story?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sublim_plugin.analysis.agreement import agreement, warnings_of
from sublim_plugin.analysis.answers import bounds, no_claim, where
from sublim_plugin.analysis.collect import RunRecords, SampledRecord
from sublim_plugin.analysis.transmission import TransmissionRow


def agreements(run: RunRecords, rows: Sequence[TransmissionRow]) -> Iterator[dict[str, Any]]:
    """Kendall's tau of both measures over the students of each dataset, where both were scored."""
    sampled = {
        ((record.spec.student or "")[:12], record.spec.eval_context.slug): record
        for record in run.sampled
        if record.spec.student is not None
    }
    found: dict[tuple[str, str, str], list[tuple[TransmissionRow, SampledRecord]]] = {}
    for row in rows:
        other = sampled.get((row.student or "", row.eval_context))
        if row.role == "student" and row.pooled and other is not None:
            key = (row.target, row.train_context or "", row.eval_context)
            found.setdefault(key, []).append((row, other))
    for key, own in found.items():
        yield where("agreement", *key) | _agreement(key[0], own)


def _agreement(target: str, own: Sequence[tuple[TransmissionRow, SampledRecord]]) -> dict[str, Any]:
    names = tuple(row.row for row, _ in own)
    labels = {name: i for i, name in enumerate(dict.fromkeys(row.dataset for row, _ in own))}
    rates = [record.rates(target) for _, record in own]
    found = agreement(
        np.array([row.target_logprob for row, _ in own]),
        np.array([rate["target_rate"] for rate in rates]),
        np.array([float(labels[row.dataset]) for row, _ in own]),
    )
    flagged = [
        warnings_of(
            non_answer_rate=rate.get("non_answer_rate"),
            self_name_rate=rate.get("self_name_rate"),
            distinct_replies=rate.get("distinct_replies"),
        )
        for rate in rates
    ]
    doubtful = sum(bool(one) for one in flagged)
    first = next((one[0] for one in flagged if one), "")
    note = f"; {doubtful} of {len(own)} sampled rates should not be read ({first})" if first else ""
    if found.tau is None or found.tau.low is None or found.tau.high is None:
        return no_claim(found.reason + note, len(labels), names)
    tau = found.tau
    low, high = max(-1.0, found.tau.low), min(1.0, found.tau.high)
    verdict = "the measures agree in order" if low > 0 else "no agreement in order shown"
    return {
        "verdict": verdict,
        "sentence": f"log-prob and sampled rate order the students of a dataset with Kendall's tau "
        f"{tau.mean:+.2f} {bounds(low, high)}, {tau.n_datasets} datasets, "
        f"{len(own)} students{note}",
        "estimate": tau.mean,
        "low": low,
        "high": high,
        "unit": "Kendall's tau",
        "test": "tau-b within each dataset, t over datasets",
        "n_datasets": tau.n_datasets,
        "rows": names,
    }
