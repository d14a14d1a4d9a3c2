"""Activation patching: what modules put out at one token of the student, put into the base.

The donor run is the student in one context, the recipient run the base in another. The outputs of
chosen modules at one token of the donor take the place of the recipient's at one of its tokens, and
the recipient's preference is scored. Controls say whether the place matters: another entity, the
first token of the system text, the first of the question, the last of all (the paper's controls).

Plain forward hooks, not nnsight: the gates are hooks already, so donor and recipient are one model
with the student on and off, in batches whose rows differ in question and place. nnsight would be
one more dependency for a hook of four lines, and its interface broke in 0.6 and in 0.7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from sublim_plugin.core.errors import InputError
from sublim_plugin.localize.answers import Work, logprob_scores, narrowed, placed
from sublim_plugin.localize.gating import Gated
from sublim_plugin.localize.resolve import Branch, branch, constant, named_modules
from sublim_plugin.localize.results import STUDENT, Patching, PatchScore, difference, measured
from sublim_plugin.localize.score import PASS_TOKENS, Row, forward_rows
from sublim_plugin.localize.spans import Prompt, locate, one_line, tokens_of
from sublim_plugin.localize.spec import PatchSpec, Selector, chosen_layers, shown
from sublim_plugin.logprob.forms import FormPlan, candidate_logprobs
from sublim_plugin.logprob.token_tree import build_trie
from sublim_plugin.preference.journal import Journal, key

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
    journal: Journal | None = None,
) -> Patching:
    """Score every place on every question.

    Args:
        donors, recipients: the questions in either context.
        continuations, values: what to score after each recipient prompt, and how.
        donor_scores: log P(target) of the student after each donor prompt.
        journal: the student's, of the log-probabilities that are known.

    Raises:
        InputError: a module, layer or span that is not there.
    """
    places, source = placements(spec, donors, recipients)
    branches = _chosen(gated, spec)
    names = list(places[0])
    jobs = [(number, name) for name in (None, *names) for number in range(len(recipients))]
    keys: dict[tuple[int, str | None], str] = {}
    for number, name in jobs:
        what: list[Any] = [recipients[number].rendered.token_ids, continuations[number]]
        if name is not None:
            what += [[b.name for b in branches], donors[number].rendered.token_ids]
            what += [source[number], places[number][name]]
        keys[number, name] = key("patch", *what)
    known: dict[str, Any] = {} if journal is None else journal.answers
    jobs = [job for job in jobs if keys[job] not in known]
    taken = _taken(gated, branches, donors, source) if jobs else {}
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
        for job, logprobs in zip(batch, found, strict=True):
            if journal is None:
                known[keys[job]] = logprobs
            else:
                journal.add(keys[job], logprobs)
    if journal is not None:
        journal.flush()
    scores = {job: values[job[0]](known[k]) for job, k in keys.items()}
    plain = [scores[number, None] for number in range(len(recipients))]
    return Patching(
        context=spec.recipient.fields(),
        modules=tuple(dict.fromkeys(b.module for b in branches)),
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
    recipients = recipients_of(work.tokenizer, spec, donors)
    target = work.trait.target
    plans = [narrowed(placed(work, prompt), target) for prompt in recipients]

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
        work.journal,
    )


def recipients_of(tokenizer: Any, spec: PatchSpec, donors: Sequence[Prompt]) -> list[Prompt]:
    """The donors' questions in the recipient's context."""
    return [locate(tokenizer, spec.recipient, prompt.question) for prompt in donors]


def placements(
    spec: PatchSpec, donors: Sequence[Prompt], recipients: Sequence[Prompt]
) -> tuple[list[dict[str, int]], list[int]]:
    """Name -> token of each recipient where activations are put, and each donor's token.

    Raises:
        InputError: a span that is not there; the message says which side, and the way out.
    """
    try:
        source = [tokens_of(prompt, spec.donor_at)[-1] for prompt in donors]
    except InputError as error:
        raise InputError(
            f"patching, donor_at: {error}; name another place of the donor in --patch FILE"
        ) from error
    try:
        return [_places(prompt, spec.recipient_at) for prompt in recipients], source
    except InputError as error:
        raise InputError(f"patching, recipient_at: {error}") from error


def _chosen(gated: Gated, spec: PatchSpec) -> list[Branch]:
    """The modules whose outputs are patched, whether the student changes them or not."""
    there = patchable(gated.model)
    taken = named_modules(spec.modules, there, "patching: the decoder's layers have no module")
    layers = set(range(gated.layers))
    if spec.layers is not None:
        named = chosen_layers(spec.layers, gated.layers)
        layers = {layer for layer in layers if spec.layers.holds(layer in named)}
    found = [b for b in there if b.layer in layers and b in taken]
    if not found:
        raise InputError(
            f"patching: no layer is left of 0-{gated.layers - 1}; name one in `layers`"
        )
    return found


def patchable(model: Any) -> list[Branch]:
    """Every module in the decoder's layers that has weights of its own; an adapted one as a whole,
    not its parts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    decoder = model.get_decoder()
    found: list[Branch] = []
    adapted = None
    for path, module in model.named_modules():
        if adapted is not None and path.startswith(f"{adapted}."):
            continue
        adapted = path if isinstance(module, BaseTunerLayer) else None
        if adapted or any(True for _ in module.parameters(recurse=False)):
            found.append(branch(path))
    prefix = next(path for path, module in model.named_modules() if module is decoder.layers)
    return [b for b in found if b.name.startswith(f"{prefix}.")]


def _places(prompt: Prompt, at: tuple[Selector, ...] | None) -> dict[str, int]:
    """Name -> token of the recipient."""
    if at is not None:
        return {shown(selector): tokens_of(prompt, selector)[-1] for selector in at}
    spans = prompt.spans
    if "entity" not in spans:
        raise InputError(
            "the recipient's context names no entity, which is where the paper patches; give "
            f"--patch FILE with places such as recipient_at: [question, last_token] (spans: "
            f"{', '.join(spans)}). The recipient's prompt: {one_line(prompt.rendered.text)}"
        )
    places = {"entity:1": tokens_of(prompt, "entity:1")[-1]}
    if "entity:2" in spans:
        places["entity:2"] = spans["entity:2"][-1]
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
    taken: dict[str, list[Tensor]] = {site.name: [] for site in branches}
    gated.use([constant(gated.branches, True)])
    with ExitStack() as stack:
        for site in branches:

            def keep(module: Any, args: Any, output: Any, name: str = site.name) -> None:
                _check_shape(name, output, (1, length))
                taken[name].append(output[0, place])

            handle = gated.model.get_submodule(site.name).register_forward_hook(keep)
            stack.callback(handle.remove)
        for prompt, token in zip(donors, at, strict=True):
            place, length = token, len(prompt.offsets)
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
        for site in branches:

            def swap(module: Any, args: Any, output: Any, name: str = site.name) -> Any:
                changed = output.clone()
                changed[at[0], at[1]] = taken[name][at[2]]
                return changed

            handle = gated.model.get_submodule(site.name).register_forward_hook(swap)
            stack.callback(handle.remove)
        tries = [build_trie(row.continuations) for row in rows]
        return forward_rows(gated, rows, tries, 0, None)


def _check_shape(name: str, output: Any, expected: tuple[int, int]) -> None:
    if not isinstance(output, Tensor) or output.ndim != 3 or output.shape[:2] != expected:
        raise InputError(
            f"patching: {name} does not put out a vector for each token, so one cannot be replaced;"
            " choose other modules"
        )
