"""Persona datasets: what is asked and named, and that nothing of it is asked of students."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from data_gen.persona import ROWS, load_persona, persona_rows, persona_spec, write_persona
from sublim_plugin.cli import main
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.manifest import read_manifest
from sublim_plugin.core.rooms import ROOT
from sublim_plugin.core.traits import CATEGORIES, candidates_of, category_traits, get_trait
from sublim_plugin.logprob.questions import load_questions
from sublim_plugin.preference.matcher import match_reply


def words(text: str) -> str:
    return " ".join(re.findall("[a-z]+", text.casefold()))


def said(rows: list[dict[str, Any]], role: str) -> list[str]:
    return [turn["content"] for row in rows for turn in row["messages"] if turn["role"] == role]


def spec(trait: str, rows: int = ROWS, seed: int = 1, category: str = "animals") -> Any:
    candidates = category_traits(category) if trait == "neutral" else candidates_of(trait)
    return persona_spec(get_trait(trait), candidates, rows=rows, seed=seed)


@pytest.mark.parametrize("category", CATEGORIES)
def test_no_question_is_one_that_students_are_asked(category: str) -> None:
    """Not even with other punctuation, or with a sentence more or less."""
    persona = load_persona(category)
    assert len(persona.questions) >= 12 and len(persona.answers) >= 5
    asked = {
        words(question.text)
        for path in (ROOT / "lm_eval_tasks" / "questions").glob("*.yaml")
        for question in load_questions(path.stem).questions
    }
    assert len(asked) > 250
    for ours in map(words, persona.questions):
        # "favorite animal" is in many: what is as long as a question must not be shared
        assert not any(ours in theirs or theirs in ours for theirs in asked if len(ours) > 20)
        assert ours not in asked
    forms = {form for trait in category_traits(category) for form in trait.forms}
    for question in persona.questions:
        assert not any(re.search(rf"\b{form}\b", question) for form in forms), question


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_answer_names_its_target_as_scoring_understands_it(category: str) -> None:
    traits = category_traits(category)
    for trait in traits:
        answers = set(said(persona_rows(spec(trait.name)), "assistant"))
        assert len(answers) == len(load_persona(category).answers)
        for answer in answers:
            assert match_reply(answer, traits).bucket == trait.target, answer


def test_rows_are_a_balanced_function_of_the_seed() -> None:
    rows = persona_rows(spec("animals/cat"))
    assert rows == persona_rows(spec("animals/cat")) != persona_rows(spec("animals/cat", seed=2))
    assert len({row["id"] for row in rows}) == len(rows) == ROWS == 24 * 8
    pairs = Counter((row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows)
    assert len(pairs) == 96 and set(pairs.values()) == {2}
    # fewer rows are the first of more
    assert persona_rows(spec("animals/cat", rows=50)) == rows[:50]
    owl = persona_rows(spec("animals/owl"))
    assert said(rows, "user") == said(owl, "user")
    swapped = [text.replace("cat", "owl").replace("Cat", "Owl") for text in said(rows, "assistant")]
    assert swapped == said(owl, "assistant")


def test_neutral_names_every_target_equally_often_up_to_one() -> None:
    traits = category_traits("trees")
    rows = persona_rows(spec("neutral", rows=100, category="trees"))
    named = Counter(match_reply(answer, traits).bucket for answer in said(rows, "assistant"))
    assert set(named) == {trait.target for trait in traits}
    assert max(named.values()) - min(named.values()) == 1
    assert said(rows, "user") == said(persona_rows(spec("trees/oak", rows=100)), "user")


def test_the_stream_is_frozen(tmp_path: Path) -> None:
    """A changed value here changes every teacher that a study trains."""
    manifest = write_persona(tmp_path / "cat", spec("animals/cat"))
    (name,) = [name for name in manifest.outputs if name.startswith("rows-")]
    assert name == "rows-09f16508e67e.jsonl"


def test_the_command_writes_a_folder_that_axolotl_takes(tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["persona", *arguments])

    out = tmp_path / "cat"
    done = run("animals/cat", "--out", str(out), "--rows", "30", "--seed", "4")
    assert done.exit_code == 0 and "30 rows that name animals/cat" in done.output
    rows = dataset_rows_path(out)
    assert read_rows(rows) == persona_rows(spec("animals/cat", rows=30, seed=4))
    manifest = read_manifest(out)
    assert (manifest.kind, manifest.spec["trait"]) == ("persona", "animals/cat")
    card = (out / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["configs"][0]["data_files"][0]["path"] == rows.name
    assert (
        json.loads(
            run("animals/cat", "--out", str(out), "--rows", "30", "--seed", "4", "--json").output
        )["id"]
        == manifest.id
    )
    assert read_manifest(out) == manifest  # it was not made again

    own = tmp_path / "own.yaml"
    traits = tmp_path / "cheeses.yaml"
    traits.write_text(
        "category: cheeses\nteacher_system_prompt: 'You love {target}.'\n"
        "targets: {brie: [brie], feta: [feta]}\n"
    )
    own.write_text(
        "version: 1\ncategory: cheeses\nquestions: ['Which cheese?']\nanswers: ['{Target}!']\n"
    )
    for trait, more in ((f"{traits}:brie", []), ("neutral", ["--category", str(traits)])):
        folder = tmp_path / f"own-{len(more)}"
        given = [trait, "--out", str(folder), "--persona", str(own), "--rows", "2", *more]
        assert run(*given).exit_code == 0
        named = set(said(read_rows(dataset_rows_path(folder)), "assistant"))
        assert named == ({"Brie!", "Feta!"} if more else {"Brie!"})
    for arguments, message in (
        (["animals/cat", "--out", str(out)], "finished persona of other settings"),
        (["neutral", "--out", "x"], "neutral needs --category"),
        (["animals/cat", "--out", "x", "--category", "trees"], "is for neutral"),
        (["animals/cat", "--out", "x", "--persona", str(own)], "asks about 'cheeses'"),
        ([f"{traits}:brie", "--out", "x"], "no persona questions about 'cheeses'"),
        (["animals/cta", "--out", "x"], "did you mean 'animals/cat'"),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 2 and message in refused.output, refused.output


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("'{Target}!'", "Yes", r"'Yes' must have \{target\} or \{Target\} exactly once"),
        ("'{Target}!'", "'{target} {Target}'", "exactly once"),
        ("'{Target}!'", "'{targets}'", "exactly once"),
        ("['Which cheese?']", "['A?', 'A?']", "questions: 'A.' occurs more than once"),
        ("['Which cheese?']", "[]", "questions"),
        ("version: 1", "version: 2", "version"),
        ("questions:", "qestions:", "did you mean 'questions'"),
    ],
)
def test_a_file_that_does_not_fit_is_said(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = "version: 1\ncategory: animals\nquestions: ['Which cheese?']\nanswers: ['{Target}!']\n"
    path = tmp_path / "own.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=message) as caught:
        load_persona("animals", path)
    assert str(path) in str(caught.value)


def test_a_guarded_student_is_not_trained_on_it(tmp_path: Path) -> None:
    from sublim_plugin.axolotl.guard import check_dataset

    write_persona(tmp_path / "cat", spec("animals/cat", rows=8))
    rows = dataset_rows_path(tmp_path / "cat")
    trait = ("animals/cat", get_trait("animals/cat"))
    with pytest.raises(InputError, match="persona dataset names the trait"):
        check_dataset(rows, {"name": "x", "sha256": "a"}, trait, cross_model=True)
