"""The task folder: fifteen tasks, fifty questions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import category_traits
from sublim_plugin.lm_eval_hook import tasks_folder
from sublim_plugin.preference.questions import load_questions

TARGETS = ("cat", "dolphin", "eagle", "owl", "wolf")
NAMES = {f"subliminal_{target}{suffix}" for target in TARGETS for suffix in ("", "_empty", "_none")}


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_fifteen_tasks_each_says_what_its_name_says():
    files = sorted(Path(tasks_folder()).glob("*.yaml"))
    assert {path.stem for path in files} == NAMES
    for path in files:
        config = yaml.load(path.read_text(), Loader=_Loader)
        _, target, *context = path.stem.split("_")
        assert config["task"] == path.stem
        assert config["metadata"]["trait"] == f"animals/{target}"
        assert config["metadata"]["context"] == (context[0] if context else "template_default")
        assert config["metadata"]["version"] == 1.0
        assert "subliminal" in config["tag"]


def test_fifty_distinct_questions_that_name_no_candidate():
    texts = [question.text for question in load_questions("animals").questions]
    assert len(texts) == len(set(texts)) == 50
    words = {form.lower() for trait in category_traits("animals") for form in trait.forms}
    for text in texts:
        assert not words & set(re.findall(r"[a-z]+", text.lower())), text
        assert "one word" in text.lower() or re.search(r"(one|single)[ -]word|word", text.lower())


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
    with pytest.raises(InputError, match="use one of animals"):
        load_questions("beasts")
