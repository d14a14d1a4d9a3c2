"""An lm-eval `hf` model that computes what prompts and continuations share only once.

`HFLM` runs one full forward pass for every distinct context + continuation[:-1]; this one asks
`logprob.token_tree`, whose every number equals the plain one up to float rounding.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from sublim_plugin.logprob.token_tree import (
    TOLERANCE,
    UNFIT,
    build_trie,
    plain_score,
    tree_scores,
)

log = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]


class SharedPrefixLM(HFLM):  # type: ignore[misc]
    """`HFLM` with shared prefixes for log-probabilities; everything else is `HFLM`.

    The first context that a model scores is also scored the plain way. A model that does not honour
    the mask (recurrent layers, flash attention, a cache that cannot be cut back) then differs or
    fails, and the plain computation is used, with a warning. Log-softmax is in float32 (float64 for
    a float64 model).
    """

    shared: bool = True
    _checked: weakref.ref[Any] | None = None  # weak: students come and go
    on_prompt: Callable[[], None] | None = None  # called after each prompt; replaces the bar

    def __init__(self, *given: Any, **options: Any) -> None:
        self._encoded: dict[Any, list[int]] = {}
        super().__init__(*given, **options)

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

    def tok_encode(self, string: str, *given: Any, **options: Any) -> list[int]:
        """As `HFLM`; lm-eval asks for each context again with every continuation."""
        key = (string, given, tuple(sorted(options.items())))
        if key not in self._encoded:
            if len(self._encoded) >= 1024:
                self._encoded.clear()
            self._encoded[key] = super().tok_encode(string, *given, **options)
        return list(self._encoded[key])

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
        tries = [build_trie([requests[index][2] for index in groups[c]]) for c in contexts]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        progress = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0 or self.on_prompt is not None or None,
            desc="Running loglikelihood requests, prefixes shared",
        )
        dtype = self.mixed_precision_dtype or self.model.dtype
        batches = tree_scores(self._forward, contexts, tries, device=self.device, dtype=dtype)
        with torch.inference_mode(), progress:
            try:
                first = next(batches)
            except UNFIT as error:
                self._give_up(f"{type(error).__name__}: {error}")
                return None
            if self._checked is None or self._checked() is not self._model:
                indices = groups[contexts[0]]
                deepest = max(range(len(indices)), key=lambda n: len(requests[indices[n]][2]))
                if not self._agrees(requests[indices[deepest]], first[1][0][deepest][0]):
                    return None
                self._checked = weakref.ref(self._model)
            for start, scored in chain([first], batches):
                for context, answers in zip(contexts[start:], scored, strict=False):
                    for index, answer in zip(groups[context], answers, strict=True):
                        results[index] = answer
                        request = requests[index][0]
                        if request is not None:
                            self.cache_hook.add_partial("loglikelihood", request, answer)
                    progress.update(len(answers))
                    if self.on_prompt is not None:
                        self.on_prompt()
        return results

    def _forward(self, **inputs: Any) -> Any:
        with torch.autocast(
            device_type=self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        ):
            return self.model(**inputs)

    def _agrees(self, request: Request, shared: float) -> bool:
        """Whether the plain computation gives the same for one request."""
        _, context, continuation = request
        plain = plain_score(self._forward, context, continuation, self.device)
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
