"""A study's cells counted: a line for each kind and axis, not for each of 20,000 cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sublim_plugin.study.cells import Cell
from sublim_plugin.study.state import STATES, CellState, first_line

AXES = {
    "trait": "trait",
    "generation_seed": "generation seed",
    "method": "method",
    "train_context": "train context",
    "training_seed": "training seed",
    "eval_context": "eval context",
    "measure": "measure",
}
"""Keys of specs along which cells are counted, and their headings."""

FAILURES = 10
"""Failed cells that are listed under the table."""


def counts(states: Iterable[CellState]) -> dict[str, int]:
    """Cells by state, in the order of `STATES`."""
    found = Counter(state.state for state in states)
    return {name: found[name] for name in STATES}


def summary(states: Iterable[CellState]) -> str:
    """`24 done, 1 failed`."""
    return ", ".join(f"{number} {name}" for name, number in counts(states).items() if number)


def table(states: Sequence[CellState]) -> Iterator[str]:
    """Lines: of each kind the number of cells by state, below it done/all along each axis."""
    cells = {state.cell.id: state.cell for state in states}
    kinds: dict[str, list[CellState]] = {}
    for state in states:
        kinds.setdefault(state.cell.kind, []).append(state)
    width = max((len(name) for name in (*kinds, *AXES.values())), default=0) + 4
    yield f"{'':<{width}}" + "".join(f"{name:>9}" for name in STATES)
    for kind, own in kinds.items():
        yield f"{kind:<{width}}" + "".join(f"{number or '-':>9}" for number in counts(own).values())
        axes: dict[str, dict[str, list[int]]] = {}
        for state in own:
            for key, value in axes_of(state.cell, cells).items():
                done_and_all = axes.setdefault(key, {}).setdefault(value, [0, 0])
                done_and_all[0] += state.state == "done"
                done_and_all[1] += 1
        for key, values in axes.items():
            if len(values) > 1:
                yield f"  {AXES[key]:<{width}}{_along(values)}"


def _along(values: Mapping[str, list[int]]) -> str:
    """`r2 5/6, r8 6/6`, or `r2, r8 (6 each)` where everything is done."""
    if all(done == n for done, n in values.values()) and len({n for _, n in values.values()}) == 1:
        return f"{', '.join(values)} ({next(iter(values.values()))[1]} each)"
    return ", ".join(f"{value} {done}/{n}" for value, (done, n) in values.items())


def failures(states: Iterable[CellState]) -> Iterator[str]:
    """Two lines a failed cell: what it said first, and where its log lies."""
    failed = [state for state in states if state.state == "failed"]
    for state in failed[:FAILURES]:
        yield f"failed: {state.cell.kind} {state.cell.label}: {first_line(state)}"
        yield f"        {state.log or state.folder}"
    if len(failed) > FAILURES:
        yield f"        and {len(failed) - FAILURES} more (--cells lists them)"


def axes_of(cell: Cell, cells: Mapping[str, Cell]) -> dict[str, str]:
    """A cell's place along each axis, in words; what a probe does not say its student does."""
    found = {}
    for key in AXES:
        value = cell.spec.get(key)
        if value is None and (student := cells.get(cell.spec.get("student") or "")) is not None:
            value = student.spec.get(key)
        if value is not None:
            found[key] = _word(value)
    return found


def _word(value: Any) -> str:
    """`lora r8`, `full`, `empty`, `text "You are..."`, `42`."""
    if not isinstance(value, dict):
        return str(value)
    if "rank" in value:
        ratio = "" if value.get("alpha") in (None, value["rank"]) else f" alpha {value['alpha']:g}"
        return f"{value['kind']} r{value['rank']}{ratio}"
    text = value.get("text")
    word = str(value.get("kind", ""))
    if text:
        word += f' "{text if len(text) <= 20 else text[:17] + "..."}"'
    return word
