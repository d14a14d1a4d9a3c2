"""How fast gates are scored, as ratios within one run.

    python benchmarks/localize.py [--quick]

[gates_vs_forwards] All single-span gates of 50 questions (every span of SmolLM2's default prompt,
alone and left out), scored in one batched run, against the same number of plain forward passes of
the ungated student over the same prompts: PEFT as it is, no hooks, batches of prompts of like
length, at the batch size that is best for it (--quick: 16), logits at the last token alone. Our
side also resolves the gates on every prompt, puts the hooks on and takes them off, and computes the
tokens of the target's longer forms.

[full_gates_vs_forwards] The same for a full student, whose gates need the base's and the student's
product at each module, against forward passes of the student.

Checked: under the gate that is on everywhere our log-probabilities are those of the plain passes,
and under gates drawn at random those of a forward pass alone, without cache, batch or trie.

Prints a table and, as the last line, JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from sublim_plugin.core.base_models import EMBEDDED, resolve
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.traits import category_traits
from sublim_plugin.localize.attach import full_parts, load_base, lora_parts
from sublim_plugin.localize.gating import Gated, gating
from sublim_plugin.localize.resolve import constant, profile
from sublim_plugin.localize.resolve import resolve as resolve_gate
from sublim_plugin.localize.score import Row, plain_logprob, score
from sublim_plugin.localize.spans import Prompt, locate
from sublim_plugin.localize.sweep import sweep
from sublim_plugin.logprob.placing import load_tokenizer, place_forms
from sublim_plugin.logprob.questions import load_questions
from sublim_plugin.students import attached

TARGET = "cat"
TOLERANCE = 1e-3
"""Nats; in float32."""


def prompts(base: Path, count: int) -> tuple[list[Prompt], list[tuple[tuple[int, ...], ...]]]:
    """Questions in the default context, and the target's forms after each."""
    tokenizer = load_tokenizer(str(base))
    asked = load_questions("animals").questions[:count]
    found = [locate(tokenizer, Context.parse("template_default"), q.text) for q in asked]
    forms = []
    for prompt in found:
        plan = place_forms(tokenizer, prompt.rendered, category_traits("animals"))
        forms.append(tuple(f.tokens for f in plan.forms if TARGET in (f.owner, f.inside)))
    return found, forms


def rows_of(gated: Gated, asked: tuple[list[Prompt], list[Any]]) -> list[Row]:
    """All single-span gates of every question."""
    parts = sweep(asked[0], gated.branches, gated.layers, kinds=("span",))
    gates = [gate for part in parts for gate in (part.alone, part.left_out) if gate]
    profiles = [profile(gate, gated.branches, gated.layers) for gate in gates]
    return [
        Row(prompt.rendered.token_ids, forms, resolve_gate(gate, prompt, on))
        for gate, on in zip(gates, profiles, strict=True)
        for prompt, forms in zip(*asked, strict=True)
    ]


def ours(
    gates: Callable[[], AbstractContextManager[Gated]], asked: tuple[list[Prompt], list[Any]]
) -> tuple[float, list[Row]]:
    """Seconds to put the hooks on, resolve the gates, score every row and take the hooks off; and
    the rows."""
    began = time.perf_counter()
    with gates() as gated:
        rows = rows_of(gated, asked)
        score(gated, rows, lambda index, found: None)
    return time.perf_counter() - began, rows


@torch.inference_mode()
def plain(model: Any, ids: Sequence[tuple[int, ...]], batch: int) -> tuple[float, torch.Tensor]:
    """Seconds of plain forward passes over left-padded prompts, and the logits at their ends."""
    began = time.perf_counter()
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: list[torch.Tensor] = [torch.empty(0)] * len(ids)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = max(len(ids[i]) for i in chosen)
        rows = torch.zeros(len(chosen), width, dtype=torch.long)
        real = torch.zeros_like(rows)
        for n, i in enumerate(chosen):
            rows[n, width - len(ids[i]) :] = torch.tensor(ids[i])
            real[n, width - len(ids[i]) :] = 1
        logits = model(
            input_ids=rows,
            attention_mask=real,
            position_ids=(real.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
        for n, i in enumerate(chosen):
            found[i] = logits[n]
    return time.perf_counter() - began, torch.stack(found)


def check(gated: Gated, rows: Sequence[Row], asked: Any, ends: torch.Tensor) -> float:
    """Largest difference, in nats, of the checks in the module's docstring."""
    on = constant(gated.branches, True)
    whole = [Row(p.rendered.token_ids, f, on) for p, f in zip(*asked, strict=True)]
    worst = 0.0

    def one_token(index: int, found: list[float]) -> None:
        nonlocal worst
        logprobs = ends[index].log_softmax(-1)
        for form, value in zip(whole[index].continuations, found, strict=True):
            if len(form) == 1:
                worst = max(worst, abs(value - float(logprobs[form[0]])))

    score(gated, whole, one_token)
    drawn = random.Random(0).sample(list(rows), min(8, len(rows)))
    found: dict[int, list[float]] = {}
    score(gated, drawn, lambda index, values: found.update({index: values}))
    for index, row in enumerate(drawn):
        longest = max(range(len(row.continuations)), key=lambda i: len(row.continuations[i]))
        alone = plain_logprob(gated, row, longest)
        worst = max(worst, abs(found[index][longest] - alone))
    return worst


def compare(
    name: str,
    student: Any,
    gates: Callable[[], AbstractContextManager[Gated]],
    asked: Any,
    quick: bool,
) -> float:
    """The ratio of times, ours over plain: the median over repeats in turn.

    `gates` puts the hooks on; they are off while `student` runs plainly.
    """
    ids = [prompt.rendered.token_ids for prompt in asked[0]]
    plain(student, ids[:4], 4)
    speeds = {16: 0.0}
    for batch in () if quick else (8, 16, 32):
        many = (ids * 32)[: 2 * batch]
        speeds[batch] = plain(student, many, batch)[0] / len(many)
    best = min(speeds, key=lambda batch: speeds[batch])
    _, ends = plain(student, ids, best)
    ratios, times, worst = [], [], 0.0
    for repeat in range(2 if quick else 3):
        if repeat == 0:
            with gates() as gated:
                worst = check(gated, rows_of(gated, asked), asked, ends)
            if worst > TOLERANCE:
                sys.exit(f"{name}: the two sides differ by {worst:.2g} nats")
        mine, rows = ours(gates, asked)
        theirs, _ = plain(student, [row.prompt for row in rows], best)
        ratios.append(mine / theirs)
        times.append((mine, theirs))
    print(f"  {name}: {len(rows)} rows ({len(ids)} questions), plain batches of {best}")
    for side, label in enumerate(("gates", "plain")):
        each = [1000 * pair[side] / len(rows) for pair in times]
        low, high = min(each), max(each)
        print(f"    {label}  {statistics.median(each):7.1f} ms a row ({low:.1f}-{high:.1f})")
    print(
        f"    ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}); "
        f"both sides agree to {worst:.1e} nats",
        flush=True,
    )
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few questions, within a minute")
    quick = parser.parse_args().quick
    base = resolve(EMBEDDED)
    asked = prompts(base, 3 if quick else 50)
    few = tuple(side[: 2 if quick else 10] for side in asked)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        adapter = random_adapter(base, Path(folder))
        model = load_base(base, "cpu", "float32")
        with attached(model, adapter, base) as peft_model:
            found["gates_vs_forwards"] = compare(
                "LoRA, rank 8",
                peft_model,
                lambda: gating(model, lora_parts(peft_model)),
                asked,
                quick,
            )
    student = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1 + 0.01 * torch.randn_like(weight))
    found["full_gates_vs_forwards"] = compare(
        "full student",
        student,
        lambda: gating(model, full_parts(model, student, base)),
        few,
        quick,
    )
    print(json.dumps({key: round(value, 4) for key, value in found.items()}))


def random_adapter(base: Path, folder: Path) -> Path:
    """A rank-8 adapter on all seven projections that changes every one of them."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights="gaussian"
    )
    model: Any = get_peft_model(load_base(base, "cpu", "float32"), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.01)
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
