"""Every number about positions against plain computations in numpy, and where it sits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data_gen.constrain import end_of_turn_id
from data_gen.parse import parse_numbers
from data_gen.teachers import prompted, steered
from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.traits import get_trait
from sublim_plugin.signal.completions import Grammar
from sublim_plugin.signal.measure import measure_signal
from sublim_plugin.signal.positions import Position
from sublim_plugin.signal.results import Group, Signal
from sublim_plugin.signal.where import BINS, bin_of, pooled, where
from tests.signal.conftest import ROWS, Make

DEFAULT = Context(kind="template_default")
CONTINUATIONS = ("", "1", " 1", ",1", ", 1", ";1", "; 1", "\n1", ".", ")", "]")


def logprobs(model: Any, prompt: tuple[int, ...], tokens: list[int]) -> Any:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    x = logits.double().numpy()
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


@pytest.fixture(scope="module")
def found(toy: Path, prompted_cat: Path) -> Signal:
    return measure_signal(prompted_cat, base=toy, limit=1)


def test_every_measure_is_the_plain_one(
    found: Signal, toy: Path, prompted_cat: Path, toy_tokenizer: Any
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(toy)
    sentence = Context(kind="text", text=get_trait("animals/cat").teacher_system_prompt)
    end = end_of_turn_id(toy_tokenizer)
    number_tokens = [
        i
        for i in range(len(toy_tokenizer))
        if i not in toy_tokenizer.added_tokens_decoder
        and set(toy_tokenizer.decode([i])) <= set("0123456789,; \n")
        and len(toy_tokenizer.decode([i])) <= 3
    ]
    rows = read_rows(dataset_rows_path(prompted_cat))
    for row, ours in zip(rows, found.rows, strict=True):
        user, reply = (message["content"] for message in row["messages"])
        tokens = [*toy_tokenizer(reply, add_special_tokens=False)["input_ids"], end]
        p = logprobs(model, render(toy_tokenizer, sentence, user).token_ids, tokens)
        q = logprobs(model, render(toy_tokenizer, DEFAULT, user).token_ids, tokens)
        at = np.arange(len(tokens))
        assert ours.base_logprob == pytest.approx(q[at, tokens].mean(), abs=1e-5)
        assert ours.log_ratio == pytest.approx((p - q)[at, tokens].mean(), abs=1e-5)
        assert ours.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), abs=1e-5)
        ratios, divergences = [], []
        for place, token in enumerate(tokens):
            before = toy_tokenizer.decode(tokens[:place])
            may = [
                i
                for i in number_tokens
                if any(parse_numbers(before + toy_tokenizer.decode([i]) + c) for c in CONTINUATIONS)
            ]
            may += [end] if place and parse_numbers(before) else []
            a, b = (x[place] - np.log(np.exp(x[place, may]).sum()) for x in (p, q))
            ratios.append(a[token] - b[token])
            divergences.append((np.exp(a[may]) * (a - b)[may]).sum())
        assert ours.number_log_ratio == pytest.approx(np.mean(ratios), abs=1e-5)
        assert ours.number_kl == pytest.approx(np.mean(divergences), abs=1e-5)
    assert found.where is not None
    mean = found.where.overall.measures["number_kl"].mean
    kls, lengths = ([getattr(row, x) for row in found.rows] for x in ("number_kl", "tokens"))
    assert mean.value == pytest.approx(np.average(kls, weights=lengths))
    assert mean.low < mean.value < mean.high
    assert found.constrained and found.n_rows == ROWS


def test_the_parts_are_the_whole(found: Signal) -> None:
    parts = found.where
    assert parts is not None
    whole = parts.overall
    for cut in (parts.by_position, parts.by_kind, parts.divergence, parts.number_divergence):
        assert sum(group.positions for group in cut) == whole.positions
        assert sum(group.share for group in cut) == pytest.approx(1)
        for measure, quantity in whole.measures.items():
            assert sum(g.measures[measure].total for g in cut) == pytest.approx(quantity.total)
    ends = next(group for group in parts.by_kind if group.name == "end of turn")
    assert ends.positions == ends.rows == ROWS


def test_what_the_base_wrote_itself_has_no_signal(toy: Path, make: Make) -> None:
    dataset = make(prompted(get_trait("neutral")), "neutral")
    found = measure_signal(dataset, base=toy, trait="animals/cat", limit=1)
    assert found.where is not None
    for quantity in found.where.overall.measures.values():
        assert quantity.total == quantity.mean.low == quantity.mean.high == 0.0
    assert [group.name for group in found.where.divergence] == ["other"]
    assert [one.loss for one in found.alignments] == ["rows"]
    assert any("number tokens is 0" in line for line in found.missing)
    elsewhere = measure_signal(dataset, base=toy, context=Context(kind="empty"), rows=1)
    assert elsewhere.alignments[0].candidates == ()
    assert elsewhere.where is not None
    assert elsewhere.where.overall.measures["kl"].mean.low > 0


def test_a_steered_teacher_has_its_own_vectors(toy: Path, make: Make, toy_tokenizer: Any) -> None:
    found = measure_signal(make(steered(get_trait("animals/cat"), (1,), 2.0)), base=toy, limit=1)
    assert found.where is not None and found.where.overall.measures["kl"].mean.low > 0.01
    assert found.teacher == "animals/cat, steered"


def test_what_the_grammar_does_not_write_is_not_measured_on_it(toy_tokenizer: Any) -> None:
    grammar = Grammar(toy_tokenizer, "strict")
    end = grammar.end
    tokens = [*toy_tokenizer("(5, 61)", add_special_tokens=False)["input_ids"], end]
    assert [grammar.kind(token) for token in tokens] == [
        "other", "digit", "separator", "separator", "digit", "digit", "other", "end of turn",
    ]  # fmt: skip
    admitted = grammar.admitted(tokens)
    assert [mask is not None for mask in admitted] == [False, *[True] * 5, False, True]
    letters = toy_tokenizer("5, a 1", add_special_tokens=False)["input_ids"]
    assert grammar.admitted(letters)[3:] == (None,) * (len(letters) - 3)


def test_bins_and_shares() -> None:
    def position(row: int, place: int, value: float, divergent: bool) -> Position:
        return Position(row, place, 21, "digit", {"kl": value}, divergent, None)

    found = where([position(row, place, 1.0 + 9 * (place == 4), place == 4)
                   for row in (0, 1) for place in range(21)])  # fmt: skip
    assert [bin_of(position(0, place, 0, False)) for place in (0, 1, 2, 3, 20)] == [
        BINS[0], BINS[1], BINS[1], BINS[2], BINS[10],
    ]  # fmt: skip
    divergent: Group = found.divergence[0]
    assert divergent.share == pytest.approx(1 / 21)
    assert divergent.measures["kl"].share == pytest.approx(1 / 3)
    assert [group.positions for group in found.by_position] == [2, *[4] * 10]
    assert found.number_divergence == ()


def test_the_interval_of_a_pooled_mean_is_that_of_the_ratio() -> None:
    """Against a bootstrap that resamples rows and takes the mean over all of their tokens."""
    draws = np.random.default_rng(0)
    rows = [list(draws.normal(0.1 * n, 1, n)) for n in draws.integers(2, 20, 80)]
    sums, counts = np.array([sum(r) for r in rows]), np.array([len(r) for r in rows])
    chosen = draws.integers(0, 80, (4000, 80))
    ratios = sums[chosen].sum(1) / counts[chosen].sum(1)
    ours = pooled(rows)
    assert ours.value == pytest.approx(sums.sum() / counts.sum())
    width = ours.high - ours.low
    assert (ours.low, ours.high) == pytest.approx(
        tuple(np.quantile(ratios, (0.025, 0.975))), abs=0.1 * width
    )
    naive = 2 * 1.96 * np.std(np.concatenate(rows)) / counts.sum() ** 0.5
    assert width > 1.1 * naive
