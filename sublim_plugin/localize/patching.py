"""Activation patching: what modules put out at one token of the student, put into the base.

The donor run is the student in one context, the recipient run the base in another. The outputs of
chosen modules at one token of the donor take the place of the recipient's at one of its tokens, and
the recipient's preference is scored. Controls say whether the place matters: another entity, the
first token of the system text, the first of the question, the last of all (the paper's controls).

Plain forward hooks, not nnsight: the gates are hooks already, so donor and recipient are one model
with the student on and off, in batches whose rows differ in question and place; nnsight would add a
dependency that changed its interface in each of its last minor releases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.strict_yaml import nearest
from sublim_plugin.localize.answers import Work, logprob_scores, narrowed
from sublim_plugin.localize.gating import Gated
from sublim_plugin.localize.resolve import Branch, constant
from sublim_plugin.localize.results import STUDENT, Patching, PatchScore, difference, measured
from sublim_plugin.localize.score import PASS_TOKENS, Row, forward_rows
from sublim_plugin.localize.spans import Prompt, locate, one_line, tokens_of
from sublim_plugin.localize.spec import PatchSpec, Selector, chosen_layers, shown
from sublim_plugin.logprob.forms import FormPlan, candidate_logprobs
from sublim_plugin.logprob.placing import place_forms
from sublim_plugin.logprob.token_tree import build_trie

Form = tuple[int, ...]
Value = Callable[[Sequence[float]], float]
"""From the log-probabilities of a prompt's continuations to log P(target)."""


def patch(
    gated: Gated,
    spec: PatchSpec,
    donors: Sequence[Prompt],
    recipients: Sequence[Prompt],
    continuations: Sequence[tuple[Form, ...]],
    values: Sequence[Value],
    donor_scores: Sequence[float],
) -> Patching:
    """Score every place on every question.

    Args:
        donors, recipients: the questions in either context.
        continuations, values: what to score after each recipient prompt, and how.
        donor_scores: log P(target) of the student after each donor prompt.

    Raises:
        InputError: a module, layer or span that is not there.
    """
    branches = _chosen(gated, spec)
    places = [_places(prompt, spec.recipient_at) for prompt in recipients]
    names = [name for name in places[0] if all(name in found for found in places)]
    source = [tokens_of(prompt, spec.donor_at)[-1] for prompt in donors]
    taken = _taken(gated, branches, donors, source)
    jobs = [(number, name) for name in (None, *names) for number in range(len(recipients))]
    scores: dict[tuple[int, str | None], float] = {}
    size = max(len(p.offsets) for p in recipients) + max(map(_nodes, continuations))
    step = max(1, PASS_TOKENS["cpu" if gated.model.device.type == "cpu" else "accelerator"] // size)
    off = constant(gated.branches, False)
    for start in range(0, len(jobs), step):
        batch = jobs[start : start + step]
        found = _recipient_pass(
            gated,
            branches,
            [Row(recipients[n].rendered.token_ids, continuations[n], off) for n, _ in batch],
            [None if name is None else (n, places[n][name]) for n, name in batch],
            taken,
        )
        for (number, name), logprobs in zip(batch, found, strict=True):
            scores[number, name] = values[number](logprobs)
    plain = [scores[number, None] for number in range(len(recipients))]
    return Patching(
        context=spec.recipient.fields(),
        modules=tuple(dict.fromkeys(branch.module for branch in branches)),
        layers=tuple(sorted({b.layer for b in branches if b.layer is not None})),
        donor_marked=donors[0].marked([source[0]]),
        recipient_marked=recipients[0].marked(places[0].values()),
        donor=measured(donor_scores),
        recipient=measured(plain),
        places=tuple(
            PatchScore(
                at=name,
                token=one_line(recipients[0].text_of([places[0][name]])),
                effect=difference([scores[n, name] for n in range(len(recipients))], plain),
            )
            for name in names
        ),
    )


def patching(work: Work, spec: PatchSpec) -> Patching:
    """Patch into the questions of a localization; see `patch`.

    Raises:
        InputError: a context, module, layer or span that is not there.
    """
    donors = work.prompts
    recipients = [locate(work.tokenizer, spec.recipient, prompt.question) for prompt in donors]
    target = work.trait.target
    plans = [
        narrowed(place_forms(work.tokenizer, prompt.rendered, work.candidates), target)
        for prompt in recipients
    ]

    def value(plan: FormPlan) -> Value:
        return lambda logprobs: candidate_logprobs(plan, logprobs)[target]

    whole = logprob_scores(work, {STUDENT: work.gates[STUDENT]}, False)
    return patch(
        work.gated,
        spec,
        donors,
        recipients,
        [tuple(form.tokens for form in plan.forms) for plan in plans],
        [value(plan) for plan in plans],
        whole.scores[STUDENT],
    )


def _chosen(gated: Gated, spec: PatchSpec) -> list[Branch]:
    known = {name for b in gated.branches for name in (b.module, b.family)}
    for module in spec.modules:
        if module not in known:
            raise InputError(f"patching: no module '{module}'{nearest(module, sorted(known))}")
    layers = set(range(gated.layers))
    if spec.layers is not None:
        named = chosen_layers(spec.layers, gated.layers)
        layers = {layer for layer in layers if spec.layers.holds(layer in named)}
    return [
        b
        for b in gated.branches
        if b.layer in layers and (b.module in spec.modules or b.family in spec.modules)
    ]


def _places(prompt: Prompt, at: tuple[Selector, ...] | None) -> dict[str, int]:
    """Name -> token of the recipient."""
    if at is not None:
        return {shown(selector): tokens_of(prompt, selector)[-1] for selector in at}
    spans = prompt.spans
    places: dict[str, int] = {}
    for name in ("entity:1", "entity:2"):
        if "entity" in spans and (name in spans or name == "entity:1"):
            places[name] = tokens_of(prompt, name)[-1]
    if "system_text" in spans:
        places["first of system_text"] = spans["system_text"][0]
    places["first of question"] = spans["question"][0]
    places["last_token"] = spans["last_token"][0]
    return places


def _nodes(continuations: tuple[Form, ...]) -> int:
    return len(build_trie(continuations).tokens)


@torch.inference_mode()
def _taken(
    gated: Gated, branches: Sequence[Branch], donors: Sequence[Prompt], at: Sequence[int]
) -> dict[str, Tensor]:
    """Module -> its output [questions, width] at each donor's token."""
    taken: dict[str, list[Tensor]] = {branch.name: [] for branch in branches}
    gated.use([constant(gated.branches, True)])
    with ExitStack() as stack:
        for branch in branches:

            def keep(module: Any, args: Any, output: Tensor, name: str = branch.name) -> None:
                taken[name].append(output[0, place])

            handle = gated.model.get_submodule(branch.name).register_forward_hook(keep)
            stack.callback(handle.remove)
        for prompt, token in zip(donors, at, strict=True):
            place = token
            ids = torch.tensor([prompt.rendered.token_ids], device=gated.model.device)
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            gated.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
    return {name: torch.stack(found) for name, found in taken.items()}


@torch.inference_mode()
def _recipient_pass(
    gated: Gated,
    branches: Sequence[Branch],
    rows: Sequence[Row],
    patches: Sequence[tuple[int, int] | None],
    taken: dict[str, Tensor],
) -> list[list[float]]:
    """Scores of rows whose `patches` are (donor, token), or None."""
    width = max(len(row.prompt) for row in rows)
    # rows are left-padded to one width
    put = [
        (i, width - len(rows[i].prompt) + patch[1], patch[0])
        for i, patch in enumerate(patches)
        if patch is not None
    ]
    at = tuple(torch.tensor([entry[n] for entry in put], dtype=torch.long) for n in range(3))
    with ExitStack() as stack:
        for branch in branches:

            def swap(module: Any, args: Any, output: Tensor, name: str = branch.name) -> Tensor:
                changed = output.clone()
                changed[at[0], at[1]] = taken[name][at[2]]
                return changed

            handle = gated.model.get_submodule(branch.name).register_forward_hook(swap)
            stack.callback(handle.remove)
        tries = [build_trie(row.continuations) for row in rows]
        return forward_rows(gated, rows, tries, 0, None)
