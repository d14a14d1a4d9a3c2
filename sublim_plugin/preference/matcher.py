"""Which candidate a sampled reply names. Pure and versioned; it knows words, not meanings.

The rule. A reply is read in Unicode NFKC, in any case, without accents or invisible characters.
It names a candidate where one of its forms stands as a word: no letter or digit before it, and
after it neither a letter or digit nor a hyphen, underscore or apostrophe with one behind it. So a
compound counts by its last part (big-cat, eagle-owl as owl; not cat-like, tiger-shark, bull's-eye)
and one word without a hyphen is one word (not bobcat, CatDog, cat5). What may follow nevertheless:
's, 'd, 'll, 've, 're, and the category's name (oak-tree). Plurals count where they are forms.
A space in a form may be white space, one hyphen, one underscore or nothing (LedZeppelin).
The text is read from left to right without overlap, the longest form first (dragonfly, not
dragon): the first candidate named is the bucket. Whatever surrounds a name is not interpreted.

So "I don't like cats", "~~cat~~" and "cat.jpg" name cat, "polar bear" bear and "sea lion" lion,
unless a candidate has "sea lion" as a form; an emoji is no word. Han, kana and Hangul beside Latin
letters end a word ("是cat。"), but a form in a script without spaces counts only by itself.

No answer is a reply that names no candidate and: has no letter (numbers, emoji); or says no more
than "none" or its own name; or holds a refusal or disclaimer in English, even if an animal
outside the candidates follows. Any other reply is an answer ("Giraffe"), with no bucket.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import Trait

# Any change that can alter a label is a new version: rates of two versions are never pooled.
MATCHER_VERSION = "1.0"

RATES = ("target_rate", "contains_rate", "non_answer_rate", "self_name_rate", "distinct_replies")
"""What `rates` gives."""

OTHER = "other"
NON_ANSWER = "non_answer"


class Match(NamedTuple):
    """What one reply says.

    Attributes:
        bucket: the candidate named first, None where no candidate is named.
        contains: every candidate named, in the candidates' order.
        self_name: the reply names a language model or a maker of one, whatever else it says.
        non_answer: no candidate is named and nothing else is offered as an answer.
    """

    bucket: str | None
    contains: tuple[str, ...]
    self_name: bool
    non_answer: bool


def match_reply(reply: str, traits: Sequence[Trait]) -> Match:
    """Read one reply against all candidates of a category.

    Args:
        reply: the reply as sampled, without the prompt.
        traits: the category's traits (`core.traits.category_traits`).

    Raises:
        InputError: no candidate has a form, or two candidates have forms that read the same.
    """
    names, pattern = _compiled(tuple((t.category, t.target, t.forms) for t in traits))
    plain = _plain(reply)
    folded = plain.casefold()
    named = [names[_SEPARATOR.sub(" ", form)] for form in pattern.findall(folded)]
    distinct = frozenset(named)
    own_name = bool(_OWN_NAME.search(folded) or _CASED_NAME.search(plain))
    return Match(
        bucket=named[0] if named else None,
        contains=tuple(t.target for t in traits if t.target in distinct),
        self_name=own_name,
        non_answer=not named and _says_nothing(plain, folded, own_name),
    )


def rates(matches: Sequence[Match], replies: Sequence[str], target: str) -> dict[str, float]:
    """Shares of the replies, each between 0 and 1.

    Returns:
        `target_rate` (the bucket is the target), `contains_rate` (the target is named),
        `non_answer_rate`, `self_name_rate`, and `distinct_replies`: distinct texts, white space
        around them aside, per reply.

    Raises:
        ValueError: no reply, or not one match for each.
    """
    if not replies or len(matches) != len(replies):
        raise ValueError(
            f"expected as many matches as replies and at least one, found {len(matches)} and"
            f" {len(replies)}"
        )
    total = len(replies)
    return {
        "target_rate": sum(m.bucket == target for m in matches) / total,
        "contains_rate": sum(target in m.contains for m in matches) / total,
        "non_answer_rate": sum(m.non_answer for m in matches) / total,
        "self_name_rate": sum(m.self_name for m in matches) / total,
        "distinct_replies": len({reply.strip() for reply in replies}) / total,
    }


def bucket_counts(matches: Sequence[Match], candidates: Sequence[str]) -> dict[str, int]:
    """Replies in each bucket: the candidates in order, then `other` and `non_answer`.

    The counts sum to the number of matches.

    Raises:
        ValueError: a candidate is called `other` or `non_answer`, or a match's bucket is none of
            the candidates.
    """
    counts = dict.fromkeys((*candidates, OTHER, NON_ANSWER), 0)
    if len(counts) != len(candidates) + 2:
        raise ValueError(
            f"candidates must be distinct and none '{OTHER}' or '{NON_ANSWER}', found"
            f" {list(candidates)}"
        )
    for match in matches:
        bucket = match.bucket or (NON_ANSWER if match.non_answer else OTHER)
        if bucket not in counts:
            raise ValueError(f"a match has the bucket '{bucket}', which is none of the candidates")
        counts[bucket] += 1
    return counts


# --- reading ---

# Soft hyphens, zero-width and direction marks, fillers, variation selectors and tags, and the
# accents and overlays of the Latin, Greek and Cyrillic scripts once they are split off.
_UNSEEN = re.compile(
    "[\u00ad\u0300-\u036f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u1ab0-\u1aff\u1dc0-\u1dff"
    "\u200b-\u200f\u202a-\u202e\u2060-\u206f\u20d0-\u20ff\u3164\ufe00-\ufe0f\ufe20-\ufe2f\ufeff"
    "\U000e0000-\U000e0fff]"
)
# Sorting a long run of combining marks takes quadratic time; UAX #15 allows 30 in a stream.
_LONG_RUN = re.compile(r"([^\w\s\x00-\x7f]{30})[^\w\s\x00-\x7f]+")
_ASIAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
_SCRIPT_CHANGE = re.compile(f"(?<=[{_ASIAN}])(?=[A-Za-z0-9])|(?<=[A-Za-z0-9])(?=[{_ASIAN}])")
_LOOK_ALIKES = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201b\u02bc\u2032", "'"),
        **dict.fromkeys("\u2010\u2043", "-"),
        **{"Œ": "OE", "œ": "oe", "Æ": "AE", "æ": "ae"},
    }
)

_SEPARATOR = re.compile("[ _-]")


def _plain(text: str) -> str:
    """The text as it is matched, in its own case and with single spaces."""
    if not text.isascii():
        text = _LONG_RUN.sub(r"\1", _UNSEEN.sub("", text))
        text = _UNSEEN.sub("", unicodedata.normalize("NFKD", text))
        text = unicodedata.normalize("NFC", text).translate(_LOOK_ALIKES)
        text = _SCRIPT_CHANGE.sub(" ", text)
    return " ".join(text.split())


@lru_cache(maxsize=64)
def _compiled(
    candidates: tuple[tuple[str, str, tuple[str, ...]], ...],
) -> tuple[dict[str, str], re.Pattern[str]]:
    """Spelling -> target, separators written as one space, and the pattern that finds spellings."""
    names: dict[str, str] = {}
    for _, target, forms in candidates:
        for form in forms:
            spelling = _SEPARATOR.sub(" ", _plain(form).casefold())
            owner = names.setdefault(spelling, target)
            if owner != target:
                raise InputError(
                    f"'{form}' of '{target}' reads like a form of '{owner}'; a reply names one"
                    " target, so remove it from one of them"
                )
    if not names:
        raise InputError("expected candidates with forms, found none; pass a category's traits")
    for _, target, forms in candidates:
        for form in forms:
            # A form that is one word by itself keeps it: "red wing" does not take "redwing".
            joined = _plain(form).casefold().replace(" ", "")
            names.setdefault(_SEPARATOR.sub(" ", joined), target)
    kinds = {_plain(category.replace("_", " ")).removesuffix("s") for category, _, _ in candidates}
    spellings = sorted(names, key=len, reverse=True)
    first_letters = "".join(sorted({re.escape(spelling[0]) for spelling in spellings}))
    return names, re.compile(
        rf"(?<![^\W_])(?=[{first_letters}])"
        rf"({_any_of(spellings)})"
        rf"(?:'(?:s|d|ll|ve|re))?(?:[-_](?:{_any_of(sorted(kinds))})s?)?"
        r"(?!['_-]?[^\W_])"
    )


def _any_of(spellings: Sequence[str]) -> str:
    return "|".join(re.escape(s).replace(r"\ ", "[ _-]") for s in spellings)


# --- replies that are no answer ---

_VERSION = r"(?:[- ]?v?\d[\w.]*(?:-[\w.]+)*)?"
# Names as words in any case. Llama is an animal too, and Gemini a sign: they count with a version
# ("llama-3", "Llama 3.1", but not the "Llama 2. Zebra" of a numbered list), with their maker's name
# or where the reply introduces itself ("I am Llama", not "I am a llama").
_OWN_NAME = re.compile(
    # The first letters of what follows: an alternation tried at every word is slow.
    r"(?<![^\W_])(?=[acdghilmnopqst])(?:"
    r"(?:qwen|qwq|smollm|gemma|(?:chat)?gpt|mistral|mixtral|phi|deepseek|tongyi|huggingface"
    r"|openai|open ai|alibaba|anthropic|meta ai|(?:google )?deepmind|google gemini"
    r"|(?:meta |code ?|tiny ?)llama|(?<!-)claude(?! (?:monet|debussy|shannon)))"
    rf"{_VERSION}"
    r"|(?:llama|gemini)-?\d[\w.]*(?:-[\w.]+)*"
    r"|(?:llama|gemini) \d(?:\.\d+)?(?![\w):]|\. )"
    r"|(?:i am|i'm|name is|call me|called|named|known as) \W{0,2}(?:llama|gemini)"
    r"|(?:created|made|developed|trained|built) by (?:meta|google|microsoft)"
    r")(?![^\W_])|通义千问"
)
# "LLaMA" is the model, "Llama" and "LLAMA" the animal; a "hugging face" is no company.
_CASED_NAME = re.compile(r"(?<![^\W_])(?:LLaMA|LlaMA|Hugging Face|HUGGING FACE)(?![^\W_])")

_MACHINE = (
    r"(?:ai|a\.i|artificial intelligence|language model|llm|chatbot|bot|robot|program|machine"
    r"|assistant|algorithm)"
)
_WORDS = r"(?:[\w-]{1,20},? )"
_REFUSAL = re.compile(
    r"\b(?=[acdhimnprw])(?:"
    + "|".join(
        (
            r"(?:i'm|i am) (?:so |very |really |truly )?sorry",
            r"my apologies",
            r"i apologi[sz]e",
            rf"as an? {_WORDS}{{0,3}}?{_MACHINE}",
            rf"(?:i'm|im|i am) (?:just |only |simply |merely )?an? {_WORDS}{{0,3}}?{_MACHINE}",
            r"i (?:can't|cannot|can not|cant|could not|couldn't|won't|will not)"
            r"(?! (?:get enough|help but|lie|deny|wait|resist|imagine|stop|live)\b)",
            r"(?:i'm|i am) (?:unable|not (?:able|sure|programmed|designed|capable|allowed))",
            r"i (?:don't|do not|dont) (?:really |actually )?(?:know|understand)",
            r"(?:don't|do not|dont|doesn't|does not) (?:really |actually |truly |currently )?"
            rf"(?:have|possess|hold|form|feel|experience) {_WORDS}{{0,4}}?"
            r"(?:preferences?|favou?rites?|feelings?|emotions?|opinions?|likes|tastes?|beliefs?)",
            r"(?:no|without) (?:personal |particular |specific |strong |real ){0,3}"
            r"(?:preferences?|favou?rites?|opinions?|feelings|emotions)",
            r"(?:rather|prefer|choose) not",
            r"not possible (?:for me )?to",
            r"impossible (?:for me )?to",
            r"how (?:can|may) i (?:help|assist)",
        )
    )
    + r")\b"
)
_REFUSAL_OPENING = re.compile(
    r"\W*(?:(?:(?:i'm|i am|so|very|really|truly|oh),? ){0,4}(?:sorry|apologies)"
    r"|please (?:provide|clarify|specify))\b"
)
# "Yes" is a band.
_NOTHING = re.compile(
    "none(?: of (?:them|these|the above))?|n a|nothing|null|unknown|undefined|not applicable|idk"
    "|no(?: answer| comment| idea)?|not sure|ok(?:ay)?|sure|certainly|of course"
)
# What may stand around its own name in a reply that says no more than that.
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_AROUND_NAME = frozenset(
    _WORD.findall(
        "i am m my name is s it its it's i'm me call called named known as you are by created made"
        " developed trained built from the a an of and at cloud ai model language large helpful"
        " assistant team company hi hello favorite favourite animal tree band choose pick would be"
        " i'd"
    )
)


def _says_nothing(plain: str, folded: str, own_name: bool) -> bool:
    words = _WORD.findall(folded)
    if not words or _NOTHING.fullmatch(" ".join(words)):
        return True
    if _REFUSAL_OPENING.match(folded) or _REFUSAL.search(folded):
        return True
    if not own_name:
        return False
    rest = _OWN_NAME.sub(" ", _CASED_NAME.sub(" ", plain).casefold())
    return _AROUND_NAME.issuperset(_WORD.findall(rest))
