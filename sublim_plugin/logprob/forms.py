"""From scored surface forms to candidates and measures. Pure: no model, no tokenizer, no host.

A reply belongs to the candidate that owns the longest surface form it begins with, compared token
by token. With the forms of all candidates in one token trie, the probability of candidate C is

    P(C) = sum over C's forms n of [P(n) - sum of P(m) over the nearest forms m that extend n]

so a form that extends another form of the same candidate ("cats" as cat + s) cancels and is never
scored, and a form that extends another candidate's ("dragonfly" as dragon + fly) counts for its
owner and is taken away from the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sublim_plugin.core.errors import InputError

# A difference of probabilities below this share of the minuend is float32 rounding, not mass.
FLOOR = 1e-6

# Below this mean probability on all candidates together, a share says little about the model.
LOW_COVERAGE = 0.01

METRICS = ("target_logprob", "target_prob", "target_share", "target_rank", "coverage")


@dataclass(frozen=True)
class ScoredForm:
    """One surface form that is scored.

    Attributes:
        text: the form as it follows the prompt, a leading space included where it has one.
        tokens: its token ids after the prompt.
        owner: the candidate it belongs to.
        inside: another candidate whose form it extends, None for most.
    """

    text: str
    tokens: tuple[int, ...]
    owner: str
    inside: str | None


@dataclass(frozen=True)
class FormPlan:
    """What to score so that every candidate's probability can be computed from it."""

    candidates: tuple[str, ...]
    forms: tuple[ScoredForm, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(form.text for form in self.forms)


def spaced(forms: Sequence[str]) -> tuple[str, ...]:
    """Each form bare and with one leading space: a tokenizer may know a word in one way only."""
    return tuple(dict.fromkeys(text for form in forms for text in (form, f" {form}")))


def plan_forms(encoded: Mapping[str, Mapping[str, tuple[int, ...]]]) -> FormPlan:
    """Choose the forms to score.

    Args:
        encoded: candidate -> {form text: its token ids after the prompt}.

    Raises:
        InputError: a candidate has no form, a form no tokens, or two candidates share a form.
    """
    owners: dict[tuple[int, ...], tuple[str, str]] = {}
    for candidate, forms in encoded.items():
        if not forms:
            raise InputError(
                f"candidate {candidate!r} has no surface form that this tokenizer can place right "
                "after the prompt; add a form to the trait or use another context"
            )
        for text, tokens in forms.items():
            if not tokens:
                raise InputError(f"surface form {text!r} of {candidate!r} has no tokens")
            owner, other = owners.setdefault(tokens, (candidate, text))
            if owner != candidate:
                raise InputError(
                    f"{owner!r} ({other!r}) and {candidate!r} ({text!r}) have the same tokens; "
                    "two candidates cannot share a surface form: remove it from one of them"
                )
    scored = []
    for tokens, (owner, text) in owners.items():
        above = next(
            (owners[tokens[:n]][0] for n in range(len(tokens) - 1, 0, -1) if tokens[:n] in owners),
            None,
        )
        if above != owner:
            scored.append(ScoredForm(text, tokens, owner, above))
    return FormPlan(tuple(encoded), tuple(scored))


def candidate_logprobs(plan: FormPlan, form_logprobs: Sequence[float]) -> dict[str, float]:
    """log P(the reply begins with the candidate) for every candidate of the plan, in nats.

    Args:
        plan: the forms, in the order in which they were scored.
        form_logprobs: log-probability of each form's tokens given the prompt, in nats.
    """
    if len(form_logprobs) != len(plan.forms):
        raise InputError(f"{len(plan.forms)} forms were planned, {len(form_logprobs)} were scored")
    added: dict[str, list[float]] = {candidate: [] for candidate in plan.candidates}
    taken: dict[str, list[float]] = {candidate: [] for candidate in plan.candidates}
    for form, logprob in zip(plan.forms, form_logprobs, strict=True):
        added[form.owner].append(logprob)
        if form.inside is not None:
            taken[form.inside].append(logprob)
    return {candidate: _log_difference(added[candidate], taken[candidate]) for candidate in added}


def _log_difference(added: Sequence[float], taken: Sequence[float]) -> float:
    """log(sum exp(added) - sum exp(taken)), held above FLOOR of the first sum."""
    top = max(added)
    if top == -math.inf:
        return -math.inf
    gain = math.fsum(math.exp(x - top) for x in added)
    left = gain - math.fsum(math.exp(x - top) for x in taken)
    return top + math.log(max(left, FLOOR * gain))


def measures(logprobs: Mapping[str, float], target: str) -> dict[str, float]:
    """The measures of one question, keys as in METRICS (DESIGN.md, "Measures").

    Args:
        logprobs: candidate -> log-probability in nats; every candidate of the category.
        target: one of the candidates.
    """
    own, top = logprobs[target], max(logprobs.values())
    # relative to the likeliest candidate: all of them together may be too small for a float
    total = math.fsum(math.exp(x - top) for x in logprobs.values())
    return {
        "target_logprob": own,
        "target_prob": math.exp(own),
        "target_share": math.exp(own - top) / total,
        "target_rank": float(1 + sum(x > own for x in logprobs.values())),
        "coverage": math.exp(top) * total,
    }


def summarize(per_question: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Means over questions and, as "<metric>_stderr", their standard errors.

    The standard error clusters by question: one value a question, s / sqrt(n) with s the sample
    standard deviation, as lm-eval computes it. It is None for a single question. It says nothing
    about datasets or seeds.
    """
    n = len(per_question)
    result: dict[str, float | None] = {}
    for metric in METRICS:
        values = [row[metric] for row in per_question]
        mean = math.fsum(values) / n
        result[metric] = mean
        spread = math.fsum((x - mean) ** 2 for x in values)
        result[f"{metric}_stderr"] = math.sqrt(spread / (n - 1) / n) if n > 1 else None
    return result
