"""The report's answers on the shape over rank and on full finetuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sublim_plugin.analysis.answers import LEVEL, NO_MARGIN, bounds, no_claim, p_text, where
from sublim_plugin.analysis.curves import RankCurves, group_names, groups, prefixes, rank_curves
from sublim_plugin.analysis.effects import by_dataset
from sublim_plugin.analysis.equivalence import HOW, against_best, equivalence
from sublim_plugin.analysis.rank_shape import RankShape, over_traits, rank_shape
from sublim_plugin.analysis.replication import too_few_datasets
from sublim_plugin.analysis.transmission import QuestionDifferences, TransmissionRow
from sublim_plugin.analysis.u_test import UTest


def shapes(rows: Sequence[TransmissionRow]) -> Iterator[dict[str, Any]]:
    """Is it an inverted U? Adjusted over traits that share contexts, settings and scaling."""
    names = group_names(groups(rows))
    found = [(curve, rank_shape(curve.ranks, curve.values_DK)) for curve in rank_curves(rows)]
    families: dict[tuple[str, ...], list[tuple[RankCurves, RankShape]]] = {}
    for curve, shape in found:
        key = (*curve.group.contexts, curve.family, curve.group.scaling)
        families.setdefault(key, []).append((curve, shape))
    prefix = prefixes([curve.group for curve, _ in found], names)
    for family in families.values():
        # Traits of one family differ in their teachers; one with two teachers has two curves, and
        # they are not independent, so only traits with one are combined.
        tested = [(c, s, s.lines.p) for c, s in family if s.lines is not None]
        combined = over_traits([p for _, _, p in tested]) if tested else None
        adjusted = dict(
            zip((c.group for c, _, _ in tested), combined.adjusted, strict=True) if combined else ()
        )
        for curve, shape in family:
            name = names[curve.group]
            draft = _shape(curve, shape, name, adjusted.get(curve.group))
            yield draft | {"sentence": f"{prefix[curve.group]}{draft['sentence']}"}
        traits = {c.group.target for c, _, _ in tested}
        if combined is None or len(traits) < 2:
            continue
        first = tested[0][0].group
        about = where("rank shape", "all traits", *first.contexts, names[first])
        rows_of = tuple(row for c, _, _ in tested for row in c.rows)
        n = min(s.n_datasets for _, s, _ in tested)
        if len(traits) < len(tested):
            why = "a trait has several teachers, so its curves are not independent of each other"
            yield about | no_claim(f"over traits: {why}", n, rows_of)
            continue
        claims = sum(s.verdict == "inverted U" and adjusted[c.group] < LEVEL for c, s, _ in tested)
        yield about | {
            "verdict": f"{claims} of {len(tested)} traits",
            "sentence": f"{prefix[first]}{claims} of {len(tested)} traits "
            "show an inverted U after Benjamini and Hochberg's adjustment; that none does: "
            f"Fisher's combined {p_text(combined.fisher_p)}",
            "test": "Fisher's combination of two-lines tests",
            "p": combined.fisher_p,
            "n_datasets": n,
            "rows": rows_of,
        }


def _shape(
    curve: RankCurves, shape: RankShape, name: str, p_adjusted: float | None
) -> dict[str, Any]:
    draft = where("rank shape", curve.group.target, *curve.group.contexts, name) | {
        "n_datasets": shape.n_datasets,
        "rows": curve.rows,
        "verdict": shape.verdict,
    }
    if shape.lines is None or p_adjusted is None:
        return draft | {"sentence": f"no claim about its shape over rank: {shape.reason}"}
    draft |= {
        "estimate": shape.peak_rank,
        "low": shape.peak_low,
        "high": shape.peak_high,
        "unit": "rank of the highest mean",
        "test": "two-lines test (Simonsohn 2018), datasets as units",
        "p": shape.lines.p,
        "p_adjusted": p_adjusted,
    }
    second = f"no u-test ({shape.quadratic_reason})"
    if shape.quadratic is not None:
        second = f"u-test {p_text(shape.quadratic.p)}"
        if shape.quadratic.low is not None and shape.quadratic.high is not None:
            draft["fieller_low"] = float(np.exp2(shape.quadratic.low))
            draft["fieller_high"] = float(np.exp2(shape.quadratic.high))
    tests = (
        f"two-lines {p_text(shape.lines.p)} (adjusted {p_text(p_adjusted)}), {second}, "
        f"{shape.n_datasets} datasets"
    )
    if shape.verdict != "inverted U":
        return draft | {"sentence": f"no inverted U over rank shown: {shape.reason}; {tests}"}
    if p_adjusted >= LEVEL:
        return draft | {
            "verdict": "no inverted U shown",
            "sentence": f"an inverted U over rank by itself, not after adjustment; {tests}",
        }
    support = "the u-test does not support it"
    if shape.supported and shape.quadratic is not None:
        support = f"the u-test agrees{_fieller(shape.quadratic, shape.ranks)}"
    elif shape.quadratic is None:
        support = "without a u-test beside it"
    return draft | {
        "sentence": f"inverted U over rank, peak at rank {shape.peak_rank:g} "
        f"[{shape.peak_low:g}, {shape.peak_high:g}]; {tests}; {support}"
    }


def _fieller(found: UTest, ranks: Sequence[float]) -> str:
    """The quadratic's peak in ranks with Fieller's interval, cut where the grid ends."""
    if found.extremum is None or found.low is None or found.high is None:
        return ", its peak not bounded (Fieller)"

    def rank(x: float) -> str:
        low, high = np.log2(ranks[0]), np.log2(ranks[-1])
        if x < low or x > high:
            return f"<{ranks[0]:g}" if x < low else f">{ranks[-1]:g}"
        return f"{2**x:.3g}"

    inside = f"[{rank(found.low)}, {rank(found.high)}]"
    return f", its quadratic peaks at {rank(found.extremum)} {inside} (Fieller)"


def full_finetuning(
    rows: Sequence[TransmissionRow], differences: QuestionDifferences, margin: float | None
) -> Iterator[dict[str, Any]]:
    """Is full finetuning at the base, and how far below the best LoRA of each setting?"""
    found = groups(rows)
    names = group_names(found)
    curves = rank_curves(rows, least=1)
    for group, own in found.items():
        if group.scaling:
            continue
        name = names[group]
        draft = where("full finetuning", group.target, *group.contexts, name)
        yield draft | _at_the_base(own, differences.base, name, margin)
        for curve in curves:
            if (curve.group.target, curve.group.contexts) == (group.target, group.contexts):
                yield draft | _against(curve, own, name, names[curve.group])


def _at_the_base(
    own: Sequence[TransmissionRow],
    differences: Mapping[str, Sequence[float]],
    name: str,
    margin: float | None,
) -> dict[str, Any]:
    rows = tuple(row.row for row in own)
    values_DQ = by_dataset(own, differences)
    n = len(values_DQ)
    if too_few_datasets(n):
        why = too_few_datasets(n)
        return no_claim(why, n, rows) | {"sentence": f"{name}: no claim: {why}"}
    found = equivalence(values_DQ, margin or 1.0)
    answer = {
        "estimate": found.inside.mean,
        "low": found.inside.low,
        "high": found.inside.high,
        "unit": "nats",
        "n_datasets": n,
        "rows": rows,
    }
    number = f"{found.inside.mean:+.2f} nats {bounds(found.inside.low, found.inside.high)}"
    if margin is None:
        sentence = f"{name}: {number} over the base, {n} datasets; {NO_MARGIN}"
        return answer | {"verdict": "no claim", "sentence": sentence}
    verdict = "at the base" if found.equivalent else "not shown to be at the base"
    return answer | {
        "verdict": verdict,
        "test": f"two one-sided tests, margin {margin:g} nats",
        "p": found.p,
        "sentence": f"{name} is {verdict}: {number}, margin {margin:g} nats, {HOW} "
        f"{p_text(found.p)}, {n} datasets",
    }


def _against(
    curve: RankCurves, own: Sequence[TransmissionRow], name: str, lora: str
) -> dict[str, Any]:
    """The best LoRA of one curve against these fully finetuned students, paired by dataset."""
    values: dict[str | None, list[float]] = {}
    for row in own:
        values.setdefault(row.dataset, []).append(row.vs_base_logprob or 0.0)
    full_D = np.array([np.mean(values.get(d, [np.nan])) for d in curve.datasets], dtype=float)
    used = (*curve.rows, *(row.row for row in own))
    shared = (np.isfinite(full_D)[:, None] & np.isfinite(curve.values_DK)).sum(0)
    if not shared.any():
        why = f"no dataset has both {name} and {lora}"
        return no_claim(why, 0, used) | {"sentence": f"no claim: {why}"}
    found = against_best(full_D, curve.values_DK, curve.ranks)
    if found.p is None:
        why = f"{name} against the best {lora}: a rank has {found.reason}"
        return no_claim(why, int(shared.min()), used)
    clear = found.p < LEVEL and found.difference > 0
    return {
        "verdict": "below the best LoRA" if clear else "not shown to be below the best LoRA",
        "sentence": f"the best {lora} (rank {found.best_rank:g}) lies {found.difference:+.2f} nats "
        f"{bounds(found.low, found.high)} above {name}, {p_text(found.p)} after correction for "
        f"choosing the best of {len(curve.ranks)} ranks, {found.n_datasets} datasets",
        "estimate": found.difference,
        "low": found.low,
        "high": found.high,
        "unit": "nats",
        "test": "paired by dataset, Bonferroni over ranks",
        "p": found.p,
        "n_datasets": found.n_datasets,
        "rows": used,
    }
