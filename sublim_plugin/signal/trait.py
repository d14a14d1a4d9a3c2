"""The trait's log-probability on questions as a differentiable function of a model's weights.

The numbers are those of `logprob.forms.candidate_logprobs`; there they are plain floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import Trait, candidates_of, get_trait
from sublim_plugin.logprob.forms import FLOOR, FormPlan
from sublim_plugin.logprob.placing import place_forms
from sublim_plugin.logprob.questions import load_questions
from sublim_plugin.logprob.token_tree import at_least_float32, build_trie, lay_out


@dataclass(frozen=True)
class Asked:
    """A trait and the questions that ask for it: prompts' token ids, and the forms behind each.

    `questions_sha256` is that of the whole set; `prompts` are its first ones.
    """

    trait: Trait
    candidates: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    plans: tuple[FormPlan, ...]
    questions_sha256: str

    @property
    def pairs(self) -> list[tuple[tuple[int, ...], FormPlan]]:
        """Each prompt with the forms behind it."""
        return list(zip(self.prompts, self.plans, strict=True))

    @property
    def target(self) -> int:
        """The target's index among the candidates."""
        return self.candidates.index(self.trait.target)


def ask(
    name: str, questions: str | None, limit: int, tokenizer: Any, context: Context
) -> Asked | None:
    """The first `limit` questions about a trait; None for `neutral`.

    Raises:
        InputError: an unknown trait or question set, or forms that cannot follow the prompts.
    """
    trait = get_trait(name)
    if not trait.target:
        return None
    candidates = candidates_of(name)
    found = load_questions(questions or trait.category)
    if found.category != trait.category:
        raise InputError(
            f"the questions of {found.name!r} ask for {found.category}, {trait.name} is of "
            f"{trait.category}; give a set about it with --questions"
        )
    rendered = [render(tokenizer, context, q.text) for q in found.questions[:limit]]
    return Asked(
        trait=trait,
        candidates=tuple(candidate.target for candidate in candidates),
        prompts=tuple(prompt.token_ids for prompt in rendered),
        plans=tuple(place_forms(tokenizer, prompt, candidates, False) for prompt in rendered),
        questions_sha256=found.sha256,
    )


def differentiable_logprobs(
    forward: Callable[..., Any], prompt: Sequence[int], plan: FormPlan, like: Tensor
) -> Tensor:
    """log P(the reply begins with the candidate) for every candidate of the plan, [candidates].

    One pass over the prompt and the token trie of all forms, as `token_tree` lays it out.

    Args:
        forward: a causal LM, called with transformers' keyword arguments.
        like: any weight of it, for device and dtype.
    """
    trie = build_trie([form.tokens for form in plan.forms])
    length, nodes = len(prompt), len(trie.tokens)
    positions = torch.zeros(length + nodes, dtype=torch.long)
    allowed = torch.zeros(length + nodes, length + nodes, dtype=torch.bool)
    lay_out(positions, allowed, 0, 0, length, trie.parents)
    mask = torch.zeros(allowed.shape, dtype=like.dtype)
    mask = mask.masked_fill(~allowed, torch.finfo(like.dtype).min)
    logits = forward(
        input_ids=torch.tensor([[*prompt, *trie.tokens]], device=like.device),
        attention_mask=mask[None, None].to(like.device),
        position_ids=positions[None].to(like.device),
        use_cache=False,
        logits_to_keep=1 + nodes,
    ).logits[0]
    logprobs = at_least_float32(logits).log_softmax(-1)
    forms = [
        logprobs[[node + 1 for node, _ in path], [token for _, token in path]].sum()
        for path in trie.scores
    ]
    return torch.stack([_candidate(plan, forms, name) for name in plan.candidates])


def _candidate(plan: FormPlan, forms: Sequence[Tensor], name: str) -> Tensor:
    """log(sum of the candidate's forms - sum of others' forms that extend them)."""
    pairs = list(zip(plan.forms, forms, strict=True))
    added = torch.stack([logprob for form, logprob in pairs if form.owner == name])
    taken = [logprob for form, logprob in pairs if form.inside == name]
    gain = added.logsumexp(0)
    if not taken:
        return gain
    left = 1 - (torch.stack(taken).logsumexp(0) - gain).exp()
    return gain + left.clamp_min(FLOOR).log()


def log_shares(logprobs: Tensor) -> Tensor:
    """Log of each candidate's share of all candidates' probability, [candidates]."""
    return logprobs.log_softmax(-1)
