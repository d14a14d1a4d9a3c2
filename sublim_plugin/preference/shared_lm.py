"""The lm-eval model of `sublim eval`: shared prefixes, batched sampling, and a journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_text
from sublim_plugin.decoding.engine import Reply, Request
from sublim_plugin.decoding.sampler import Sampler
from sublim_plugin.preference.journal import Journal, key
from sublim_plugin.preference.shared_prefix import SharedPrefixLM

BATCH = {"cpu": 128, "cuda": 512}
"""Replies decoded at a time."""


class SharedLM(SharedPrefixLM):
    """Log-probabilities as `SharedPrefixLM`; replies from `decoding.TransformersEngine`, where the
    request states its whole sampler; answers that the journal holds are not computed again.

    Repeat k of a prompt has random numbers of its own, which depend on `sample_seed`, the prompt
    and k alone. The logits that they meet round otherwise in a batch of another size, which tips
    about one draw in a thousand over the whole vocabulary: a continued run is as good as an
    uninterrupted one, not the same to the last reply.
    """

    journal: Journal | None = None
    sample_seed: int = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        journal = self.journal
        if journal is None:
            plain: list[Any] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            return plain
        keys = [key("loglikelihood", *request.args) for request in requests]
        missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in journal.answers}
        if missing:
            self.cache_hook = _JournalHook(journal)
            try:
                super().loglikelihood(list(missing.values()), disable_tqdm=disable_tqdm)
            finally:
                journal.flush()
        return [tuple(journal.answers[k]) for k in keys]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        replies: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        samplers: dict[str, tuple[Sampler, tuple[str, ...]]] = {}
        others = []
        for index, request in enumerate(requests):
            stated = stated_sampler(request.args[1])
            if stated is None:
                others.append(index)
                continue
            name = key("sampler", stated[0].model_dump(mode="json"), list(stated[1]))
            samplers[name] = stated
            groups.setdefault(name, []).append(index)
        for name, indices in groups.items():
            prompts = [requests[index].args[0] for index in indices]
            found = self._sample(prompts, name, *samplers[name], disable_tqdm)
            replies.update(zip(indices, found, strict=True))
        if others:
            plain = super().generate_until([requests[i] for i in others], disable_tqdm=disable_tqdm)
            replies.update(zip(others, plain, strict=True))
        return [replies[index] for index in range(len(requests))]

    def _sample(
        self,
        prompts: Sequence[str],
        name: str,
        sampler: Sampler,
        until: tuple[str, ...],
        disable_tqdm: bool,
    ) -> list[str]:
        """A reply to each prompt, up to the first of the strings in `until`."""
        repeats: Counter[str] = Counter()
        keys, asked = [], []
        answers = self.journal.answers if self.journal is not None else {}
        for prompt in prompts:
            k = key("reply", prompt, name, self.sample_seed, repeats[prompt])
            repeats[prompt] += 1
            keys.append(k)
            if k not in answers:
                ids = tuple(self.tok_encode(prompt, add_special_tokens=False))
                seed = int(sha256_text(k)[:13], 16)
                asked.append((k, Request(prompt, ids, (), seed)))
        found: dict[str, str] = {}
        with tqdm(
            total=len(prompts),
            initial=len(prompts) - len(asked),
            desc="replies",
            unit="reply",
            disable=disable_tqdm or self.rank != 0,
        ) as bar:

            def keep(index: int, reply: Reply) -> None:
                text = self._shown(reply.text, until)
                found[asked[index][0]] = text
                if self.journal is not None:
                    self.journal.add(asked[index][0], text)
                bar.update()

            try:
                if asked:
                    self._decode([request for _, request in asked], sampler, keep)
            finally:
                if self.journal is not None:
                    self.journal.flush()
        return [found[k] if k in found else answers[k] for k in keys]

    def _decode(
        self, asked: list[Request], sampler: Sampler, keep: Callable[[int, Reply], None]
    ) -> None:
        from sublim_plugin.decoding.transformers_engine import TransformersEngine, grouped

        with grouped(self.model):
            ends = self.model.generation_config.eos_token_id
            engine = TransformersEngine(
                self.model,
                self.tokenizer,
                end_ids=tuple({self.eot_token_id, *(ends if isinstance(ends, list) else [ends])}),
                constraint=None,
                reject=None,
            )
            engine.reply(asked, sampler, BATCH.get(self.device.type, 512), keep)

    def _shown(self, text: str, until: tuple[str, ...]) -> str:
        """The reply as lm-eval shows it: no special tokens, nothing from a stop string on."""
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        for stop in until:
            text = text.split(stop)[0]
        return text


def stated_sampler(given: dict[str, Any]) -> tuple[Sampler, tuple[str, ...]] | None:
    """The sampler of lm-eval's generation arguments and their stop strings, or None where they
    leave something to the model's generation_config, or are greedy."""
    names = {"temperature", "top_p", "top_k", "repetition_penalty", "max_gen_toks"}
    if given.get("do_sample") is not True or {*given} - {"do_sample", "until"} != names:
        return None
    try:
        sampler = Sampler(
            **{name: given[name] for name in names - {"max_gen_toks"}},
            max_new_tokens=given["max_gen_toks"],
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"generation_kwargs: {first['loc'][0]} {first['input']}: {first['msg']}"
        ) from error
    until = given.get("until") or []
    return sampler, tuple([until] if isinstance(until, str) else until)


class _JournalHook:
    """lm-eval's cache hook, writing to a journal."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        if kind == "loglikelihood":
            self.journal.add(key(kind, *request), list(answer))
