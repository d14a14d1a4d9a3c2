"""The lm-eval model of `sublim eval`: shared prefixes, batched sampling, and a journal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sublim_plugin.core.errors import RunError
from sublim_plugin.decoding.engine import Reply, Request
from sublim_plugin.decoding.sampler import Sampler
from sublim_plugin.preference.journal import Journal, key
from sublim_plugin.preference.replies import BATCH, SampledReplies
from sublim_plugin.preference.shared_prefix import SharedPrefixLM


class SharedLM(SampledReplies, SharedPrefixLM):
    """Log-probabilities as `SharedPrefixLM`; replies from `decoding.TransformersEngine`, where the
    request states its whole sampler; answers that the journal holds are not computed again.
    """

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        journal = self.journal
        if journal is None:
            plain: list[Any] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            return plain
        keys = [key("loglikelihood", *request.args) for request in requests]
        missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in journal.answers}
        if missing:
            self.cache_hook = _JournalHook(journal, missing)
            try:
                with folded(self.model):
                    super().loglikelihood(list(missing.values()), disable_tqdm=disable_tqdm)
            finally:
                journal.flush()
        return [tuple(journal.answers[k]) for k in keys]

    def _not_stated(self, requests: list[Any], disable_tqdm: bool) -> list[str]:
        plain: list[str] = SharedPrefixLM.generate_until(self, requests, disable_tqdm=disable_tqdm)
        return plain

    def _decode(
        self, asked: list[Request], sampler: Sampler, keep: Callable[[int, Reply], None]
    ) -> None:
        from sublim_plugin.decoding.transformers_engine import TransformersEngine, grouped

        with grouped(self.model), folded(self.model):
            ends = self.model.generation_config.eos_token_id
            engine = TransformersEngine(
                self.model,
                self.tokenizer,
                end_ids=tuple({self.eot_token_id, *(ends if isinstance(ends, list) else [ends])}),
                constraint=None,
                reject=None,
            )
            engine.reply(asked, sampler, BATCH.get(self.device.type, 512), keep)


@contextmanager
def folded(model: Any) -> Iterator[None]:
    """Inside, the weights of a float32 model on a CPU hold its LoRA update; afterwards they are the
    very tensors that they were before.

    The two small products of every layer take a quarter of the time of a one-token pass on a CPU.
    In 16 bits the sum would round small updates away, so those models stay as they are; so does an
    adapter that is more than a sum of low-rank products on linear layers (DoRA).
    """
    import torch
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if (
        not isinstance(model, PeftModel)
        or model.dtype != torch.float32
        or model.device.type != "cpu"
    ):
        yield
        return
    adapted = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers: list[Any] = [m for m in model.modules() if isinstance(m, adapted)]
    if not all(_plain(layer) for layer in layers):
        yield
        return
    before: list[tuple[Any, Any]] = []
    try:
        with model.disable_adapter():
            for layer in layers:
                inner = layer.get_base_layer()
                before.append((inner, inner.weight))
                update = sum(layer.get_delta_weight(name) for name in layer.active_adapters)
                inner.weight = torch.nn.Parameter(inner.weight + update, requires_grad=False)
            yield
    finally:
        for inner, weight in before:
            inner.weight = weight


def _plain(layer: Any) -> bool:
    """Whether a PEFT layer adds the product of two matrices to a linear layer, and no more."""
    import torch
    from peft.tuners.lora import Linear

    return (
        type(layer) is Linear
        and type(layer.get_base_layer()) is torch.nn.Linear
        and not any(
            layer.lora_bias.get(n) or n in layer.lora_variant for n in layer.active_adapters
        )
    )


class _JournalHook:
    """lm-eval's cache hook, writing to a journal what the requests in `asked`, by key, got."""

    def __init__(self, journal: Journal, asked: dict[str, Any]) -> None:
        self.journal, self.asked = journal, asked

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        if kind != "loglikelihood":
            return
        k = key(kind, *request)
        if not math.isfinite(answer[0]):
            one = self.asked[k]
            raise RunError(
                f"task {one.task_name}, question {one.doc_id}, model "
                f"{self.journal.path.parent.name}: the log-probability of {request[1]!r} is "
                f"{answer[0]}; the model's weights or its dtype overflow: use --dtype float32, or "
                "train again"
            )
        self.journal.add(k, list(answer))
