"""What a study will cost and can show, before it is run. Imports no torch.

Measured before stated before unknown: finished cells of the same kind and method in this run folder
give hours and bytes; else the figures of `costs.yaml`, each with its source; else it is said that
there is none. Ranges are the quartiles of what was measured, or the ends of what was stated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sublim_plugin.core.manifest import Manifest
from sublim_plugin.core.strict_yaml import load_model
from sublim_plugin.core.traits import NEUTRAL
from sublim_plugin.logprob.questions import load_questions
from sublim_plugin.study.cells import Cell
from sublim_plugin.study.state import CellState
from sublim_plugin.study.study_file import Study

Range = tuple[float, float]
FIGURES = Path(__file__).with_name("costs.yaml")
SHUFFLED = "shuffled"
UNKNOWN = "unknown: no figure for this model, and none of these cells is finished here"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Strict):
    """An entry of `costs.yaml`, where it is explained."""

    model: str
    kind: str
    method: str | None = None
    rows: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    prompts: Annotated[int, Field(ge=1)] | None = None
    minutes: Range | None = None
    mb: Range | None = None
    mb_per_rank: Range | None = None
    machine: str | None = None
    source: str


class _Figures(_Strict):
    figures: tuple[Figure, ...]


class Line(_Strict):
    """Cells of one kind and method: how many, and what those to do cost in all.

    `hours` are of one machine that makes one cell at a time; `hours` and `bytes` are None where
    nothing is known.
    """

    kind: str
    method: str | None
    cells: int
    done: int
    hours: Range | None
    bytes: Range | None
    figure: Literal["measured", "stated", "unknown", "not needed"]
    machine: str | None
    source: str


class Costs(_Strict):
    """A study's cost. Sums leave out what is unknown, and `without_*` count those cells."""

    study: str
    base_model: str
    cells: int
    done: int
    lines: tuple[Line, ...]
    hours: Range
    without_hours: int
    bytes: Range
    without_bytes: int
    datasets: int
    tests: int
    power: str


class _Size:
    """How much there is to a cell."""

    def __init__(self, cells: dict[str, Cell], study: Study) -> None:
        self.cells = cells
        self.questions = len(load_questions(study.probes.questions).questions)

    def work(self, cell: Cell) -> float:
        """What the time grows with: rows of a dataset or signal, rows times epochs of a training,
        prompts of a probe, else 1."""
        recipe = cell.spec.get("recipe", {})
        epochs = float(recipe.get("num_epochs") or 1)
        if cell.kind == "teacher":
            return float(cell.spec["persona"]["rows"]) * epochs
        if cell.kind == "student":
            dataset = self.cells.get(cell.spec.get("dataset", ""))
            return (1.0 if dataset is None else self.written(dataset)) * epochs
        if cell.kind == "signal":
            dataset = self.cells.get(cell.spec["dataset"])
            return float(min(cell.spec["rows"], dataset.spec["rows"] if dataset else math.inf))
        return self.written(cell)

    def written(self, cell: Cell) -> float:
        """What the files beside the weights grow with."""
        if cell.kind == "probe":
            asked = min(cell.spec.get("limit") or self.questions, self.questions)
            return float(asked * cell.spec.get("samples", 1))
        return float(cell.spec.get("rows") or 1) if cell.kind == "dataset" else 1.0


def costs(study: Study, states: Sequence[CellState]) -> Costs:
    """Count a study's cells and price those that are not done."""
    from sublim_plugin.analysis.power import planned_power

    groups: dict[tuple[str, str | None], list[CellState]] = {}
    for state in states:
        groups.setdefault((state.cell.kind, _method(state.cell)), []).append(state)
    size = _Size({state.cell.id: state.cell for state in states}, study)
    lines = tuple(_line(kind, method, own, study, size) for (kind, method), own in groups.items())
    n_datasets, n_tests = _replication([state.cell for state in states])
    return Costs(
        study=study.name,
        base_model=_model_name(states, study),
        cells=len(states),
        done=sum(line.done for line in lines),
        lines=lines,
        hours=_total([line.hours for line in lines]),
        without_hours=sum(line.cells - line.done for line in lines if line.hours is None),
        bytes=_total([line.bytes for line in lines]),
        without_bytes=sum(line.cells - line.done for line in lines if line.bytes is None),
        datasets=n_datasets,
        tests=n_tests,
        power=planned_power(n_datasets, max(1, n_tests)),
    )


def _method(cell: Cell) -> str | None:
    method = cell.spec.get("method")
    if cell.spec.get("shuffled"):
        return SHUFFLED
    return str(method["kind"]) if isinstance(method, dict) else cell.spec.get("measure")


def _line(
    kind: str,
    method: str | None,
    states: Sequence[CellState],
    study: Study,
    size: _Size,
) -> Line:
    todo = [state.cell for state in states if state.state != "done"]
    line = Line(
        kind=kind, method=method, cells=len(states), done=len(states) - len(todo), hours=(0.0, 0.0),
        bytes=(0.0, 0.0), figure="not needed", machine=None, source="all done",
    )  # fmt: skip
    if not todo:
        return line
    made = [(state.cell, state.manifest) for state in states if state.manifest is not None]
    found = _measured(made, todo, size)
    if method == SHUFFLED and not found:
        found = _stated(kind, None, todo, study, size)
        found = found and found | {"hours": (0.0, 0.0), "source": "rows of a dataset, reordered"}
    found = found or _stated(kind, method, todo, study, size)
    nothing = {"hours": None, "bytes": None, "figure": "unknown", "source": UNKNOWN}
    return line.model_copy(update=found or nothing)


def _measured(
    made: Sequence[tuple[Cell, Manifest]], todo: Sequence[Cell], size: _Size
) -> dict[str, Any] | None:
    if not made:
        return None
    hours = _quartiles([m.wall_s / 3600 / size.work(cell) for cell, m in made])
    weights = _quartiles([_bytes(m, weights=True) / _rank(cell) for cell, m in made])
    beside = _quartiles([_bytes(m, weights=False) / size.written(cell) for cell, m in made])
    device = made[0][1].device
    return {
        "hours": _sum(hours, [size.work(cell) for cell in todo]),
        "bytes": _total(
            [
                _sum(weights, [_rank(cell) for cell in todo]),
                _sum(beside, [size.written(cell) for cell in todo]),
            ]
        ),
        "figure": "measured",
        "machine": ", ".join(
            str(device[key]) for key in ("device", "machine") if device.get(key) is not None
        )
        + (f", {device['cores']} cores" if device.get("cores") else ""),
        "source": f"measured: {len(made)} finished here",
    }


def _stated(
    kind: str, method: str | None, todo: Sequence[Cell], study: Study, size: _Size
) -> dict[str, Any] | None:
    models = [
        str(todo[0].spec.get("base_model", {}).get("name", "")).rsplit("/", 1)[-1].lower(),
        *((recipe or "").split("/")[0] for recipe in _recipes(study)),
    ]
    figure = next(
        (
            one
            for model in models
            for one in figures()
            if (one.model, one.kind, one.method) == (model, kind, method)
        ),
        None,
    )
    if figure is None:
        return None
    rows = (figure.rows or 1) * (figure.epochs or 1)
    unit = figure.prompts or rows
    scales = bool(figure.rows or figure.prompts)
    hours = disk = None
    if figure.minutes is not None:
        scaled = [size.work(cell) / unit if scales else 1.0 for cell in todo]
        hours = _sum(_times(figure.minutes, 1 / 60), scaled)
    if figure.mb is not None:
        grows = scales and kind in ("dataset", "probe")
        sizes = [size.written(cell) / unit if grows else 1.0 for cell in todo]
        disk = _sum(_times(figure.mb, 1e6), sizes)
        if figure.mb_per_rank is not None:
            ranks = _sum(_times(figure.mb_per_rank, 1e6), [_rank(cell) for cell in todo])
            disk = _total([disk, ranks])
    return {
        "hours": hours,
        "bytes": disk,
        "figure": "stated",
        "machine": figure.machine,
        "source": figure.source
        if figure.source.startswith("measured")
        else f"stated: {figure.source}",
    }


def _recipes(study: Study) -> tuple[str | None, str | None]:
    return study.training.lora_recipe, study.training.full_recipe


@cache
def figures() -> tuple[Figure, ...]:
    """The figures that come with sublim.

    Raises:
        InputError: `costs.yaml` was changed and does not fit.
    """
    return load_model(FIGURES, _Figures).figures


def _rank(cell: Cell) -> float:
    method = cell.spec.get("method")
    return float(method.get("rank") or 1) if isinstance(method, dict) else 1.0


def _bytes(manifest: Manifest, *, weights: bool) -> int:
    return sum(
        file.bytes
        for name, file in manifest.outputs.items()
        if name.endswith(".safetensors") == weights
    )


def _quartiles(values: Sequence[float]) -> Range:
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.25 * last)], ordered[round(0.75 * last)]


def _times(value: Range, factor: float) -> Range:
    return value[0] * factor, value[1] * factor


def _sum(each: Range, sizes: Sequence[float]) -> Range:
    return _times(each, sum(sizes))


def _total(ranges: Sequence[Range | None]) -> Range:
    known = [one for one in ranges if one is not None]
    return sum(low for low, _ in known), sum(high for _, high in known)


def _replication(cells: Sequence[Cell]) -> tuple[int, int]:
    """Datasets of the trait that has fewest, and the most methods that a trait is tested with."""
    datasets: dict[str, set[str]] = {}
    methods: dict[str, set[str]] = {}
    controls = {cell.id for cell in cells if cell.spec.get("shuffled")}
    for cell in cells:
        if cell.kind != "student" or cell.spec.get("dataset") in controls:
            continue
        if (trait := cell.spec.get("trait")) != NEUTRAL:
            rate = cell.spec.get("recipe", {}).get("learning_rate")
            datasets.setdefault(str(trait), set()).add(str(cell.spec.get("dataset")))
            key = json.dumps([cell.spec.get("method"), rate], sort_keys=True)
            methods.setdefault(str(trait), set()).add(key)
    return (
        min(map(len, datasets.values()), default=0),
        max(map(len, methods.values()), default=0),
    )


def _model_name(states: Sequence[CellState], study: Study) -> str:
    named = (state.cell.spec.get("base_model", {}).get("name") for state in states)
    return next((str(name) for name in named if name), study.base_model)
