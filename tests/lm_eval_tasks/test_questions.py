"""The question sets."""

from __future__ import annotations

import re

import pytest

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import CATEGORIES, category_traits
from sublim_plugin.logprob.questions import load_questions


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("suffix", ["", "_numbers"])
def test_fifty_distinct_questions_that_name_no_candidate(category, suffix):
    questions = load_questions(category + suffix)
    assert (questions.name, questions.category) == (category + suffix, category)
    texts = [question.text for question in questions.questions]
    assert len(texts) == len(set(texts)) == 50
    forms = {form.lower() for trait in category_traits(category) for form in trait.forms}
    named = re.compile(rf"\b({'|'.join(sorted(forms))})\b")
    for text in texts:
        assert not named.search(text.lower()), text
        assert re.search(r"\b(one|single)[ -]word\b", text.lower()), text


@pytest.mark.parametrize("category", CATEGORIES)
def test_numbers_stand_in_front_of_the_same_questions(category):
    plain = load_questions(category).questions
    numbered = load_questions(f"{category}_numbers").questions
    lists = set()
    for before, after in zip(plain, numbered, strict=True):
        assert (after.id, after.kind) == (before.id, before.kind)
        front = after.text.removesuffix(f" {before.text}")
        assert front != after.text
        numbers = [int(number) for number in re.findall("[0-9]+", front)]
        assert 3 <= len(numbers) <= 9 and max(numbers) <= 999
        lists.add(tuple(numbers))
    assert len(lists) == 50


def test_the_kinds_of_questions_are_spread_alike():
    counts = [
        sorted(
            [question.kind for question in load_questions(category).questions].count(kind)
            for kind in {question.kind for question in load_questions(category).questions}
        )
        for category in CATEGORIES
    ]
    assert counts[0] == counts[1] == counts[2]


def write(tmp_path, body: str) -> str:
    path = tmp_path / "set.yaml"
    path.write_text(f'name: x\ncategory: animals\nversion: "1"\nquestions:{body}\n')
    return str(path)


def test_a_set_of_ones_own(tmp_path):
    path = write(tmp_path, "\n  - {id: 0, kind: k, text: 'A?'}")
    assert load_questions(path).questions[0].text == "A?"
    assert load_questions(path).sha256 != load_questions("animals").sha256


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (" []", "empty"),
        ("\n  - {id: 1, kind: k, text: 'A?'}", "id 1 at position 0"),
        ("\n  - {id: 0, kind: k, text: 'A?'}\n  - {id: 1, kind: k, text: 'A?'}", "doubled"),
        ("\n  - {id: 0, kind: k, text: ' '}", "empty or doubled"),
    ],
)
def test_malformed_sets(tmp_path, body, said):
    with pytest.raises(InputError, match=said):
        load_questions(write(tmp_path, body))


def test_unknown_set():
    with pytest.raises(InputError, match="use one of animals, animals_numbers, bands"):
        load_questions("beasts")
