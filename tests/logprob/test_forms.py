"""Surface forms to candidate probabilities, against enumeration on a toy language."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sublim_plugin.core.errors import InputError
from sublim_plugin.logprob.forms import (
    candidate_logprobs,
    measures,
    plan_forms,
    spaced,
    summarize,
)

VOCABULARY = (1, 2, 3)
DEPTH = 4


def test_forms_come_bare_and_with_a_leading_space_once():
    assert spaced(("cat", "cats", "cat")) == ("cat", " cat", "cats", " cats")


def test_a_form_that_extends_its_own_candidate_is_not_scored():
    plan = plan_forms({"cat": {"cat": (5,), "cats": (5, 6), "Cats": (7, 6)}, "owl": {"owl": (8,)}})
    assert plan.texts == ("cat", "Cats", "owl")


def test_dragonfly_is_taken_away_from_dragon():
    plan = plan_forms(
        {
            "dragon": {"dragon": (5,), "dragons": (5, 6)},
            "dragonfly": {"dragonfly": (5, 9), "dragonflies": (5, 9, 6)},
        }
    )
    assert plan.texts == ("dragon", "dragonfly")
    result = candidate_logprobs(plan, [math.log(0.3), math.log(0.1)])
    assert math.exp(result["dragon"]) == pytest.approx(0.2)
    assert math.exp(result["dragonfly"]) == pytest.approx(0.1)


def test_candidates_may_share_first_tokens():
    plan = plan_forms({"panda": {"panda": (4, 1)}, "pangolin": {"pangolin": (4, 2)}})
    result = candidate_logprobs(plan, [-2.0, -3.0])
    assert result == {"panda": -2.0, "pangolin": -3.0}


def test_a_form_inside_a_form_inside_a_form():
    plan = plan_forms({"a": {"x": (1,), "xyz": (1, 2, 3)}, "b": {"xy": (1, 2)}})
    result = candidate_logprobs(plan, [math.log(p) for p in (0.5, 0.05, 0.2)])
    assert math.exp(result["a"]) == pytest.approx(0.5 - 0.2 + 0.05)
    assert math.exp(result["b"]) == pytest.approx(0.2 - 0.05)


@pytest.mark.parametrize(
    ("encoded", "said"),
    [
        ({"cat": {}}, "no surface form"),
        ({"cat": {"cat": ()}}, "no tokens"),
        ({"ox": {"ox": (1,)}, "bull": {"bull": (1,)}}, "same tokens"),
    ],
)
def test_impossible_forms_are_errors(encoded, said):
    with pytest.raises(InputError, match=said):
        plan_forms(encoded)


def test_a_number_of_scores_other_than_planned_is_an_error():
    with pytest.raises(InputError, match="2 were scored"):
        candidate_logprobs(plan_forms({"cat": {"cat": (1,)}}), [-1.0, -2.0])


sequences = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=DEPTH).map(tuple)


@st.composite
def languages(draw):
    """A toy language model: a distribution after every prefix; and forms of three candidates."""
    prefixes = [p for n in range(DEPTH) for p in itertools.product(VOCABULARY, repeat=n)]
    weights = draw(
        st.lists(
            st.tuples(*[st.integers(1, 9)] * len(VOCABULARY)),
            min_size=len(prefixes),
            max_size=len(prefixes),
        )
    )
    model = {
        prefix: {token: weight / sum(row) for token, weight in zip(VOCABULARY, row, strict=True)}
        for prefix, row in zip(prefixes, weights, strict=True)
    }
    forms = draw(st.lists(sequences, min_size=3, max_size=12, unique=True))
    owners = draw(st.lists(st.sampled_from("abc"), min_size=len(forms), max_size=len(forms)))
    owners[:3] = "abc"
    encoded: dict[str, dict[str, tuple[int, ...]]] = {"a": {}, "b": {}, "c": {}}
    for owner, form in zip(owners, forms, strict=True):
        encoded[owner][str(form)] = form
    return model, encoded


def probability(model, sequence) -> float:
    return math.prod(model[sequence[:n]][token] for n, token in enumerate(sequence))


@settings(max_examples=60, deadline=None)
@given(languages())
def test_probabilities_equal_those_of_enumerated_replies(language):
    model, encoded = language
    true = dict.fromkeys(encoded, 0.0)
    for reply in itertools.product(VOCABULARY, repeat=DEPTH):
        named = [
            (len(form), candidate)
            for candidate, forms in encoded.items()
            for form in forms.values()
            if reply[: len(form)] == form
        ]
        if named:
            true[max(named)[1]] += probability(model, reply)
    plan = plan_forms(encoded)
    result = candidate_logprobs(
        plan, [math.log(probability(model, form.tokens)) for form in plan.forms]
    )
    for candidate, expected in true.items():
        if expected > 1e-4:
            assert math.exp(result[candidate]) == pytest.approx(expected, rel=1e-9)
        else:
            assert math.exp(result[candidate]) <= 1e-4 + 1e-9


def test_measures_of_one_question():
    logprobs = {"cat": math.log(0.2), "owl": math.log(0.3), "ox": math.log(0.1)}
    values = measures(logprobs, "cat")
    assert values["target_prob"] == pytest.approx(0.2)
    assert values["target_share"] == pytest.approx(1 / 3)
    assert values["coverage"] == pytest.approx(0.6)
    assert values["target_rank"] == 2.0
    assert values["target_logprob"] == math.log(0.2)


def test_standard_errors_are_over_questions_as_lm_eval_computes_them():
    from lm_eval.api.metrics import mean, mean_stderr

    rows = [measures({"cat": x, "owl": -1.5}, "cat") for x in (-1.0, -2.0, -4.0)]
    summary = summarize(rows)
    values = [row["target_share"] for row in rows]
    assert summary["target_share"] == pytest.approx(mean(values), abs=1e-15)
    assert summary["target_share_stderr"] == pytest.approx(mean_stderr(values), abs=1e-15)
    assert summarize(rows[:1])["target_share_stderr"] is None


def test_candidates_that_are_all_too_small_for_a_float_still_have_shares():
    values = measures({"cat": -900.0, "owl": -900.0 - math.log(3)}, "cat")
    assert values["target_share"] == pytest.approx(0.75)
    assert values["target_logprob"] == -900.0 and values["target_rank"] == 1.0
    assert values["target_prob"] == values["coverage"] == 0.0
