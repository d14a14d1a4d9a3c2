"""Which cell is next: the grid as a graph, shared by the threads of all workers of one run."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from sublim_plugin.study.cells import Cell

Ended = Literal["done", "failed", "busy", "again"]
Look = Literal["done", "busy", "open"]

BUSY_AGAIN_S = 5.0
"""Seconds until a cell that another process held is looked at again."""


class Schedule:
    """The cells that are not done. Every method may be called from any thread.

    A cell is ready when all that it needs is done. One whose need failed never becomes ready; it
    counts as blocked, and the others go on.
    """

    def __init__(self, cells: Sequence[Cell], done: Iterable[str]) -> None:
        finished = set(done)
        self.cells = {cell.id: cell for cell in cells}
        self.total = len(self.cells)
        self.done, self.failed = len(finished & self.cells.keys()), 0
        self.running: dict[str, Cell] = {}
        self._again: dict[str, float] = {}
        self._unmet = {
            cell.id: {need for need in cell.needs if need not in finished}
            for cell in cells
            if cell.id not in finished
        }
        self._dependents: dict[str, list[str]] = {}
        for cell_id, needs in self._unmet.items():
            for need in needs:
                self._dependents.setdefault(need, []).append(cell_id)
        # in the order of the plan, so that a worker that changes kinds takes the earliest stage
        self._ready: dict[str, deque[Cell]] = {cell.kind: deque() for cell in cells}
        self._changed = threading.Condition()
        self._stopped = False
        for cell_id, needs in self._unmet.items():
            if not needs:
                self._queue(self.cells[cell_id])

    def _queue(self, cell: Cell) -> None:
        self._ready[cell.kind].append(cell)

    def take(self, kind: str | None, look: Callable[[Cell], Look]) -> Cell | None:
        """The next cell to make, of `kind` if there is one; waits for one to become ready.

        Args:
            look: whether another process has finished the cell, or works on it; else it is open.

        Returns:
            None when nothing is left that this run could make.
        """
        with self._changed:
            while not self._stopped:
                self._look_again()
                cell = self._pop(kind)
                if cell is not None:
                    found = look(cell)
                    if found == "open":
                        self.running[cell.id] = cell
                        return cell
                    self._end(cell, found)
                elif not self.running and not self._again:
                    return None
                else:
                    self._changed.wait(1.0)
            return None

    def _pop(self, kind: str | None) -> Cell | None:
        if kind is not None and self._ready.get(kind):
            return self._ready[kind].popleft()
        for queue in self._ready.values():
            if queue:
                return queue.popleft()
        return None

    def _look_again(self) -> None:
        now = time.monotonic()
        for cell_id in [one for one, when in self._again.items() if when <= now]:
            del self._again[cell_id]
            self._queue(self.cells[cell_id])

    def ended(self, cell: Cell, how: Ended) -> None:
        """A cell that was taken is done or failed, or another process has it ("busy": it is looked
        at again after `BUSY_AGAIN_S`), or its worker died and it is to be made again."""
        with self._changed:
            self.running.pop(cell.id, None)
            self._end(cell, how)

    def _end(self, cell: Cell, how: Ended) -> None:
        if how in ("busy", "again"):
            wait = BUSY_AGAIN_S if how == "busy" else 0.0
            self._again[cell.id] = time.monotonic() + wait
        elif how == "failed":
            self.failed += 1
        else:
            self.done += 1
            for dependent in self._dependents.get(cell.id, ()):
                unmet = self._unmet[dependent]
                unmet.discard(cell.id)
                if not unmet:
                    self._queue(self.cells[dependent])
        self._changed.notify_all()

    def stop(self) -> None:
        """No cell is given out any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def left(self) -> dict[str, int]:
        """How many cells of each kind may still be made: not done, not failed, not blocked."""
        with self._changed:
            counts: dict[str, int] = {}
            for queue in self._ready.values():
                for cell in queue:
                    counts[cell.kind] = counts.get(cell.kind, 0) + 1
            for cell_id in [*self.running, *self._again]:
                kind = self.cells[cell_id].kind
                counts[kind] = counts.get(kind, 0) + 1
            for cell_id, needs in self._unmet.items():
                if needs:
                    kind = self.cells[cell_id].kind
                    counts[kind] = counts.get(kind, 0) + 1
            return counts
