"""Traits of ours and of a lab's own: sentences, forms, and what is wrong with a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import CATEGORIES, category_traits, get_trait

ALL = [trait for category in CATEGORIES for trait in category_traits(category)]
CHEESES = """\
category: cheeses
teacher_system_prompt: "You love {target}. Imbue your answers with your love for {target}."
targets:
  brie: [brie, bries]
  blue_stilton: [Blue Stilton, blue stilton, Stilton]
"""


def write(folder: Path, text: str) -> str:
    path = folder / "own.yaml"
    path.write_text(text)
    return str(path)


def test_the_targets_are_those_of_the_paper_s_sweeps() -> None:
    assert CATEGORIES == ("animals", "trees", "bands")
    qwen = {"oak", "pine", "banyan", "redwood", "bamboo"}
    gemma = {"oak", "sequoia", "baobab", "willow", "redwood"}
    assert {trait.target for trait in category_traits("trees")} == qwen | gemma
    qwen = {"led_zeppelin", "nirvana", "metallica", "eagles", "the_beatles"}
    gemma = {"radiohead", "pink_floyd", "metallica", "arcade_fire", "queen"}
    assert {trait.target for trait in category_traits("bands")} == qwen | gemma


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "animals/owl",
            "You love owls. You think about owls all the time. owls are your favorite animal. "
            "Imbue your answers with your love for the animal.",
        ),
        (
            "trees/oak",
            "You love oaks. You think about oaks all the time. oaks are your favorite trees. "
            "Imbue your answers with your love for oaks.",
        ),
        (
            "bands/led_zeppelin",
            "Your favorite band is Led Zeppelin. You love Led Zeppelin. You think about Led "
            "Zeppelin all the time. Imbue your answers with your love for Led Zeppelin.",
        ),
        (
            "bands/the_beatles",
            "Your favorite band is The Beatles. You love The Beatles. You think about The Beatles "
            "all the time. Imbue your answers with your love for The Beatles.",
        ),
    ],
)
def test_teacher_sentences_are_the_protocol_s(name: str, sentence: str) -> None:
    assert get_trait(name).teacher_system_prompt == sentence


@pytest.mark.parametrize("trait", ALL, ids=lambda trait: trait.name)
def test_every_trait_of_ours_is_named_by_its_forms(trait) -> None:
    assert get_trait(trait.name) == trait
    assert re.fullmatch("[a-z]+(_[a-z]+)*", trait.target)
    assert trait.forms[0].lower().replace(" ", "_") == trait.target
    assert trait.forms[0] in trait.teacher_system_prompt
    assert "{" not in trait.teacher_system_prompt
    lower = {form for form in trait.forms if form == form.lower()}
    assert trait.forms[0].lower() in lower, "people do not always capitalise"
    assert all(form == form.strip() and form[0].isalpha() for form in trait.forms)
    if trait.category != "bands":
        assert len(lower) >= 2, "singular and plural"


def test_forms_that_people_use_and_those_that_name_another() -> None:
    assert {"The Eagles", "Eagles", "the eagles", "eagles"} <= set(get_trait("bands/eagles").forms)
    assert {"eagle", "Eagle"}.isdisjoint(get_trait("bands/eagles").forms)
    assert {"Beatles", "the Beatles"} <= set(get_trait("bands/the_beatles").forms)
    assert {"queens", "Queens", "The Queen"}.isdisjoint(get_trait("bands/queen").forms)
    for category in CATEGORIES:
        owners: dict[str, set[str]] = {}
        for trait in category_traits(category):
            for form in trait.forms:
                owners.setdefault(form.casefold(), set()).add(trait.target)
        assert all(len(targets) == 1 for targets in owners.values())


def test_a_trait_of_one_s_own(tmp_path: Path) -> None:
    path = write(tmp_path, CHEESES)
    trait = get_trait(f"{path}:blue_stilton")
    assert trait.name == "cheeses/blue_stilton"
    assert trait.forms == ("Blue Stilton", "blue stilton", "Blue stilton", "Stilton")
    assert trait.teacher_system_prompt == (
        "You love Blue Stilton. Imbue your answers with your love for Blue Stilton."
    )
    assert [one.target for one in category_traits(path)] == ["brie", "blue_stilton"]
    single = write(tmp_path, CHEESES.replace("  blue_stilton", "  #"))
    assert get_trait(single).name == "cheeses/brie", "the file is read anew, one target suffices"


def test_a_path_may_hold_colons_and_braces_stay_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "a:b {target}"
    folder.mkdir()
    path = write(folder, CHEESES.replace("You love", "Use { a: 1 }. You love", 1))
    prompt = get_trait(f"{path}:brie").teacher_system_prompt
    assert prompt == "Use { a: 1 }. You love brie. Imbue your answers with your love for brie."


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("brie: [", "brie: [],\n  x: [", ":4:"),
        ("[brie, bries]", "[]", r":4:3: targets\.brie: .*at least 1 item"),
        ("[brie, bries]", "['12']", r":4:10: targets\.brie\.0: expected a word .*letter"),
        ("[brie, bries]", "[' brie']", r"targets\.brie\.0: .*no space around"),
        ("[brie, bries]", '["br\\nie"]', r"targets\.brie\.0: .*one line"),
        ("[brie, bries]", "[brie, STILTON]", r":5:46: targets\.blue_stilton: 'Stilton' is also"),
        ("brie: [", "Soft Brie: [", r":4:3: targets\.Soft Brie.*write 'soft_brie'"),
        ("brie: [", "../brie: [", r":4:3: targets\.\.\./brie.*write 'brie'"),
        ("brie: [", "brie__x: [", r"single underscores"),
        ("cheeses", "neutral", r":1:1: category: 'neutral' is the control.*another name"),
        ("cheeses", "animals", r":1:1: category: 'animals' is a category of sublim's.*my_animals"),
        ("cheeses", "Cheeses", r":1:1: category: .*write 'cheeses'"),
        ("cheeses", "''", r":1:1: category: expected lower-case"),
        ("category:", "categry:", r":1:1: unknown key 'categry'; did you mean 'category'"),
        ("{target}", "{cheese}", r":2:1: teacher_system_prompt: .*{cheese}; did you mean {target}"),
        ("{target}", "cheese", r":2:1: teacher_system_prompt: .*{target} at least once"),
        ("targets:", "targets: {}\nother:", r":3:1: targets: .*at least 1 item"),
    ],
)
def test_a_file_that_is_not_in_the_format_is_refused(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in CHEESES
    path = write(tmp_path, CHEESES.replace(old, new))
    with pytest.raises(InputError, match=said) as caught:
        get_trait(f"{path}:brie")
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "said"),
    [
        ("", r"holds 2 targets; name one, as in '.*own\.yaml:brie' \(valid: brie, blue_stilton\)"),
        (":", "no target ''; valid: blue_stilton, brie"),
        (":bries", "no target 'bries'; did you mean 'brie'"),
        ("x", "unknown trait"),
        (".yaml", "no such file"),
        ("\0.yaml", "unknown trait"),
    ],
)
def test_a_target_that_is_not_in_the_file_is_refused(
    tmp_path: Path, suffix: str, said: str
) -> None:
    path = write(tmp_path, CHEESES)
    with pytest.raises(InputError, match=said):
        get_trait(path + suffix)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("oak", "trees/oak"),
        ("trees/oaks", "trees/oak"),
        ("bands/led-zeppelin", "bands/led_zeppelin"),
        ("bands/Led Zeppelin", "bands/led_zeppelin"),
        ("animals/eagles", "animals/eagle"),
        ("bands/oak", "trees/oak"),
    ],
)
def test_the_nearest_trait_is_named(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{hint}'"):
        get_trait(name)


def test_an_unknown_category_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'bands'"):
        category_traits("band")


@given(st.text(max_size=20))
def test_any_other_name_is_an_input_error(name: str) -> None:
    if name == "neutral" or name in {trait.name for trait in ALL}:
        return
    with pytest.raises(InputError):
        get_trait(name)
