"""Batched decoding with transformers: a reply depends on its row's prompt and seed alone.

Rows sit in slots of one preallocated key-value cache, right-aligned to nothing: each row has its
own length, so no row is padded for another one's sake. Prompts that begin alike share one forward
pass over the common beginning, and equal prompts one pass. A row that ends makes room for the next.

The attention function groups the query heads of a key head instead of repeating keys and values,
and is used for prompts and steps alike.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.decoding.draws import uniforms
from sublim_plugin.decoding.engine import Constraint, Filter, OnReply, Reply, Request
from sublim_plugin.decoding.sampler import Sampler, pick, weights

ATTENTION = "sublim_grouped"
PREFILL_TOKENS = 1024
"""Prompt tokens, padding included, in one forward pass: enough to keep two cores or a GPU busy."""


def grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query [n, H, Q, D] over key and value [n, G, T, D], H a multiple of G.

    `attention_mask` [n, 1, Q, T] is added to the scores. Returns [n, Q, H, D].
    """
    if s_aux is not None:
        raise InputError("models with attention sinks are not supported by this engine")
    n, heads, q, width = query.shape
    groups, t = key.shape[1], key.shape[2]
    scores = query.reshape(n, groups, -1, width) @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(n, groups, -1, q, t) + attention_mask.unsqueeze(1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    mixed = weights.view(n, groups, -1, t) @ value
    return mixed.view(n, heads, q, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, grouped_attention)


@contextmanager
def grouped(model: Any) -> Iterator[None]:
    """Inside, the model, or the base model of a PeftModel, computes `grouped_attention`."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.config._attn_implementation
    inner.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


class _SlotCache(Cache):
    """Keys and values of `slots` rows in place, each at its own length. Three ways to write:
    the common beginning (`mode` "common"), prompts of new rows ("join"), one step ("step")."""

    def __init__(self, layers: int, slots: int, length: int) -> None:
        super().__init__(layers=[])
        self.slots, self.length = slots, length
        self.common: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.store: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.n_layers = layers
        self.mode = "common"
        self.joining: list[tuple[int, int, int]] = []
        """Slot, length and row of the forward pass for each row that joins."""
        self.positions = torch.empty(0, dtype=torch.long)
        self.used = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.used

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = (key_states, value_states)
        if layer_idx == len(self.store):
            shape = (self.slots, key_states.shape[1], self.length)
            self.store.append(
                (
                    key_states.new_zeros(*shape, key_states.shape[3]),
                    value_states.new_zeros(*shape, value_states.shape[3]),
                )
            )
        if self.mode == "common":
            self.common.append(new)
            return new
        store = self.store[layer_idx]
        if self.mode == "step":
            rows = torch.arange(len(self.positions), device=key_states.device)
            for held, fresh in zip(store, new, strict=True):
                held[rows, :, self.positions] = fresh[:, :, 0]
            return tuple(x[: len(rows), :, : self.used] for x in store)  # type: ignore[return-value]
        if not self.common:
            start, seen = 0, new
        else:
            common = self.common[layer_idx]
            start = common[0].shape[2]
            seen = tuple(  # type: ignore[assignment]
                torch.cat((old.expand(len(fresh), -1, -1, -1), fresh), 2)
                for old, fresh in zip(common, new, strict=True)
            )
        for held, full in zip(store, seen, strict=True):
            for slot, length, i in self.joining:
                held[slot, :, :start] = full[i, :, :start]
                held[slot, :, start : start + length] = full[i, :, full.shape[2] - length :]
        return seen

    def get(self, slot: int, length: int) -> list[torch.Tensor]:
        """A copy of the first `length` positions of a slot, keys and values layer by layer."""
        return [held[slot, :, :length].clone() for layer in self.store for held in layer]

    def put(self, slot: int, states: list[torch.Tensor]) -> None:
        """Write what `get` gave to a slot."""
        stores = [held for layer in self.store for held in layer]
        for held, state in zip(stores, states, strict=True):
            held[slot, :, : state.shape[1]] = state

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for layer in self.store:
            for held in layer:
                held[target, :, :length] = held[source, :, :length]


class _Row:
    """A row in a slot: its request, what it has written and the length of its cache.

    `state` is that of the constraint or of the filter; None where the reply is given up."""

    def __init__(self, index: int, request: Request, budget: int, state: Any) -> None:
        self.index, self.request = index, request
        self.uniforms = uniforms(f"sublim sample/{request.seed}", budget)
        self.written: list[int] = []
        self.length = len(request.token_ids)
        self.state = state


class TransformersEngine:
    """A causal language model on one device, ready to answer requests (see `engine.Engine`).

    A reply ends with one of `end_ids`. Under a `constraint` the output layer computes the logits of
    its tokens alone, which is the same as masking all others. With `reject`, a reply that this
    filter can no longer accept leaves the batch at its first wrong token (`Reply.stopped`);
    since every row has its own draws, this changes nothing about the replies that are accepted.
    Raises InputError for an architecture whose layers are not all attention layers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        end_ids: tuple[int, ...],
        constraint: Constraint | None,
        reject: Filter | None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device: torch.device = model.device
        self.end_ids = frozenset(end_ids)
        self.filter = reject if constraint is None else None
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not kinds <= {"full_attention", "sliding_attention"}:
            raise InputError(
                f"{config.name_or_path}: layers of kind {sorted(kinds)}; the transformers engine "
                "reads models whose layers are all attention layers"
            )
        self.layers: int = config.num_hidden_layers
        window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
        self.longest: int = min(window or 1 << 60, config.max_position_embeddings)
        self.vocabulary: int = config.vocab_size
        self.constraint = constraint
        self.columns: torch.Tensor | None = None
        self.forward_s = 0.0
        """Seconds spent inside the model's forward passes so far."""
        if constraint is not None:
            self.columns = torch.tensor(constraint.token_ids, device=self.device)
            full = self.model.get_output_embeddings()
            small = torch.nn.Linear(full.in_features, len(self.columns), bias=full.bias is not None)
            small.weight = torch.nn.Parameter(full.weight.detach()[self.columns], False)
            if full.bias is not None:
                small.bias = torch.nn.Parameter(full.bias.detach()[self.columns], False)
            self.model.set_output_embeddings(small)

    def describe(self) -> dict[str, Any]:
        """See `engine.Engine`."""
        return {
            "engine": "transformers",
            "device": str(self.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "row_seeds": True,
            "early_rejection": self.filter is not None,
        }

    @torch.inference_mode()
    def reply(
        self,
        requests: Sequence[Request],
        sampler: Sampler,
        batch_size: int,
        on_reply: OnReply = lambda index, reply: None,
    ) -> list[Reply]:
        """See `engine.Engine`.

        Raises InputError where a prompt and its budget exceed the model's positions.
        """
        if not requests:
            return []
        budget = sampler.max_new_tokens
        longest = max(len(r.token_ids) for r in requests)
        if longest + budget > self.longest:
            raise InputError(
                f"a prompt of {longest} tokens and max_new_tokens {budget} exceed the "
                f"{self.longest} positions that this engine can attend to in the model; lower "
                "max_new_tokens or shorten the prompts"
            )
        run = _Run(self, requests, sampler, min(batch_size, len(requests)), longest + budget)
        for index in run.steps():
            on_reply(index, run.replies[index])
        return [run.replies[index] for index in range(len(requests))]


class _Run:
    """The state of one call of `Engine.reply`."""

    def __init__(
        self,
        engine: TransformersEngine,
        requests: Sequence[Request],
        sampler: Sampler,
        slots: int,
        length: int,
    ) -> None:
        self.engine, self.sampler, self.slots = engine, sampler, slots
        self.replies: dict[int, Reply] = {}
        follower = engine.constraint or engine.filter
        state = follower.start if follower else None
        self.waiting = deque(
            _Row(i, request, sampler.max_new_tokens, state) for i, request in enumerate(requests)
        )
        self.active: list[_Row] = []
        self.coming = Counter(request.token_ids for request in requests)
        """How many rows of a prompt are still waiting."""
        self.kept: dict[tuple[int, ...], tuple[torch.Tensor, list[torch.Tensor]]] = {}
        """Logits [1, columns] behind each prompt that more rows are waiting for, and its states."""
        self.cache = _SlotCache(engine.layers, slots, length)
        self.penalized = sampler.repetition_penalty != 1
        self.seen = (
            torch.zeros(slots, engine.vocabulary, dtype=torch.bool, device=engine.device)
            if self.penalized
            else None
        )
        self.common = self._common_beginning([r.token_ids for r in requests])

    def _common_beginning(self, prompts: list[tuple[int, ...]]) -> int:
        """Length of the beginning that all prompts share, at least one token short of each."""
        low, high = min(prompts), max(prompts)
        shared = 0
        while shared < min(len(low), len(high)) - 1 and low[shared] == high[shared]:
            shared += 1
        return min(shared, min(map(len, prompts)) - 1)

    def steps(self) -> Iterator[int]:
        """Decode until every reply is complete, yielding the index of each as it is."""
        if self.common:
            ids = self.waiting[0].request.token_ids[: self.common]
            mask = self._additive(torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool).tril())
            self._forward(torch.tensor([ids]), torch.arange(len(ids))[None], mask)
        while self.waiting or self.active:
            free = self.slots - len(self.active)
            if self.waiting and (free >= max(1, self.slots // 8) or free >= len(self.waiting)):
                yield from self._join(free)
            if self.active:
                yield from self._step()

    def _join(self, free: int) -> Iterator[int]:
        """Fill free slots with waiting rows. A prompt that several rows share is computed once, and
        kept for those that come later."""
        groups: dict[tuple[int, ...], list[_Row]] = {}
        for _ in range(min(free, len(self.waiting))):
            row = self.waiting.popleft()
            groups.setdefault(row.request.token_ids, []).append(row)
        for prompt, rows in list(groups.items()):
            self.coming[prompt] -= len(rows)
            if prompt in self.kept:
                del groups[prompt]
                logits, states = self.kept[prompt]
                first = len(self.active)
                for row in rows:
                    self.cache.put(len(self.active), states)
                    self._enter(row)
                self._sample(logits.expand(len(rows), -1), first)
        prompts = sorted(groups, key=len)
        while prompts:
            count = max(1, min(len(prompts), PREFILL_TOKENS // (len(prompts[-1]) - self.common)))
            batch, prompts = prompts[-count:], prompts[:-count]
            self._prefill(batch, [groups[prompt] for prompt in batch])
        self.kept = {prompt: kept for prompt, kept in self.kept.items() if self.coming[prompt]}
        yield from self._leave()

    def _prefill(self, prompts: list[tuple[int, ...]], groups: list[list[_Row]]) -> None:
        """One forward pass over distinct prompts of like length, for the rows of each."""
        tails = [prompt[self.common :] for prompt in prompts]
        width = max(map(len, tails))
        lengths = torch.tensor([len(tail) for tail in tails])
        columns = torch.arange(width)
        real = columns >= width - lengths[:, None]
        ids = torch.zeros(len(tails), width, dtype=torch.long)
        ids[real] = torch.tensor([token for tail in tails for token in tail])
        positions = (columns - (width - lengths[:, None]) + self.common).clamp_min(0)
        causal = torch.ones(width, width, dtype=torch.bool).tril() & real[:, None, :]
        causal |= torch.eye(width, dtype=torch.bool)
        before = torch.ones(len(tails), width, self.common, dtype=torch.bool)
        mask = self._additive(torch.cat((before, causal), -1)[:, None])
        first = len(self.active)
        sources = [i for i, rows in enumerate(groups) for _ in rows]
        self.cache.mode = "join"
        self.cache.joining = [(first + n, len(tails[i]), i) for n, i in enumerate(sources)]
        logits = self._forward(ids, positions, mask)
        for i, prompt in enumerate(prompts):
            if self.coming[prompt]:
                states = self.cache.get(first + sources.index(i), len(prompt))
                self.kept[prompt] = (logits[i : i + 1].clone(), states)
        for rows in groups:
            for row in rows:
                self._enter(row)
        self._sample(logits[sources], first)

    def _enter(self, row: _Row) -> None:
        if self.seen is not None:
            self.seen[len(self.active)] = False
            self.seen[len(self.active), list(row.request.token_ids)] = True
        self.active.append(row)

    def _step(self) -> Iterator[int]:
        """One token for every active row: the last one sampled goes in, the next comes out."""
        engine, cache = self.engine, self.cache
        positions = torch.tensor([row.length for row in self.active], device=engine.device)
        cache.mode, cache.positions = "step", positions
        cache.used = max(row.length for row in self.active) + 1
        ids = torch.tensor([[row.written[-1]] for row in self.active])
        reach = torch.arange(cache.used, device=engine.device) <= positions[:, None]
        logits = self._forward(ids, positions[:, None], self._additive(reach[:, None, None]))
        for row in self.active:
            row.length += 1
        self._sample(logits, 0)
        yield from self._leave()

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Logits [n, columns] at the last position of ids [n, Q]."""
        device = self.engine.device
        started = time.perf_counter()
        output = self.engine.model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        self.engine.forward_s += time.perf_counter() - started
        return logits

    def _additive(self, allowed: torch.Tensor) -> torch.Tensor:
        """0 where attention is allowed, the dtype's lowest value elsewhere."""
        dtype = self.engine.model.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=self.engine.device)
        return mask.masked_fill_(~allowed.to(mask.device), torch.finfo(dtype).min)

    def _sample(self, logits: torch.Tensor, first: int) -> None:
        """Append a token to each active row from `first` on; a row of logits [n, columns] each."""
        columns, constraint, rows = self.engine.columns, self.engine.constraint, self.active[first:]
        seen = None if self.seen is None else self.seen[first : first + len(rows)]
        if seen is not None and columns is not None:
            seen = seen[:, columns]
        if constraint is not None:
            allowed = torch.tensor([constraint.mask(row.state) for row in rows if row.state])
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        draws = torch.tensor([row.uniforms[len(row.written)] for row in rows], dtype=torch.float64)
        shares = weights(logits, self.sampler, seen)
        chosen = pick(shares, draws.to(logits.device))
        fine = (shares.gather(1, chosen.unsqueeze(1)) > 0).flatten()  # false where it is NaN
        if not bool(fine.all()):
            request = rows[int(fine.int().argmin())].request
            raise RunError(
                f"{self.engine.model.name_or_path}: the logits after {request.text[-200:]!r} are "
                "not finite; the model's weights or its dtype overflow: use float32, or train again"
            )
        if columns is not None:
            chosen = columns[chosen]
        if self.seen is not None:
            self.seen[torch.arange(first, first + len(rows), device=chosen.device), chosen] = True
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.written.append(token)
            if row.state is None or token in self.engine.end_ids:
                continue
            if constraint is not None:
                row.state = constraint.step(row.state, token)
            elif self.engine.filter is not None:
                row.state = self.engine.filter.step(row.state, row.written)

    def text(self, token_ids: list[int]) -> str:
        """The text of tokens with nothing cleaned up, special tokens included."""
        text: str = self.engine.tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _leave(self) -> Iterator[int]:
        """Take complete rows out; the last active row moves into the gap."""
        engine, slot = self.engine, 0
        while slot < len(self.active):
            row = self.active[slot]
            ended = row.written[-1] in engine.end_ids
            stopped = engine.filter is not None and row.state is None and not ended
            if not (ended or stopped or len(row.written) == self.sampler.max_new_tokens):
                slot += 1
                continue
            text = self.text(row.written[:-1] if ended else row.written)
            self.replies[row.index] = Reply(text, len(row.written), ended, stopped)
            last = self.active.pop()
            if last is not row:
                self.active[slot] = last
                self.cache.move(len(self.active), slot, last.length)
                if self.seen is not None:
                    self.seen[slot] = self.seen[len(self.active)]
            yield row.index
