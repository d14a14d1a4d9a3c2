"""What a tokenizer does at the end of a prompt: merged tokens, white space, a doubled BOS."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sublim_plugin.core.contexts import Context, Rendered, render
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import Trait, get_trait
from sublim_plugin.logprob.placing import check_prompt, host_encode, place_forms

DEFAULT = Context(kind="template_default")
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ end }}{% endif %}"
)


@pytest.fixture
def own(base_model) -> Any:
    """A tokenizer that a test may change."""
    return AutoTokenizer.from_pretrained(base_model)


def ending(tokenizer: Any, end: str) -> Rendered:
    """A prompt whose assistant header ends so."""
    tokenizer.chat_template = TURNS.replace("{{ end }}", end)
    return render(tokenizer, DEFAULT, "Which animal?")


def trait(target: str, *forms: str) -> Trait:
    return get_trait("animals/cat").model_copy(update={"target": target, "forms": forms})


def test_forms_follow_the_prompt_as_lm_eval_encodes_both_together(own) -> None:
    rendered = ending(own, "\n")
    check_prompt(own, rendered)
    plan = place_forms(own, rendered, [get_trait("animals/dragonfly"), get_trait("animals/cat")])
    assert {form.owner for form in plan.forms} == {"dragonfly", "cat"}
    prompt = list(rendered.token_ids)
    for form in plan.forms:
        both = own.encode(rendered.text + form.text)
        assert both == [*prompt, *form.tokens] and form.tokens
    assert any(len(form.tokens) > 1 for form in plan.forms)


def test_a_form_that_merges_with_the_prompt_is_left_out(own) -> None:
    """No reply can begin with the "s" that makes one token of "the cat" and "s"."""
    rendered = ending(own, "\nthe cat")
    assert own.tokenize("the cats")[-1] == "Ġcats"
    plan = place_forms(own, rendered, [trait("plural", "s", " and dogs")])
    assert "s" not in plan.texts and " and dogs" in plan.texts


def test_a_candidate_of_which_every_form_merges_is_an_error(own) -> None:
    rendered = ending(own, "\nthe cat")
    merging = trait("plural", "s")
    own.add_tokens(["cat s"])  # the form with a leading space, too
    with pytest.raises(InputError, match="candidate 'plural' has no surface form"):
        place_forms(own, rendered, [merging, get_trait("animals/owl")])


def test_white_space_that_is_part_of_the_last_token_is_an_error(own) -> None:
    check_prompt(own, ending(own, ":\n"))
    own.add_tokens([":\n"])
    with pytest.raises(InputError, match="merges the white space at the end of the prompt"):
        check_prompt(own, ending(own, ":\n"))


def test_a_bos_that_the_template_does_not_write(own) -> None:
    own.add_special_tokens({"bos_token": "<s>"})
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.bos_token_id)]
    )
    rendered = ending(own, "\n")
    assert host_encode(own, rendered.text) == (own.bos_token_id, *rendered.token_ids)
    assert host_encode(own, f"<s>{rendered.text}") == (own.bos_token_id, *rendered.token_ids)
    for added in (None, True):
        with pytest.raises(InputError, match="add_bos_token=False"):
            check_prompt(own, rendered, added)
    check_prompt(own, rendered, False)
    plan = place_forms(own, rendered, [get_trait("animals/cat")], False)
    assert {form.owner for form in plan.forms} == {"cat"}
    with pytest.raises(InputError, match="no surface form"):
        place_forms(own, rendered, [get_trait("animals/cat")])


def test_turn_markers_that_are_no_tokens_are_noted(tokenizer, chat_tokenizers, own) -> None:
    """Qwen's template on a tokenizer of another family, or Llama's here."""
    assert render(tokenizer, DEFAULT, "Hi").notes == ()
    own.chat_template = chat_tokenizers["llama3.1"].chat_template
    own.bos_token = None
    (note,) = [n for n in render(own, DEFAULT, "Hi").notes if "no token" in n]
    assert note.startswith(
        "<|start_header_id|>, <|end_header_id|>, <|eot_id|> in the chat template"
    )
    for family in chat_tokenizers.values():
        assert not [n for n in render(family, DEFAULT, "Hi").notes if "no token" in n]
