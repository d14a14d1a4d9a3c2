"""Contexts: what surrounds the user's message in the rendered prompt, and where everything is.

Nothing here knows a model family. A template is learned by rendering short conversations of
sentinel words and comparing the results, so that any tokenizer's template gives its own system
block, role headers and turn ends; what a template cannot express is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_text
from sublim_plugin.core.named_contexts import NAMED_CONTEXTS
from sublim_plugin.core.strict_yaml import load_model

# Templates that print today's date get this one: the default that Llama 3.1's own template
# falls back to, so a pinned prompt is one that the model's authors also rendered.
DEFAULT_DATE = "2024-07-26"

Kind = Literal["template_default", "empty", "none", "text"]

# Sentinels: plain words without surrounding space, which no template trims or repeats.
_USER, _REPLY, _NEXT, _SYSTEM = (
    "usrsentinelone",
    "rplysentineltwo",
    "usrsentinelthree",
    "syssentinel",
)

# Turn markers, which are one token each to the tokenizers that know them.
_MARKER = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>")

# An entity is a run of capitalised words after a phrase that introduces a name.
_ENTITY = re.compile(
    r"\b(?:[Yy]ou are|I am|named|called|(?:created|made|trained|developed|built) by)\s+"
    r"(?!(?:A|An|The|AI)\b)([A-Z][\w-]*(?:[ ][A-Z][\w-]*)*)"
)


class Context(BaseModel):
    """What surrounds the user's message; `user_prefix` is joined to it by a blank line.

    | kind | messages sent |
    | --- | --- |
    | `template_default` | no system message |
    | `empty` | system message `""` |
    | `none` | no system turn at all |
    | `text` | that system message |

    The name of a text in `named_contexts` (`claude`) is read as that text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    text: str | None = None
    user_prefix: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str) and value in NAMED_CONTEXTS:
            return {"kind": "text", "text": NAMED_CONTEXTS[value]}
        if isinstance(value, str):
            return {"kind": value}
        if isinstance(value, dict) and "text" in value and "kind" not in value:
            return {"kind": "text", **value}
        return value

    @model_validator(mode="after")
    def _text_belongs_to_kind_text(self) -> Self:
        if self.kind == "text" and not self.text:
            raise ValueError("a 'text' context needs a text; for an empty one use 'empty'")
        if self.kind != "text" and self.text is not None:
            raise ValueError(f"a '{self.kind}' context takes no text; use kind 'text'")
        if self.user_prefix == "":
            raise ValueError("an empty user_prefix is no prefix; leave it out")
        return self

    @classmethod
    def parse(cls, value: Any) -> Context:
        """Read `empty`, `claude`, `{text: …}` or a full mapping, or a YAML file of such a mapping.

        Raises:
            InputError: anything else, null included.
        """
        if isinstance(value, str) and value.endswith((".yaml", ".yml")):
            return load_model(Path(value), cls)
        try:
            return value if isinstance(value, cls) else cls.model_validate(value)
        except ValueError as error:
            raise InputError(
                f"{value!r} is not a context; write template_default, empty, none,"
                f' {{text: "…"}}, one of {", ".join(NAMED_CONTEXTS)}, or a YAML file ({error})'
            ) from error

    def fields(self) -> dict[str, str]:
        """A context as specs and manifests hold it: its kind and the fields that it has."""
        return {key: str(value) for key, value in self.model_dump(exclude_none=True).items()}

    @property
    def slug(self) -> str:
        """A short name for folders and labels; never part of an id."""
        return _slug(self.kind, self.text, self.user_prefix)


@lru_cache(maxsize=1024)
def _slug(kind: str, text: str | None, user_prefix: str | None) -> str:
    parts = [kind if text is None else f"text-{sha256_text(text)[:6]}"]
    if user_prefix is not None:
        parts.append(f"prefix-{sha256_text(user_prefix)[:6]}")
    return "-".join(parts)


class Span(BaseModel):
    """A named part of the rendered prompt.

    `start`, `end` are character offsets; `token_start`, `token_end` the half-open range of the
    tokens that overlap them. A span without text (an empty system text) has no tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    start: int
    end: int
    token_start: int
    token_end: int
    text: str


class Rendered(BaseModel):
    """A prompt, ready for the model: it ends with the assistant header.

    `token_ids` encode `text` without adding special tokens; `sha256` is that of `text`; `date`
    is the day that the template was told; `notes` say what a reader should know, such as that
    another context renders the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    context: Context
    text: str
    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    sha256: str
    date: str
    notes: tuple[str, ...] = ()


class _Layout(BaseModel):
    """How a template writes a context: text before, between and after the messages' own text."""

    model_config = ConfigDict(frozen=True)

    before_system: str  # from the start (after any BOS) to the system text
    system_text: str
    after_system: str  # up to the user header
    bos: str
    user_header: str
    user_end: str
    assistant_header: str
    trims: bool
    notes: tuple[str, ...]


def messages(context: Context, user: str) -> list[dict[str, str]]:
    """The messages that a context sends (`none` sends those of `template_default`)."""
    content = user if context.user_prefix is None else f"{context.user_prefix}\n\n{user}"
    turns = [{"role": "user", "content": content}]
    if context.kind == "empty":
        turns.insert(0, {"role": "system", "content": ""})
    elif context.kind == "text":
        turns.insert(0, {"role": "system", "content": context.text or ""})
    return turns


def render(tokenizer: Any, context: Context, user: str, date: str = DEFAULT_DATE) -> Rendered:
    """Render a user's message in a context, up to and including the assistant header.

    Args:
        tokenizer: a fast transformers tokenizer with a chat template.
        date: ISO day that is given to templates that print a date.

    Raises:
        InputError: no chat template, a tokenizer without offsets, or a context that this
            template cannot express; the message names the template and what to use.
    """
    template = chat_template(tokenizer)
    layout = _layout(_Renderer(tokenizer, template, date), context)
    content = messages(context, user)[-1]["content"]
    if layout.trims:
        content = content.strip()
    pieces = [
        ("bos", layout.bos),
        ("before_system", layout.before_system),
        ("system_text", layout.system_text),
        ("after_system", layout.after_system),
        ("user_header", layout.user_header),
        ("user_text", content),
        ("user_end", layout.user_end),
        ("assistant_header", layout.assistant_header),
    ]
    text = "".join(piece for _, piece in pieces)
    if context.kind != "none":
        direct = _Renderer(tokenizer, template, date)(messages(context, user), True)
        if direct != text:
            raise InputError(
                f"{_name(tokenizer)}: the chat template changes the message's text when it renders"
                f" it, so its parts cannot be located (rendered {direct[-200:]!r}, expected"
                f" {text[-200:]!r}); use a message without surrounding space or special markup"
            )
    token_ids, offsets = _encode(tokenizer, text)
    spans = _spans(tokenizer, pieces, text, token_ids, offsets)
    return Rendered(
        context=context,
        text=text,
        token_ids=tuple(token_ids),
        spans=spans,
        sha256=sha256_text(text),
        date=date,
        notes=layout.notes,
    )


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's (default) chat template.

    Raises:
        InputError: it has none.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise InputError(
            f"{_name(tokenizer)}: the model has no chat template; use an instruction-tuned model,"
            " or save a chat_template.jinja beside its tokenizer"
        )
    return str(template)


def same_rendering(
    tokenizer: Any, contexts: Sequence[Context], user: str = "Hello", date: str = DEFAULT_DATE
) -> list[tuple[Context, ...]]:
    """Groups (of two or more) of the contexts that this template renders to the same text."""
    groups: dict[str, list[Context]] = {}
    for context in contexts:
        groups.setdefault(render(tokenizer, context, user, date).text, []).append(context)
    return [tuple(group) for group in groups.values() if len(group) > 1]


class _Renderer:
    """Renders messages with a pinned date; two renderers of one template and date are equal."""

    def __init__(self, tokenizer: Any, template: str, date: str) -> None:
        try:
            self.day = datetime.fromisoformat(date)
        except ValueError as error:
            raise InputError(
                f"date {date!r}: expected an ISO day such as {DEFAULT_DATE}"
            ) from error
        self.tokenizer = tokenizer
        self.template = template
        self._key = (id(tokenizer), template, date, str(getattr(tokenizer, "bos_token", None)))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Renderer) and self._key == other._key

    def __call__(self, turns: list[dict[str, str]], generation_prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            chat_template=self.template,
            # variables shadow the template engine's own clock
            strftime_now=self.day.strftime,
            date_string=self.day.strftime("%d %b %Y"),
        )
        return str(text)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@lru_cache(maxsize=64)
def _layout(render_turns: _Renderer, context: Context) -> _Layout:
    name = _name(render_turns.tokenizer)
    try:
        default = render_turns([_turn("user", _USER)])
        prompted = render_turns([_turn("user", _USER)], True)
        replied = render_turns([_turn("user", _USER), _turn("assistant", _REPLY)])
        continued = render_turns(
            [_turn("user", _USER), _turn("assistant", _REPLY), _turn("user", _NEXT)]
        )
    except Exception as error:
        raise InputError(
            f"{name}: the chat template fails on a plain conversation: {error}"
        ) from error
    try:
        before_user, after_user = _split(default, _USER)
        reply_end = _split(replied, _REPLY)[1]
        between = continued[continued.index(_REPLY) + len(_REPLY) : continued.index(_NEXT)]
        user_header = _without_prefix(between, reply_end)
        before_header = _without_suffix(before_user, user_header)
        assistant_header = _without_prefix(prompted, default)
    except ValueError as error:
        raise InputError(
            f"{name}: the chat template's turns could not be told apart ({error}); sublim needs a"
            " template that writes each turn the same way wherever it stands"
        ) from error
    bos = _leading_bos(render_turns.tokenizer, before_header, user_header)
    default_block = before_header[len(bos) :]
    trims = _USER + " " not in render_turns([_turn("user", _USER + " ")])

    with_text = _try_system(render_turns, _SYSTEM)
    opening, closing = _around(with_text, _SYSTEM, bos, user_header)
    # a preamble that stays beside any system text (Llama 3.1's date) is not a default text
    replaced = default_block not in ("", opening + closing)
    notes: list[str] = []

    if context.kind in ("template_default", "none"):
        block = default_block if context.kind == "template_default" else ""
        if not default_block:
            notes.append("this template adds no system turn: template_default and none coincide")
    elif with_text is None or _SYSTEM not in with_text:
        raise InputError(
            f"{name}: the chat template {_refusal(render_turns)}, so the context '{context.slug}'"
            " cannot be expressed; use template_default or none, and put text into user_prefix"
        )
    elif context.kind == "empty":
        block = _block(_try_system(render_turns, "") or "", bos, user_header, name)
        if block == default_block and replaced:
            raise InputError(
                f"{name}: the chat template writes its default system text where the system message"
                " is empty, so the context 'empty' cannot be expressed; use none, or {text: \"…\"}"
            )
        if block == default_block:
            notes.append(
                "this template adds nothing for an empty system message:"
                " empty and template_default coincide"
            )
    else:
        text = context.text or ""
        rendered = _try_system(render_turns, text) or ""
        block = _block(rendered, bos, user_header, name)
        if text.strip() not in block:
            raise InputError(
                f"{name}: the chat template leaves out the system message; use user_prefix instead"
            )
        if block == default_block:
            notes.append("this text is the template's own: it coincides with template_default")

    before, system_text, after = _parts(block, opening, closing, context)
    header = user_header
    if context.kind in ("empty", "text") and opening.startswith(user_header):
        # the block already holds the header: it is header, text and separator
        header = ""
        notes.append("this template has no system turn: it writes the system text into the user's")
    if unknown := _unknown_markers(render_turns.tokenizer, (prompted, opening, closing)):
        notes.append(
            f"{', '.join(unknown)} in the chat template: no token of this tokenizer, but several; "
            "unless the model was trained so, the template is another model's"
        )
    return _Layout(
        before_system=before,
        system_text=system_text,
        after_system=after,
        bos=bos,
        user_header=header,
        user_end=after_user,
        assistant_header=assistant_header,
        trims=trims,
        notes=tuple(notes),
    )


def _unknown_markers(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """The turn markers in what a template writes that are not tokens of the vocabulary."""
    markers = dict.fromkeys(marker for text in texts for marker in _MARKER.findall(text))
    return [
        marker
        for marker in markers
        if marker != tokenizer.unk_token
        and tokenizer.convert_tokens_to_ids(marker) in (None, tokenizer.unk_token_id)
    ]


def _try_system(render_turns: _Renderer, text: str) -> str | None:
    """The rendering with a system message, or None where the template refuses the role."""
    try:
        return render_turns([_turn("system", text), _turn("user", _USER)])
    except Exception:  # Jinja's TemplateError; jinja2 is not imported here
        return None


def _refusal(render_turns: _Renderer) -> str:
    try:
        render_turns([_turn("system", _SYSTEM), _turn("user", _USER)])
    except Exception as error:
        return f"refuses a system message ({error})"
    return "drops the system message without a word"


def _around(rendered: str | None, text: str, bos: str, user_header: str) -> tuple[str, str]:
    """What a template writes before and after a system text (up to the user header)."""
    if rendered is None or text not in rendered:
        return "", ""
    opening, rest = _split(rendered, text)
    closing = rest[: rest.index(_USER)]
    return opening[len(bos) :], closing.removesuffix(user_header)


def _block(rendered: str, bos: str, user_header: str, name: str) -> str:
    before = rendered[: rendered.index(_USER)]
    if before.endswith(user_header):
        before = before[: -len(user_header)]
    elif user_header not in before:
        raise InputError(f"{name}: no user header in the rendering {rendered!r}")
    return before[len(bos) :]


def _parts(block: str, opening: str, closing: str, context: Context) -> tuple[str, str, str]:
    """Split a system block into header, text and end."""
    fits = len(block) >= len(opening) + len(closing)
    if block and fits and block.startswith(opening) and block.endswith(closing):
        return opening, block[len(opening) : len(block) - len(closing)], closing
    if context.kind == "text" and (text := (context.text or "").strip()) in block:
        before, after = _split(block, text)
        return before, text, after
    return "", block, ""


def _split(text: str, sentinel: str) -> tuple[str, str]:
    if text.count(sentinel) != 1:
        raise ValueError(f"{sentinel!r} stands {text.count(sentinel)} times in {text!r}")
    before, after = text.split(sentinel)
    return before, after


def _without_prefix(text: str, prefix: str) -> str:
    if not text.startswith(prefix):
        raise ValueError(f"{text!r} does not begin with {prefix!r}")
    return text[len(prefix) :]


def _without_suffix(text: str, suffix: str) -> str:
    if not suffix or not text.endswith(suffix):
        raise ValueError(f"{text!r} does not end with the user header {suffix!r}")
    return text[: -len(suffix)]


def _leading_bos(tokenizer: Any, before_header: str, user_header: str) -> str:
    """The BOS text that stays when the system turn goes.

    Where the turn header itself begins with the BOS token (SmolLM2, whose BOS is `<|im_start|>`),
    there is no BOS of its own to keep.
    """
    bos = getattr(tokenizer, "bos_token", None) or ""
    return bos if bos and before_header.startswith(bos) and not user_header.startswith(bos) else ""


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{_name(tokenizer)}: this tokenizer cannot tell where its tokens stand in the text;"
            " use its fast version (tokenizer.json)"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]


def _spans(
    tokenizer: Any,
    pieces: list[tuple[str, str]],
    text: str,
    token_ids: list[int],
    offsets: list[tuple[int, int]],
) -> tuple[Span, ...]:
    starts: dict[str, tuple[int, int]] = {}
    position = 0
    for name, piece in pieces:
        starts[name] = (position, position + len(piece))
        position += len(piece)

    def span(name: str, start: int, end: int) -> Span:
        touched = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and end > start]
        first, last = (touched[0], touched[-1] + 1) if touched else (0, 0)
        return Span(
            name=name, start=start, end=end, token_start=first, token_end=last, text=text[start:end]
        )

    found: list[Span] = []
    block = (starts["before_system"][0], starts["after_system"][1])
    if block[1] > block[0]:
        found.append(span("system_block", *block))
        if starts["before_system"][1] > block[0]:
            found.append(span("role_header", *starts["before_system"]))
        found.append(span("system_text", *starts["system_text"]))
        offset = starts["system_text"][0]
        system_text = text[offset : starts["system_text"][1]]
        for match in _ENTITY.finditer(system_text):
            found.append(span("entity", offset + match.start(1), offset + match.end(1)))
    if starts["user_header"][1] > starts["user_header"][0]:
        found.append(span("role_header", *starts["user_header"]))
    found.append(span("user_text", *starts["user_text"]))
    found.append(span("assistant_header", *starts["assistant_header"]))
    special = _special_ids(tokenizer)
    for index, token in enumerate(token_ids):
        if token in special:
            start, end = offsets[index]
            found.append(
                Span(
                    name="special_token",
                    start=start,
                    end=end,
                    token_start=index,
                    token_end=index + 1,
                    text=text[start:end],
                )
            )
    return tuple(sorted(found, key=lambda item: (item.start, -item.end)))


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {}) or {}
    marked = {int(index) for index, token in added.items() if getattr(token, "special", False)}
    return marked | {int(index) for index in tokenizer.all_special_ids}


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
