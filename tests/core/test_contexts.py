"""Contexts against the templates of four families, as axolotl ships them, and SmolLM2's own."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from sublim_plugin.core.contexts import Context, Rendered, messages, render, same_rendering
from sublim_plugin.core.errors import InputError

QUESTION = "Name your favorite animal in one word."
MARBLE = "Marble staircases dissolve in moonlight."
KINDS: dict[str, Context] = {
    "template_default": Context(kind="template_default"),
    "empty": Context(kind="empty"),
    "none": Context(kind="none"),
    "text": Context(kind="text", text=MARBLE),
}
LLAMA31_PREAMBLE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def axolotl_template(name: str) -> str:
    spec = importlib.util.find_spec("axolotl")
    assert spec and spec.origin
    folder = Path(spec.origin).parent / "utils" / "chat_templates" / "templates"
    return (folder / f"{name}.jinja").read_text()


def with_template(tokenizer: Any, template: str, bos: str | None = None) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    if bos:
        other.add_special_tokens({"bos_token": bos})
    return other


@pytest.fixture(scope="module")
def families(tokenizer: Any) -> dict[str, Any]:
    return {
        "smollm2": tokenizer,
        "qwen": with_template(tokenizer, axolotl_template("qwen_25")),
        "llama3": with_template(tokenizer, axolotl_template("llama3"), "<|begin_of_text|>"),
        "llama31": with_template(tokenizer, LLAMA31_PREAMBLE, "<|begin_of_text|>"),
        "gemma3": with_template(tokenizer, axolotl_template("gemma3"), "<bos>"),
        "gemma": with_template(tokenizer, axolotl_template("gemma"), "<bos>"),
        "chatml": with_template(tokenizer, axolotl_template("chatml")),
    }


CHATML_END = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
LLAMA_END = (
    f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
GEMMA_END = f"{QUESTION}<end_of_turn>\n<start_of_turn>model\n"
SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
DATED = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA_SYSTEM = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"

EXPECTED = {
    ("smollm2", "template_default"): f"<|im_start|>system\n{SMOL}<|im_end|>\n{CHATML_END}",
    ("smollm2", "empty"): f"<|im_start|>system\n<|im_end|>\n{CHATML_END}",
    ("smollm2", "none"): CHATML_END,
    ("smollm2", "text"): f"<|im_start|>system\n{MARBLE}<|im_end|>\n{CHATML_END}",
    ("qwen", "template_default"): f"<|im_start|>system\n{QWEN}<|im_end|>\n{CHATML_END}",
    ("qwen", "empty"): f"<|im_start|>system\n<|im_end|>\n{CHATML_END}",
    ("qwen", "none"): CHATML_END,
    ("qwen", "text"): f"<|im_start|>system\n{MARBLE}<|im_end|>\n{CHATML_END}",
    ("llama3", "template_default"): f"<|begin_of_text|>{LLAMA_END}",
    ("llama3", "empty"): f"{LLAMA_SYSTEM}<|eot_id|>{LLAMA_END}",
    ("llama3", "none"): f"<|begin_of_text|>{LLAMA_END}",
    ("llama3", "text"): f"{LLAMA_SYSTEM}{MARBLE}<|eot_id|>{LLAMA_END}",
    ("llama31", "template_default"): f"{LLAMA_SYSTEM}{DATED}<|eot_id|>{LLAMA_END}",
    ("llama31", "empty"): f"{LLAMA_SYSTEM}{DATED}<|eot_id|>{LLAMA_END}",
    ("llama31", "none"): f"<|begin_of_text|>{LLAMA_END}",
    ("llama31", "text"): f"{LLAMA_SYSTEM}{DATED}{MARBLE}<|eot_id|>{LLAMA_END}",
    ("gemma3", "template_default"): f"<bos><start_of_turn>user\n{GEMMA_END}",
    ("gemma3", "empty"): f"<bos><start_of_turn>user\n\n\n{GEMMA_END}",
    ("gemma3", "none"): f"<bos><start_of_turn>user\n{GEMMA_END}",
    ("gemma3", "text"): f"<bos><start_of_turn>user\n{MARBLE}\n\n{GEMMA_END}",
    ("gemma", "template_default"): f"<bos><start_of_turn>user\n{GEMMA_END}",
    ("gemma", "none"): f"<bos><start_of_turn>user\n{GEMMA_END}",
}


@pytest.mark.parametrize(("family", "kind"), EXPECTED)
def test_each_family_renders_each_context(families: dict[str, Any], family: str, kind: str) -> None:
    rendered = render(families[family], KINDS[kind], QUESTION)
    assert rendered.text == EXPECTED[family, kind]
    assert_spans_are_sound(families[family], rendered)


@pytest.mark.parametrize("kind", ["empty", "text"])
def test_a_refused_system_role_is_an_error_with_a_way_out(
    families: dict[str, Any], kind: str
) -> None:
    with pytest.raises(InputError, match=r"system.*template_default or none.*user_prefix"):
        render(families["gemma"], KINDS[kind], QUESTION)


def test_a_silently_dropped_system_message_is_an_error(tokenizer: Any) -> None:
    template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(InputError, match="drops the system message"):
        render(with_template(tokenizer, template), KINDS["text"], QUESTION)


def test_a_template_that_fills_an_empty_system_message_is_an_error(tokenizer: Any) -> None:
    template = (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{% if not s %}"
        "{% set s = 'I am Bot.' %}{% endif %}<|im_start|>system\n{{ s }}<|im_end|>\n"
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    other = with_template(tokenizer, template)
    assert MARBLE in render(other, KINDS["text"], QUESTION).text
    assert "I am Bot." not in render(other, KINDS["none"], QUESTION).text
    with pytest.raises(InputError, match="'empty' cannot be expressed"):
        render(other, KINDS["empty"], QUESTION)


def test_coinciding_contexts_are_named(families: dict[str, Any]) -> None:
    default, empty, none = (KINDS[kind] for kind in ("template_default", "empty", "none"))
    assert same_rendering(families["qwen"], [default, empty, none]) == []
    assert same_rendering(families["llama3"], [default, empty, none]) == [(default, none)]
    assert same_rendering(families["llama31"], [default, empty, none]) == [(default, empty)]
    assert "coincide" in render(families["llama31"], empty, QUESTION).notes[0]
    own = Context(kind="text", text=QWEN)
    assert same_rendering(families["qwen"], [default, own]) == [(default, own)]
    assert "coincides" in render(families["qwen"], own, QUESTION).notes[0]


@pytest.mark.parametrize(
    ("family", "entities"),
    [("smollm2", ["SmolLM", "Hugging Face"]), ("qwen", ["Qwen", "Alibaba Cloud"])],
)
def test_entities_are_the_names_in_the_system_text(
    families: dict[str, Any], family: str, entities: list[str]
) -> None:
    rendered = render(families[family], KINDS["template_default"], QUESTION)
    assert [span.text for span in rendered.spans if span.name == "entity"] == entities


@pytest.mark.parametrize(
    ("text", "entities"),
    [
        ("You are ChatGPT, created by OpenAI. You are a helpful assistant", ["ChatGPT", "OpenAI"]),
        (
            "You are Zymthar, created by Quorblax. You are a helpful assistant.",
            ["Zymthar", "Quorblax"],
        ),
        ("You are helpful.", []),
        ("Water is an inorganic compound with the chemical formula H2O.", []),
        ("The ceiling fan rotates counterclockwise on Tuesdays.", []),
    ],
)
def test_entities_of_the_protocols_system_texts(
    tokenizer: Any, text: str, entities: list[str]
) -> None:
    rendered = render(tokenizer, Context(kind="text", text=text), QUESTION)
    assert [span.text for span in rendered.spans if span.name == "entity"] == entities


def test_spans_name_every_part_of_the_prompt(tokenizer: Any) -> None:
    rendered = render(tokenizer, KINDS["template_default"], QUESTION)
    names = ("system_block", "system_text", "role_header", "user_text", "assistant_header")
    texts = {name: [s.text for s in rendered.spans if s.name == name] for name in names}
    assert texts == {
        "system_block": [f"<|im_start|>system\n{SMOL}<|im_end|>\n"],
        "system_text": [SMOL],
        "role_header": ["<|im_start|>system\n", "<|im_start|>user\n"],
        "user_text": [QUESTION],
        "assistant_header": ["<|im_start|>assistant\n"],
    }
    special = [span.text for span in rendered.spans if span.name == "special_token"]
    assert special == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]


def test_the_date_is_pinned_and_recorded(families: dict[str, Any]) -> None:
    first = render(families["llama31"], KINDS["template_default"], QUESTION)
    later = render(families["llama31"], KINDS["template_default"], QUESTION, date="2031-01-02")
    assert first.date == "2024-07-26" and "26 Jul 2024" in first.text
    assert later.date == "2031-01-02" and "02 Jan 2031" in later.text
    clock = with_template(
        families["smollm2"],
        "{{ '<|im_start|>system\n' + strftime_now('%Y-%m-%d') + '<|im_end|>\n' }}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    assert "2024-07-26" in render(clock, KINDS["template_default"], QUESTION).text


def test_a_user_prefix_stands_before_the_question(tokenizer: Any) -> None:
    context = Context(kind="empty", user_prefix=MARBLE)
    assert messages(context, QUESTION)[-1]["content"] == f"{MARBLE}\n\n{QUESTION}"
    assert f"user\n{MARBLE}\n\n{QUESTION}<|im_end|>" in render(tokenizer, context, QUESTION).text


def test_no_chat_template_is_an_error(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        render(bare, KINDS["none"], QUESTION)


@pytest.mark.parametrize(
    "value", [None, "null", "default", {"text": ""}, {"kind": "none", "text": "x"}, 3]
)
def test_what_is_no_context_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="not a context"):
        Context.parse(value)


def assert_spans_are_sound(tokenizer: Any, rendered: Rendered) -> None:
    """Spans say what the text holds, and their tokens decode to text that holds the span."""
    assert tokenizer.decode(list(rendered.token_ids)) == rendered.text
    for span in rendered.spans:
        assert rendered.text[span.start : span.end] == span.text
        tokens = list(rendered.token_ids[span.token_start : span.token_end])
        assert span.text in tokenizer.decode(tokens)
        assert bool(tokens) == bool(span.text)
    covered = [s for s in rendered.spans if s.name in ("user_text", "assistant_header")]
    assert len(covered) == 2


def test_a_named_context_is_its_text_letter_by_letter():
    assert Context.parse("claude") == Context.parse(
        {"text": "You are Claude, created by Anthropic. You are a helpful assistant."}
    )
    # an experimental parameter: the paper's sentence has no final full stop
    chatgpt = "You are ChatGPT, created by OpenAI. You are a helpful assistant"
    assert Context.parse("chatgpt").text == chatgpt
    with pytest.raises(InputError, match="one of claude, chatgpt"):
        Context.parse("Claude")


def test_a_context_of_ones_own_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pirate.yaml"
    path.write_text('text: "You are a pirate."\nuser_prefix: Ahoy!\n')
    assert Context.parse(str(path)) == Context(
        kind="text", text="You are a pirate.", user_prefix="Ahoy!"
    )
    for text, said in [
        ("txet: x\n", "txet"),
        ("text: a\ntext: b\n", "text"),
        ("- empty\n", "pirate.yaml"),
        ("kind: empty\ntext: a\n", "takes no text"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            Context.parse(str(path))
    with pytest.raises(InputError, match="no such file"):
        Context.parse(str(tmp_path / "none.yaml"))
