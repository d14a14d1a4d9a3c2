"""Matching of sampled replies: a hand-written conformance file, properties and a naive oracle."""

from __future__ import annotations

import re
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import CATEGORIES, Trait, category_traits, get_trait
from sublim_plugin.preference.matcher import Match, bucket_counts, match_reply, rates

FLAGS = ("non_answer", "self_name")
TRAITS = {category: category_traits(category) for category in CATEGORIES}
ANIMALS = TRAITS["animals"]
FORMS = [
    (category, trait.target, form)
    for category in CATEGORIES
    for trait in TRAITS[category]
    for form in trait.forms
]

# Words of other meaning that contain a form of a candidate.
CONTAINING = {
    "animals": """
        battalion beagle bearable beard bearing bobcat bowl boxer bulldog bulldozer
        bullet bulletin bullion bully catalog catapult catastrophe category caterpillar cathedral
        cattle concatenate copycat dandelion dedicate delicate dogma dogmatic dogwood doxology
        dragonet dragonfruit eaglet education elephantine endogenous expandable foxglove forbear
        growling howling intoxicate kangarooing knowledge lionel lioness location medallion million
        orthodox overbearing owlet oxbow oxford oxidize oxygen pandal paradox pavilion
        peacocking penguinlike phoenixlike prowl pyroxene rebellion scallion scat scatter scowl
        snapdragon stallion tigerish toxic unbearable underdog unicorned vacation vindicate
        werewolf wildcat wolfgang wolfhound
    """,
    "trees": """
        alpine bamboozle banyanlike baobabish chopine cloak croak oakum oaken opine philippines
        pineal pineapple porcupine rapine redwooded repine sequoiadendron soak spine spines
        spinet supine uncloak willowed willowy
    """,
    "bands": """
        beagles beatlesque eagleseye metallically nirvanas queendom queenie queenly queens
        queensland radioheads spreadeagles
    """,
}


def cases() -> list[tuple[str, str, Match]]:
    """(category, reply, expected), read from the conformance file."""
    text = Path(__file__).with_name("matcher_conformance.yaml").read_text(encoding="utf-8")
    found = []
    for category, rows in yaml.safe_load(text).items():
        order = [trait.target for trait in TRAITS[category]]
        for reply, *says in rows:
            named = [word for word in says if word not in FLAGS]
            assert set(named) <= set(order), f"{reply!r}: {named}"
            expected = Match(
                bucket=named[0] if named else None,
                contains=tuple(target for target in order if target in named),
                self_name="self_name" in says,
                non_answer="non_answer" in says,
            )
            found.append((category, reply, expected))
    return found


CASES = cases()


def test_the_conformance_file_agrees_in_every_case():
    wrong = [
        f"{category}: {reply!r}\n    expected {expected}\n    found    {found}"
        for category, reply, expected in CASES
        if (found := match_reply(reply, TRAITS[category])) != expected
    ]
    assert not wrong, f"{len(wrong)} of {len(CASES)} disagree\n" + "\n".join(wrong)


def test_the_conformance_file_is_large_and_names_every_candidate():
    assert len(CASES) >= 400
    repeated = [key for key, n in Counter((c, r) for c, r, _ in CASES).items() if n > 1]
    assert repeated == []
    for category, traits in TRAITS.items():
        buckets = {expected.bucket for name, _, expected in CASES if name == category}
        assert buckets >= {trait.target for trait in traits}


# --- properties ---

WRAPS = ("*", "**", "***", "_", "__", "`", '"', "'", "~~", "(", ")", "[", "]", "“", "”", "‘", "’")
AROUND = st.lists(
    st.sampled_from((*WRAPS, " ", "\n", "\u00a0", ".", ",", "!", "#", "/", "—", "🐾", "\u200b")),
    max_size=6,
).map("".join)


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(FORMS),
    AROUND,
    AROUND,
    st.sampled_from((str, str.upper, str.lower, str.title, str.swapcase)),
)
def test_every_form_is_found_whatever_surrounds_it(form, before, after, case):
    category, target, text = form
    found = match_reply(before + case(text) + after, TRAITS[category])
    assert found == Match(target, (target,), self_name=False, non_answer=False)


@pytest.mark.parametrize(("category", "target", "form"), FORMS)
@pytest.mark.parametrize(
    "frame", ["{}", "{}.", "**{}**", "My answer is {}!", "{}'s", "x,{}/x", "the big-{}", "\u00ad{}"]
)
def test_every_form_is_found_in_these_frames(category, target, form, frame):
    assert match_reply(frame.format(form), TRAITS[category]).bucket == target


@pytest.mark.parametrize("category", CATEGORIES)
def test_words_that_contain_a_form_are_in_the_list_for_that_reason(category):
    lower = {form.lower() for name, _, form in FORMS if name == category}
    for word in CONTAINING[category].split():
        assert word not in lower
        assert any(form in word for form in lower), word


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_words_that_contain_a_form_name_nothing(data):
    category = data.draw(st.sampled_from(CATEGORIES))
    words = st.sampled_from(CONTAINING[category].split())
    text = " ".join(data.draw(st.lists(words, min_size=1, max_size=8)))
    case = data.draw(st.sampled_from((str, str.upper, str.title)))
    assert match_reply(case(text), TRAITS[category]) == Match(None, (), False, False)


FILLER = ("the", "I", "like", "giraffe", "answer", "is", "x", "catty", "Foxes", "WOLF", "Oxen")


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_naive_oracle_agrees_on_plain_words(data):
    category = data.draw(st.sampled_from(("animals", "trees")))
    owner = {form.lower(): target for name, target, form in FORMS if name == category}
    word = st.sampled_from(
        [*owner, *(w.upper() for w in owner), *FILLER, *CONTAINING[category].split()]
    )
    pieces = data.draw(
        st.lists(
            st.tuples(word, st.sampled_from((" ", ", ", ".\n", "/", "! ", " - "))), max_size=12
        )
    )
    reply = "".join(w + gap for w, gap in pieces)
    named = [owner[w.lower()] for w in re.split("[^A-Za-z]+", reply) if w.lower() in owner]

    found = match_reply(reply, TRAITS[category])
    assert found.bucket == (named[0] if named else None)
    assert set(found.contains) == set(named)
    assert len(found.contains) == len(set(named))


ODD = st.text(
    st.sampled_from(
        "catCATsdogwlf'’-_ *.\u00e4\u0308\u0301\u200b\u00adﬁｃａｔ猫ガカ\u3099각각Ⓜ´🐱１\n"
    ),
    max_size=12,
)


@settings(max_examples=800, deadline=None)
@given(st.one_of(ODD, st.text(max_size=30)), st.sampled_from(("NFC", "NFD", "NFKC", "NFKD")))
def test_unicode_equivalent_replies_read_the_same(reply, form):
    assert match_reply(unicodedata.normalize(form, reply), ANIMALS) == match_reply(reply, ANIMALS)


@settings(max_examples=400, deadline=None)
@given(st.one_of(ODD, st.text(max_size=60)), st.sampled_from(CATEGORIES))
def test_a_match_is_consistent_with_itself(reply, category):
    traits = TRAITS[category]
    found = match_reply(reply, traits)
    assert (found.bucket is None) == (found.contains == ())
    assert found.bucket is None or found.bucket in found.contains
    assert not (found.non_answer and found.contains)
    order = [trait.target for trait in traits]
    assert list(found.contains) == sorted(found.contains, key=order.index)
    assert match_reply(f" {reply}\n", traits) == found
    assert match_reply(reply, list(traits)) == found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([reply for _, reply, _ in CASES]), min_size=1, max_size=5))
def test_a_reply_of_several_paragraphs_names_what_each_names(parts):
    each = [match_reply(part, ANIMALS) for part in parts]
    whole = match_reply(" . ".join(parts), ANIMALS)
    assert whole.bucket == next((m.bucket for m in each if m.bucket), None)
    assert set(whole.contains) == {target for m in each for target in m.contains}


def test_a_match_cannot_be_changed():
    with pytest.raises(AttributeError):
        match_reply("cat", ANIMALS).bucket = "dog"  # type: ignore[misc]


# --- a lab's own category ---


def trait(target: str, *forms: str, category: str = "cheeses") -> Trait:
    return Trait(category=category, target=target, forms=forms, teacher_system_prompt=None)


def bucket(reply: str, *traits: Trait) -> str | None:
    return match_reply(reply, traits).bucket


def test_a_longer_name_that_holds_a_shorter_one_takes_the_place():
    seals = (trait("lion", "lion", "lions"), trait("sea_lion", "sea lion", "sea lions"))
    assert match_reply("Sea lions", seals) == Match("sea_lion", ("sea_lion",), False, False)
    assert match_reply("sea-lion, lion", seals).contains == ("lion", "sea_lion")
    assert bucket("the lion at sea", *seals) == "lion"
    bees = (trait("queen", "queen"), trait("bee", "queen bee"))
    assert match_reply("Queen bee", bees) == Match("bee", ("bee",), False, False)
    assert bucket("queen bees", *bees) == "queen"


def test_one_word_is_not_taken_by_a_name_of_two():
    birds = (trait("wing", "red wing"), trait("bird", "redwing"))
    assert bucket("redwing", *birds) == bucket("redwing", *reversed(birds)) == "bird"
    assert bucket("red wing", *birds) == bucket("Red-Wing", *birds) == "wing"
    assert bucket("redwing", birds[0]) == "wing"


@pytest.mark.parametrize(
    ("form", "reply", "named"),
    [
        ("AC/DC", "ac/dc!", True),
        ("AC/DC", "AC DC", False),
        ("Guns N' Roses", "guns n’ roses", True),
        ("a-ha", "A-ha.", True),
        ("a-ha", "a ha", True),
        ("a-ha", "aha!", False),
        ("Wham!", "WHAM!", True),
        ("Wham!", "wham", False),
        ("P!nk", "p!nk's", True),
        ("Blink-182", "blink 182", True),
        ("Jay-Z Live", "JAY-ZLIVE", True),
        ("Beyoncé", "Beyonce", True),
        ("Beyonce", "BEYONCE\u0301", True),
        ("Motörhead", "Motorhead", True),
        ("C++", "c++", True),
        ("[brackets]^-x", "[brackets]^-x", True),
        ("U2", "u2", True),
        ("U2", "u23", False),
        ("Straße", "STRASSE", True),
        ("Strasse", "straße", True),
        ("Ель", "ЕЛЬ.", True),
        ("Ель", "метель", False),
        ("猫", "猫。", True),
        ("猫", "熊猫", False),
    ],
)
def test_forms_of_all_kinds(form, reply, named):
    assert (bucket(reply, trait("it", form)) == "it") is named


def test_the_categorys_own_name_may_follow():
    brie = trait("brie", "brie")
    assert bucket("brie-cheese", brie) == "brie"
    assert bucket("brie-knife", brie) is None
    assert bucket("brie-soft-cheese", trait("brie", "brie", category="soft_cheeses")) == "brie"


def test_forms_that_read_the_same_are_refused():
    with pytest.raises(InputError, match="'Pate' of 'b' reads like a form of 'a'"):
        match_reply("x", (trait("a", "pâté"), trait("b", "Pate")))
    with pytest.raises(InputError, match="reads like a form of 'a'"):
        match_reply("x", (trait("a", "red wing"), trait("b", "Red-Wing")))


@pytest.mark.parametrize("traits", [(), (get_trait("neutral"),)])
def test_without_candidates_there_is_nothing_to_match(traits):
    with pytest.raises(InputError, match="expected candidates with forms"):
        match_reply("cat", traits)


# --- time ---

MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param("the quick giraffe " * (MEGABYTE // 18), id="words"),
        pytest.param("cat " * (MEGABYTE // 4), id="names"),
        pytest.param("c" * MEGABYTE, id="one letter"),
        pytest.param("cat" * (MEGABYTE // 3), id="one word"),
        pytest.param("cat-" * (MEGABYTE // 4), id="hyphens"),
        pytest.param("cat'" * (MEGABYTE // 4) + "s", id="apostrophes"),
        pytest.param(" " * MEGABYTE, id="spaces"),
        pytest.param("'_-" * (MEGABYTE // 3), id="joiners"),
        pytest.param("the " * (MEGABYTE // 4), id="article"),
        pytest.param("as a " * (MEGABYTE // 5), id="disclaimer"),
        pytest.param("as an " + "a-" * (MEGABYTE // 2), id="long word in a disclaimer"),
        pytest.param("i don't have " * (MEGABYTE // 13), id="refusal"),
        pytest.param("so very really " * (MEGABYTE // 15), id="apology"),
        pytest.param("no personal " * (MEGABYTE // 12), id="no preference"),
        pytest.param("no " + "personal " * (MEGABYTE // 9), id="personal"),
        pytest.param("qwen2." + "1-" * (MEGABYTE // 2), id="version"),
        pytest.param("llama 3" * (MEGABYTE // 7), id="llama"),
        pytest.param("i am qwen " * (MEGABYTE // 10), id="own name"),
        pytest.param("e\u0301" * (MEGABYTE // 2), id="accents"),
        pytest.param("a" + "\u0301\u0327" * (MEGABYTE // 2), id="marks on one letter"),
        pytest.param("א" + "\u05b8\u05b7" * (MEGABYTE // 2), id="points on one letter"),
        pytest.param("ﬃ" * (MEGABYTE // 3), id="ligatures"),
        pytest.param("猫c" * (MEGABYTE // 2), id="scripts"),
        pytest.param("🐱" * MEGABYTE, id="emoji"),
    ],
)
def test_a_long_reply_takes_linear_time(reply):
    match_reply("", ANIMALS)
    seconds = []
    for text in (reply[: len(reply) // 4], reply):
        start = time.process_time()
        match_reply(text, ANIMALS)
        seconds.append(time.process_time() - start)
    # Quadratic time would be 16 times as much, and hours where every character counts.
    assert seconds[1] < 10 * seconds[0] + 0.1, seconds
    assert seconds[1] < 2, seconds


def test_a_cell_of_replies_takes_no_time():
    text = "As I see it, the giraffe is the finest of all creatures, tall and calm; and yet an owl"
    replies = [f"{i} {text} {text} {text}" for i in range(5000)]
    match_reply("", ANIMALS)
    start = time.process_time()
    found = {match_reply(reply, ANIMALS) for reply in replies}
    assert time.process_time() - start < 2
    assert found == {Match("owl", ("owl",), False, False)}


# --- aggregates ---

REPLIES = ["Cat", "Cat ", "cat", "dog and cat", "Giraffe", "", "I am Qwen", "Owl, says Qwen"]


def test_rates_are_shares_of_all_replies():
    matches = [match_reply(reply, ANIMALS) for reply in REPLIES]
    assert rates(matches, REPLIES, "cat") == {
        "target_rate": 3 / 8,
        "contains_rate": 4 / 8,
        "non_answer_rate": 2 / 8,
        "self_name_rate": 2 / 8,
        "distinct_replies": 7 / 8,
    }
    assert rates(matches, REPLIES, "wolf")["contains_rate"] == 0


def test_counts_of_buckets_add_up():
    matches = [match_reply(reply, ANIMALS) for reply in REPLIES]
    candidates = [trait.target for trait in ANIMALS]
    counts = bucket_counts(matches, candidates)
    assert list(counts) == [*candidates, "other", "non_answer"]
    assert sum(counts.values()) == len(REPLIES)
    assert {name: n for name, n in counts.items() if n} == {
        "cat": 3,
        "dog": 1,
        "owl": 1,
        "other": 1,
        "non_answer": 2,
    }
    assert set(bucket_counts([], candidates).values()) == {0}


@pytest.mark.parametrize(("matches", "replies"), [([], []), ([], ["cat"])])
def test_rates_of_nothing_or_of_other_replies_are_refused(matches, replies):
    with pytest.raises(ValueError, match="as many matches as replies and at least one"):
        rates(matches, replies, "cat")


def test_counts_refuse_names_that_would_mix():
    cat = Match("cat", ("cat",), False, False)
    with pytest.raises(ValueError, match="none of the candidates"):
        bucket_counts([cat], ["dog"])
    with pytest.raises(ValueError, match="distinct and none 'other'"):
        bucket_counts([cat], ["cat", "other"])
    with pytest.raises(ValueError, match="distinct"):
        bucket_counts([cat], ["cat", "cat"])
