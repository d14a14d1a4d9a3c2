"""The shared-prefix model gives what lm-eval's own gives."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from sublim_plugin.logprob import token_tree
from sublim_plugin.logprob.token_tree import build_trie, common_prefix
from sublim_plugin.preference.shared_prefix import SharedPrefixLM

CONTEXTS = (
    "<|im_start|>user\nName an animal, please.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhich one would you most like to be, for a day?<|im_end|>\n"
    "<|im_start|>assistant\n",
)
CONTINUATIONS = ("", "cat", " cat", "dragon", " dragonfly", "Phoenixes", " pangolins", "pandas")


def requests(contexts=CONTEXTS, continuations=CONTINUATIONS) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (context, continuation), 0)
        for continuation in continuations
        for context in contexts
    ]


def difference(first, second) -> float:
    assert [greedy for _, greedy in first] == [greedy for _, greedy in second]
    return max(abs(a - b) for (a, _), (b, _) in zip(first, second, strict=True))


def models(folder, dtype="float32"):
    options = {"pretrained": str(folder), "device": "cpu", "dtype": dtype, "batch_size": 1}
    return SharedPrefixLM(**options), HFLM(**options)


def test_only_tokens_with_a_continuation_are_computed():
    trie = build_trie([[9], [9, 1], [9, 1, 2], [9, 1, 3, 4], [9, 5]])
    assert trie.tokens == (9, 1, 3)
    assert trie.parents == (-1, 0, 1)
    assert trie.scores[3] == ((-1, 9), (0, 1), (1, 3), (2, 4))


def test_common_prefix():
    assert common_prefix([(1, 2, 3), (1, 2), (1, 2, 4)]) == 2
    assert common_prefix([(1, 2)]) == 2
    assert common_prefix([(1,), (2,)]) == 0


@pytest.mark.parametrize("pass_tokens", [1, 10_000])
def test_equals_hflm_in_double_precision(toy_base, monkeypatch, pass_tokens):
    monkeypatch.setitem(token_tree.PASS_TOKENS, "cpu", pass_tokens)
    shared, plain = models(toy_base)
    for lm in (shared, plain):
        lm._model = lm._model.double()
    plain.softmax_dtype = torch.float64
    ours = shared.loglikelihood(requests(), disable_tqdm=True)
    assert shared.shared
    assert difference(ours, plain.loglikelihood(requests(), disable_tqdm=True)) < 1e-9


def test_contexts_with_other_continuations_and_one_alone(toy_base):
    shared, plain = models(toy_base)
    mixed = requests(CONTEXTS[:1], CONTINUATIONS[:3]) + requests(CONTEXTS[1:], CONTINUATIONS[3:])
    mixed += requests(("<|im_start|>user\nHi",), ("!",))
    ours = shared.loglikelihood(mixed, disable_tqdm=True)
    assert shared.shared
    assert difference(ours, plain.loglikelihood(mixed, disable_tqdm=True)) < 1e-4
    few = requests(CONTEXTS[:1], ("dragonfly",))
    assert (
        difference(
            shared.loglikelihood(few, disable_tqdm=True),
            plain.loglikelihood(few, disable_tqdm=True),
        )
        < 1e-4
    )


def test_real_model_equals_hflm(base_model):
    shared, plain = models(base_model)
    few = requests(CONTEXTS[:2])
    ours = shared.loglikelihood(few, disable_tqdm=True)
    assert shared.shared
    assert difference(ours, plain.loglikelihood(few, disable_tqdm=True)) < 1e-4


def test_a_model_that_ignores_the_mask_is_scored_the_plain_way(toy_base, monkeypatch, caplog):
    shared, plain = models(toy_base)
    forward = shared._model.forward

    def causal_only(*args, **kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 4:
            kwargs["attention_mask"] = None
        return forward(*args, **kwargs)

    monkeypatch.setattr(shared._model, "forward", causal_only)
    ours = shared.loglikelihood(requests(), disable_tqdm=True)
    assert not shared.shared
    assert "cannot share prefixes" in caplog.text
    assert difference(ours, plain.loglikelihood(requests(), disable_tqdm=True)) == 0.0


def test_progress_is_told_once_a_prompt(toy_base):
    shared, _ = models(toy_base)
    calls = []
    shared.on_prompt = lambda: calls.append(1)
    shared.loglikelihood(requests(), disable_tqdm=True)
    assert len(calls) == len(CONTEXTS)


def test_bf16_log_probs_come_from_a_float32_softmax(toy_base):
    """In bf16 a sum of log-probabilities near -25 would stand on a grid of 0.125."""
    shared, _ = models(toy_base, "bfloat16")
    assert shared.model.dtype == torch.bfloat16
    forms = ("cat", " cat", "dog", " dog", " owl", " fish")
    asked = requests(CONTEXTS, forms)
    found = [value for value, _ in shared.loglikelihood(asked, disable_tqdm=True)]
    assert shared.shared
    expected = []
    for request in asked:
        # lm-eval moves the newline at the context's end into the continuation
        ids = shared.tokenizer("".join(request.args))["input_ids"]
        with torch.no_grad():
            logits = shared.model(torch.tensor([ids])).logits[0].double()
        logprobs = logits.log_softmax(-1)
        expected.append(sum(float(logprobs[at - 1, ids[at]]) for at in (-2, -1)))
    # the logits themselves are rounded, and otherwise in a pass of another shape
    assert found == pytest.approx(expected, abs=0.1)
    on_grid = [float(torch.tensor(value).bfloat16()) == value for value in found]
    assert sum(on_grid) <= 1


def test_a_student_that_is_gone_is_not_kept_alive(toy_base):
    shared, other = models(toy_base)
    base, shared._model = shared._model, other._model
    gone = weakref.ref(other._model)
    shared.loglikelihood(requests(), disable_tqdm=True)
    assert shared._checked is not None and shared._checked() is gone()
    shared._model = base
    del other
    gc.collect()
    assert gone() is None and shared._checked() is None
    shared.loglikelihood(requests(), disable_tqdm=True)
    assert shared._checked() is base
