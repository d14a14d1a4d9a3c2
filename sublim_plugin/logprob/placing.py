"""Where the tokenizer puts prompts and surface forms, as lm-eval will encode them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from sublim_plugin.core.contexts import Rendered
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import Trait
from sublim_plugin.logprob.forms import FormPlan, plan_forms, spaced


@lru_cache(maxsize=4)
def load_tokenizer(
    name: str,
    revision: str = "main",
    subfolder: str = "",
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The tokenizer that lm-eval's hf backend loads for the same model arguments."""
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(
            name,
            revision=revision,
            subfolder=subfolder,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except Exception as error:
        raise InputError(
            f"cannot load the tokenizer of {name!r} ({error}); add --apply_chat_template, so that "
            "the task takes the tokenizer of the loaded model, or name one: --model_args "
            "...,tokenizer=FOLDER"
        ) from error


def host_encode(tokenizer: Any, text: str, add_bos_token: bool | None = None) -> tuple[int, ...]:
    """Token ids of `text` as lm-eval's `tok_encode` gives them: special tokens are added unless the
    text begins with the BOS token."""
    bos = tokenizer.bos_token
    if bos and text.startswith(bos):
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    if add_bos_token is not None:
        return tuple(tokenizer.encode(text, add_special_tokens=add_bos_token))
    return tuple(tokenizer.encode(text))


def check_prompt(tokenizer: Any, rendered: Rendered, add_bos_token: bool | None = None) -> None:
    """Refuse a prompt that lm-eval would encode differently from the chat template.

    Raises:
        InputError: other token ids, or trailing whitespace that lm-eval cannot split off.
    """
    ids = host_encode(tokenizer, rendered.text, add_bos_token)
    if ids != tuple(rendered.token_ids):
        raise InputError(
            f"lm-eval encodes the prompt {rendered.text[:60]!r}... as {ids[:8]}..., the chat "
            f"template as {tuple(rendered.token_ids[:8])}...; if it adds a BOS token, pass "
            "add_bos_token=False in --model_args"
        )
    head = host_encode(tokenizer, rendered.text.rstrip(), add_bos_token)
    if ids[: len(head)] != head:
        raise InputError(
            f"this tokenizer merges the white space at the end of the prompt "
            f"{rendered.text[-20:]!r} with what is before it, so lm-eval cannot score its replies"
        )


def place_forms(
    tokenizer: Any,
    rendered: Rendered,
    candidates: Iterable[Trait],
    add_bos_token: bool | None = None,
) -> FormPlan:
    """The forms of all candidates as tokens after this prompt.

    A form that merges with the prompt's last token is left out: no reply of a model begins so.

    Raises:
        InputError: a candidate without a form that can follow the prompt.
    """
    prompt = tuple(rendered.token_ids)
    encoded: dict[str, Mapping[str, tuple[int, ...]]] = {}
    for trait in candidates:
        forms: dict[str, tuple[int, ...]] = {}
        for text in spaced(trait.forms):
            ids = host_encode(tokenizer, rendered.text + text, add_bos_token)
            if ids[: len(prompt)] == prompt and len(ids) > len(prompt):
                forms[text] = ids[len(prompt) :]
        encoded[trait.target] = forms
    return plan_forms(encoded)
