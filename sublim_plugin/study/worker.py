"""A worker process: makes the cells that it is given, loading the base model once.

`python -P -m sublim_plugin.study.worker STUDY RUN_DIR ID...` makes these, in this order, and exits
with the highest code. Without ids it serves: a line with an id on stdin makes that cell, and a line
of JSON on stdout tells of progress, `{"cell", "at", "of"}`, and of the end, `{"cell", "code"}`. It
ends with its stdin. What a cell's work prints goes to `cell.log` in the cell's folder; a failure's
message goes to `error.txt` and does not stop the others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_gen.shuffle import write_shuffled
from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.base_models import fingerprint, resolve
from sublim_plugin.core.errors import BusyError, InputError, RunError, SublimError
from sublim_plugin.core.manifest import is_done
from sublim_plugin.study.cells import Cell, plan
from sublim_plugin.study.gpus import gpus
from sublim_plugin.study.signal_stage import measure_dataset
from sublim_plugin.study.stages import (
    MODEL,
    localize_student,
    make_dataset,
    score_probe,
    train_student,
)
from sublim_plugin.study.state import ERROR_NAME
from sublim_plugin.study.study_file import load_study
from sublim_plugin.study.teacher_stage import train_teacher
from sublim_plugin.study.trained import base_for

LOG_NAME = "cell.log"
Tell = Callable[[int, int], None]


class Workshop:
    """What is kept between two cells: the plan, and the base model where it scores."""

    def __init__(self, study_path: Path, run_dir: Path) -> None:
        self.study = load_study(study_path)
        self.base = resolve(self.study.base_model)
        self.run_dir = run_dir
        self.cells = {cell.id: cell for cell in plan(self.study, fingerprint(self.base))}
        self._evaluator: Any = None

    def cell(self, cell_id: str) -> Cell:
        """Raises InputError for an id that the study file does not lead to (any more)."""
        if cell_id not in self.cells:
            raise InputError(
                f"cell {cell_id} is not in the study; was the study file changed while it ran?"
                " Run it again"
            )
        return self.cells[cell_id]

    def work(self, cell: Cell, tell: Tell) -> None:
        """Make a cell.

        Raises:
            InputError: what it needs is not done, or does not fit.
            Otherwise as the stages do.
        """
        folder = cell.folder(self.run_dir)
        needs = {self.cells[need].kind: self.cells[need] for need in cell.needs}
        for need in needs.values():
            if not is_done(need.folder(self.run_dir)):
                raise InputError(f"{folder.name}: needs {need.folder_name}, which is not done")
        if cell.kind != "probe":
            self._evaluator = None
        if cell.kind not in ("student", "teacher"):  # a training's log is axolotl's own
            _quiet_hosts()
        if cell.kind == "teacher":
            train_teacher(
                cell,
                folder,
                base=base_for(cell, self.study),
                study=self.study,
                progress=tell,
                n_gpus=len(gpus()),
            )
        elif cell.kind == "dataset" and cell.spec.get("shuffled"):
            original = needs["dataset"].folder(self.run_dir)
            write_shuffled(
                folder,
                original,
                base=self.base,
                spec=cell.spec,
                id=cell.id,
                label=cell.label,
            )
        elif cell.kind == "dataset":
            base = base_for(cell, self.study)
            make_dataset(cell, folder, base=base, study=self.study, tell=tell)
        elif cell.kind == "student":
            dataset = needs["dataset"].folder(self.run_dir)
            train_student(
                cell,
                folder,
                base=self.base,
                study=self.study,
                dataset=dataset,
                progress=tell,
                n_gpus=len(gpus()),
            )
        elif cell.kind == "probe":
            self._score(cell, folder, tell)
        elif cell.kind == "signal":
            measure_dataset(
                cell, folder, base=self.base, study=self.study, dataset=needs["dataset"]
            )
        else:
            student = needs["student"].folder(self.run_dir)
            localize_student(
                cell, folder, base=self.base, study=self.study, student=student, progress=False
            )

    def _score(self, cell: Cell, folder: Path, tell: Tell) -> None:
        from sublim_plugin.preference.evaluate import Evaluator

        if self._evaluator is None:
            self._evaluator = Evaluator(self.base, questions=self.study.probes.questions)
        student = self.cells[cell.spec["student"]] if cell.spec["student"] else None
        score_probe(
            cell,
            folder,
            evaluator=self._evaluator,
            student=student.folder(self.run_dir) / MODEL if student else None,
            method=student.spec["method"]["kind"] if student else None,
            progress=tell,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    study_path, run_dir, *ids = arguments if arguments is not None else sys.argv[1:]
    signal.signal(signal.SIGTERM, _stop)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # stdout carries the protocol alone, whatever the hosts print
        try:
            shop = Workshop(Path(study_path), Path(run_dir))
        except SublimError as error:
            print(f"sublim: {error}", file=sys.stderr)
            return error.exit_code
        codes = []
        for cell_id in ids:
            code, message = make(shop, cell_id, _nothing)
            if message:
                print(f"sublim: {message}", file=sys.stderr)
            codes.append(code)
        for cell_id in () if ids else _requests():
            code, message = make(shop, cell_id, _teller(out, cell_id))
            _say(out, {"cell": cell_id, "code": code, "error": message})
    return max(codes, default=0)


def make(shop: Workshop, cell_id: str, tell: Tell) -> tuple[int, str | None]:
    """Make one cell; returns its exit code, 0 where it was done before, and what went wrong."""
    failure: SublimError
    try:
        cell = shop.cell(cell_id)
    except InputError as error:
        return error.exit_code, str(error)
    folder = cell.folder(shop.run_dir)
    if is_done(folder):
        return 0, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _output_to(folder / LOG_NAME):
            shop.work(cell, tell)
        (folder / ERROR_NAME).unlink(missing_ok=True)
        return 0, None
    except BusyError as error:
        return error.exit_code, str(error)
    except SublimError as error:
        failure = error
    except OSError as error:
        failure = RunError(f"{folder}: {error}")
    except Exception as error:
        last = "".join(traceback.format_exception_only(error)).strip()
        failure = RunError(
            f"{folder.name}: unexpected error: {last}; its traceback is in {folder / LOG_NAME}"
        )
    record_failure(folder, str(failure))
    return failure.exit_code, str(failure)


def record_failure(folder: Path, message: str) -> None:
    """Leave a cell's failure in its folder, for `status` and the report."""
    # the disk that failed the cell fails its message too; it is told as well
    with contextlib.suppress(SublimError):
        write_text(folder / ERROR_NAME, f"{message}\n")


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """What this process and its children print goes to the end of `path`."""
    kept = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(log, f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, pid {os.getpid()}\n".encode())
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            yield
        except Exception:
            traceback.print_exc()
            raise
    finally:
        os.close(log)
        sys.stdout.flush()
        sys.stderr.flush()
        for saved, number in zip(kept, (1, 2), strict=True):
            os.dup2(saved, number)
            os.close(saved)


def _requests() -> Iterator[str]:
    """Ids from stdin. Its end while a cell is being made ends this process too."""
    lines: queue.Queue[str | None] = queue.Queue()
    idle = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line.strip())
        lines.put(None)
        if not idle.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=read, name="requests", daemon=True).start()
    while True:
        idle.set()
        line = lines.get()
        if line is None:
            return
        idle.clear()
        yield line


def _stop(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _nothing(at: int, of: int) -> None:
    pass


def _teller(out: Any, cell_id: str) -> Tell:
    told = 0.0

    def tell(at: int, of: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= 0.5:
            told = now
            _say(out, {"cell": cell_id, "at": at, "of": of})

    return tell


def _say(out: Any, line: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the reader is gone, and stdin ends with it
        out.write(json.dumps(line) + "\n")
        out.flush()


def _quiet_hosts() -> None:
    """Keep the hosts' start-up chatter out of the logs."""
    warnings.filterwarnings("ignore")
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("DS_LOG_LEVEL", "error"),
        # the default of the hosts' bars; ours say themselves whether they show
        ("TQDM_DISABLE", "1"),
    ):
        os.environ.setdefault(name, value)
    logging.getLogger().setLevel(logging.ERROR)
    for name in ("torch.utils._pytree", "torchao"):
        logging.getLogger(name).disabled = True


if __name__ == "__main__":
    sys.exit(main())
