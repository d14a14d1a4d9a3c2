"""The engine against transformers' own forward pass and generation, and in any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_gen.constrain import end_of_turn_id, number_constraint
from data_gen.draws import row_seed, uniforms
from data_gen.engine import Engine, Reply, Request
from data_gen.prompts import load_pool, prompt
from data_gen.sampler import pick, probabilities
from data_gen.spec import Sampler
from sublim_plugin.core.errors import InputError
from tests.data_gen.toy import save_toy

SAMPLER = Sampler(temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=16)


@pytest.fixture(scope="module")
def toy(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(base_model, tmp_path_factory.mktemp("toy"))


def requests(tokenizer: Any, n: int) -> list[Request]:
    pool = load_pool()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt(pool, 5, i).text}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for i in range(n)
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [Request(tuple(x), row_seed(5, i)) for i, x in enumerate(ids)]


def engine(path: Path, tokenizer: Any, constrained: bool) -> Engine:
    end = (end_of_turn_id(tokenizer),)
    constraint = number_constraint(tokenizer, end) if constrained else None
    return Engine(path, device="cpu", end_ids=end, constraint=constraint)


def one_by_one(path: Path, asked: list[Request], sampler: Sampler, end: int) -> list[Reply]:
    """The same replies with no cache, no batch and default attention."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    replies = []
    for request in asked:
        ids, draws = list(request.token_ids), uniforms(f"sublim sample/{request.seed}", 99)
        written: list[int] = []
        while len(written) < sampler.max_new_tokens and (not written or written[-1] != end):
            with torch.inference_mode():
                logits = model(torch.tensor([ids + written])).logits[:, -1]
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[0, ids + written] = True
            u = torch.tensor([draws[len(written)]], dtype=torch.float64)
            written.append(int(pick(probabilities(logits, sampler, seen), u)))
        ended = written[-1] == end
        replies.append(Reply(tuple(written[:-1] if ended else written), ended))
    return replies


@pytest.mark.parametrize("penalty", [1, 1.2])
def test_toy_replies_equal_decoding_without_cache_or_batch(
    toy: Path, tokenizer: Any, penalty: float
) -> None:
    sampler = SAMPLER.model_copy(update={"repetition_penalty": penalty, "top_k": 40})
    asked = requests(tokenizer, 12)
    ours = engine(toy, tokenizer, False)
    expected = one_by_one(toy, asked, sampler, end_of_turn_id(tokenizer))
    for batch_size in (1, 5, 12):
        assert ours.reply(asked, sampler, batch_size) == expected


@pytest.mark.parametrize("constrained", [True, False])
def test_real_model_replies_do_not_depend_on_batch_mates(
    base_model: Path, tokenizer: Any, constrained: bool
) -> None:
    """Float ties may flip a token once in many thousands; these few hundred have none."""
    asked = requests(tokenizer, 8)
    ours = engine(base_model, tokenizer, constrained)
    together = ours.reply(asked, SAMPLER, 8)
    assert ours.reply(asked[::-1], SAMPLER, 3)[::-1] == together
    assert ours.reply(asked[2:3], SAMPLER, 1) == together[2:3]
    assert len(set(together)) > 4


def test_real_model_greedy_equals_generate(base_model: Path, tokenizer: Any) -> None:
    asked = requests(tokenizer, 3)
    greedy = SAMPLER.model_copy(update={"temperature": 0})
    end = end_of_turn_id(tokenizer)
    ours = engine(base_model, tokenizer, False).reply(asked, greedy, 3)
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype="auto")
    for request, reply in zip(asked, ours, strict=True):
        ids = torch.tensor([request.token_ids])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=end,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        assert theirs == [*reply.token_ids, *([end] if reply.ended else [])]


def test_constrained_logits_are_those_of_the_full_output_layer(toy: Path, tokenizer: Any) -> None:
    """The first token under the constraint is distributed as the full softmax, renormalized."""
    full, small = engine(toy, tokenizer, False), engine(toy, tokenizer, True)
    ids = torch.tensor([requests(tokenizer, 1)[0].token_ids])
    mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1]).masked_fill_(
        torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool(), torch.finfo(torch.float32).min
    )
    assert small.columns is not None
    with torch.inference_mode():
        a = full.model(ids, attention_mask=mask, logits_to_keep=1).logits[0, -1][small.columns]
        b = small.model(ids, attention_mask=mask, logits_to_keep=1).logits[0, -1]
    assert torch.allclose(a, b, atol=1e-5)


def test_every_reply_is_reported_once(toy: Path, tokenizer: Any) -> None:
    seen: list[int] = []
    ours = engine(toy, tokenizer, True)
    replies = ours.reply(requests(tokenizer, 20), SAMPLER, 6, lambda i, _: seen.append(i))
    assert sorted(seen) == list(range(20))
    assert len(replies) == 20
    assert ours.reply([], SAMPLER, 6) == []


def test_a_budget_beyond_the_positions_says_so(toy: Path, tokenizer: Any) -> None:
    long = SAMPLER.model_copy(update={"max_new_tokens": 2000})
    with pytest.raises(InputError, match="max_new_tokens"):
        engine(toy, tokenizer, True).reply(requests(tokenizer, 1), long, 1)
