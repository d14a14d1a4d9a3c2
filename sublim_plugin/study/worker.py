"""A worker process: makes the given cells, loading the base model once.

`python -P -m sublim_plugin.study.worker STUDY RUN_DIR ID…`; exits with the highest code of a failure. A cell's failure is written to its folder
and does not stop the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.base_models import fingerprint, resolve
from sublim_plugin.core.errors import BusyError, InputError, RunError, SublimError
from sublim_plugin.study.cells import Cell, plan
from sublim_plugin.study.stages import (
    MODEL,
    localize_student,
    make_dataset,
    score_probe,
    train_student,
)
from sublim_plugin.study.state import ERROR_NAME
from sublim_plugin.study.study_file import Study, load_study


def main(arguments: Sequence[str] | None = None) -> int:
    study_path, run_dir, *ids = arguments if arguments is not None else sys.argv[1:]
    _quiet_hosts()
    study = load_study(Path(study_path))
    base = resolve(study.base_model)
    cells = {cell.id: cell for cell in plan(study, fingerprint(base))}
    chosen = [cells[cell_id] for cell_id in ids]
    kinds = {
        "dataset": _datasets,
        "student": _students,
        "probe": _probes,
        "localization": _localizations,
    }
    codes = [
        work(of_kind, cells, study, base, Path(run_dir))
        for kind, work in kinds.items()
        if (of_kind := [cell for cell in chosen if cell.kind == kind])
    ]
    return max(codes, default=0)


def _quiet_hosts() -> None:
    """Keep the hosts' start-up chatter out of the study's progress."""
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


def _datasets(
    chosen: Sequence[Cell], cells: dict[str, Cell], study: Study, base: Path, run_dir: Path
) -> int:
    show = sys.stderr.isatty()
    codes = []
    for cell in chosen:
        folder = cell.folder(run_dir)
        work = partial(make_dataset, cell, folder, base=base, study=study, progress=show)
        codes.append(attempt(folder, work))
    return max(codes, default=0)


def _students(
    chosen: Sequence[Cell], cells: dict[str, Cell], study: Study, base: Path, run_dir: Path
) -> int:
    codes = []
    for cell in chosen:
        folder = cell.folder(run_dir)
        dataset = cells[cell.needs[0]].folder(run_dir)
        work = partial(train_student, cell, folder, base=base, study=study, dataset=dataset)
        codes.append(attempt(folder, work))
    return max(codes, default=0)


def _probes(
    chosen: Sequence[Cell], cells: dict[str, Cell], study: Study, base: Path, run_dir: Path
) -> int:
    from tqdm import tqdm

    from sublim_plugin.preference.evaluate import Evaluator

    evaluator = Evaluator(base, questions=study.probes.questions)
    codes = []
    for cell in chosen:
        student = cells[cell.spec["student"]] if cell.spec["student"] else None
        folder = cell.folder(run_dir)
        with tqdm(desc=cell.label, unit="question", disable=None, leave=False) as bar:

            def show(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            work = partial(
                score_probe,
                cell,
                folder,
                evaluator=evaluator,
                student=student.folder(run_dir) / MODEL if student else None,
                method=student.spec["method"]["kind"] if student else None,
                progress=show,
            )
            codes.append(attempt(folder, work))
    return max(codes, default=0)


def _localizations(
    chosen: Sequence[Cell], cells: dict[str, Cell], study: Study, base: Path, run_dir: Path
) -> int:
    show = sys.stderr.isatty()
    codes = []
    for cell in chosen:
        folder = cell.folder(run_dir)
        student = cells[cell.spec["student"]].folder(run_dir)
        work = partial(
            localize_student, cell, folder, base=base, study=study, student=student, progress=show
        )
        codes.append(attempt(folder, work))
    return max(codes, default=0)


def attempt(folder: Path, work: Callable[[], None]) -> int:
    """Do a cell's work; a failure is written to `error.txt` and its exit code returned."""
    error_file = folder / ERROR_NAME
    try:
        work()
    except BusyError as error:
        print(f"sublim: {error}", file=sys.stderr)
        return error.exit_code
    except SublimError as error:
        return _record(error_file, error)
    except OSError as error:
        return _record(error_file, RunError(f"{folder}: {error}"))
    except Exception as error:
        traceback.print_exc()
        last = "".join(traceback.format_exception_only(error)).strip()
        return _record(error_file, RunError(f"{folder.name}: unexpected error: {last}"))
    error_file.unlink(missing_ok=True)
    return 0


def _record(error_file: Path, error: SublimError) -> int:
    print(f"sublim: {error}", file=sys.stderr)
    # the disk that failed the cell fails its message too; it was printed
    with contextlib.suppress(SublimError):
        write_text(error_file, f"{error}\n")
    return InputError.exit_code if isinstance(error, InputError) else error.exit_code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
