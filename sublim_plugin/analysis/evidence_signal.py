"""The report's answer on dose and response: do datasets with more signal transmit more?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sublim_plugin.analysis.answers import LEVEL, no_claim, p_text, where
from sublim_plugin.analysis.collect import RunRecords
from sublim_plugin.analysis.dose_response import WithinRanks, within_ranks
from sublim_plugin.analysis.replication import too_few_datasets
from sublim_plugin.analysis.signals import Pair, pairs
from sublim_plugin.analysis.transmission import TransmissionRow

TOPIC = "dose and response"


def dose_and_response(run: RunRecords, rows: Sequence[TransmissionRow]) -> Iterator[dict[str, Any]]:
    """One answer for students that differ in trait, teacher and seeds only: teachers are the dose.

    Training seeds of a dataset are averaged first.
    """
    by_row = {row.row: row for row in rows}
    groups: dict[tuple[str, str, str, int | None, float | None], list[Pair]] = {}
    for pair in pairs(run, rows):
        row = by_row[pair.row]
        key = (pair.train_context, pair.eval_context, row.family, row.rank, row.alpha)
        groups.setdefault(key, []).append(pair)
    names = {key: own[0].method for key, own in groups.items()}
    for key, own in groups.items():
        row, name = by_row[own[0].row], names[key]
        if sum(names[one] == name and one[:2] == key[:2] for one in groups) > 1:
            more = [f"alpha {row.alpha:g}"] if row.alpha not in (None, row.rank) else []
            more += [f"learning rate {row.learning_rate:g}"] if row.learning_rate else []
            name = ", ".join([name, *more])
        about = where(TOPIC, "all traits", own[0].train_context, own[0].eval_context, name)
        yield about | _answer(own)


def _answer(own: Sequence[Pair]) -> dict[str, Any]:
    traits: dict[str, dict[str, list[Pair]]] = {}
    for pair in own:
        if pair.change is not None:
            traits.setdefault(pair.trait, {}).setdefault(pair.dataset, []).append(pair)
    compared = {trait: found for trait, found in traits.items() if len(found) > 1}
    n = sum(map(len, compared.values()))
    rows = tuple(pair.row for pair in own)
    if why := too_few_datasets(n):
        return no_claim(f"{why}, of traits that have two or more with a predicted change", n, rows)
    values = [
        (
            [pairs_of[0].change or 0.0 for pairs_of in found.values()],
            [float(np.mean([one.vs_base_logprob for one in o])) for o in found.values()],
        )
        for found in compared.values()
    ]
    found = within_ranks(values)
    if found is None:
        return no_claim("the datasets of each trait are all alike in it", n, rows)
    return _claim(found, n, len(compared)) | {
        "n_datasets": n,
        "rows": tuple(
            one.row for datasets in compared.values() for o in datasets.values() for one in o
        ),
    }


def _claim(found: WithinRanks, n: int, n_traits: int) -> dict[str, Any]:
    verdict = "no relation between predicted and observed shown"
    if found.p < LEVEL:
        how = "more" if found.correlation > 0 else "less"
        verdict = f"datasets predicted to transmit more transmit {how}"
    traits = "trait" if n_traits == 1 else "traits"
    number = f"all {found.total:,}" if found.exact else f"{found.total:,} drawn"
    least = ""
    if found.least is not None and found.least >= LEVEL:
        least = f", and no order of so few datasets gives less than {p_text(found.least)[4:]}"
    return {
        "verdict": verdict,
        "sentence": f"{verdict}: Spearman's rank correlation of the predicted change of log share "
        f"with transmission {found.correlation:+.2f}, ranks taken within each trait and pooled, "
        f"{p_text(found.p)} ({number} permutations within traits{least}), "
        f"{n} datasets, {n_traits} {traits}",
        "estimate": found.correlation,
        "unit": "Spearman's rank correlation within traits",
        "test": f"permutation within traits, datasets as units, {number}",
        "p": found.p,
    }
