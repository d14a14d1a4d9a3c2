"""The report's answers on transmission: what could be seen, what was, and a cross-check of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sublim_plugin.analysis.answers import LEVEL, bounds, no_claim, p_text, where
from sublim_plugin.analysis.curves import Group, group_names, groups, prefixes
from sublim_plugin.analysis.effects import Effect, by_dataset
from sublim_plugin.analysis.mixed import mixed_effect
from sublim_plugin.analysis.power import (
    PLANNED,
    POWER,
    anchor_sd,
    datasets_needed,
    detectable,
    planned_power,
)
from sublim_plugin.analysis.rank_shape import over_traits
from sublim_plugin.analysis.replication import MIN_DATASETS, too_few_datasets
from sublim_plugin.analysis.transmission import QuestionDifferences, TransmissionRow

FEW = " (so few that a 95% interval may hold the truth in 89% only, see docs/statistics.md)"
Tested = list[tuple[Effect, float]]


def planned(rows: Sequence[TransmissionRow]) -> Iterator[dict[str, Any]]:
    """What this many datasets could show before any result was in."""
    found = groups(rows)
    if not found:
        return
    datasets: dict[str, set[str | None]] = {}
    methods: dict[tuple[str, str, str, str], set[str]] = {}
    for group, own in found.items():
        datasets.setdefault(group.target, set()).update(row.dataset for row in own)
        methods.setdefault(group[:4], set()).update(row.method for row in own)
    n = min(len(own) for own in datasets.values())
    text = planned_power(n, max(len(own) for own in methods.values()))
    used = dict.fromkeys(row.row for own in found.values() for row in own)
    yield where("power", "all traits", "", "") | {
        "verdict": "before any result",
        "sentence": text,
        "n_datasets": n,
        "rows": tuple(used),
    }


def transmission(
    rows: Sequence[TransmissionRow], effects: Sequence[Effect]
) -> Iterator[dict[str, Any]]:
    """Is there transmission, and at which rank is it largest? One answer per trait and setting."""
    for group, name, prefix, own in _by_group(rows, effects):
        draft = where("transmission", group.target, *group.contexts, name)
        draft |= {"rows": tuple(row for effect in own for row in effect.rows)}
        tested = [effect for effect in own if effect.p is not None]
        if not tested:
            n = max(effect.n_datasets for effect in own)
            plan = detectable(PLANNED, anchor_sd()).effect
            draft |= no_claim("", n, draft["rows"])
            yield draft | {
                "sentence": f"{prefix}no interval is drawn: {too_few_datasets(n)}. {PLANNED} "
                f"datasets would show an effect of {plan:.1f} nats (power {POWER}) if datasets "
                f"differ as the published ones (SD {anchor_sd():.1f} nats)"
            }
            continue
        answer = _decide(tested)
        untested = len(own) - len(tested)
        more = f"; {untested} more with fewer than 3 datasets" if untested else ""
        yield draft | answer | {"sentence": f"{prefix}{answer['sentence']}{more}"}


def _by_group(
    rows: Sequence[TransmissionRow], effects: Sequence[Effect]
) -> Iterator[tuple[Group, str, str, list[Effect]]]:
    """Each group with its name, the name as a prefix where others are like it, and its effects."""
    by_row = {row: effect for effect in effects for row in effect.rows}
    found = groups(rows)
    names = group_names(found)
    prefix = prefixes(found, names)
    for key, own in found.items():
        mine = {by_row[row.row].condition: by_row[row.row] for row in own}
        yield key, names[key], prefix[key], list(mine.values())


def _decide(tested: Sequence[Effect]) -> dict[str, Any]:
    """Raised needs both: above the base, and above the neutral student of the same settings."""
    above = _adjusted(tested, [_upward(e.p, e.vs_base_logprob) for e in tested])
    controlled = [effect for effect in tested if effect.neutral_p is not None]
    both = [
        max(_upward(e.p, e.vs_base_logprob), _upward(e.neutral_p, e.vs_neutral_logprob))
        for e in controlled
    ]
    raised = [pair for pair in _adjusted(controlled, both) if pair[1] < LEVEL]
    over_base = [pair for pair in above if pair[1] < LEVEL]
    best, p = max(raised or over_base or above, key=lambda pair: pair[0].vs_base_logprob)
    number = (
        f"{best.vs_base_logprob:+.2f} nats {bounds(best.low, best.high)} over the base, "
        f"{p_text(best.p)}"
    )
    answer: dict[str, Any] = {
        "estimate": best.vs_base_logprob,
        "low": best.low,
        "high": best.high,
        "unit": "nats",
        "test": "t over datasets and questions, student minus base",
        "p": best.p,
        "p_adjusted": p,
        "neutral_estimate": best.vs_neutral_logprob,
        "neutral_low": best.neutral_low,
        "neutral_high": best.neutral_high,
        "neutral_p": best.neutral_p,
        "neutral_datasets": best.neutral_datasets,
        "n_datasets": best.n_datasets,
        "rows": best.rows,
    }
    count = f"{best.n_datasets} datasets"
    if best.n_datasets == MIN_DATASETS:
        count += FEW
    if raised:
        others = [pair for pair in over_base if pair[0] not in [effect for effect, _ in raised]]
        rest = f"; above the base only with {_names(others)}" if others else ""
        answer["test"] += ", and student minus neutral student; both must pass"
        return answer | {
            "verdict": "raised",
            "sentence": f"above the base and above the neutral student of the same settings with "
            f"{_names(raised)} ({len(raised)} of {len(controlled)} with both tests, adjusted p < "
            f"{LEVEL:g}); most with {best.method}: {number}, {count}; {_neutral(best)}{rest}",
        }
    if over_base:
        tested_too = best.neutral_p is not None
        verdict = "not shown above the neutral student" if tested_too else "drift not excluded"
        return answer | {
            "verdict": f"above the base, {verdict}",
            "sentence": f"above the base with {_names(over_base)} ({len(over_base)} of "
            f"{len(tested)}, adjusted p < {LEVEL:g}); most with {best.method}: {number}, {count}; "
            f"{_neutral(best)}",
        }
    seen, smallest = _seen(best, len(tested))
    return answer | {
        "verdict": "no evidence of transmission",
        "sentence": f"no evidence of transmission: {count}{seen}; highest mean with "
        f"{best.method}: {number}{f' (adjusted {p_text(p)})' if len(tested) > 1 else ''}",
        "smallest_effect": smallest,
    }


def _upward(p: float | None, mean: float | None) -> float:
    """The two-sided p of a difference that is above 0; 1 for one that is not."""
    return 1.0 if p is None or mean is None or mean <= 0 else p


def _adjusted(effects: Sequence[Effect], p_values: Sequence[float]) -> Tested:
    if not effects:
        return []
    return list(zip(effects, over_traits(p_values).adjusted, strict=True))


def _names(tested: Tested) -> str:
    return ", ".join(dict.fromkeys(effect.method for effect, _ in tested))


def _seen(effect: Effect, n_tests: int) -> tuple[str, float | None]:
    """What this spread, over datasets and questions, would have let the study see."""
    sd, level = effect.sd_over_datasets, LEVEL / n_tests
    if not sd or effect.se_questions is None:
        return "", None
    over: dict[str, Any] = {"se_questions": effect.se_questions, "n_questions": effect.n_questions}
    smallest = detectable(effect.n_datasets, sd, **over, level=level).effect
    needed = datasets_needed(1.0, sd, **over, level=level)
    need = f"1 nat would need {needed:,} datasets" if needed else "1 nat would need more questions"
    tests = "" if n_tests == 1 else f" over {n_tests} tests"
    return (
        f", smallest effect that could have been seen {smallest:.2f} nats (power {POWER} at 5%"
        f"{tests}; {need})",
        smallest,
    )


def _neutral(effect: Effect) -> str:
    if effect.vs_neutral_logprob is None:
        return (
            "no neutral student of the same settings was scored, so drift from training on numbers "
            "cannot be excluded"
        )
    number = f"{effect.vs_neutral_logprob:+.2f} nats"
    if effect.neutral_p is None:
        reason = too_few_datasets(effect.neutral_datasets)
        return (
            f"{number} over the neutral student (no interval: {reason}), so drift from training on "
            "numbers cannot be excluded"
        )
    inside = bounds(effect.neutral_low, effect.neutral_high)
    return (
        f"{number} {inside} over the neutral student, {p_text(effect.neutral_p)}, "
        f"{effect.neutral_datasets} datasets"
    )


def cross_checks(
    rows: Sequence[TransmissionRow], effects: Sequence[Effect], differences: QuestionDifferences
) -> Iterator[dict[str, Any]]:
    """Does a mixed model see what the interval sees? For the largest effect of each group."""
    by_name = {row.row: row for row in rows}
    for group, name, prefix, own in _by_group(rows, effects):
        tested = [effect for effect in own if effect.p is not None]
        if not tested:
            continue
        best = max(tested, key=lambda effect: effect.vs_base_logprob)
        draft = where("cross-check", group.target, *group.contexts, name)
        if best.n_questions < 2:
            yield draft | no_claim("one question", best.n_datasets, best.rows)
            continue
        logit_DQ = by_dataset([by_name[row] for row in best.rows], differences.base_logit)
        found = mixed_effect(logit_DQ)
        same = _sign(found.low, found.high) == _sign(best.low or 0.0, best.high or 0.0)
        yield draft | {
            "verdict": "the mixed model agrees" if same else "the mixed model disagrees",
            "sentence": f"{prefix}{best.method}, logit-scale mixed model with random datasets and "
            f"questions: {found.effect:+.2f} logits {bounds(found.low, found.high)}; interval "
            f"over datasets and questions: {best.vs_base_logprob:+.2f} nats "
            f"{bounds(best.low, best.high)}; {'both' if same else 'not both'} "
            f"{'exclude' if _sign(best.low or 0.0, best.high or 0.0) else 'hold'} 0"
            f"{'' if same else ': read neither without the other'}",
            "estimate": found.effect,
            "low": found.low,
            "high": found.high,
            "unit": "logits",
            "test": "mixed model by restricted maximum likelihood, t over datasets",
            "n_datasets": best.n_datasets,
            "rows": best.rows,
        }


def _sign(low: float, high: float) -> int:
    """1 above 0, -1 below, 0 where the interval holds it."""
    return int(low > 0) - int(high < 0)
