"""The trait's log-probability, asked of a model in training.

The same measure as `sublim eval`'s (`logprob`), on the model as it stands: evaluation mode, no
gradients, no random numbers, so that the training is the same to the last bit with and without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sublim_plugin.axolotl.messages import warn
from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.traits import Trait
from sublim_plugin.logprob.forms import FormPlan, candidate_logprobs
from sublim_plugin.logprob.placing import place_forms
from sublim_plugin.logprob.questions import load_questions
from sublim_plugin.logprob.token_tree import (
    TOLERANCE,
    UNFIT,
    Scored,
    Trie,
    build_trie,
    plain_score,
    tree_scores,
)


class Probe:
    """What is asked of the model: `questions` of the trait's category in each context.

    Args:
        trait: the target; its category's targets are the candidates.
        candidates: all targets of the category.
        questions: a question set's name or path; `limit`: how many of it.

    Raises:
        InputError: the questions are about another category, or a context or form does not fit the
            tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        trait: Trait,
        candidates: Sequence[Trait],
        contexts: Sequence[Context],
        *,
        questions: str,
        limit: int,
    ) -> None:
        asked = load_questions(questions)
        if asked.category != trait.category:
            raise InputError(
                f"`sublim.probe.questions`: the set {asked.name!r} asks about {asked.category}, "
                f"the trait is {trait.name}."
            )
        self.trait, self.contexts = trait, tuple(contexts)
        self.texts = [question.text for question in asked.questions[:limit]]
        self._plans: list[FormPlan] = []
        self._prompts: list[list[tuple[int, ...]]] = []
        for context in self.contexts:
            rendered = [render(tokenizer, context, text) for text in self.texts]
            self._plans.append(place_forms(tokenizer, rendered[0], candidates))
            self._prompts.append([prompt.token_ids for prompt in rendered])
        self.shared_prefixes: bool | None = None
        """Whether the model can take the token tree; the first measurement finds out."""

    def measure(self, model: Any, dtype: torch.dtype) -> list[list[dict[str, float]]]:
        """For each context and question, candidate -> log-probability in nats; `dtype` is that of
        the attention scores. Leaves the model as it was.

        Raises:
            RunError: the accelerator's memory does not hold the probe beside the training.
        """
        try:
            with _as_it_was(model):
                return [
                    [
                        candidate_logprobs(plan, one)
                        for one in self._scores(model, plan, them, dtype)
                    ]
                    for plan, them in zip(self._plans, self._prompts, strict=True)
                ]
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"the probe does not fit in memory beside the training ({error}); lower "
                "`micro_batch_size`, with more `gradient_accumulation_steps`, or take "
                "`sublim.probe` out."
            ) from error

    def _scores(
        self, model: Any, plan: FormPlan, prompts: list[tuple[int, ...]], dtype: torch.dtype
    ) -> list[list[float]]:
        """For each prompt, the log-probabilities of the plan's forms."""
        device = next(model.parameters()).device
        forms = [form.tokens for form in plan.forms]
        if self.shared_prefixes is not False:
            try:
                found = _shared(model, prompts, _trie(plan), device, dtype)
            except torch.OutOfMemoryError:
                raise  # a RuntimeError, as much of UNFIT is; plain scoring would only be slower
            except UNFIT as error:
                found = None
                warn(f"the probe scores form by form, several times slower: {error}")
            if self.shared_prefixes is None:
                deepest = max(range(len(forms)), key=lambda index: len(forms[index]))
                plain = plain_score(model, prompts[0], forms[deepest], device)
                close = found is not None and abs(found[0][deepest] - plain) <= TOLERANCE[dtype]
                self.shared_prefixes = close
                if found is not None and not close:
                    warn(
                        "the probe scores form by form, several times slower: with shared prefixes "
                        f"this model gives {found[0][deepest]:.6g} for {plain:.6g}"
                    )
            if self.shared_prefixes and found is not None:
                return found
        return [[plain_score(model, prompt, form, device) for form in forms] for prompt in prompts]


def _trie(plan: FormPlan) -> Trie:
    return build_trie([form.tokens for form in plan.forms])


def _shared(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    trie: Trie,
    device: torch.device,
    dtype: torch.dtype,
) -> list[list[float]]:
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    scored: Scored = []
    for _, batch in tree_scores(
        model, [prompts[i] for i in order], [trie] * len(order), device=device, dtype=dtype
    ):
        scored += batch
    by_prompt = dict(zip(order, scored, strict=True))
    return [[score for score, _ in by_prompt[index]] for index in range(len(prompts))]


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; on leaving, every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
