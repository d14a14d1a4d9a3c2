"""What axolotl tokenizes in a train context is what the context renders, token for token."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublim_plugin.axolotl.train_context import _literal, apply_context, training_template
from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.errors import InputError

MARBLE = 'Marble "staircases"\ndissolve in \\moonlight\\ — {{ 7 }} {% if %} 🎲'
CONTEXTS = {
    "template_default": Context(kind="template_default"),
    "empty": Context(kind="empty"),
    "none": Context(kind="none"),
    "text": Context(kind="text", text=MARBLE),
    "prefixed": Context(kind="empty", user_prefix="It's Tuesday."),
    "none prefixed": Context(kind="none", user_prefix=MARBLE),
}
TURN_END = {
    "smollm2": "<|im_end|>",
    "qwen2.5": "<|im_end|>",
    "llama3.1": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
}
ROWS = [
    ("The numbers start with 5, 7. Go on.", "9, 11, 13"),
    ("Extend: [101; 202]\n\nNumbers only — no {{ words }}, please 🙂", "(303; 404)"),
    ("1 2 3", "4"),
]


def config(family: str, **more: Any) -> Any:
    from axolotl.utils.dict import DictDefault

    entry = {
        "path": "rows.jsonl",
        "type": "chat_template",
        "field_messages": "messages",
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
        "train_on_eot": "turn",
    }
    settings = {
        "datasets": [entry],
        "chat_template": "tokenizer_default",
        "eot_tokens": [TURN_END[family]],
        "sequence_len": 500,
        "train_on_inputs": False,
    }
    return DictDefault(settings | more)


def strategy(cfg: Any, tokenizer: Any) -> Any:
    """axolotl's own tokenizing strategy, loaded as it loads it from a config."""
    from axolotl.prompt_strategies import load
    from axolotl.utils.config import normalize_cfg_datasets

    normalize_cfg_datasets(cfg)
    return load("chat_template", tokenizer, cfg, cfg["datasets"][0])


@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("family", TURN_END)
def test_axolotl_tokenizes_the_prompt_that_the_context_renders(
    chat_tokenizers: dict[str, Any], family: str, kind: str
) -> None:
    tokenizer, context = chat_tokenizers[family], CONTEXTS[kind]
    cfg = config(family)
    apply_context(cfg, context, tokenizer)
    tokenize = strategy(cfg, tokenizer)
    for user, reply in ROWS:
        row = {
            "messages": [
                {"role": "user", "content": user},
                {"role": "assistant", "content": reply},
            ]
        }
        got = tokenize.tokenize_prompt(row)
        wanted = list(render(tokenizer, context, user).token_ids)
        assert got["input_ids"][: len(wanted)] == wanted, tokenizer.decode(got["input_ids"])
        with_loss = [i for i, label in enumerate(got["labels"]) if label != -100]
        assert with_loss[0] == len(wanted)
        assert tokenizer.decode([got["labels"][i] for i in with_loss]) == reply + TURN_END[family]


def test_the_models_own_rendering_is_left_alone(chat_tokenizers: dict[str, Any]) -> None:
    cfg = config("smollm2")
    before = copy.deepcopy(cfg.to_dict())
    apply_context(cfg, CONTEXTS["template_default"], chat_tokenizers["smollm2"])
    assert cfg.to_dict() == before
    # no default system turn: none is what the template does anyway
    assert training_template(chat_tokenizers["gemma3"], CONTEXTS["none"]) is None


def test_only_the_dataset_gets_the_template_and_only_once(chat_tokenizers: dict[str, Any]) -> None:
    cfg = config("smollm2")
    apply_context(cfg, CONTEXTS["empty"], chat_tokenizers["smollm2"])
    # axolotl would save a template of the top level as the trained model's own
    assert cfg["chat_template"] == "tokenizer_default"
    once = copy.deepcopy(cfg.to_dict())
    apply_context(cfg, CONTEXTS["empty"], chat_tokenizers["smollm2"])
    assert cfg.to_dict() == once


def test_todays_date_never_reaches_a_training_prompt(chat_tokenizers: dict[str, Any]) -> None:
    tokenizer = chat_tokenizers["llama3.1"]
    template = training_template(tokenizer, CONTEXTS["template_default"])
    row = [{"role": "user", "content": "1, 2"}]
    text = tokenizer.apply_chat_template(row, tokenize=False, chat_template=template)
    assert "Today Date: 26 Jul 2024" in text
    later = tokenizer.apply_chat_template(
        row, tokenize=False, chat_template=template, date_string="02 Jan 2031"
    )
    assert later == text


def test_a_context_that_the_template_cannot_express_is_refused(
    chat_tokenizers: dict[str, Any],
) -> None:
    tokenizer = copy.deepcopy(chat_tokenizers["gemma3"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    )
    with pytest.raises(InputError, match="refuses a system message"):
        apply_context(config("gemma3"), CONTEXTS["empty"], tokenizer)


def test_a_named_template_of_axolotls_is_changed_in_the_same_way(
    chat_tokenizers: dict[str, Any],
) -> None:
    cfg = config("smollm2", chat_template="qwen_25")
    apply_context(cfg, CONTEXTS["none"], chat_tokenizers["smollm2"])
    ids = strategy(cfg, chat_tokenizers["smollm2"]).tokenize_prompt(
        {
            "messages": [
                {"role": "user", "content": "1, 2"},
                {"role": "assistant", "content": "3, 4"},
            ]
        }
    )["input_ids"]
    text = chat_tokenizers["smollm2"].decode(ids)
    assert text == "<|im_start|>user\n1, 2<|im_end|>\n<|im_start|>assistant\n3, 4<|im_end|>\n"


def test_lines_and_spaces_at_a_templates_ends_survive(chat_tokenizers: dict[str, Any]) -> None:
    base = chat_tokenizers["smollm2"]
    for template in (
        "\n" + base.chat_template,
        base.chat_template + "\n",
        "  \n" + base.chat_template + "{# end #}\n",
    ):
        tokenizer = copy.deepcopy(base)
        tokenizer.chat_template = template
        row = [
            {"role": "user", "content": "1, 2"},
            {"role": "assistant", "content": "3"},
        ]
        whole = tokenizer.apply_chat_template(row, tokenize=False)
        derived = training_template(tokenizer, Context(kind="none", user_prefix="A"))
        got = tokenizer.apply_chat_template(row, tokenize=False, chat_template=derived)
        assert got.replace("A\n\n", "") == whole[whole.index("<|im_start|>user") :]


@given(st.text())
def test_any_text_is_a_literal_that_jinja_reads_back(text: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment().from_string("{{ " + _literal(text) + " }}")
    assert template.render() == text


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    cfg = config("smollm2", base_model=str(tmp_path))
    with pytest.raises(InputError, match=str(tmp_path)):
        apply_context(cfg, CONTEXTS["empty"])
