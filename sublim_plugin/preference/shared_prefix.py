"""An lm-eval `hf` model that computes what prompts and continuations share only once.

`HFLM` runs one full forward pass for every distinct context + continuation[:-1]. Here the tokens
that all contexts of a call begin with (system block, user header) are computed once and stay in the
KV cache; each context then takes a single pass over the rest of its prompt followed by the token
trie of its continuations. Trie tokens see the prompt and their own ancestors (a tree attention
mask) and sit at the positions they would have in a sequence of their own, so every number equals
the plain one up to float rounding. One-token continuations cost nothing beyond the prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from sublim_plugin.preference.trie import (
    Trie,
    at_least_float32,
    build_trie,
    common_prefix,
    lay_out,
    score_paths,
)

log = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]

# Tokens computed in one forward pass: enough to keep a processor's caches or a GPU busy.
PASS_TOKENS = {"cpu": 800, "accelerator": 4096}

# Largest difference of a log-probability between the shared and the plain computation (nats).
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 0.05, torch.bfloat16: 0.3}


class SharedPrefixLM(HFLM):  # type: ignore[misc]
    """`HFLM` with shared prefixes for log-probabilities; everything else is `HFLM`.

    The first context of each call is also scored the plain way. A model that does not honour the
    mask (recurrent layers, flash attention, a cache that cannot be cut back) then differs or fails,
    and the plain computation is used, with a warning. Log-softmax is in float32 (float64 for
    a float64 model).
    """

    shared: bool = True
    on_prompt: Callable[[], None] | None = None  # called after each prompt; replaces the bar

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(index)
        longest = max((len(context) + len(cont) for _, context, cont in requests), default=0)
        usable = (
            self.shared
            and self.backend == "causal"
            and len(groups) < len(requests)
            and longest <= self._longest_shared()
        )
        if usable:
            results = self._score_groups(requests, groups, disable_tqdm)
            if results is not None:
                return results
        plain: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            requests, disable_tqdm=disable_tqdm, override_bs=override_bs
        )
        return plain

    def _longest_shared(self) -> int:
        """Longest sequence for which every layer attends to everything before it."""
        config = getattr(self.model.config, "text_config", None) or self.model.config
        window = getattr(config, "sliding_window", None)
        return min(self.max_length, window) if isinstance(window, int) else int(self.max_length)

    def _score_groups(
        self,
        requests: list[Request],
        groups: dict[tuple[int, ...], list[int]],
        disable_tqdm: bool,
    ) -> list[tuple[float, bool]] | None:
        """Scores in the order of `requests`, or None if this model cannot be scored so."""
        contexts = sorted(groups, key=len, reverse=True)
        # Each pass computes at least the context's last token.
        head = min(common_prefix(contexts), len(contexts[-1]) - 1)
        tries = [build_trie([requests[index][2] for index in groups[c]]) for c in contexts]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        progress = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0 or self.on_prompt is not None,
            desc="Running loglikelihood requests, prefixes shared",
        )
        longest = len(contexts[0]) - head + max(len(trie.tokens) for trie in tries)
        budget = PASS_TOKENS["cpu" if self.device.type == "cpu" else "accelerator"]
        size = max(1, min(budget // longest, len(contexts)))
        with torch.inference_mode(), progress:
            cache: Any = None
            for start in range(0, len(contexts), size):
                batch = contexts[start : start + size]
                try:
                    if cache is None and head > 0:
                        cache = self._prefill(batch[0][:head], size)
                    if cache is not None and len(batch) < size:
                        cache.batch_select_indices(list(range(len(batch))))
                    scored = self._score_batch(
                        [context[head:] for context in batch],
                        tries[start : start + size],
                        head,
                        cache,
                    )
                except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
                    if start > 0:
                        raise
                    self._give_up(f"{type(error).__name__}: {error}")
                    return None
                if start == 0:
                    indices = groups[batch[0]]
                    deepest = max(range(len(indices)), key=lambda n: len(requests[indices[n]][2]))
                    if not self._agrees(requests[indices[deepest]], scored[0][deepest][0]):
                        return None
                for context, answers in zip(batch, scored, strict=True):
                    for index, answer in zip(groups[context], answers, strict=True):
                        results[index] = answer
                        request = requests[index][0]
                        if request is not None:
                            self.cache_hook.add_partial("loglikelihood", request, answer)
                    progress.update(len(answers))
                    if self.on_prompt is not None:
                        self.on_prompt()
        return results

    def _prefill(self, tokens: Sequence[int], size: int) -> Any:
        """A KV cache of `tokens`, repeated for `size` rows."""
        ids = torch.tensor([tokens], device=self.device)
        cache = self._forward(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        if size > 1:
            cache.batch_repeat_interleave(size)
        return cache

    def _forward(self, **inputs: Any) -> Any:
        with torch.autocast(
            device_type=self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        ):
            return self.model(**inputs)

    def _score_batch(
        self, tails: Sequence[Sequence[int]], tries: Sequence[Trie], head: int, cache: Any
    ) -> list[list[tuple[float, bool]]]:
        """(sum of log-probabilities, whether greedy) of each continuation of each context.

        Args:
            tails: each context without its first `head` tokens.
            tries: the continuations of each context.
            cache: the first `head` tokens for every row, now and afterwards; None if head is 0.
        """
        width, nodes = max(map(len, tails)), max(len(trie.tokens) for trie in tries)
        length, scored_rows = width + nodes, nodes + 1  # scored: a context's last token, its nodes
        ids = torch.zeros(len(tails), length, dtype=torch.long)
        positions = torch.zeros(len(tails), length, dtype=torch.long)
        allowed = torch.zeros(len(tails), length, head + length, dtype=torch.bool)
        for row, (tail, trie) in enumerate(zip(tails, tries, strict=True)):
            pad = width - len(tail)
            ids[row, pad:width] = torch.tensor(tail)
            ids[row, width : width + len(trie.tokens)] = torch.tensor(trie.tokens, dtype=torch.long)
            lay_out(positions[row], allowed[row], head, pad, width, trie.parents)
        dtype = self.mixed_precision_dtype or self.model.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
        output = self._forward(
            input_ids=ids.to(self.device),
            attention_mask=mask[:, None].to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=scored_rows,
        )
        if cache is not None:
            cache.crop(-length)
        return [
            score_paths(at_least_float32(output.logits[row, -scored_rows:]), trie)
            for row, trie in enumerate(tries)
        ]

    def _agrees(self, request: Request, shared: float) -> bool:
        """Whether the plain computation gives the same for one request."""
        _, context, continuation = request
        ids = torch.tensor([[*context, *continuation][:-1]], device=self.device)
        logits = self._forward(input_ids=ids, use_cache=False).logits[0, len(context) - 1 :]
        logprobs = torch.log_softmax(at_least_float32(logits), dim=-1)
        tokens = torch.tensor(continuation, device=self.device)
        plain = float(logprobs.gather(1, tokens[:, None]).double().sum())
        if abs(plain - shared) <= TOLERANCE.get(self.model.dtype, 0.3):
            return True
        self._give_up(f"log-probability {shared} instead of {plain}")
        return False

    def _give_up(self, reason: str) -> None:
        self.shared = False
        log.warning(
            "%s cannot share prefixes (%s); scoring every continuation on its own, which is slower",
            type(self.model).__name__,
            reason,
        )
