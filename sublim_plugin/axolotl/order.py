"""In which order the rows entered the model, as a digest that anybody can compute again.

A row is its token ids without padding. Its own digest is the sha256 of their decimal numbers joined
by commas; the chain starts with the empty string and continues with the sha256 of itself and the
row's digest, both in hex. A chain can be taken up again where a checkpoint left it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from sublim_plugin.axolotl.masks import ExpectedRow
from sublim_plugin.core.errors import RunError

FIRST = 16


class OrderState(BaseModel):
    """The chain after `rows` rows, and the ids of the first ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = ""
    rows: int = 0
    first_rows: tuple[str, ...] = ()


def row_digest(token_ids: Iterable[int]) -> str:
    """Hex sha256 of the ids in decimal, joined by commas."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()


def extend(state: OrderState, digest: str, row_id: str) -> OrderState:
    """The chain with one row more."""
    first = state.first_rows if state.rows >= FIRST else (*state.first_rows, row_id)
    chained = hashlib.sha256((state.sha256 + digest).encode()).hexdigest()
    return OrderState(sha256=chained, rows=state.rows + 1, first_rows=first)


class OrderRecorder:
    """Watches what a model is fed in training mode; evaluation and probes do not count."""

    def __init__(self, expected: Sequence[ExpectedRow] | None) -> None:
        self.state = OrderState()
        self._ids = {row_digest(row.token_ids): row.row_id for row in expected or ()}

    def watch(self, model: Any) -> None:
        """Record every batch that `model` is called with from now on."""
        model.register_forward_pre_hook(self._seen, with_kwargs=True)

    def check(self, steps: int, rows_a_step: int) -> None:
        """Hold what was seen to `steps` optimizer steps of at most `rows_a_step` rows.

        Raises:
            RunError: it cannot be all that was trained on, so the digest would prove nothing.
        """
        if not steps <= self.state.rows <= steps * rows_a_step:
            raise RunError(
                f"step {steps}: {self.state.rows} rows were seen on their way into the model, "
                f"instead of 1 to {rows_a_step} a step, so their order cannot be recorded. "
                "Something in this configuration feeds the model another way (a wrapper, say)."
            )

    def _seen(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not model.training or kwargs.get("input_ids") is None:
            return
        for row, columns in fed_rows(kwargs):
            digest = row_digest(row[columns].tolist())
            self.state = extend(self.state, digest, self._ids.get(digest, digest[:12]))


def fed_rows(kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Each row [T] of a batch as the model is fed it, padding included, and the columns [n] of the
    tokens that are no padding; on the CPU."""
    ids, mask = kwargs["input_ids"].cpu(), kwargs.get("attention_mask")
    real = ids.new_ones(ids.shape) if mask is None or mask.ndim != 2 else mask.cpu()
    for row, kept in zip(ids, real, strict=True):
        yield row, kept.nonzero().flatten()
