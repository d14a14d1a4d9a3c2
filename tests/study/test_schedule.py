"""Which cell is next: what is needed comes first, failures block what needs them and no more."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sublim_plugin.study import schedule as module
from sublim_plugin.study.cells import Cell
from sublim_plugin.study.schedule import Look, Schedule
from sublim_plugin.study.view import View

KINDS = ("dataset", "student", "probe", "localization", "signal")


@st.composite
def grids(draw: st.DrawFn) -> list[Cell]:
    cells: list[Cell] = []
    for number in range(draw(st.integers(1, 25))):
        needs = (
            draw(st.lists(st.sampled_from(cells), max_size=3, unique_by=lambda c: c.id))
            if cells
            else []
        )
        kind = draw(st.sampled_from(KINDS))
        cells.append(Cell(kind, f"{number}", {"n": number}, tuple(cell.id for cell in needs)))
    return cells


@settings(max_examples=60, deadline=None)
@given(grids(), st.data())
def test_every_cell_is_made_once_and_after_what_it_needs(
    cells: list[Cell], data: st.DataObject
) -> None:
    begun = data.draw(st.sets(st.sampled_from([cell.id for cell in cells])))
    # what is done needs nothing that is not
    done = {cell.id for cell in cells if cell.id in begun and set(cell.needs) <= begun}
    bad = data.draw(st.sets(st.sampled_from([cell.id for cell in cells]), max_size=3)) - done
    workers = data.draw(st.integers(1, 4))
    schedule = Schedule(cells, done)
    finished, made = set(done), Counter[str]()
    guard = threading.Lock()

    def work() -> None:
        kind: str | None = None
        while (cell := schedule.take(kind, lambda _: "open")) is not None:
            kind = cell.kind
            with guard:
                made[cell.id] += 1
                assert set(cell.needs) <= finished
                if cell.id not in bad:
                    finished.add(cell.id)
            schedule.ended(cell, "failed" if cell.id in bad else "done")

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    blocked: set[str] = set()
    for cell in cells:
        if cell.id not in done and {*cell.needs} & (bad | blocked):
            blocked.add(cell.id)
    expected = {cell.id for cell in cells} - done - blocked
    assert made == Counter(expected)
    assert schedule.failed == len(bad & expected)
    assert schedule.done == len(cells) - len(blocked) - schedule.failed
    assert sum(schedule.left().values()) == len(blocked)


def test_a_worker_stays_with_its_kind_and_else_takes_the_earliest_stage() -> None:
    cells = [
        Cell("dataset", "a", {"n": 1}),
        Cell("dataset", "b", {"n": 2}),
        Cell("probe", "base", {"n": 3}),
    ]
    student = Cell("student", "a r8", {"n": 4}, (cells[0].id,))
    schedule = Schedule([*cells[:2], student, cells[2]], [])
    order = []
    kind = None
    while (cell := schedule.take(kind, lambda _: "open")) is not None:
        order.append(cell.label)
        kind = cell.kind
        schedule.ended(cell, "done")
    assert order == ["a", "b", "a r8", "base"]


def test_a_cell_of_another_process_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_AGAIN_S", 0.01)
    first, second = Cell("dataset", "a", {"n": 1}), Cell("dataset", "b", {"n": 2})
    after = Cell("student", "s", {"n": 3}, (first.id,))
    schedule = Schedule([first, second, after], [])
    answers: list[Look] = ["busy", "open", "busy", "done", "open"]
    looked = []

    def look(cell: Cell) -> Look:
        looked.append(cell.label)
        return answers.pop(0)

    taken = schedule.take(None, look)
    assert taken is second
    schedule.ended(second, "done")
    assert schedule.take(None, look) is after
    assert looked == ["a", "b", "a", "a", "s"] and schedule.done == 2


def test_a_worker_that_died_gives_its_cell_to_another() -> None:
    cell = Cell("dataset", "a", {"n": 1})
    schedule = Schedule([cell], [])
    assert schedule.take(None, lambda _: "open") is cell
    schedule.ended(cell, "again")
    assert schedule.take(None, lambda _: "open") is cell
    schedule.stop()
    assert schedule.take(None, lambda _: "open") is None


def test_workers_that_end_and_workers_that_look_do_not_wait_for_each_other() -> None:
    """The view is told of cells by a thread inside the schedule, and asks the schedule itself."""
    cells = [Cell("dataset", f"{n}", {"n": n}) for n in range(400)]
    schedule = Schedule(cells, [])
    view = View(schedule, 4, lambda text: None)

    def look(cell: Cell) -> Look:
        view.waiting(cell)
        return "open"

    def work() -> None:
        while (cell := schedule.take(None, look)) is not None:
            view.started(cell)
            schedule.ended(cell, "done")
            view.ended(cell, "done")

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    view.close()
    assert schedule.done == 400
