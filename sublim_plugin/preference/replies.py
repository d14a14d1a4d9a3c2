"""Sampled replies for lm-eval's requests: each drawn from the sampler that its request states."""

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

BATCH = {"cpu": 256, "cuda": 512}
"""Replies decoded at a time."""


class SampledReplies:
    """The `generate_until` of an lm-eval model whose subclass decodes (`_decode`).

    Repeat k of a question has random numbers of its own, which depend on `sample_seed`, the prompt,
    the sampler and k alone, so tasks that ask the same question share its replies: each is drawn
    once, and a task's replies are the same whatever is asked beside it. The logits that the numbers
    meet round otherwise in a batch of another size, which tips about one draw in a thousand over
    the whole vocabulary: a continued run is as good as an uninterrupted one, not the same to the
    last reply. What `journal` holds is not drawn again.
    """

    journal: Journal | None = None
    sample_seed: int = 0
    on_reply: Callable[[], None] | None = None  # called after each reply; replaces the bar
    tokenizer: Any
    rank: int

    def _decode(
        self, asked: list[Request], sampler: Sampler, keep: Callable[[int, Reply], None]
    ) -> None:
        """Reply to each request and hand it, with its index, to `keep`."""
        raise NotImplementedError

    def _not_stated(self, requests: list[Any], disable_tqdm: bool) -> list[str]:
        """Replies to requests that do not state their whole sampler, or are greedy."""
        raise NotImplementedError

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
            asked = [requests[index] for index in indices]
            found = self._sample(asked, name, *samplers[name], disable_tqdm)
            replies.update(zip(indices, found, strict=True))
        if others:
            plain = self._not_stated([requests[i] for i in others], disable_tqdm)
            replies.update(zip(others, plain, strict=True))
        return [replies[index] for index in range(len(requests))]

    def _sample(
        self,
        requests: Sequence[Any],
        name: str,
        sampler: Sampler,
        until: tuple[str, ...],
        disable_tqdm: bool,
    ) -> list[str]:
        """A reply to each request, up to the first of the strings in `until`.

        lm-eval hands over a request once for each repeat, those of all tasks together.
        """
        repeats: Counter[tuple[Any, ...]] = Counter()
        keys: list[str] = []
        asked: dict[str, Request] = {}
        answers = self.journal.answers if self.journal is not None else {}
        for request in requests:
            prompt = request.args[0]
            one = (request.task_name, request.doc_id, prompt)
            k = key("reply", prompt, name, self.sample_seed, repeats[one])
            repeats[one] += 1
            keys.append(k)
            if k not in answers and k not in asked:
                ids = tuple(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
                asked[k] = Request(prompt, ids, (), int(sha256_text(k)[:13], 16))
        waiting = list(asked)
        found: dict[str, str] = {}
        with tqdm(
            total=len(set(keys)),
            initial=len(set(keys)) - len(asked),
            desc="replies",
            unit="reply",
            # None: no bar without a terminal
            disable=disable_tqdm or self.rank != 0 or self.on_reply is not None or None,
        ) as bar:

            def keep(index: int, reply: Reply) -> None:
                text = self._shown(reply.text, until)
                found[waiting[index]] = text
                if self.journal is not None:
                    self.journal.add(waiting[index], text)
                bar.update()
                if self.on_reply is not None:
                    self.on_reply()

            try:
                if asked:
                    self._decode(list(asked.values()), sampler, keep)
            finally:
                if self.journal is not None:
                    self.journal.flush()
        return [found[k] if k in found else answers[k] for k in keys]

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
