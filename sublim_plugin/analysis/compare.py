"""Two studies side by side: effects and answers that ask the same, and settings that differ.

Nothing is pooled. A difference of two means over datasets has an interval only where both sides
have enough datasets: by pairs over the datasets that both studies used, if they share any, else
Welch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from sublim_plugin.analysis.answers import Answer
from sublim_plugin.analysis.collect import RunRecords, collect
from sublim_plugin.analysis.effects import Effect, effects
from sublim_plugin.analysis.evidence import evidence
from sublim_plugin.analysis.replication import MIN_DATASETS, too_few_datasets
from sublim_plugin.analysis.transmission import (
    TransmissionRow,
    question_differences,
    transmission_table,
)
from sublim_plugin.core.errors import InputError

SIZES = ("datasets", "students", "scorings")


@dataclass(frozen=True)
class Side:
    """One study, analysed."""

    name: str
    run: RunRecords
    rows: Sequence[TransmissionRow]
    effects: Sequence[Effect]
    answers: Sequence[Answer]
    margin: float | None


def side(name: str, run_dir: Path, margin: float | None) -> Side:
    """Read and analyse the finished cells of a run folder.

    Raises:
        InputError: no cells there, or a cell that is garbled.
    """
    if not (run_dir / "cells").is_dir():
        raise InputError(f"{run_dir}: no run folder (it holds no cells/); run the study first")
    run = collect(run_dir)
    rows = transmission_table(run)
    differences = question_differences(run, rows)
    found = effects(rows, differences)
    answers = evidence(run, rows, differences, found, margin)
    return Side(name, run, rows, found, answers, margin)


class Difference(BaseModel):
    """An effect of both studies, in nats: `difference` is B minus A, over shared datasets if any.

    `low`, `high` (95%) and `p` (two-sided) are over datasets, questions taken as fixed; None where
    `reason` says why. `p_adjusted` is after Benjamini and Hochberg's adjustment over all
    differences. `a` and `b` are the effects' names in each study's effects.csv.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    target: str
    role: str
    method: str
    train_context: str
    eval_context: str
    settings: str
    a: str
    b: str
    a_logprob: float | None
    a_low: float | None
    a_high: float | None
    a_datasets: int
    b_logprob: float | None
    b_low: float | None
    b_high: float | None
    b_datasets: int
    difference: float | None
    low: float | None
    high: float | None
    test: str
    p: float | None
    p_adjusted: float | None
    reason: str


def differences(a: Side, b: Side) -> tuple[Difference, ...]:
    """Every effect of either study, matched by trait, method and contexts.

    Effects that share these in one study (other recipes) are told apart by the settings that vary;
    where that is not enough they stay unmatched.
    """
    keyed = [_keyed(one) for one in (a, b)]
    drafts = []
    for key in dict.fromkeys([*keyed[0], *keyed[1]]):
        ours, theirs = keyed[0].get(key, []), keyed[1].get(key, [])
        several = max(len(ours), len(theirs)) > 1
        if len(ours) == len(theirs) == 1:
            drafts.append(_pair(a, b, ours[0], theirs[0]))
            continue
        reason = "several recipes share this row" if several else "not in both studies"
        drafts += [_alone(a, b, i, None, reason) for i in ours]
        drafts += [_alone(a, b, None, j, reason) for j in theirs]
    tested = [i for i, draft in enumerate(drafts) if draft["p"] is not None]
    if tested:
        adjusted = stats.false_discovery_control([drafts[i]["p"] for i in tested])
        for i, p in zip(tested, adjusted, strict=True):
            drafts[i]["p_adjusted"] = float(p)
    return tuple(Difference(id=f"D{i}", **draft) for i, draft in enumerate(drafts, start=1))


def _keyed(one: Side) -> dict[tuple[Any, ...], list[int]]:
    """Indices of a study's effects by what they are about."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for index, effect in enumerate(one.effects):
        key = (effect.target, effect.role, effect.method, effect.train_context, effect.eval_context)
        found.setdefault(key, []).append(index)
    by_settings: dict[tuple[Any, ...], list[int]] = {}
    for key, own in found.items():
        for index in own:
            name = _settings_of(one.effects[index]) if len(own) > 1 else ""
            by_settings.setdefault((*key, name), []).append(index)
    return by_settings


def _settings_of(effect: Effect) -> str:
    return ", ".join(filter(None, [effect.settings_name, effect.scalings]))


def _about(effect: Effect) -> dict[str, Any]:
    return {
        "target": effect.target,
        "role": effect.role,
        "method": effect.method,
        "train_context": effect.train_context,
        "eval_context": effect.eval_context,
        "settings": _settings_of(effect),
    }


def _numbers(which: str, effect: Effect | None, index: int | None) -> dict[str, Any]:
    return {
        which: "" if index is None else f"F{index + 1}",
        f"{which}_logprob": effect.vs_base_logprob if effect else None,
        f"{which}_low": effect.low if effect else None,
        f"{which}_high": effect.high if effect else None,
        f"{which}_datasets": effect.n_datasets if effect else 0,
    }


def _alone(a: Side, b: Side, i: int | None, j: int | None, reason: str) -> dict[str, Any]:
    ours = a.effects[i] if i is not None else None
    theirs = b.effects[j] if j is not None else None
    about = _about(ours) if ours else _about(theirs) if theirs else {}
    nothing = dict.fromkeys(("difference", "low", "high", "p", "p_adjusted"))
    found = {**about, **_numbers("a", ours, i), **_numbers("b", theirs, j), **nothing}
    return found | {"test": "", "reason": reason}


def _pair(a: Side, b: Side, i: int, j: int) -> dict[str, Any]:
    found = _alone(a, b, i, j, "")
    ours, theirs = _by_dataset(a, a.effects[i]), _by_dataset(b, b.effects[j])
    found["difference"] = b.effects[j].vs_base_logprob - a.effects[i].vs_base_logprob
    fewest = min(len(ours), len(theirs))
    if fewest < MIN_DATASETS:
        return found | {"reason": too_few_datasets(fewest)}
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) >= MIN_DATASETS:
        values = np.array([theirs[name] - ours[name] for name in shared])
        found["difference"] = float(values.mean())
        test = f"paired t over {len(shared)} shared datasets"
        variance, df = values.var(ddof=1) / len(values), len(values) - 1
    elif shared:
        reason = f"the studies share {len(shared)} datasets: too few for pairs, not independent"
        return found | {"reason": reason}
    else:
        x, y = np.array(list(ours.values())), np.array(list(theirs.values()))
        one, other = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
        test, variance = "Welch's t over datasets", one + other
        parts = one**2 / (len(x) - 1) + other**2 / (len(y) - 1)
        df = variance**2 / parts if parts else fewest - 1
    if not variance > 0:
        return found | {"reason": "the datasets do not vary"}
    se = math.sqrt(variance)
    half = float(stats.t.ppf(0.975, df)) * se
    centre = found["difference"]
    return found | {
        "test": test,
        "low": centre - half,
        "high": centre + half,
        "p": float(2 * stats.t.sf(abs(centre) / se, df)),
    }


def _by_dataset(one: Side, effect: Effect) -> dict[str, float]:
    """Student minus base of each dataset, averaged over training seeds."""
    by_row = {row.row: row for row in one.rows}
    groups: dict[str, list[float]] = {}
    for name in effect.rows:
        row = by_row[name]
        groups.setdefault(row.dataset or "", []).append(row.vs_base_logprob or 0.0)
    return {name: float(np.mean(values)) for name, values in groups.items()}


class AnswerPair(BaseModel):
    """What each study answers to one question; "" where it was not asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    topic: str
    target: str
    train_context: str
    eval_context: str
    a: str
    a_verdict: str
    a_sentence: str
    b: str
    b_verdict: str
    b_sentence: str
    agree: bool | None


def answer_pairs(a: Side, b: Side) -> tuple[AnswerPair, ...]:
    """Answers of either study by question, trait and contexts; several to one by their order."""
    keyed: list[dict[tuple[str, ...], Answer]] = []
    for one in (a, b):
        own: dict[tuple[str, ...], Answer] = {}
        for answer in one.answers:
            about = (answer.topic, answer.target, answer.train_context, answer.eval_context)
            number = sum(known[:4] == about for known in own)
            own[(*about, str(number))] = answer
        keyed.append(own)
    found = []
    for number, key in enumerate(dict.fromkeys([*keyed[0], *keyed[1]]), start=1):
        ours, theirs = keyed[0].get(key), keyed[1].get(key)
        found.append(
            AnswerPair(
                id=f"A{number}",
                topic=key[0],
                target=key[1],
                train_context=key[2],
                eval_context=key[3],
                a=ours.id if ours else "",
                a_verdict=ours.verdict if ours else "",
                a_sentence=ours.sentence if ours else "",
                b=theirs.id if theirs else "",
                b_verdict=theirs.verdict if theirs else "",
                b_sentence=theirs.sentence if theirs else "",
                agree=ours.verdict == theirs.verdict if ours and theirs else None,
            )
        )
    return tuple(found)


class Setting(BaseModel):
    """A setting of both studies: all its values in each, in words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    setting: str
    a: str
    b: str
    differs: bool


def settings(a: Side, b: Side) -> tuple[Setting, ...]:
    """Every setting that a manifest of either study holds, those that differ first."""
    ours, theirs = _settings(a), _settings(b)
    found = [
        Setting(
            setting=name,
            a=ours.get(name, ""),
            b=theirs.get(name, ""),
            differs=ours.get(name, "") != theirs.get(name, ""),
        )
        for name in dict.fromkeys([*ours, *theirs])
    ]
    return tuple(sorted(found, key=lambda setting: not setting.differs))


def _settings(one: Side) -> dict[str, str]:
    run = one.run
    values: dict[str, set[str]] = {}

    def add(name: str, value: object) -> None:
        if value not in (None, ""):
            values.setdefault(name, set()).add(str(value))

    for name, own in zip(SIZES, (run.datasets, run.students, run.probes), strict=True):
        add(name, len(own))
    add("equivalence margin (nats)", one.margin)
    for dataset in run.datasets:
        spec = dataset.spec
        add("base model", f"{spec.base_model.name} {spec.base_model.sha256[:12]}")
        for field in ("trait", "generation_seed", "rows", "constrain", "parser"):
            add(f"dataset: {field}", getattr(spec, field))
        add("dataset: prompts sha256", spec.prompts_sha256[:12])
        add("dataset: teacher", spec.teacher.get("kind", "prompted"))
        for name, value in spec.sampler.items():
            add(f"dataset: sampler {name}", value)
    for student in run.students:
        kind = student.spec.method.kind
        add(f"{kind}: rank", student.spec.method.rank)
        add("student: train context", student.spec.train_context.slug)
        add("student: training_seed", student.spec.training_seed)
        for name, value in student.spec.recipe.items():
            add(f"{kind}: {name}", value)
    for probe in run.probes:
        spec_of = probe.spec
        add("probe: eval context", spec_of.eval_context.slug)
        add("probe: measure", spec_of.measure)
        add("probe: questions sha256", spec_of.questions_sha256[:12])
        add("probe: number of questions", len(probe.questions))
    for manifest in run.manifests.values():
        for name, value in manifest.versions.items():
            add(f"version: {name}", value)
    return {name: _listed(known) for name, known in values.items()}


def _listed(values: Iterable[str], most: int = 12) -> str:
    def order(value: str) -> tuple[bool, float, str]:
        number = _number(value)
        return number is None, number or 0.0, value

    own = sorted(values, key=order)
    more = f" and {len(own) - most} more" if len(own) > most else ""
    return ", ".join(own[:most]) + more


def _number(value: str) -> float | None:
    parse: Callable[[str], float] = float
    try:
        return parse(value)
    except ValueError:
        return None
