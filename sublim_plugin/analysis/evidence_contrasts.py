"""The report's answers on rank or scale, on context and on specificity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sublim_plugin.analysis.answers import LEVEL, NO_MARGIN, bounds, no_claim, p_text, where
from sublim_plugin.analysis.collect import RunRecords
from sublim_plugin.analysis.curves import group_names, groups, prefixes, rank_curves
from sublim_plugin.analysis.diagonal_contrast import (
    block_contrasts,
    contrast_interval,
    permutation_test,
)
from sublim_plugin.analysis.equivalence import HOW, flat_in_rank
from sublim_plugin.analysis.power import POWER, detectable
from sublim_plugin.analysis.rank_or_scale import Comparison, rank_or_scale
from sublim_plugin.analysis.replication import too_few_datasets
from sublim_plugin.analysis.square_tables import context_tables, specificity_tables
from sublim_plugin.analysis.transmission import TransmissionRow
from sublim_plugin.core.errors import InputError

MATCHED = "matched minus mismatched train and eval context"
OWN = "own trait minus other traits, student drift and trait priors removed"


def scale(rows: Sequence[TransmissionRow]) -> Iterator[dict[str, Any]]:
    """Does the rank, the size of the update or the step size foretell transmission?

    The only question that reads students of several learning rates and scalings together: they are
    the predictors. Whatever else they differ in keeps them apart.
    """
    found: dict[tuple[str, str, str, str], list[TransmissionRow]] = {}
    for row in rows:
        if row.role == "student" and row.rank is not None and row.pooled:
            key = (row.target, row.train_context or "", row.eval_context, row.but_scale)
            found.setdefault(key, []).append(row)
    several = len(found) > len({key[:3] for key in found})
    for key, own in found.items():
        name = own[0].settings_name if several else "LoRA"
        for answer in _scale(own):
            text = f"{name}: {answer['sentence']}" if several else answer["sentence"]
            yield where("rank or scale", *key[:3], name) | answer | {"sentence": text}


def _scale(own: Sequence[TransmissionRow]) -> Iterator[dict[str, Any]]:
    names = tuple(row.row for row in own)
    known = [row for row in own if row.update_norm and row.step_size]
    datasets = {name: i for i, name in enumerate(dict.fromkeys(row.dataset for row in known))}
    x = {
        "rank": np.log2([float(row.rank or 1) for row in known]),
        "update norm": np.log2([row.update_norm or 1.0 for row in known]),
        "learning rate x scaling": np.log2([row.step_size or 1.0 for row in known]),
    }
    varying = {name: values for name, values in x.items() if len(values) and np.ptp(values) > 1e-9}
    left_out = len(own) - len(known)
    lacks = f" ({left_out} of {len(own)} students lack a norm, a rate or an alpha)"
    why = too_few_datasets(len(datasets))
    if not known:
        why = "no student records its update norm, learning rate and alpha"
    elif not why and len(varying) < 2:
        why = f"of rank, update norm and step size only {', '.join(varying) or 'none'} varies"
    if why:
        yield no_claim(why + (lacks if left_out and known else ""), len(datasets), names)
        return
    found = rank_or_scale(
        varying,
        np.array([row.vs_base_logprob or 0.0 for row in known]),
        np.array([float(datasets[row.dataset]) for row in known]),
    )
    best = max(found.predictors, key=lambda p: p.explained)
    shares = ", ".join(f"{p.name} {p.explained:.0%}" for p in found.predictors)
    for pair in found.comparisons:
        gap = pair.error_difference
        verdict, text = _compared(pair)
        yield {
            "verdict": verdict,
            "sentence": f"{text}. Explained in datasets left out: {shares} (best {best.name}); "
            f"difference in squared error, {pair.one} minus {pair.other}, {gap.mean:+.2g} "
            f"[{gap.low:+.2g}, {gap.high:+.2g}], {gap.n_datasets} datasets"
            f"{lacks if left_out else ''}",
            "estimate": gap.mean,
            "low": gap.low,
            "high": gap.high,
            "unit": "nats squared",
            "test": "error in datasets left out, paired by dataset",
            "n_datasets": gap.n_datasets,
            "rows": tuple(row.row for row in known),
        }


def _compared(pair: Comparison) -> tuple[str, str]:
    """A verdict on two predictors and its words."""
    gap = pair.error_difference
    if not pair.separable:
        return "cannot be told apart", (
            f"{pair.one} and {pair.other} cannot be told apart here: they order the students "
            f"alike (rank correlation {pair.alike:.2f}). A grid of learning rates or scalings "
            "within ranks would separate them"
        )
    if gap.low is not None and gap.high is not None and gap.low * gap.high > 0:
        better = pair.one if gap.mean < 0 else pair.other
        return f"{better} foretells it better", (
            f"{better} foretells new datasets better than the other of the two"
        )
    return "undecided", f"neither {pair.one} nor {pair.other} foretells new datasets better"


def contexts(rows: Sequence[TransmissionRow]) -> Iterator[dict[str, Any]]:
    """Does it matter whether train and eval context match? Decided by t over datasets."""
    tables = context_tables(rows)
    alike = Counter(table.target for table in tables)
    for table in tables:
        what = f"{table.name}: {MATCHED}" if alike[table.target] > 1 else MATCHED
        labels = ", ".join(table.labels)
        draft = where("context", table.target, labels, labels, table.name)
        dropped = _dropped(table.dropped, "dataset")
        if table.square is None:
            yield draft | no_claim(table.reason + dropped, 0, table.rows)
            continue
        n = len(table.square.blocks)
        try:
            found, p = contrast_interval(table.square.values_DIJ)
        except InputError as error:
            yield draft | no_claim(f"{error}{dropped}", n, table.rows)
            continue
        if p is None:
            why = f"{what}: {found.mean:+.2f} nats; no interval: {found.reason}{dropped}"
            yield draft | no_claim(why, n, table.rows)
            continue
        verdict = "no effect of matching shown"
        if p < LEVEL:
            verdict = "matched above" if found.mean > 0 else "matched below"
            verdict += " mismatched contexts"
        yield draft | {
            "verdict": verdict,
            "sentence": f"{what}: {found.mean:+.2f} nats {bounds(found.low, found.high)}, t "
            f"{p_text(p)}, {n} datasets{dropped}",
            "estimate": found.mean,
            "low": found.low,
            "high": found.high,
            "unit": "nats",
            "test": "t of the interaction contrast, datasets as blocks, two-sided",
            "p": p,
            "n_datasets": n,
            "rows": table.rows,
        }


def flatness(rows: Sequence[TransmissionRow], margin: float | None) -> Iterator[dict[str, Any]]:
    """Is a curve asked in another context than it was trained in flat in rank?"""
    names = group_names(groups(rows))
    curves = [c for c in rank_curves(rows) if c.group.train_context != c.group.eval_context]
    prefix = prefixes([curve.group for curve in curves], names)
    for curve in curves:
        name = names[curve.group]
        draft = where("flat in rank", curve.group.target, *curve.group.contexts, name)
        if margin is None:
            yield draft | no_claim(NO_MARGIN, len(curve.datasets), curve.rows)
            continue
        try:
            flat = flat_in_rank(curve.values_DK, margin)
        except InputError as error:
            yield draft | no_claim(str(error), len(curve.datasets), curve.rows)
            continue
        n = flat.inside.n_datasets
        if flat.p is None:
            yield draft | no_claim(f"two ranks share {flat.inside.reason}", n, curve.rows)
            continue
        verdict = "flat in rank" if flat.equivalent else "not shown to be flat in rank"
        yield draft | {
            "verdict": verdict,
            "sentence": f"{prefix[curve.group]}{verdict} within {margin:g} nats; of all pairs of "
            f"ranks the hardest to show differs by {flat.inside.mean:+.2f} nats "
            f"{bounds(flat.inside.low, flat.inside.high)}, {HOW} "
            f"{p_text(flat.p)}, {n} datasets",
            "estimate": flat.inside.mean,
            "low": flat.inside.low,
            "high": flat.inside.high,
            "unit": "nats",
            "test": f"two one-sided tests of every pair of ranks, margin {margin:g} nats",
            "p": flat.p,
            "n_datasets": n,
            "rows": curve.rows,
        }


def specificity(run: RunRecords, rows: Sequence[TransmissionRow]) -> Iterator[dict[str, Any]]:
    """Do students turn to their own animal rather than to any? Decided by permutation."""
    tables = specificity_tables(run, rows)
    alike = Counter((table.train_context, table.eval_context) for table in tables)
    for table in tables:
        several = alike[table.train_context, table.eval_context] > 1
        what = f"{table.name}: {OWN}" if several else OWN
        labels = ", ".join(table.labels)
        draft = where("specificity", labels, table.train_context, table.eval_context, table.name)
        dropped = _dropped(table.dropped, "generation seed")
        if table.square is None:
            yield draft | no_claim(table.reason + dropped, 0, table.rows)
            continue
        n = len(table.square.blocks)
        found, p = contrast_interval(table.square.values_DIJ)
        if p is None:
            why = f"{what}: {found.mean:+.2f} nats; {found.reason}{dropped}"
            yield draft | no_claim(why, n, table.rows)
            continue
        shuffled = permutation_test(table.square.values_DIJ)
        count = f"{shuffled.total:,} {'' if shuffled.exact else 'drawn '}permutations"
        number = (
            f"{what}: {found.mean:+.2f} nats {bounds(found.low, found.high)}, t {p_text(p)}, "
            f"permutation {p_text(shuffled.p)} ({count}), {n} generation seeds{dropped}"
        )
        # Bounds and p are of two tests; the interval's p stands in the sentence only.
        answer = {
            "estimate": found.mean,
            "low": found.low,
            "high": found.high,
            "unit": "nats",
            "test": "permutation of rows within generation seeds, one-sided",
            "p": shuffled.p,
            "n_datasets": n,
            "rows": table.rows,
        }
        if shuffled.least >= LEVEL:
            yield (
                draft
                | answer
                | {
                    "verdict": "no claim",
                    "sentence": f"{number}; so few permutations cannot give p < {LEVEL:g}: more "
                    "generation seeds or traits are needed",
                }
            )
            continue
        if shuffled.p < LEVEL and found.low is not None and found.low > 0:
            yield draft | answer | {"verdict": "raised diagonal", "sentence": number}
            continue
        sd = float(block_contrasts(table.square.values_DIJ).std(ddof=1))
        smallest = detectable(n, sd).effect if sd > 0 else None
        if smallest is not None:
            number += f"; smallest that could have been seen {smallest:.2f} nats (power {POWER})"
        yield (
            draft
            | answer
            | {
                "verdict": "no raised diagonal shown",
                "sentence": number,
                "smallest_effect": smallest,
            }
        )


def _dropped(number: int, unit: str) -> str:
    if not number:
        return ""
    return f"; {number} {unit}{'s' if number > 1 else ''} with a missing cell left out"
