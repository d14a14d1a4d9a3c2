"""`sublim eval` as a function: many students of one loaded base, nothing computed twice.

    rows = score_students(
        base=Path("Qwen2.5-7B-Instruct"), adapters=[Path("a"), Path("b")], out=Path("scores"),
        tasks=["subliminal_cat", "subliminal_cat_sampled"], contexts=["template_default", "empty"],
    )

The base is scored as well: every number of a student is to be read against it, in the same context.
`preference.kept` says where the results lie.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sublim_plugin.core import base_models
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import BusyError, InputError, RunError
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.preference import asked as asking
from sublim_plugin.preference.asked import Asked, Tasks
from sublim_plugin.preference.journal import Journal
from sublim_plugin.preference.kept import find, keep, key_of, model_folder
from sublim_plugin.preference.models import (
    Engine,
    Student,
    check_students,
    identity,
    named,
    student,
    the_base,
)
from sublim_plugin.preference.opened import MERGED, Opened, check_engine
from sublim_plugin.preference.rows import Row, against_base, check_finite, notes_of, row_of

__all__ = ["Engine", "Row", "Student", "Unfinished", "identity", "score_students", "student"]

POLL_SECONDS = 1.0
"""Between two looks at whether another process is done with the base."""

Say = Callable[[str], None]


class Unfinished(RunError):
    """Some models could not be scored; the others were. `rows` are theirs.

    `exit_code` is 2 or 75 where every failure is of that kind, else 1.
    """

    def __init__(self, failed: Mapping[str, Exception], rows: Sequence[Row]) -> None:
        lines = [f"{name}: {_said(error)}" for name, error in failed.items()]
        super().__init__("\n".join(["not scored, and the same command tries again:", *lines]))
        self.rows = list(rows)
        codes = {getattr(error, "exit_code", 1) for error in failed.values()}
        self.exit_code = codes.pop() if len(codes) == 1 else 1


def score_students(
    *,
    base: str | Path,
    tasks: Sequence[str],
    out: str | Path,
    adapters: Sequence[str | Path] = (),
    contexts: Sequence[str | Mapping[str, Any] | Context] = (),
    questions: str | Path | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    seed: int = 1,
    engine: Engine = "transformers",
    device: str | None = None,
    dtype: str = "auto",
    say: Say = lambda line: None,
) -> list[Row]:
    """Score a base and students of it on lm-eval tasks; what is in `out` is not computed again.

    Args:
        base: folder of the base model, or `embedded:smollm2-135m-instruct`.
        tasks: names or tags of sublim's lm-eval tasks.
        out: folder of the results (`preference.kept`); several processes may share it.
        adapters: folders of adapters, full checkpoints, or a study's students.
        contexts: kinds, named texts, mappings, or YAML files; each task's own where empty.
        questions: a question set by name or file, in place of the tasks' own.
        include_path: folder of tasks that `sublim tasks new` wrote. Task files are code.
        limit: only the first questions.
        seed: of sampled replies.
        engine: `vllm` samples replies, of all adapters in one engine, and nothing else.
        device: `cpu`, `cuda`, ...; by default a GPU if there is one. Not for vllm.
        dtype: `auto` is the checkpoint's; log-softmax is in float32 in any case.
        say: told of progress, a line at a time.

    Returns:
        A row for each model, context and task; the base's first.

    Raises:
        InputError: a student, task, context or question set that does not fit; all of them are
            checked before anything is scored, and nothing has been written.
        Unfinished: a model failed under way; the others were scored.
    """
    folder, out = base_models.resolve(base), Path(out)
    check_engine(engine, device)
    if not tasks:
        raise InputError("no task is named; see `sublim tasks path` for what there is")
    index = Tasks(_text(questions), Path(include_path) if include_path is not None else None)
    if index.include_path is not None:
        asking.check_folder(index.include_path)
    common = identity(folder, engine=engine, dtype=dtype)
    untouched = the_base(folder, common)
    students = named(untouched, _students(adapters, common))
    asked = asking.resolve(
        folder, list(dict.fromkeys(tasks)), _labelled(contexts), index, limit=limit, seed=seed
    )
    if engine == "vllm" and (plain := [a.task for a in asked if a.measure != "generate_until"]):
        raise InputError(
            f"task {plain[0]}: the vllm engine samples replies; it does not give the "
            "log-probability of every surface form; use `--engine transformers` for this task"
        )
    missing = [one for one in students if len(_found(out, one, asked)) < len(asked)]
    if missing:
        check_students(folder, missing)
    _sweep(out)
    opened = Opened(
        folder,
        [one.folder for one in missing if one.folder and one.method == "lora"],
        engine=engine,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    try:
        failed = _score_all([untouched, *students], asked, index, opened, out, limit, say)
    finally:
        opened.close()
    alike = _alike(asked)
    rows: dict[str, list[Row]] = {}
    for one in (untouched, *students):
        found = _found(out, one, asked)
        rows[one.name] = [
            row_of(one.name, a, *found[key], alike.get(a.label, ()))
            for a in asked
            if (key := key_of(one, a)) in found
        ]
    own = rows.pop(untouched.name)
    all_rows = [*own, *(row for each in rows.values() for row in against_base(each, own))]
    if failed:
        raise Unfinished(failed, all_rows)
    return all_rows


def _students(adapters: Sequence[str | Path], common: dict[str, Any]) -> list[Student]:
    """The students in these folders. Raises InputError with a line for each that is none."""
    students, problems = [], []
    for folder in adapters:
        try:
            students.append(student(Path(folder), common))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return students


def _score_all(
    models: Sequence[Student],
    asked: Sequence[Asked],
    index: Tasks,
    opened: Opened,
    out: Path,
    limit: int | None,
    say: Say,
) -> dict[str, Exception]:
    """Score what is missing; the models that failed, with why.

    The base belongs to every run into `out`: where another one is at it, it comes last and is
    waited for.
    """
    failed: dict[str, Exception] = {}
    pending, told = deque(models), False
    while pending:
        one = pending.popleft()
        try:
            _score(one, asked, index, opened, out, limit, say)
        except BusyError as error:
            if one.folder is not None:
                failed[one.name] = error
                say(f"{one.name}: {error}")
                continue
            if not told:
                say(f"{error}: here it comes last, and waits")
                told = True
            if not pending:
                time.sleep(POLL_SECONDS)
            pending.append(one)
        except (OSError, RuntimeError, ValueError) as error:  # ours and torch's among them
            failed[one.name] = error
            say(f"{one.name}: failed, the others go on: {_said(error)}")
    return failed


def _score(
    one: Student,
    asked: Sequence[Asked],
    index: Tasks,
    opened: Opened,
    out: Path,
    limit: int | None,
    say: Say,
) -> None:
    """Compute and keep what `out` does not hold of one model."""
    if len(_found(out, one, asked)) == len(asked):
        say(f"{one.name}: all there, nothing is computed")
        return
    folder = model_folder(out, one)
    with cell_lock(folder):
        found = _found(out, one, asked)
        missing = [a for a in asked if key_of(one, a) not in found]
        if not missing:
            return
        with opened.on(one.folder, one.method, folder):
            opened.lm.journal = Journal(folder / "journal.jsonl", one.identity)
            runs = _runs(missing)
            for number, run in enumerate(runs, 1):
                _run(one, run, index, opened, folder, limit)
                what = run[0].task if len(run) == 1 else f"{len(run)} tasks"
                say(f"{one.name}, {what}, {run[0].label}: done, {number} of {len(runs)}")


def _runs(missing: Sequence[Asked]) -> list[list[Asked]]:
    """What is asked of lm-eval at a time: all log-probability tasks of a context, which share their
    requests, and each sampled one by itself, so that its replies do not depend on the others."""
    runs: dict[Any, list[Asked]] = {}
    for a in missing:
        alone = a.task if a.measure == "generate_until" else None
        runs.setdefault((a.context if a.given else None, alone), []).append(a)
    return list(runs.values())


def _run(
    one: Student,
    run: Sequence[Asked],
    index: Tasks,
    opened: Opened,
    folder: Path,
    limit: int | None,
) -> None:
    from sublim_plugin.preference.host import run_tasks

    manager = index.manager(run[0].context if run[0].given else None)
    results = run_tasks(opened.lm, [a.task for a in run], manager, limit)
    for a in run:
        check_finite(results, a, one.name)
    for a in run:
        block = {
            "key": key_of(one, a),
            "model": one.name,
            "student": None if one.folder is None else str(one.folder),
            "method": one.method,
            "base": str(opened.base),
            "identity": one.identity,
            "task": a.task,
            "measure": a.measure,
            "context": a.context.fields(),
            "context_label": a.label,
            "questions": a.questions,
            "determines": a.determines,
            "limit": limit,
            "seed": a.determines.get("seed"),
            "rendered_example": a.example,
            "notes": notes_of(a, results),
            **opened.described(one.folder, one.method),
        }
        keep(folder, results, block, opened.base)


def _found(out: Path, one: Student, asked: Sequence[Asked]) -> dict[str, tuple[Any, Path]]:
    """Results and samples file of what `out` holds of one model, by key."""
    folder = model_folder(out, one)
    keys = [key_of(one, a) for a in asked]
    return {key: found for key in keys if (found := find(folder, key)) is not None}


def _labelled(
    contexts: Sequence[str | Mapping[str, Any] | Context],
) -> list[tuple[str, Context]]:
    """Each context once, with a name of its own."""
    given: dict[Context, Any] = {}
    for value in contexts:
        given.setdefault(Context.parse(value), value)
    labels = {context: asking.label(value, context) for context, value in given.items()}
    names = list(labels.values())
    return [
        (name if names.count(name) == 1 else f"{name}-{context.slug}", context)
        for context, name in labels.items()
    ]


def _alike(asked: Sequence[Asked]) -> dict[str, list[str]]:
    """A note for each of the contexts asked for that the base's template renders alike."""
    places: dict[str, dict[str, None]] = {}
    for a in asked:
        places.setdefault(a.determines["prompts"], {})[a.label] = None
    return {
        label: [f"{' and '.join(labels)} are the same prompts to this model"]
        for labels in places.values()
        if len(labels) > 1
        for label in labels
    }


def _sweep(out: Path) -> None:
    """Remove the merged checkpoints that killed runs left, where no run is at the same model."""
    for left in out.glob(f"*/{MERGED}*"):
        try:
            with cell_lock(left.parent):
                shutil.rmtree(left, ignore_errors=True)
        except BusyError:
            continue


def _said(error: Exception) -> str:
    kind = "" if hasattr(error, "exit_code") else f"{type(error).__name__}: "
    return kind + str(error)


def _text(value: str | Path | None) -> str | None:
    return None if value is None else str(value)
