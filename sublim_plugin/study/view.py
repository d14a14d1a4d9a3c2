"""What a run tells while it goes: a line for each cell that ends, on a terminal a bar below."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from sublim_plugin.study.cells import Cell
from sublim_plugin.study.schedule import Schedule

Say = Callable[[str], None]


class View:
    """Cells done, running and failed, their rate, and the time left.

    Lines go to `say`, which suits a log and a notebook's cell as well; the bar is tqdm's and shows
    on a terminal only. Methods may be called from any thread.
    """

    def __init__(self, schedule: Schedule, workers: int, say: Say) -> None:
        from tqdm import tqdm

        self._schedule, self._workers, self._print = schedule, workers, say
        self._began = time.monotonic()
        self._at_first = schedule.done
        self._spent: dict[str, list[float]] = {}
        self._running: dict[str, tuple[str, float, str]] = {}
        self._told: set[str] = set()
        self._guard = threading.Lock()
        self._bar: Any = tqdm(
            total=schedule.total,
            initial=schedule.done,
            unit="cell",
            disable=None,
            leave=False,
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} cells |{bar:12}| {elapsed}{postfix}",
        )

    def say(self, text: str) -> None:
        with self._guard:
            self._write(text)

    def _write(self, text: str) -> None:
        self._bar.clear()
        self._print(text)
        self._bar.refresh()

    def started(self, cell: Cell) -> None:
        with self._guard:
            self._running[cell.id] = (f"{cell.kind} {cell.label}", time.monotonic(), "")
            self._show()

    def progress(self, cell: Cell, at: int, of: int) -> None:
        with self._guard:
            if cell.id in self._running:
                name, since, _ = self._running[cell.id]
                self._running[cell.id] = (name, since, f" {at}/{of}")
                self._show()

    def waiting(self, cell: Cell, why: str = "another process is working on it") -> None:
        """Tell once that the cell has to wait."""
        with self._guard:
            if cell.id not in self._told:
                self._told.add(cell.id)
                self._write(f"{cell.kind} {cell.label} waits: {why}")

    def ended(self, cell: Cell, word: str, error: str | None = None) -> None:
        """Call after the schedule knows."""
        # before the guard: a thread that is given a cell holds the schedule and may tell something
        left = self._schedule.left()
        with self._guard:
            _, since, _ = self._running.pop(cell.id, ("", time.monotonic(), ""))
            seconds = time.monotonic() - since
            if word == "done":
                self._spent.setdefault(cell.kind, []).append(seconds)
            schedule = self._schedule
            count = f"[{schedule.done + schedule.failed}/{schedule.total}]"
            failed = f"; {schedule.failed} failed" if schedule.failed else ""
            self._write(
                f"{count} {cell.kind} {cell.label}: {word} in {duration(seconds)}"
                f"{failed}{self._left(left)}"
            )
            if error:
                self._write(f"    {error.splitlines()[0]}")
            self._show()

    def _left(self, kinds: Mapping[str, int]) -> str:
        """Cells an hour, and the time left where each kind that is to come has been timed."""
        hours = (time.monotonic() - self._began) / 3600
        made = self._schedule.done - self._at_first
        seconds = 0.0
        for kind, number in kinds.items():
            times = self._spent.get(kind)
            if not times:
                return ""
            seconds += number * sum(times) / len(times)
        if not seconds or made < 2:
            return ""
        left = seconds / self._workers
        return f"; {made / hours:.0f} cells an hour, about {duration(left)} left"

    def _show(self) -> None:
        self._bar.n = self._schedule.done
        names = [f"{name}{at}" for name, _, at in self._running.values()]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        self._bar.set_postfix_str("; ".join(names[:2]) + more)

    def close(self) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
