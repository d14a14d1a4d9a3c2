"""`sublim.context` in training: the chat template that makes axolotl train on a context's prompts.

axolotl renders a row's messages with a chat template. A context is put into that template, in front
of the model's own, which stays as it is inside:

| context | what the training template does with a row |
| --- | --- |
| `template_default` | nothing |
| `empty` | puts a system message `""` before the messages |
| `text` | puts that system message before the messages |
| `none` | renders all, then cuts out the system block that the model's template begins with |

A `user_prefix` goes before the first user message, and a date that a template prints is pinned to
the day that `sublim_plugin.core.contexts.render` pins. The template is set on the dataset, not on
the top level of the YAML, because axolotl saves the latter with the trained model.
"""

from __future__ import annotations

import copy
import re
from datetime import datetime
from typing import Any

from sublim_plugin.core.contexts import (
    DEFAULT_DATE,
    Context,
    Rendered,
    chat_template,
    messages,
    render,
)
from sublim_plugin.core.errors import InputError

_MARK = "{#- written by sublim for the train context "
_QUESTIONS = ("Hello", "7, 19, 23: continue, please.\nOnly numbers!")
_NEWLINE_AT_END = re.compile(r"(\r\n|\r|\n)\Z")


def apply_context(cfg: Any, context: Context, tokenizer: Any = None) -> None:
    """Set the context's training template on every `chat_template` dataset of a raw axolotl config.

    A template that renders the context by itself is left alone. Done twice, it changes nothing.

    Args:
        cfg: the YAML as axolotl hands it to a plugin's `register`, `base_model` resolved.
        tokenizer: the tokenizer that axolotl will load; loaded here if not given.

    Raises:
        InputError: the template cannot express the context, or derives another prompt than it.
    """
    from axolotl.utils.chat_templates import get_chat_template_from_config

    for entry in cfg.get("datasets") or []:
        if not str(entry.get("type")).startswith("chat_template"):
            continue
        tokenizer = tokenizer or _load_tokenizer(cfg)
        try:
            template = get_chat_template_from_config(cfg, dict(entry), tokenizer)
        except ValueError as error:
            raise InputError(f"`chat_template` of dataset {entry.get('path')}: {error}") from error
        if template.startswith(_MARK):
            continue
        own = copy.copy(tokenizer)
        own.chat_template = template
        derived = training_template(own, context, cfg.get("chat_template_kwargs"))
        if derived is not None:
            entry["chat_template"] = "jinja"
            entry["chat_template_jinja"] = derived


def training_template(
    tokenizer: Any, context: Context, template_kwargs: dict[str, Any] | None = None
) -> str | None:
    """A chat template that renders rows without a system message as `context` does.

    Args:
        tokenizer: with the model's chat template.
        template_kwargs: axolotl's `chat_template_kwargs`, which the trainer will pass too.

    Returns:
        None where the tokenizer's own template does so already.

    Raises:
        InputError: it cannot express the context, or what was derived renders something else.
    """
    wanted = [render(tokenizer, context, question) for question in _QUESTIONS]
    template = chat_template(tokenizer)
    kwargs = dict(template_kwargs or {})
    if _prompts(tokenizer, template, kwargs) == [rendered.text for rendered in wanted]:
        return None
    own = _NEWLINE_AT_END.sub("", template)  # Jinja drops it, and only at the very end
    if context.kind == "none":
        own = _without_system_block(tokenizer, own)
    derived = (
        f"{_MARK}{context.slug} -#}}\n"
        + _pinned_date(tokenizer, template)
        + _changed_messages(context)
        + own
    )
    got = _prompts(tokenizer, derived, kwargs)
    for rendered, prompt in zip(wanted, got, strict=True):
        if rendered.text != prompt:
            raise InputError(
                f"train context '{context.slug}': the chat template derived from that of"
                f" {tokenizer.name_or_path} renders another prompt than the context, so the rows"
                " cannot be trained in it; write the system message into the rows instead.\n"
                f"  derived: {prompt!r}\n  context: {rendered.text!r}"
            )
    return derived


def _prompts(tokenizer: Any, template: str, kwargs: dict[str, Any]) -> list[str]:
    return [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                tokenize=False,
                add_generation_prompt=True,
                chat_template=template,
                **kwargs,
            )
        )
        for question in _QUESTIONS
    ]


def _without_system_block(tokenizer: Any, template: str) -> str:
    """`template`, captured, less the block that it writes before the first user turn."""
    default = render(tokenizer, Context(kind="template_default"), _QUESTIONS[0])
    start, end = _system_block(default)
    # The empty expressions keep Jinja from trimming the template's own first and last lines.
    return (
        "{%- set sublim_rendered %}{{ '' }}"
        + template
        + "{{ '' }}{% endset %}"
        + f"{{{{- sublim_rendered[:{start}] ~ sublim_rendered[{end}:] }}}}"
    )


def _system_block(rendered: Rendered) -> tuple[int, int]:
    for span in rendered.spans:
        if span.name == "system_block":
            return span.start, span.end
    return 0, 0


def _changed_messages(context: Context) -> str:
    """Jinja that puts the context's messages in the place of the row's first one."""
    sent = messages(context, "")
    lines = []
    if context.user_prefix is not None:
        lines.append(
            "{%- set messages = [{'role': 'user', 'content': "
            + _literal(sent[-1]["content"])
            + " ~ messages[0]['content']}] + messages[1:] %}\n"
        )
    if sent[0]["role"] == "system":
        text = _literal(sent[0]["content"])
        lines.append(
            "{%- set messages = [{'role': 'system', 'content': " + text + "}] + messages %}\n"
        )
    return "".join(lines)


def _pinned_date(tokenizer: Any, template: str) -> str:
    """Jinja that gives the template the pinned day in the place of today's."""
    day = datetime.fromisoformat(DEFAULT_DATE)
    lines = []
    if "date_string" in template:
        lines.append("{%- set date_string = " + _literal(day.strftime("%d %b %Y")) + " %}\n")
    if "strftime_now" in template:
        pinned = {form: day.strftime(form) for form in _date_formats(tokenizer, template)}
        table = ", ".join(f"{_literal(form)}: {_literal(text)}" for form, text in pinned.items())
        lines.append(
            "{%- macro strftime_now(format) -%}{{- {" + table + "}[format] -}}{%- endmacro %}\n"
        )
    return "".join(lines)


def _date_formats(tokenizer: Any, template: str) -> list[str]:
    """The formats in which a template asks for today's date."""
    asked: list[str] = []

    def strftime_now(form: str) -> str:
        asked.append(form)
        return ""

    tokenizer.apply_chat_template(
        [{"role": "user", "content": _QUESTIONS[0]}],
        tokenize=False,
        chat_template=template,
        strftime_now=strftime_now,
    )
    return list(dict.fromkeys(asked))


def _literal(text: str) -> str:
    """A Jinja string literal of `text`."""
    return "'" + text.encode("unicode_escape").decode("ascii").replace("'", "\\'") + "'"


def _load_tokenizer(cfg: Any) -> Any:
    from transformers import AutoTokenizer

    name = str(cfg.get("tokenizer_config") or cfg.get("base_model"))
    try:
        return AutoTokenizer.from_pretrained(
            name,
            revision=cfg.get("revision_of_model") or cfg.get("model_revision"),
            trust_remote_code=bool(cfg.get("trust_remote_code")),
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: its tokenizer, which `sublim.context` is realized with, cannot be loaded:"
            f" {error}"
        ) from error
