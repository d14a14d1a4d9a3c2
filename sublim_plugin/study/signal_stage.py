"""The work of a signal's cell: what a student could learn from a dataset, measured untrained."""

from __future__ import annotations

import time
from pathlib import Path

from data_gen.teachers import FinetunedTeacher
from sublim_plugin.core.atomic import write_json
from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.contexts import DEFAULT_DATE, Context
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.core.manifest import is_done, verify, write_manifest
from sublim_plugin.signal.command import RESULTS
from sublim_plugin.study.cells import Cell
from sublim_plugin.study.study_file import Study
from sublim_plugin.study.teaching import teacher_for


def measure_dataset(cell: Cell, folder: Path, *, base: Path, study: Study, dataset: Cell) -> None:
    """Measure a dataset's signal in one train context (see `sublim_plugin.signal.measure`).

    The dataset's cell lies beside `folder`, and so does what the study trained to be its teacher,
    wherever both lay when the dataset was written.

    Raises:
        InputError: the teacher is not there or did not write these rows; nothing can be measured.
    """
    from sublim_plugin.signal.figure import signal_figure
    from sublim_plugin.signal.measure import measure_signal

    with cell_lock(folder) as lock:
        if is_done(folder):
            return
        started = time.time()
        rows = folder.parent / dataset.folder_name
        written = verify(rows)
        teacher = teacher_for(dataset.spec, study.datasets.teachers, folder.parent)
        found = measure_signal(
            rows,
            base=base,
            context=Context.parse(cell.spec["train_context"]),
            rows=cell.spec["rows"],
            questions=study.probes.questions,
            limit=cell.spec["limit"],
            teacher_from=teacher.folder if isinstance(teacher, FinetunedTeacher) else None,
        )
        lock.check()
        write_json(folder / RESULTS, found.model_dump(mode="json"))
        drawn = signal_figure(found, folder)
        files = [] if drawn is None else [drawn.png, drawn.svg, drawn.pdf, drawn.csv]
        model = fingerprint(base)
        write_manifest(
            folder,
            kind="signal",
            id=cell.id,
            label=cell.label,
            spec=cell.spec,
            inputs={"base_model": model, "dataset": {"id": written.id[:12]}},
            outputs=[RESULTS, *(file.name for file in files)],
            started=started,
            template={"sha256": model["template_sha256"], "date": DEFAULT_DATE},
            versions=found.versions,
            counts={"rows": found.n_rows, "questions": found.n_questions, "tokens": found.tokens},
            notes=[*found.missing, *found.notes],
        )
