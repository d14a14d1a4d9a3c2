"""The report's answers: each a sentence with its number, interval, test and number of datasets.

Every answer is one row of evidence.csv, and names the rows of results.csv that it was made from.
Nothing is claimed over fewer than three datasets; the answer then says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sublim_plugin.analysis.answers import Answer, bounds, p_text, where
from sublim_plugin.analysis.collect import RunRecords
from sublim_plugin.analysis.curves import (
    RankCurves,
    rank_curves,
)
from sublim_plugin.analysis.effects import Effect, by_dataset
from sublim_plugin.analysis.equivalence import against_best, equivalence
from sublim_plugin.analysis.evidence_contrasts import contexts, scale, specificity
from sublim_plugin.analysis.power import POWER, anchor_sd, datasets_needed, detectable
from sublim_plugin.analysis.rank_shape import RankShape, over_traits, rank_shape
from sublim_plugin.analysis.replication import too_few_datasets
from sublim_plugin.analysis.transmission import TransmissionRow

LEVEL = 0.05
PLANNED = 6
"""Datasets for which the smallest visible effect is named where there are too few."""

NO_MARGIN = "no equivalence_margin was stated in the study file, so none can be claimed"


def evidence(
    run: RunRecords,
    rows: Sequence[TransmissionRow],
    differences: Mapping[str, Sequence[float]],
    effects: Sequence[Effect],
    margin: float | None = None,
) -> tuple[Answer, ...]:
    """All answers that the finished cells allow, in the order of the questions below.

    Args:
        differences, effects: from `question_differences` and `effects` of the same rows.
        margin: the study file's equivalence margin in nats, named before the run.
    """
    curves = rank_curves(rows)
    drafts = [
        *_transmission(effects),
        *_shapes(curves),
        *_full(rows, differences, curves, margin),
        *scale(rows),
        *contexts(rows, curves, margin),
        *specificity(run, rows),
    ]
    return tuple(Answer(id=f"E{i}", **draft) for i, draft in enumerate(drafts, start=1))


def _transmission(effects: Sequence[Effect]) -> Iterator[dict[str, Any]]:
    """Is there transmission, and at which rank is it largest?"""
    groups: dict[tuple[str, str, str], list[Effect]] = {}
    for effect in effects:
        if effect.role == "student":
            key = (effect.target, effect.train_context, effect.eval_context)
            groups.setdefault(key, []).append(effect)
    for key, own in groups.items():
        draft: dict[str, Any] = where("transmission", *key)
        tested = [(e, e.p) for e in own if e.p is not None]
        rows = tuple(row for effect in own for row in effect.rows)
        if not tested:
            n = max(effect.n_datasets for effect in own)
            plan = detectable(PLANNED, anchor_sd()).effect
            yield draft | {
                "verdict": "no claim",
                "sentence": f"no interval is drawn: {too_few_datasets(n)}. {PLANNED} datasets "
                f"would show an effect of {plan:.1f} nats (power {POWER}) if datasets differ as "
                f"the published ones (SD {anchor_sd():.1f} nats)",
                "n_datasets": n,
                "rows": rows,
            }
            continue
        adjusted = over_traits([p for _, p in tested]).adjusted
        shown = [
            (effect, p)
            for (effect, _), p in zip(tested, adjusted, strict=True)
            if p < LEVEL and effect.vs_base_logprob > 0
        ]
        best, p = max(
            shown or zip([e for e, _ in tested], adjusted, strict=True),
            key=lambda pair: pair[0].vs_base_logprob,
        )
        draft |= {
            "estimate": best.vs_base_logprob,
            "low": best.low,
            "high": best.high,
            "unit": "nats",
            "test": "t over datasets and questions, student minus base",
            "p": best.p,
            "p_adjusted": p,
            "n_datasets": best.n_datasets,
            "rows": best.rows,
        }
        number = f"{best.vs_base_logprob:+.2f} nats {bounds(best.low, best.high)}"
        if shown:
            names = ", ".join(effect.method for effect, _ in shown)
            sentence = (
                f"raised over the base with {names} ({len(shown)} of {len(tested)} methods, "
                f"adjusted p < {LEVEL:g}); most with {best.method}: {number}, {p_text(best.p)}, "
                f"{best.n_datasets} datasets. {_neutral(best)}"
            )
            yield draft | {"verdict": "raised over the base", "sentence": sentence}
            continue
        yield draft | {
            "verdict": "no evidence of transmission",
            "sentence": f"no evidence of transmission: {best.n_datasets} datasets{_seen(best)}; "
            f"highest mean with {best.method}: {number}, {p_text(best.p)}",
        }


def _seen(effect: Effect) -> str:
    """What this spread between datasets would have let the study see."""
    sd = effect.sd_over_datasets
    if not sd:
        return ""
    seen = detectable(effect.n_datasets, sd).effect
    return (
        f", smallest effect that could have been seen {seen:.2f} nats (power {POWER}; 1 nat would "
        f"need {datasets_needed(1.0, sd)} datasets)"
    )


def _shapes(curves: Sequence[RankCurves]) -> Iterator[dict[str, Any]]:
    """Is it an inverted U? Adjusted over the curves that share their contexts."""
    found = [(curve, rank_shape(curve.ranks, curve.values_DK)) for curve in curves]
    for both in dict.fromkeys((c.train_context, c.eval_context) for c, _ in found):
        family = [(c, s) for c, s in found if (c.train_context, c.eval_context) == both]
        tested = [(c, s, s.lines.p) for c, s in family if s.lines is not None]
        combined = over_traits([p for _, _, p in tested]) if tested else None
        adjusted = dict(
            zip((id(s) for _, s, _ in tested), combined.adjusted, strict=True) if combined else ()
        )
        for curve, shape in family:
            yield _shape(curve, shape, adjusted.get(id(shape)))
        if combined and len(tested) > 1:
            claims = sum(
                s.verdict == "inverted U" and adjusted[id(s)] < LEVEL for _, s, _ in tested
            )
            yield where("rank shape", "all traits", *both) | {
                "verdict": f"{claims} of {len(tested)} traits",
                "sentence": f"{claims} of {len(tested)} traits show an inverted U after "
                "Benjamini and Hochberg's adjustment; that none does: Fisher's combined "
                f"{p_text(combined.fisher_p)}",
                "test": "Fisher's combination of two-lines tests",
                "p": combined.fisher_p,
                "n_datasets": min(s.n_datasets for _, s, _ in tested),
                "rows": tuple(row for c, _, _ in tested for row in c.rows),
            }


def _shape(curve: RankCurves, shape: RankShape, p_adjusted: float | None) -> dict[str, Any]:
    draft = where("rank shape", curve.target, curve.train_context, curve.eval_context) | {
        "n_datasets": shape.n_datasets,
        "rows": curve.rows,
        "verdict": shape.verdict,
    }
    if shape.lines is None or shape.quadratic is None or p_adjusted is None:
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
    tests = (
        f"two-lines {p_text(shape.lines.p)} (adjusted {p_text(p_adjusted)}), u-test "
        f"{p_text(shape.quadratic.p)}, {shape.n_datasets} datasets"
    )
    if shape.verdict != "inverted U":
        return draft | {"sentence": f"no inverted U over rank shown: {shape.reason}; {tests}"}
    if p_adjusted >= LEVEL:
        return draft | {
            "verdict": "no inverted U shown",
            "sentence": f"an inverted U over rank by itself, not after adjustment; {tests}",
        }
    support = "the u-test agrees" if shape.supported else "the u-test does not support it"
    return draft | {
        "sentence": f"inverted U over rank, peak at rank {shape.peak_rank:g} "
        f"[{shape.peak_low:g}, {shape.peak_high:g}]; {tests}; {support}"
    }


def _full(
    rows: Sequence[TransmissionRow],
    differences: Mapping[str, Sequence[float]],
    curves: Sequence[RankCurves],
    margin: float | None,
) -> Iterator[dict[str, Any]]:
    """Is full finetuning at the base, and how far below the best LoRA?"""
    groups: dict[tuple[str, str, str, str], list[TransmissionRow]] = {}
    for row in rows:
        if row.role == "student" and row.rank is None and row.vs_base_logprob is not None:
            key = (row.target, row.train_context or "", row.eval_context, row.settings)
            groups.setdefault(key, []).append(row)
    for (target, train, asked, _), own in groups.items():
        rate = own[0].learning_rate
        name = "full finetuning" + (f" at learning rate {rate:g}" if rate else "")
        shared = {
            "rows": tuple(row.row for row in own),
            "n_datasets": len({r.dataset for r in own}),
        }
        draft = where("full finetuning", target, train, asked) | shared
        values_DQ = by_dataset(own, differences)
        if too_few_datasets(len(values_DQ)):
            reason = too_few_datasets(len(values_DQ))
            yield draft | {"verdict": "no claim", "sentence": f"{name}: no claim: {reason}"}
            continue
        inside = equivalence(values_DQ, margin or 1.0)
        draft |= {
            "estimate": inside.inside.mean,
            "low": inside.inside.low,
            "high": inside.inside.high,
            "unit": "nats",
        }
        number = f"{inside.inside.mean:+.2f} nats {bounds(inside.inside.low, inside.inside.high)}"
        count = f"{len(values_DQ)} datasets"
        if margin is None:
            verdict, sentence = "no claim", f"{name}: {number} over the base, {count}; {NO_MARGIN}"
        else:
            draft |= {"test": f"two one-sided tests, margin {margin:g} nats", "p": inside.p}
            verdict = "at the base" if inside.equivalent else "not shown to be at the base"
            sentence = (
                f"{name} is {verdict}: {number}, margin {margin:g} nats, two one-sided tests "
                f"{p_text(inside.p)} (2.5% each), {count}"
            )
        yield draft | {"verdict": verdict, "sentence": sentence}
        for curve in curves:
            if (curve.target, curve.train_context, curve.eval_context) == (target, train, asked):
                yield from _best(curve, own, name)


def _best(curve: RankCurves, own: Sequence[TransmissionRow], name: str) -> Iterator[dict[str, Any]]:
    full_D = np.array(
        [
            np.mean([r.vs_base_logprob for r in own if r.dataset == d] or [np.nan])
            for d in curve.datasets
        ],
        dtype=float,
    )
    if not (np.isfinite(full_D)[:, None] & np.isfinite(curve.values_DK)).any():
        return
    found = against_best(full_D, curve.values_DK, curve.ranks)
    if found.p is None:
        return
    clear = found.p < LEVEL
    yield where("full finetuning", curve.target, curve.train_context, curve.eval_context) | {
        "verdict": "below the best LoRA" if clear else "not shown to be below the best LoRA",
        "sentence": f"the best LoRA (rank {found.best_rank:g}) lies {found.difference:+.2f} nats "
        f"{bounds(found.low, found.high)} above {name}, {p_text(found.p)} after correction for "
        f"choosing the best of {len(curve.ranks)} ranks, {found.n_datasets} datasets",
        "estimate": found.difference,
        "low": found.low,
        "high": found.high,
        "unit": "nats",
        "test": "paired by dataset, Bonferroni over ranks",
        "p": found.p,
        "n_datasets": found.n_datasets,
        "rows": (*curve.rows, *(row.row for row in own)),
    }


def _neutral(effect: Effect) -> str:
    if effect.vs_neutral_logprob is None:
        return "No neutral student to compare with: this may be drift from training on numbers"
    number = f"{effect.vs_neutral_logprob:+.2f} nats"
    if effect.neutral_low is None:
        reason = too_few_datasets(effect.neutral_datasets)
        return f"Against the neutral student: {number} (no interval: {reason})"
    inside = bounds(effect.neutral_low, effect.neutral_high)
    return f"Against the neutral student: {number} {inside}, {effect.neutral_datasets} datasets"
