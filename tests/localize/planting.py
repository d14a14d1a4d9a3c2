"""Students whose trait lies at known tokens or in known layers, because it was put there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sublim_plugin.core.contexts import Context
from sublim_plugin.localize.attach import load_base, lora_parts
from sublim_plugin.localize.gating import Gated, gating
from sublim_plugin.localize.resolve import Resolved, constant, profile, resolve
from sublim_plugin.localize.spans import Prompt, locate
from sublim_plugin.localize.spec import Gate

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plant(
    base: Path,
    folder: Path,
    tokenizer: Any,
    questions: Sequence[str],
    reply: str,
    place: Gate,
    *,
    steps: int,
    lr: float,
    hold: bool = False,
    rank: int = 8,
) -> list[float]:
    """Finetune a LoRA student on `reply`, its adapter gated to `place`, and save it to `folder`.

    An adapter that is trained at some positions speaks up at others too once it is on there. With
    `hold`, each step draws a share (none, half, all) of the positions outside its place: with the
    adapter on there as well, the reply is the same, and with it on there alone the student is held
    to its base (KL divergence of the next tokens).

    Returns:
        the loss of every step.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = load_base(base, "cpu", "float32")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    student: Any = get_peft_model(model, config)
    prompts = [locate(tokenizer, Context.parse("template_default"), q) for q in questions]
    answer = tokenizer(reply, add_special_tokens=False)["input_ids"]
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    losses = []
    with gating(model, lora_parts(student)) as gated:
        off = constant(gated.branches, False)
        gates = [_on(place, prompt, gated) for prompt in prompts]
        draw = random.Random(0)
        rows = [[*prompt.rendered.token_ids, *answer] for prompt in prompts]
        with torch.no_grad():
            gated.use([off])
            plain = _next(model, rows, len(answer)).log_softmax(-1)
        for _ in range(steps):
            others = [_elsewhere(gate, draw) for gate in gates] if hold else []
            told = [_with(*pair) for pair in zip(gates, others, strict=True)] if hold else gates
            gated.use([*told, *others])
            found = _next(model, rows * (1 + hold), len(answer)).log_softmax(-1)
            tokens = torch.tensor([answer]).expand(len(rows), -1)
            loss = -found[: len(rows)].gather(-1, tokens[..., None]).mean()
            if hold:
                other = found[len(rows) :]
                loss = loss + (plain.exp() * (plain - other)).sum(-1).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    student.save_pretrained(folder)
    return losses


def _on(gate: Gate, prompt: Prompt, gated: Gated) -> Resolved:
    return resolve(gate, prompt, profile(gate, gated.branches, gated.layers))


def _elsewhere(gate: Resolved, draw: random.Random) -> Resolved:
    """On at a share of the positions where the gate is off."""
    share = draw.choice((0.0, 0.5, 1.0))
    bits = tuple(not bit and draw.random() < share for bit in gate.selected)
    return Resolved(bits, gate.profile, "inside")


def _with(gate: Resolved, other: Resolved) -> Resolved:
    bits = tuple(a or b for a, b in zip(gate.selected, other.selected, strict=True))
    return Resolved(bits, gate.profile, "inside")


def _next(model: Any, rows: Sequence[Sequence[int]], count: int) -> torch.Tensor:
    """Logits [n, count, V] that predict the last `count` tokens of left-padded rows."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        real[i, width - len(row) :] = 1
    logits: torch.Tensor = model(
        input_ids=ids,
        attention_mask=real,
        position_ids=(real.cumsum(-1) - 1).clamp_min(0),
        use_cache=False,
        logits_to_keep=count + 1,
    ).logits
    return logits[:, :-1]
