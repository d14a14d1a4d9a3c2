"""Runs a study: every missing cell, as soon as what it needs is there, then the report.

The coordinator imports neither torch nor a host. Each of an engine's workers is a process that
makes cells of one kind, one after the other, and loads the base model once. Nothing but the cells'
folders says what is done and who works on what, so several coordinators, on several machines, may
run one study into one folder.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sublim_plugin.core.base_models import fingerprint, is_prepared, resolve
from sublim_plugin.core.errors import BusyError, InputError
from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.lock import cell_lock_in_turn
from sublim_plugin.core.manifest import MANIFEST_NAME, is_done, read_manifest, write_manifest
from sublim_plugin.core.many_objects import many_objects
from sublim_plugin.core.versions import installed
from sublim_plugin.study.cells import Cell, plan
from sublim_plugin.study.gpus import gpus
from sublim_plugin.study.local import GRACE_S, LocalWorker
from sublim_plugin.study.schedule import Look, Schedule
from sublim_plugin.study.stages import require_chat_template
from sublim_plugin.study.state import (
    CellState,
    cell_state,
    read_manifests_ahead,
    states_without_base,
    worked_on,
)
from sublim_plugin.study.study_file import Study, load_study
from sublim_plugin.study.trained import base_models
from sublim_plugin.study.view import Say, View
from sublim_plugin.study.worker import LOG_NAME, Tell, record_failure

REPORT = "report"
DEATHS = 2
"""How often a cell whose worker died is tried again before it counts as failed."""
LOG_LINES = 12


class Worker(Protocol):
    """A process that makes cells, one at a time (see `local.LocalWorker`)."""

    def make(self, cell_id: str, tell: Tell) -> tuple[int | None, str | None]: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Engine:
    """How many workers there are, and how the one of a number is started for a first cell.

    It makes cells of that one's kind.
    """

    name: str
    workers: int
    start: Callable[[int, Cell], Worker]


@dataclass(frozen=True)
class Outcome:
    """What a run left: the exit code, and the states of all cells."""

    exit_code: int
    states: list[CellState]
    report: Path


def local_engine(study_path: Path, run_dir: Path, gpus_per_worker: int = 1) -> Engine:
    """A worker for each GPU of this machine, or each `gpus_per_worker` of them; one on the CPU.

    Raises:
        InputError: the machine has fewer GPUs than one worker is to have.
    """
    devices = gpus()
    if gpus_per_worker > max(1, len(devices)):
        raise InputError(
            f"--gpus-per-worker {gpus_per_worker}: this machine shows {len(devices)} GPUs"
        )
    starts = range(0, len(devices) - gpus_per_worker + 1, gpus_per_worker)
    groups = [",".join(devices[start : start + gpus_per_worker]) for start in starts]

    def start(number: int, cell: Cell) -> Worker:
        return LocalWorker(study_path, run_dir, groups[number] if groups else None)

    return Engine("local", max(1, len(groups)), start)


def planned(study_path: Path) -> tuple[Study, Path, list[Cell]]:
    """Load a study file, prepare its base models and lay out its cells.

    Raises:
        InputError: the file, a base model or its chat template.
    """
    study = load_study(study_path)
    base, *_ = [resolve(name) for name in base_models(study)]
    require_chat_template(base)
    return study, base, plan(study, fingerprint(base))


def states_of(study_path: Path, run_dir: Path) -> tuple[list[CellState], bool]:
    """The states of all cells, without making anything.

    Returns:
        The states, and whether the base model is here and prepared; until it is, ids are not known
        and every cell counts as missing.
    """
    study = load_study(study_path)
    names = base_models(study)
    here = names[0].startswith("embedded:") or Path(names[0]).expanduser().is_dir()
    if not here or not all(is_prepared(name) for name in names):
        return states_without_base(study, run_dir), False
    return _states(plan(study, fingerprint(resolve(study.base_model))), run_dir), True


def _states(cells: Sequence[Cell], run_dir: Path) -> list[CellState]:
    with many_objects():
        read_manifests_ahead(run_dir)
        return [cell_state(cell, run_dir) for cell in cells]


def run_study(
    study_path: Path,
    run_dir: Path,
    say: Say,
    engine: Callable[[Path, Path], Engine] = local_engine,
) -> Outcome:
    """Make every cell that is missing, then the report. Finished cells are not made again.

    On SIGTERM, and on Ctrl-C, workers get `GRACE_S` seconds to keep what they have.

    Raises:
        InputError: the study, its base model or a finished cell does not fit; nothing was started.
    """
    for name in base_models(load_study(study_path)):
        if not is_prepared(name):
            say(f"preparing {name} (once)")
    study, _, cells = planned(study_path)
    states = _states(cells, run_dir)
    done = [state.cell.id for state in states if state.state == "done"]
    say(f"{study.name}: {len(cells)} cells, {len(done)} done, in {run_dir}")
    codes: list[int] = []
    if len(done) < len(cells):
        codes = make_all(Schedule(cells, done), engine(study_path, run_dir), run_dir, say)
        states = _states(cells, run_dir)
    index = write_report_if_changed(study, study_path, run_dir, states)
    failed = [state for state in states if state.state != "done"]
    for state in failed:
        first = (state.error or "not started: an input is missing").splitlines()[0]
        say(f"failed: {state.cell.kind} {state.cell.label}: {first}")
    return Outcome(max(codes, default=0) or (1 if failed else 0), states, index)


class _Run:
    """One run's workers, each with a thread of its own that hands it cells."""

    def __init__(self, schedule: Schedule, engine: Engine, run_dir: Path, view: View) -> None:
        self.schedule, self.engine, self.run_dir, self.view = schedule, engine, run_dir, view
        self.codes: list[int] = []
        self.error: BaseException | None = None
        self._deaths: dict[str, int] = {}
        self._workers: dict[int, Worker] = {}

    def stop(self) -> None:
        self.schedule.stop()
        for worker in list(self._workers.values()):
            worker.stop()

    def serve(self, number: int) -> None:
        """A thread's work: cells for one worker until none is left."""
        try:
            kind: str | None = None
            while (cell := self.schedule.take(kind, self._look)) is not None:
                if cell.kind != kind:
                    self._close(number)
                kind = cell.kind
                self._make(number, cell)
        except BaseException as error:
            self.error = error
            self.schedule.stop()
        finally:
            self._close(number)

    def _look(self, cell: Cell) -> Look:
        folder = cell.folder(self.run_dir)
        if is_done(folder):
            return "done"
        if worked_on(folder):
            self.view.waiting(cell)
            return "busy"
        return "open"

    def _make(self, number: int, cell: Cell) -> None:
        self.view.started(cell)
        if number not in self._workers:
            self._workers[number] = self.engine.start(number, cell)
            if self.schedule.stopped:  # stopped while it started
                self._workers[number].stop()

        def tell(at: int, of: int) -> None:
            self.view.progress(cell, at, of)

        code, error = self._workers[number].make(cell.id, tell)
        folder = cell.folder(self.run_dir)
        if code is None:
            self._close(number)
            if self.schedule.stopped:
                return
            deaths = self._deaths[cell.id] = self._deaths.get(cell.id, 0) + 1
            if deaths <= DEATHS:
                self.schedule.ended(cell, "again")
                self.view.ended(cell, f"{error}; tried again")
                return
            code, error = 1, f"{error} {deaths} times; {_log_end(folder / LOG_NAME)}"
            record_failure(folder, error)
        if code == BusyError.exit_code:
            self.schedule.ended(cell, "busy")
            self.view.waiting(cell, error or "")
            return
        if code:
            self.codes.append(code)
        self.schedule.ended(cell, "failed" if code else "done")
        self.view.ended(cell, "failed" if code else "done", error)

    def _close(self, number: int) -> None:
        worker = self._workers.pop(number, None)
        if worker is not None:
            worker.close()


def make_all(schedule: Schedule, engine: Engine, run_dir: Path, say: Say) -> list[int]:
    """Make all cells; returns the exit codes of those that failed."""
    view = View(schedule, engine.workers, say)
    run = _Run(schedule, engine, run_dir, view)
    threads = [
        threading.Thread(target=run.serve, args=(number,), name=f"worker {number}", daemon=True)
        for number in range(engine.workers)
    ]
    try:
        with _sigterm_interrupts(say):
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                # not join: where a signal's exception leaves it, Python 3.11 takes the thread for
                # ended (its _wait_for_tstate_lock), and no worker would get its grace
                time.sleep(0.1)
    finally:
        run.stop()
        until = time.monotonic() + GRACE_S + 5
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        view.close()
    if run.error is not None:
        raise run.error
    return run.codes


class Terminated(SystemExit):
    """SIGTERM: a batch system wants the machine back."""


@contextlib.contextmanager
def _sigterm_interrupts(say: Say) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        say("stopped by SIGTERM; the same command continues")
        raise Terminated(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _log_end(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        return f"it left no {log}"
    return "\n".join([f"{log} ends with:", *lines])


def write_report_if_changed(
    study: Study, study_path: Path, run_dir: Path, states: Sequence[CellState]
) -> Path:
    """Write the report unless the one that is there was made from these states and files."""
    from sublim_plugin.analysis.collect import CellRef
    from sublim_plugin.analysis.report import write_report
    from sublim_plugin.analysis.report_folder import own_files

    folder = run_dir / REPORT
    index = folder / "index.html"
    text = study_path.read_text(encoding="utf-8")
    spec: dict[str, Any] = {
        "study": text,
        "sublim": installed(["sublim"]),
        "cells": {
            state.cell.folder_name: [
                state.state,
                state.error,
                sha256_json(state.manifest.model_dump(mode="json")) if state.manifest else None,
            ]
            for state in states
        },
    }
    report_id = sha256_json(spec)[:12]
    if _is_current(folder, report_id):
        return index
    started = time.time()
    with cell_lock_in_turn(folder):
        if _is_current(folder, report_id):
            return index
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        refs = [
            CellRef(folder=s.folder, state=s.state, label=s.cell.label, error=s.error)
            for s in states
        ]
        write_report(
            run_dir,
            study_name=study.name,
            cells=refs,
            study_text=text,
            equivalence_margin=study.equivalence_margin,
        )
        write_manifest(
            folder,
            kind="report",
            id=report_id,
            label=study.name,
            spec=spec,
            outputs=[str(path.relative_to(folder)) for path in own_files(folder)],
            started=started,
        )
    return index


def _is_current(folder: Path, report_id: str) -> bool:
    if not (folder / "index.html").is_file() or not is_done(folder):
        return False
    return read_manifest(folder).id == report_id
