"""Where a gate's positions lie in a rendered prompt, and the prompt's text with them marked.

Spans come from the context (see `core.contexts`); a token belongs to a span if it overlaps the
span's characters. Nothing is guessed: a name or substring that is not there is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from sublim_plugin.core.contexts import Context, Rendered, render
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.strict_yaml import nearest
from sublim_plugin.localize.spec import Choice, Selector, Text, Tokens, shown

SPANS = (
    "system_block", "system_text", "entity", "user_prefix", "question", "user_text",
    "assistant_header", "last_token", "role_header", "special_token", "template",
)  # fmt: skip
"""Every name that a span can have. `template` is every token that is not wholly inside text that
the user gave (a system text of one's own, the user's message)."""


class Prompt(BaseModel):
    """A rendered prompt with the place of each token.

    Attributes:
        question: the user's question, without a prefix.
        offsets: half-open character range of each token in `rendered.text`.
        spans: name -> indices of its tokens, ascending. A name that several spans of the context
            share (`entity`) holds all of them; `entity:1`, `entity:2` are the single ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rendered: Rendered
    question: str
    offsets: tuple[tuple[int, int], ...]
    spans: dict[str, tuple[int, ...]]

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens, runs separated by " … "."""
        pieces = [self.rendered.text[start:end] for start, end in self._runs(tokens)]
        return " … ".join(pieces)

    def marked(self, tokens: Iterable[int]) -> str:
        """The prompt on one line with ⟦ ⟧ around runs of the tokens."""
        text, at, parts = self.rendered.text, 0, []
        for start, end in self._runs(sorted(set(tokens))):
            parts += [text[at:start], "⟦", text[start:end], "⟧"]
            at = end
        return one_line("".join([*parts, text[at:]]))

    def excerpt(self, tokens: Iterable[int]) -> str:
        """As `marked`, with long stretches shortened to their ends."""
        pieces = re.split("([⟦⟧])", self.marked(tokens))
        last = len(pieces) - 1
        for i, piece in enumerate(pieces):
            inside = i > 0 and pieces[i - 1] == "⟦"
            before, after = (28, 28) if inside else (10 * (i > 0), 10 * (i < last))
            if len(piece) > before + after + 1:
                pieces[i] = f"{piece[:before]}…{piece[len(piece) - after :]}"
        return "".join(pieces)

    def _runs(self, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Character ranges of runs of consecutive tokens."""
        runs: list[tuple[int, int]] = []
        for before, token in zip([None, *tokens], tokens, strict=False):
            start, end = self.offsets[token]
            if before is not None and token == before + 1:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((start, end))
        return runs


def one_line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


def locate(tokenizer: Any, context: Context, question: str) -> Prompt:
    """Render a question in a context and find every span.

    Raises:
        InputError: as `core.contexts.render`, or a question that the template rewrites.
    """
    rendered = render(tokenizer, context, question)
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = tuple((int(a), int(b)) for a, b in encoded["offset_mapping"])
    groups: dict[str, list[tuple[int, ...]]] = {}
    for span in rendered.spans:
        if span.token_end > span.token_start:
            tokens = tuple(range(span.token_start, span.token_end))
            groups.setdefault(span.name, []).append(tokens)
    user = next(span for span in rendered.spans if span.name == "user_text")
    asked = question if user.text.endswith(question) else question.strip()
    if not user.text.endswith(asked):
        raise InputError(f"the template rewrites the question {question!r} as {user.text!r}")
    if context.user_prefix is not None:
        end = user.start + len(context.user_prefix)
        groups["user_prefix"] = [_overlapping(offsets, user.start, end)]
    groups["question"] = [_overlapping(offsets, user.end - len(asked), user.end)]
    groups["last_token"] = [(len(offsets) - 1,)]
    given = [span for span in rendered.spans if span.name == "user_text"]
    if context.kind == "text":
        given += [span for span in rendered.spans if span.name == "system_text"]
    groups["template"] = [
        tuple(
            token
            for token, (start, end) in enumerate(offsets)
            if not any(span.start <= start and end <= span.end for span in given)
        )
    ]
    spans: dict[str, tuple[int, ...]] = {}
    for name in SPANS:
        found = groups.get(name, [])
        if not found:
            continue
        spans[name] = tuple(sorted({token for tokens in found for token in tokens}))
        if len(found) > 1:
            spans |= {f"{name}:{number}": tokens for number, tokens in enumerate(found, 1)}
    return Prompt(rendered=rendered, question=asked, offsets=offsets, spans=spans)


def _overlapping(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, ...]:
    return tuple(i for i, (a, b) in enumerate(offsets) if a < end and b > start)


def tokens_of(prompt: Prompt, selector: Selector) -> tuple[int, ...]:
    """Indices of the tokens that a selector names, ascending.

    Raises:
        InputError: it matches nothing; the message shows the prompt and its spans.
    """
    length = len(prompt.offsets)
    if isinstance(selector, Tokens):
        outside = [index for index in selector.tokens if not -length <= index < length]
        if outside:
            raise InputError(
                f"token {outside[0]} is not in the prompt, which has {length} tokens (0 to "
                f"{length - 1}, or -1 to {-length}): {one_line(prompt.rendered.text)}"
            )
        return tuple(sorted({index % length for index in selector.tokens}))
    if isinstance(selector, Text):
        return _substring(prompt, selector)
    name = selector.removesuffix(":1") if selector not in prompt.spans else selector
    if name not in prompt.spans:
        hint = nearest(selector, list(prompt.spans))
        raise InputError(
            f"no span '{selector}' in this prompt{hint} (spans: {', '.join(prompt.spans)}). "
            f"The prompt: {one_line(prompt.rendered.text)}"
        )
    return prompt.spans[name]


def _substring(prompt: Prompt, selector: Text) -> tuple[int, ...]:
    text = prompt.rendered.text
    starts = [i for i in range(len(text)) if text.startswith(selector.text, i)]
    if selector.occurrence is not None:
        starts = starts[selector.occurrence - 1 : selector.occurrence]
    if not starts:
        raise InputError(f"{shown(selector)} is not in the prompt: {one_line(text)}")
    found = {
        token
        for start in starts
        for token in _overlapping(prompt.offsets, start, start + len(selector.text))
    }
    return tuple(sorted(found))


def selected(prompt: Prompt, choice: Choice[Selector] | None) -> tuple[bool, ...]:
    """For each token of the prompt, whether the choice takes it.

    Raises:
        InputError: an item matches nothing, or two items share a token.
    """
    if choice is None:
        return (True,) * len(prompt.offsets)
    owners: dict[int, Selector] = {}
    for selector in choice.named:
        tokens = tokens_of(prompt, selector)
        for token in tokens:
            if token in owners:
                both = set(tokens_of(prompt, owners[token])) & set(tokens)
                raise InputError(
                    f"'{shown(owners[token])}' and '{shown(selector)}' overlap: "
                    f"{prompt.marked(both)}. Name each token once"
                )
        owners |= dict.fromkeys(tokens, selector)
    return tuple(choice.holds(token in owners) for token in range(len(prompt.offsets)))


def span_table(prompt: Prompt) -> str:
    """The prompt's spans as aligned text: name, tokens, and the prompt with them marked."""
    lines = [(name, _place(t), prompt.excerpt(t)) for name, t in prompt.spans.items()]
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    return "\n".join(
        f"{name:<{widths[0]}}  {place:>{widths[1]}}  {text}" for name, place, text in lines
    )


def _place(tokens: Sequence[int]) -> str:
    if len(tokens) == 1:
        return str(tokens[0])
    one_run = len(tokens) == tokens[-1] - tokens[0] + 1
    return f"{tokens[0]}-{tokens[-1]}" if one_run else f"{len(tokens)} tokens"
