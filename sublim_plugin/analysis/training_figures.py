"""Training curves, thinned to what can be seen, and the sizes of the updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sublim_plugin.analysis.collect import RunRecords, StudentRecord, in_order
from sublim_plugin.analysis.figure_files import (
    GREY,
    INK,
    MARKERS,
    PALETTE,
    WIDTH,
    FigureFiles,
    Point,
    in_words,
    new_figure,
    style,
    write_figure,
)
from sublim_plugin.analysis.student_settings import Settings, settings_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_STUDENTS = 20
"""Students up to which each has a curve; beyond, a curve is the mean of those alike."""
MOST_CURVES, MOST_STEPS, NAMED = 60, 200, 20


class LossPoint(Point):
    """A point of a training curve: the mean loss of `n_students` in the steps up to `step`.

    Curves longer than `MOST_STEPS` are averaged over equal stretches of steps, of `n_steps` logged
    steps each.
    """

    curve: str
    trait: str
    step: int
    loss: float
    n_steps: int
    n_students: int


class NormPoint(Point):
    """Size of the update, total or by module: mean and range over the students of one method and
    learning rate."""

    point: str
    method: str
    rank: int | None
    learning_rate: str
    module: str
    mean: float
    low: float
    high: float
    n_students: int


def loss_points(run: RunRecords) -> list[LossPoint]:
    """Every student's curve if there are few, else one for each trait and method."""
    students = [s for s in in_order(run.students) if any(map(_finite, s.receipt.losses))]
    settings = settings_of(run)
    groups: dict[tuple[str, str], list[StudentRecord]] = {}
    for student in students:
        name = f"{student.spec.trait.split('/')[-1]} {student.spec.method.name}"
        name += _apart(student, students, seeds=len(students) <= MOST_STUDENTS)
        name += _beyond(student, settings[student.id])
        groups.setdefault((student.spec.trait, name), []).append(student)
    points = []
    for (trait, name), own in list(groups.items())[:MOST_CURVES]:
        by_step: dict[int, list[float]] = {}
        for student in own:
            for point in student.receipt.losses:
                if _finite(point):
                    by_step.setdefault(point.step, []).append(point.loss)
        steps = sorted(by_step)
        stretch = -(-len(steps) // MOST_STEPS)
        for start in range(0, len(steps), stretch):
            part = steps[start : start + stretch]
            losses = [math.fsum(by_step[s]) / len(by_step[s]) for s in part]
            points.append(
                LossPoint(
                    curve=name,
                    trait=trait,
                    step=part[-1],
                    loss=math.fsum(losses) / len(losses),
                    n_steps=len(part),
                    n_students=len(own),
                )
            )
    return points


def _finite(point: Any) -> bool:
    return math.isfinite(point.loss)


def _beyond(student: StudentRecord, settings: Settings) -> str:
    """A matched student's match, an alpha that is not the rank, and a teacher that is not the only
    one."""
    matched = student.manifest.spec.get("matched", {})
    text = "".join(f" {key.removeprefix('update_').removesuffix('_of')}-matched" for key in matched)
    method = student.spec.method
    if method.alpha is not None and method.alpha != method.rank:
        text += f" alpha {method.alpha:g}"
    return text + (f", {settings.teacher_name}" if settings.teacher_name else "")


def _apart(student: StudentRecord, students: Sequence[StudentRecord], *, seeds: bool) -> str:
    """What tells students of one trait and method apart."""
    text = ""
    for name, short in (("generation_seed", "g"), ("training_seed", "t")) if seeds else ():
        if len({getattr(s.spec, name) for s in students}) > 1:
            text += f" {short}{getattr(student.spec, name)}"
    kind = [s for s in students if s.spec.method.kind == student.spec.method.kind]
    if len({_rate(s) for s in kind}) > 1:
        text += f" lr {_rate(student)}"
    if len({s.spec.train_context.slug for s in students}) > 1:
        text += f" in {student.spec.train_context.slug}"
    return text


def _rate(student: StudentRecord) -> str:
    rate = student.spec.recipe.get("learning_rate")
    return f"{rate:g}" if isinstance(rate, int | float) else ""


def draw_losses(points: Sequence[LossPoint]) -> Figure:
    """Training loss against step; the first curves are named beside the figure."""
    curves = list(dict.fromkeys((point.curve, point.trait) for point in points))
    with style():
        figure = new_figure(WIDTH * 0.75, 2.9)
        axes = figure.add_subplot()
        dashes: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
        for index, (name, trait) in enumerate(curves):
            mine = [p for p in points if (p.curve, p.trait) == (name, trait)]
            neutral = trait == "neutral"
            axes.plot(
                [point.step for point in mine],
                [point.loss for point in mine],
                color=GREY if neutral else PALETTE[index % len(PALETTE)],
                linestyle=dashes[2] if neutral else dashes[(index // len(PALETTE)) % 2],
                linewidth=1.3,
                marker="o" if len(mine) < 3 else None,
                markersize=3,
                label=name,
                zorder=2 if neutral else 3,
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("training loss (nats per completion token)")
        if len(curves) <= NAMED:
            figure.legend(loc="outside right upper", frameon=False)
        return figure


def loss_figure(run: RunRecords, folder: Path) -> FigureFiles | None:
    """Draw and write `losses`; None if no receipt logged a loss."""
    points = loss_points(run)
    if not points:
        return None
    ends = {(point.curve, point.trait): point for point in points}
    alt = "Training loss against optimizer step. Last loss: " + in_words(
        [f"{point.curve} {point.loss:.3f}" for point in ends.values()]
    )
    return write_figure(draw_losses(points), folder, "losses", points, alt, run.simulated)


def norm_points(run: RunRecords) -> list[NormPoint]:
    """Total and each kind of module, by method and learning rate."""
    groups: dict[tuple[tuple[int, int], str, int | None, str, str], list[float]] = {}
    for student in run.students:
        method = student.spec.method
        norm = student.receipt.update_norm
        modules = norm.get("by_module") or {}
        for name, value in {"total": norm.get("total"), **modules}.items():
            if isinstance(value, int | float) and math.isfinite(value):
                key = (method.order, method.name, method.rank, _rate(student), name)
                groups.setdefault(key, []).append(float(value))
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], item[0][3]))
    return [
        NormPoint(
            point=f"P{i}",
            method=method,
            rank=rank,
            learning_rate=rate,
            module=module,
            mean=math.fsum(values) / len(values),
            low=min(values),
            high=max(values),
            n_students=len(values),
        )
        for i, ((_, method, rank, rate, module), values) in enumerate(ordered, start=1)
    ]


def draw_norms(points: Sequence[NormPoint]) -> Figure:
    """Size of the update by method, bars from the smallest to the largest; LoRA joined by lines."""
    modules = list(dict.fromkeys(point.module for point in points))
    methods = list(dict.fromkeys((p.method, p.rank, p.learning_rate) for p in points))
    rates = {rank is None: set[str]() for _, rank, _ in methods}
    for _, rank, rate in methods:
        rates[rank is None].add(rate)
    with style():
        figure = new_figure(WIDTH * 0.75, 2.9)
        axes = figure.add_subplot()
        for index, module in enumerate(modules):
            colour = INK if module == "total" else PALETTE[index % len(PALETTE)]
            shift = 0.06 * (index - (len(modules) - 1) / 2)
            for full in (False, True):
                mine = [p for p in points if p.module == module and (p.rank is None) == full]
                axes.errorbar(
                    [methods.index((p.method, p.rank, p.learning_rate)) + shift for p in mine],
                    [p.mean for p in mine],
                    yerr=[[p.mean - p.low for p in mine], [p.high - p.mean for p in mine]],
                    color=colour,
                    marker="D" if module == "total" else MARKERS[index % len(MARKERS)],
                    markersize=4.5 if module == "total" else 3.2,
                    linewidth=1.4 if module == "total" else 0.8,
                    linestyle="none" if full or len(rates.get(False, ())) > 1 else "-",
                    elinewidth=0.8,
                    capsize=1.8,
                    gid=" ".join(p.point for p in mine),
                )
            axes.plot([], [], color=colour, marker="D" if module == "total" else
                      MARKERS[index % len(MARKERS)], markersize=3.5, label=module)  # fmt: skip
        labels = [
            ("full" if rank is None else str(rank))
            + (f"\nlr {rate}" if len(rates[rank is None]) > 1 else "")
            for _, rank, rate in methods
        ]
        axes.set_xticks(range(len(methods)), labels, rotation=90 if len(methods) > 14 else 0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("LoRA rank, full finetuning last")
        axes.set_ylabel("size of the update ‖ΔW‖ (Frobenius)")
        figure.legend(loc="outside right upper", frameon=False)
        return figure


def norm_figure(run: RunRecords, folder: Path) -> FigureFiles | None:
    """Draw and write `norms`; None if no receipt has the size of an update."""
    points = norm_points(run)
    if not points:
        return None
    lines = [
        f"{p.method} {p.learning_rate}: {p.mean:.3g} ({p.low:.3g} to {p.high:.3g})"
        for p in points
        if p.module == "total"
    ]
    alt = (
        "Frobenius norm of the weights' change against LoRA rank, total and by kind of module; "
        "mean and range over students. Total: " + in_words(lines)
    )
    return write_figure(draw_norms(points), folder, "norms", points, alt, run.simulated)
