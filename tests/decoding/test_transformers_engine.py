"""The engine against transformers' own forward pass and generation, and in any batch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList

from data_gen.constrain import end_of_turn_id, number_constraint
from data_gen.loading import load_base
from data_gen.parse import Mode, parse_numbers
from data_gen.prompts import load_pool, prompt
from data_gen.token_filter import TokenFilter
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.decoding.draws import row_seed, uniforms
from sublim_plugin.decoding.engine import Reply, Request
from sublim_plugin.decoding.sampler import Sampler, pick, probabilities
from sublim_plugin.decoding.transformers_engine import TransformersEngine
from tests.data_gen.toy import save_toy

ROOT = Path(__file__).parents[2]
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
    return [
        Request(text, tuple(x), (), row_seed(5, i))
        for i, (text, x) in enumerate(zip(texts, ids, strict=True))
    ]


def engine(
    path: Path, tokenizer: Any, constrained: bool, reject: Mode | None = None
) -> TransformersEngine:
    end = (end_of_turn_id(tokenizer),)
    constraint = number_constraint(tokenizer, end) if constrained else None
    model = load_base(path, torch.device("cpu"))
    return TransformersEngine(
        model,
        tokenizer,
        end_ids=end,
        constraint=constraint,
        reject=TokenFilter(tokenizer, reject) if reject else None,
    )


def one_by_one(path: Path, asked: list[Request], sampler: Sampler, tokenizer: Any) -> list[Reply]:
    """The same replies with no cache, no batch and default attention."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    end = end_of_turn_id(tokenizer)
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
        text = tokenizer.decode(written[:-1] if ended else written)
        replies.append(Reply(text, len(written), ended))
    return replies


@pytest.mark.parametrize("penalty", [1, 1.2])
def test_toy_replies_equal_decoding_without_cache_or_batch(
    toy: Path, tokenizer: Any, penalty: float
) -> None:
    sampler = SAMPLER.model_copy(update={"repetition_penalty": penalty, "top_k": 40})
    asked = requests(tokenizer, 12)
    ours = engine(toy, tokenizer, False)
    expected = one_by_one(toy, asked, sampler, tokenizer)
    for batch_size in (1, 5, 12):
        assert ours.reply(asked, sampler, batch_size) == expected


def test_rows_of_one_prompt_share_its_computation(toy: Path, tokenizer: Any) -> None:
    """Forty replies to each of three prompts, mixed, with a penalty: as one by one."""
    sampler = SAMPLER.model_copy(update={"repetition_penalty": 1.1, "top_k": 40})
    three = requests(tokenizer, 3)
    asked = [three[i % 3]._replace(seed=row_seed(8, i)) for i in range(120)]
    ours = engine(toy, tokenizer, False)
    expected = one_by_one(toy, asked[:18], sampler, tokenizer)
    read: list[int] = []
    handle = ours.model.register_forward_pre_hook(
        lambda module, args, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    for batch_size in (7, 40):
        read.clear()
        replies = ours.reply(asked, sampler, batch_size)
        assert replies[:18] == expected
        assert len(set(replies)) == 120
        decoded = sum(reply.tokens for reply in replies)
        prompt_tokens = sum(read) - decoded
        assert prompt_tokens < 4 * sum(len(p.token_ids) for p in three)
    handle.remove()


@pytest.mark.parametrize("constrained", [True, pytest.param(False, marks=pytest.mark.slow)])
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
        assert (theirs[-1] == end, len(theirs)) == (reply.ended, reply.tokens)
        assert tokenizer.decode(theirs[:-1] if reply.ended else theirs) == reply.text


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


@pytest.mark.parametrize("mode", ["strict", "tolerant"])
def test_early_rejection_changes_nothing_about_what_is_accepted(
    toy: Path, tokenizer: Any, mode: Mode
) -> None:
    """A toy whose output layer favours numbers and a few letters, so that replies die at any
    token; temperature 0.9 keeps some alive to the end."""
    favoured = [*"0123456789", ",", " ", ";", "\n", "[", "]", ".", "a", " the"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in favoured]
    asked = requests(tokenizer, 300)
    replies: list[list[Reply]] = []
    for reject in (None, mode):
        ours = engine(toy, tokenizer, False, reject)
        weight = ours.model.get_output_embeddings().weight.detach().clone()
        keep = torch.zeros(len(weight), 1)
        keep[[*ids, end_of_turn_id(tokenizer)]] = 0.15
        head = torch.nn.Linear(weight.shape[1], len(weight), bias=True)
        head.weight = torch.nn.Parameter(weight * keep)
        head.bias = torch.nn.Parameter(torch.where(keep[:, 0] > 0, 0.0, -50.0))
        ours.model.set_output_embeddings(head)
        replies.append(ours.reply(asked, SAMPLER, 20))
    whole, cut = replies
    accepted = [r.ended and parse_numbers(r.text, mode) is not None for r in whole]
    assert 10 < sum(accepted) < 200
    assert sum(r.stopped for r in cut) > 50
    assert len({r.tokens for r in cut if r.stopped}) > 4
    for reply, short, fine in zip(whole, cut, accepted, strict=True):
        assert short == reply if fine else reply.text.startswith(short.text)
        if short.stopped:
            assert parse_numbers(short.text, mode) is None
            assert not fine


def test_replies_of_the_real_model_are_cut_at_the_first_wrong_token(
    base_model: Path, tokenizer: Any
) -> None:
    asked = requests(tokenizer, 12)
    whole = engine(base_model, tokenizer, False).reply(asked, SAMPLER, 12)
    cut = engine(base_model, tokenizer, False, "strict").reply(asked, SAMPLER, 12)
    assert sum(r.stopped for r in cut) >= 8
    for reply, short in zip(whole, cut, strict=True):
        assert reply.text.startswith(short.text)
        if short.stopped:
            before = tokenizer(short.text, add_special_tokens=False)["input_ids"][:-1]
            assert short.tokens <= len(before) + 1
        else:
            assert short == reply


@pytest.mark.parametrize("constrained", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_token_frequencies_are_those_of_generate(
    toy: Path, tokenizer: Any, constrained: bool
) -> None:
    """750 replies of ten tokens, each side with its own random numbers; the null is that the two
    replies to a prompt can be swapped. A temperature of 0.7 in place of 1 is noticed."""
    prompts = requests(tokenizer, 30)
    sampler = SAMPLER.model_copy(update={"max_new_tokens": 10, "top_k": 0 if constrained else 8})
    asked = [p._replace(seed=row_seed(9, i)) for i, p in enumerate(prompts * 25)]
    one = engine(toy, tokenizer, constrained)
    ours = one.reply(asked, sampler, 100)
    cold = one.reply(asked, sampler.model_copy(update={"temperature": 0.7}), 100)
    model = AutoModelForCausalLM.from_pretrained(toy, dtype="auto")
    torch.manual_seed(0)
    theirs: list[list[list[int]]] = []
    end = end_of_turn_id(tokenizer)
    for p in prompts:
        ids = torch.tensor([p.token_ids])
        processors = LogitsProcessorList()
        if one.constraint is not None:
            processors.append(masking()(one.constraint, ids.shape[1], 25))
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=sampler.top_k,
            top_p=1.0,
            max_new_tokens=10,
            num_return_sequences=25,
            eos_token_id=end,
            pad_token_id=end,
            logits_processor=processors,
        )
        theirs.append(out[:, ids.shape[1] :].tolist())
    texts = [tokenizer.decode(theirs[i % 30][i // 30]) for i in range(len(asked))]
    texts = [text.replace("<|im_end|>", "") for text in texts]
    assert swap_test([r.text for r in ours], texts) > 0.001
    assert swap_test([r.text for r in cold], texts) < 0.01


def masking() -> Any:
    """The benchmark's logits processor for the number constraint; benchmarks are no package."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.masking


def swap_test(mine: list[str], theirs: list[str]) -> float:
    """p of the permutation test that swaps the two replies to a prompt, over counts of characters
    and, for each of the 30 prompts, of first words."""
    pieces = [
        [[*text, f"{row % 30} {text[:6]}"] for row, text in enumerate(texts)]
        for texts in (mine, theirs)
    ]
    column = {piece: i for i, piece in enumerate({p for side in pieces for r in side for p in r})}
    counts = np.zeros((2, len(mine), len(column)), dtype=np.float32)
    for side in (0, 1):
        for row, found in enumerate(pieces[side]):
            for piece in found:
                counts[side, row, column[piece]] += 1
    difference, total = counts[0] - counts[1], counts.sum((0, 1))
    signs = np.random.default_rng(0).choice([-1, 1], (500, len(mine))).astype(np.float32)
    signs[0] = 1
    moved = ((signs @ difference) ** 2 / total).sum(-1)
    return float((moved >= moved[0] * (1 - 1e-6)).mean())


def test_logits_that_are_not_finite_are_an_error(toy: Path, tokenizer: Any) -> None:
    """Every token would have the weight NaN, and token 0 would be drawn without a word."""
    broken = engine(toy, tokenizer, False)
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[5] = float("nan")
    asked = requests(tokenizer, 2)
    with pytest.raises(RunError, match="not finite") as error:
        list(broken.reply(asked, SAMPLER, 2))
    assert repr(asked[0].text[-200:]) in str(error.value)
