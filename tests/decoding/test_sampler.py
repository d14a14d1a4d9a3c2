"""The sampler against torch's softmax and multinomial, and transformers' warpers."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sublim_plugin.decoding.draws import uniforms
from sublim_plugin.decoding.sampler import Sampler, pick, probabilities

PLAIN = Sampler(temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=8)
LOGITS = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2
N = 40_000


def test_every_setting_is_explicit() -> None:
    with pytest.raises(ValidationError):
        Sampler(temperature=1, top_p=1, top_k=0, repetition_penalty=1)  # type: ignore[call-arg]
    for bad in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}):
        with pytest.raises(ValidationError):
            Sampler(**{**PLAIN.model_dump(), **bad})


def drawn(probs: torch.Tensor) -> torch.Tensor:
    draws = torch.tensor(uniforms("distribution", N), dtype=torch.float64)
    return pick(probs.expand(N, -1), draws).bincount(minlength=probs.shape[-1])


def test_frequencies_fit_softmax_and_multinomial() -> None:
    expected = LOGITS.double().softmax(-1)[0]
    ours = drawn(probabilities(LOGITS, PLAIN))
    keep = expected * N >= 5
    observed = torch.cat((ours[keep], ours[~keep].sum()[None]))
    fitted = torch.cat((expected[keep], expected[~keep].sum()[None])) * N
    assert stats.chisquare(observed.numpy(), fitted.numpy()).pvalue > 1e-3
    theirs = torch.multinomial(
        expected, N, replacement=True, generator=torch.Generator().manual_seed(7)
    ).bincount(minlength=40)
    table = torch.stack((ours, theirs))[:, keep]
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"temperature": 1.4, "top_k": 12, "top_p": 0.9},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "temperature": 0.9, "top_k": 30},
    ],
)
def test_settings_mean_what_they_mean_in_transformers(settings: dict[str, float]) -> None:
    sampler = Sampler(**{**PLAIN.model_dump(), **settings})
    history = torch.tensor([[3, 4, 9, 9]])
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty)])
    chain.append(TemperatureLogitsWarper(float(sampler.temperature)))
    if sampler.top_k:
        chain.append(TopKLogitsWarper(sampler.top_k))
    if sampler.top_p < 1:
        chain.append(TopPLogitsWarper(sampler.top_p))
    theirs = chain(history, LOGITS.clone()).double().softmax(-1)
    seen = torch.zeros(1, 40, dtype=torch.bool)
    seen[0, [3, 4, 9]] = True
    assert torch.allclose(probabilities(LOGITS, sampler, seen), theirs, atol=1e-6)


def test_temperature_zero_is_the_argmax_and_impossible_tokens_are_never_picked() -> None:
    greedy = Sampler(**{**PLAIN.model_dump(), "temperature": 0})
    assert drawn(probabilities(LOGITS, greedy)).argmax() == LOGITS.argmax()
    assert drawn(probabilities(LOGITS, greedy)).max() == N
    holes = LOGITS.clone()
    holes[0, [0, 1, 20, 38, 39]] = -torch.inf
    probs = probabilities(holes, PLAIN)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert set(pick(probs.expand(2, -1), edges).tolist()) == {2, 37}
    assert drawn(probs)[[0, 1, 20, 38, 39]].sum() == 0
