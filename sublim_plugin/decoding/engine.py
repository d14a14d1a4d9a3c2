"""What every engine answers to: requests in, replies out, and a record of how they came about.

The engines are `transformers_engine` (in process), `vllm_engine` (offline batches) and
`openai_engine` (a server). Each passes all of `Sampler` and the row's seed, and says in `describe`
what of that it could honour; none falls back silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from sublim_plugin.decoding.sampler import Sampler


class Request(NamedTuple):
    """One reply to be written: the rendered prompt as text and token ids, the messages that it was
    rendered from, and the row's sampling seed (0 to 2**53 - 1)."""

    text: str
    token_ids: tuple[int, ...]
    messages: tuple[dict[str, str], ...]
    seed: int


class Reply(NamedTuple):
    """A reply's text without its end of turn, special tokens shown as text."""

    text: str
    tokens: int
    """Sampled tokens, the end of turn among them."""
    ended: bool
    """Whether the end of turn was reached."""
    stopped: bool = False
    """Whether it was cut off because no continuation could have been accepted any more."""


class Constraint(Protocol):
    """Which tokens may be sampled: `token_ids` at all, and `mask(state)` of them next."""

    token_ids: tuple[int, ...]
    start: Any

    def mask(self, state: Any) -> tuple[bool, ...]: ...

    def step(self, state: Any, token_id: int) -> Any: ...


class Filter(Protocol):
    """Which replies can yet be accepted: `step` gives None where none that begins so can."""

    start: Any

    def step(self, state: Any, written: Sequence[int]) -> Any: ...


OnReply = Callable[[int, Reply], object]


class Engine(Protocol):
    """A model that answers requests.

    Constructors take what is particular to an engine, and raise InputError for a model, server or
    setting that cannot be used.
    """

    def reply(
        self,
        requests: Sequence[Request],
        sampler: Sampler,
        batch_size: int,
        on_reply: OnReply = ...,
    ) -> list[Reply]:
        """A reply to each request, in order, with at most `batch_size` of them under way at a time.

        `on_reply` is called with the index of a request and its reply as soon as that is complete.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What a manifest records under `device`: `engine`, its version, device, dtype, `row_seeds`
        (whether each row's own seed was honoured) and whatever else decides the replies."""
        ...
