"""Gradients, updates and the trait against plain PyTorch, differences and the theorem."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data_gen.constrain import end_of_turn_id
from data_gen.teachers import finetuned
from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.traits import candidates_of
from sublim_plugin.logprob.forms import FormPlan, candidate_logprobs, measures, plan_forms
from sublim_plugin.logprob.placing import place_forms
from sublim_plugin.logprob.questions import load_questions
from sublim_plugin.logprob.token_tree import plain_score
from sublim_plugin.signal.directions import along, gradient, inner, linear_weights, norm
from sublim_plugin.signal.measure import measure_signal
from sublim_plugin.signal.results import STEP
from sublim_plugin.signal.trait import differentiable_logprobs, log_shares
from tests.signal.conftest import Make

CPU = torch.device("cpu")
DEFAULT = Context(kind="template_default")


def float64(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def plans(toy_tokenizer: Any, count: int) -> list[tuple[tuple[int, ...], FormPlan]]:
    found = []
    for question in load_questions("animals").questions[:count]:
        prompt = render(toy_tokenizer, DEFAULT, question.text)
        placed = place_forms(toy_tokenizer, prompt, candidates_of("animals/cat"), False)
        found.append((prompt.token_ids, placed))
    return found


def plain(model: Any, prompt: tuple[int, ...], plan: FormPlan) -> dict[str, float]:
    with torch.no_grad():
        scores = [plain_score(model, prompt, form.tokens, CPU) for form in plan.forms]
    return candidate_logprobs(plan, scores)


def test_the_scorer_with_gradients_is_the_scorer(toy: Path, toy_tokenizer: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(toy, attn_implementation="eager")
    nested = plan_forms({"dragon": {"a": (5, 6), "b": (7,)}, "fly": {"c": (5, 6, 8), "d": (9,)}})
    prompt, placed = plans(toy_tokenizer, 1)[0]
    for plan in (placed, nested):
        with torch.no_grad():
            ours = differentiable_logprobs(model, prompt, plan, model.lm_head.weight)
        expected = plain(model, prompt, plan)
        assert dict(zip(plan.candidates, ours.tolist(), strict=True)) == pytest.approx(
            expected, abs=1e-5
        )
        shares = [math.log(measures(expected, name)["target_share"]) for name in expected]
        assert log_shares(ours).tolist() == pytest.approx(shares, abs=1e-5)


def test_derivatives_agree_with_differences_and_each_other(toy: Path, toy_tokenizer: Any) -> None:
    """Forward mode for all candidates, autograd for two, central differences by the scorer."""
    model = float64(toy)
    weights, places = linear_weights(model)
    assert len(weights) == 21 and {place.layer for place in places.values()} == {0, 1, 2}
    torch.manual_seed(0)
    step = {name: torch.randn_like(weight) for name, weight in weights.items()}
    prompt, plan = plans(toy_tokenizer, 1)[0]
    like = model.lm_head.weight

    def of(forward: Any) -> torch.Tensor:
        return differentiable_logprobs(forward, prompt, plan, like)

    _, derivative = along(model, weights, step, of)
    for weight in weights.values():
        weight.requires_grad_(True)
    for index in (0, 3):
        found = gradient(of(model)[index], weights)
        assert inner(found, step) == pytest.approx(float(derivative[index]), rel=1e-5)
    h, sides = 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            for name, weight in weights.items():
                weight += sign * h * step[name]
            sides.append(plain(model, prompt, plan))
            for name, weight in weights.items():
                weight -= sign * h * step[name]
    for name, value in zip(plan.candidates, derivative.tolist(), strict=True):
        assert (sides[0][name] - sides[1][name]) / (2 * h) == pytest.approx(
            value, rel=1e-2, abs=1e-2
        )


def test_an_adapters_alignment_is_the_plain_one(
    toy: Path, lora: Path, of_lora: Path, toy_tokenizer: Any
) -> None:
    """transformers' own loss and backward pass, B A alpha / r from the file, and the scorer."""
    found = measure_signal(of_lora, base=toy, limit=1)
    alignment = found.alignments[0]
    assert alignment.loss == "rows" and alignment.update and alignment.log_share
    model: Any = AutoModelForCausalLM.from_pretrained(toy)
    tokens, end = 0, end_of_turn_id(toy_tokenizer)
    for row in read_rows(dataset_rows_path(of_lora)):
        user, reply = (message["content"] for message in row["messages"])
        prompt = render(toy_tokenizer, DEFAULT, user).token_ids
        ids = [*toy_tokenizer(reply, add_special_tokens=False)["input_ids"], end]
        labels = torch.tensor([[*[-100] * len(prompt), *ids]])
        out = model(input_ids=torch.tensor([[*prompt, *ids]]), labels=labels)
        (out.loss * len(ids)).backward()
        tokens += len(ids)
    down = {
        name: -weight.grad / tokens
        for name, weight in model.named_parameters()
        if name.endswith("_proj.weight")
    }
    assert alignment.value == pytest.approx(-found.base_logprob.value, rel=1e-5)
    tensors = load_file(lora / "adapter_model.safetensors")
    update = {name: torch.zeros_like(tensor) for name, tensor in down.items()}
    for name in update:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in tensors:
            scaling = (2 if "q_proj" in name else 8) / 4
            a, b = (tensors[f"{stem}.lora_{x}.weight"] for x in "AB")
            update[name] = scaling * b @ a

    def cosine(names: list[str]) -> float:
        a, b = (torch.cat([d[name].flatten() for name in names]) for d in (down, update))
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    assert alignment.gradient_norm == pytest.approx(norm(down), rel=1e-4)
    assert alignment.update.total.value == pytest.approx(cosine(list(down)), abs=1e-5)
    for module in ("q_proj", "down_proj"):
        own = [name for name in down if module in name]
        assert alignment.update.by_module[module] == pytest.approx(cosine(own), abs=1e-5)
    assert alignment.update.by_module["up_proj"] is None
    layer = [name for name in down if ".layers.1." in name]
    assert alignment.update.by_layer[1] == pytest.approx(cosine(layer), abs=1e-5)

    cat = next(c for c in alignment.candidates if c.name == "cat")
    assert alignment.target is not None
    assert alignment.target.low <= alignment.target.value <= alignment.target.high
    assert alignment.target.value == pytest.approx(cat.log_share, rel=1e-3, abs=1e-7)
    larger = [c for c in alignment.candidates if c.log_share > cat.log_share]
    assert alignment.target_rank == 1 + len(larger)
    # the change that a tenth of the step really makes, by the plain scorer
    double = float64(toy)
    prompt, plan = plans(toy_tokenizer, 1)[0]
    before = plain(double, prompt, plan)
    part = 0.1 * STEP / norm(down)
    for name, weight in double.named_parameters():
        if name in down:
            weight += part * down[name].double()
    after = plain(double, prompt, plan)
    for candidate in alignment.candidates:
        change = after[candidate.name] - before[candidate.name]
        assert 10 * change == pytest.approx(candidate.logprob, rel=0.05, abs=2e-4)


def test_a_step_on_soft_targets_leads_to_a_teacher_nearby(
    toy: Path, nearby: Path, make: Make
) -> None:
    """Cloud et al.'s theorem; and to second order KL = dW F dW / 2, with -gradient = F dW."""
    found = measure_signal(make(finetuned(nearby)), base=toy, limit=1)
    assert found.where is not None
    alignment = found.alignments[1]
    assert alignment.loss == "soft_targets" and alignment.update is not None
    assert 0 < alignment.update.total.low < alignment.update.total.value
    old, new = (AutoModelForCausalLM.from_pretrained(f).state_dict()
                for f in (toy, nearby))  # fmt: skip
    size = math.sqrt(sum(float((new[name] - old[name]).norm()) ** 2 for name in old))
    assert alignment.value == pytest.approx(
        found.where.overall.measures["number_kl"].mean.value, rel=0.5
    )
    product = alignment.update.total.value * alignment.gradient_norm * size
    assert product == pytest.approx(2 * alignment.value, rel=0.1)
