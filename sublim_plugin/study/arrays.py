"""A study's missing cells as numbered arrays of tasks, for a scheduler of batch jobs.

An array holds cells that do not need each other and ask for the same machine; a task is a few of
them, made one after the other by one process. Each array is a file, `slurm/array-K.json` in the
run folder, which is never changed: `sublim run STUDY --array K --index N` makes its task N, also
where the scheduler is not Slurm.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sublim_plugin.core.atomic import write_json
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.study.cells import Cell

FOLDER = "slurm"
T = TypeVar("T")
Work = Literal["teacher", "dataset", "student", "student-full", "probe", "localization", "signal"]
WORKS: tuple[Work, ...] = (
    "teacher", "dataset", "student", "student-full", "probe", "localization", "signal",
)  # fmt: skip
"""What a machine is asked for by: the kinds of cells, with full finetuning apart."""
CHUNKS: Mapping[Work, int] = {
    "teacher": 1,
    "dataset": 1,
    "student": 1,
    "student-full": 1,
    "probe": 8,
    "localization": 1,
    "signal": 4,
}
"""Cells in a task. A probe is short beside the loading of its base model, a signal takes
minutes; the others are longer."""


@dataclass(frozen=True)
class Block:
    """Tasks of one kind of work, all of which may run at once when `needs` are done.

    Attributes:
        tasks: the cells of each task, in the order in which it makes them.
        needs: ids of the cells that these need, whether done or not.
    """

    work: Work
    tasks: list[list[str]]
    needs: frozenset[str]


class ArrayFile(BaseModel):
    """`array-K.json`: the ids of each task's cells, and the job's name in the queue."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    work: Work
    job_name: str
    tasks: Annotated[tuple[tuple[str, ...], ...], Field(min_length=1)]


def work_of(cell: Cell) -> Work:
    """The kind of work that a cell is."""
    if cell.kind in ("student", "teacher") and cell.spec["method"]["kind"] == "full":
        return "student-full"
    return cell.kind


def lay_out(
    cells: Sequence[Cell],
    todo: set[str],
    *,
    chunks: Mapping[Work, int],
    longest: int,
    most_tasks: int | None = None,
) -> list[Block]:
    """Arrays for the cells in `todo`, each after those that it needs.

    Cells of one depth in the graph of needs cannot need each other, whatever their kinds; the
    first depth needs nothing. A depth gives one array for each kind of work.

    Args:
        cells: the whole plan, each cell after those that it needs.
        chunks: cells in a task, for each kind of work.
        longest: tasks in an array (Slurm's MaxArraySize); more of them make several arrays.
        most_tasks: tasks in all; where there would be more, all tasks are made longer.

    Raises:
        RunError: `most_tasks` is too small for one task of each kind at each depth.
    """
    depth: dict[str, int] = {}
    groups: dict[tuple[int, Work], list[Cell]] = {}
    for cell in cells:
        depth[cell.id] = 1 + max((depth[need] for need in cell.needs), default=-1)
        if cell.id in todo:
            groups.setdefault((depth[cell.id], work_of(cell)), []).append(cell)
    if groups and most_tasks is not None and most_tasks < len(groups):
        raise RunError(
            f"the queue has room for {max(most_tasks, 0)} tasks, and these cells need at least"
            f" {len(groups)}: wait until some have ended and give the same command again, or raise"
            " --max-tasks"
        )
    factor = _factor(
        [(len(group), chunks[work]) for (_, work), group in groups.items()], most_tasks
    )
    blocks = []
    for _, work in sorted(groups, key=lambda key: (key[0], WORKS.index(key[1]))):
        group = groups[_, work]
        tasks = _split(group, math.ceil(len(group) / (chunks[work] * factor)))
        for part in _split(tasks, math.ceil(len(tasks) / longest)):
            needs = frozenset(need for task in part for cell in task for need in cell.needs)
            blocks.append(Block(work, [[cell.id for cell in task] for task in part], needs))
    return blocks


def _factor(groups: Sequence[tuple[int, int]], most_tasks: int | None) -> int:
    """How much longer tasks must be for the groups of (cells, chunk) to give `most_tasks`."""
    if most_tasks is None:
        return 1
    low, high = 1, max((cells for cells, _ in groups), default=1)
    while low < high:
        middle = (low + high) // 2
        if sum(math.ceil(cells / (chunk * middle)) for cells, chunk in groups) <= most_tasks:
            high = middle
        else:
            low = middle + 1
    return low


def _split(items: Sequence[T], parts: int) -> list[list[T]]:
    """`parts` runs of neighbours whose lengths differ by at most one."""
    bounds = [len(items) * part // parts for part in range(parts + 1)]
    return [list(items[a:b]) for a, b in itertools.pairwise(bounds)]


def array_path(run_dir: Path, number: int) -> Path:
    """Where array `number` is kept."""
    return run_dir / FOLDER / f"array-{number}.json"


def array_numbers(run_dir: Path) -> list[int]:
    """The arrays of all submissions into this run folder."""
    found = (run_dir / FOLDER).glob("array-*.json")
    return sorted(int(path.stem.split("-")[1]) for path in found if path.stem[6:].isdigit())


def write_array(run_dir: Path, number: int, block: Block, job_name: str) -> Path:
    """Keep an array; returns its path."""
    path = array_path(run_dir, number)
    tasks = tuple(tuple(task) for task in block.tasks)
    file = ArrayFile(work=block.work, job_name=job_name, tasks=tasks)
    write_json(path, file.model_dump(mode="json"))
    return path


def read_array(run_dir: Path, number: int) -> ArrayFile:
    """Read an array.

    Raises:
        InputError: there is none of that number, or it does not parse.
    """
    path = array_path(run_dir, number)
    try:
        return ArrayFile.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        known = ", ".join(map(str, array_numbers(run_dir))) or "none"
        raise InputError(
            f"{path}: no such array (there are: {known}); `sublim run STUDY --engine slurm` writes"
            " them, with --no-submit without giving them to Slurm"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        raise InputError(f"{path}: not a readable array ({error}); submit again") from error
