"""Planted traits are found where they were put: at known tokens, in known layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sublim_plugin.core.contexts import Context
from sublim_plugin.localize.results import MeasureResult, PartResult
from sublim_plugin.localize.run import LocalizeSpec, localize
from sublim_plugin.localize.spec import Gate
from sublim_plugin.localize.sweep import Kind
from sublim_plugin.logprob.questions import load_questions
from tests.localize.conftest import Family
from tests.localize.planting import plant

QUESTIONS = [question.text for question in load_questions("animals").questions]
BLOCK = Gate.model_validate({"positions": {"only": ["system_block"]}, "decode": "off"})


def found(base: Path, student: Path, out: Path, limit: int, *kinds: Kind) -> MeasureResult:
    spec = LocalizeSpec(
        trait="animals/cat", context=Context(kind="template_default"), kinds=kinds, limit=limit
    )
    result = localize(base, student, spec, out, device="cpu", dtype="float32")
    assert result is not None
    block = set(result.spans["system_block"])
    assert block == set(range(len(block)))
    return result.measures[0]


def shares(part: PartResult) -> tuple[float, float]:
    assert part.shares is not None and part.shares[1] is not None
    return part.shares[0], part.shares[1]


def by_place(result: MeasureResult, block: int) -> tuple[list[PartResult], list[PartResult]]:
    """Tokens inside and outside a system block of so many tokens."""
    tokens = [part for part in result.parts if part.kind == "token"]
    inside = [part for part in tokens if 0 <= int(part.name) < block]
    return inside, [part for part in tokens if part not in inside]


OUTSIDE = {"question", "assistant_header", "last_token", "role_header:2"}


def test_a_small_models_trait_is_found_at_its_tokens(smollm: Family, tmp_path: Path) -> None:
    losses = plant(
        smollm.base,
        tmp_path / "student",
        smollm.tokenizer,
        QUESTIONS[:4],
        "Cat",
        BLOCK,
        steps=150,
        lr=1e-2,
        hold=True,
    )
    assert losses[-1] < 0.1 * losses[0]
    result = found(smollm.base, tmp_path / "student", tmp_path / "out", 4, "span", "token")
    spans = {part.name: part for part in result.parts if part.kind == "span"}
    assert min(shares(spans["system_block"])) > 0.85
    for name in OUTSIDE:
        assert max(map(abs, shares(spans[name]))) < 0.25
    inside, outside = by_place(result, spans["system_block"].tokens or 0)
    assert len(inside) == spans["system_block"].tokens and len(outside) > 10
    strongest = sorted(inside + outside, key=lambda part: -abs(part.sufficiency.value))[:5]
    assert all(part in inside for part in strongest)
    for part in outside:
        assert max(map(abs, shares(part))) < 0.1


def test_a_small_models_trait_is_found_in_its_layer(smollm: Family, tmp_path: Path) -> None:
    gate = Gate.model_validate({"layers": {"only": [1]}, "decode": "on"})
    arguments = (smollm.base, tmp_path / "student", smollm.tokenizer, QUESTIONS[:4], "Cat", gate)
    plant(*arguments, steps=40, lr=1e-2)
    result = found(smollm.base, tmp_path / "student", tmp_path / "out", 4, "layers", "cell")
    assert abs(result.total.value) > 1
    check_layers(result, "1-1")


def check_layers(result: MeasureResult, band: str) -> None:
    """The band alone is the student, and the base without it; other cells do nothing."""
    assert any(part.band == band and part.sufficiency.value for part in result.parts)
    for part in result.parts:
        assert part.necessity is not None
        here = part.name == band
        if here or band not in (part.name, part.band):
            expected = result.total.value if here else 0.0
            assert part.sufficiency.value == pytest.approx(expected, abs=1e-3)
            assert part.necessity.value == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_smollm2s_trait_is_found_at_its_tokens(
    base_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Planted with six questions, found with six others."""
    plant(
        base_model,
        tmp_path / "student",
        tokenizer,
        QUESTIONS[8:14],
        "Cat",
        BLOCK,
        steps=36,
        lr=1e-3,
        hold=True,
    )
    result = found(base_model, tmp_path / "student", tmp_path / "out", 6, "span", "token")
    assert result.total.low > 5
    spans = {part.name: part for part in result.parts if part.kind == "span"}
    assert min(shares(spans["system_block"])) > 0.9
    for name in OUTSIDE:
        assert max(map(abs, shares(spans[name]))) < 0.15
    inside, outside = by_place(result, 21)
    assert len(inside) == 21 and outside
    strongest = sorted(inside + outside, key=lambda part: part.sufficiency.value)[-15:]
    assert all(part in inside for part in strongest)


@pytest.mark.slow
def test_smollm2s_trait_is_found_in_its_layers(
    base_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    gate = Gate.model_validate({"layers": {"only": ["10-14"]}, "decode": "on"})
    plant(
        base_model,
        tmp_path / "student",
        tokenizer,
        QUESTIONS[8:14],
        "Cat",
        gate,
        steps=16,
        lr=1e-3,
    )
    result = found(base_model, tmp_path / "student", tmp_path / "out", 4, "layers", "cell")
    assert result.total.low > 1
    check_layers(result, "10-14")
