"""The cost of a study in the form in which one would paste it into a request for compute."""

from __future__ import annotations

from sublim_plugin.study.cost import Costs, Line, Range
from sublim_plugin.study.gc import size


def text(costs: Costs) -> str:
    """Cells, hours and disk by kind; what they rest on; the sum; and the power."""
    todo = costs.cells - costs.done
    lines = [
        f"{costs.study}: {costs.cells:,} cells on {costs.base_model}, {costs.done:,} done,"
        f" {todo:,} to do",
        "",
        f"{'':<22}{'cells':>8}{'done':>8}{'to do':>8}{'hours':>16}{'disk':>20}",
    ]
    for number, line in enumerate(costs.lines, start=1):
        name = f"{line.kind} {line.method}" if line.method else line.kind
        lines.append(
            f"{name:<22}{line.cells:>8,}{line.done:>8,}{line.cells - line.done:>8,}"
            f"{hours(line.hours):>16}{disk(line.bytes):>20}  [{number}]"
        )
    time = costs.hours if costs.without_hours < todo or not todo else None
    space = costs.bytes if costs.without_bytes < todo or not todo else None
    lines.append(
        f"{'to do, in all':<22}{costs.cells:>8,}{costs.done:>8,}{todo:>8,}"
        f"{hours(time):>16}{disk(space):>20}"
    )
    lines += [""] + [f"[{n}] {_basis(line)}" for n, line in enumerate(costs.lines, start=1)]
    lines += ["", *_notes(costs), f"Power: {costs.power}."]
    return "\n".join(lines)


def _basis(line: Line) -> str:
    return line.source + (f" ({line.machine})" if line.machine else "")


def _notes(costs: Costs) -> list[str]:
    notes = [
        "Hours are those of one machine (a GPU-hour where it has one GPU) that makes one cell at a"
        " time, without start-up."
    ]
    for count, what in ((costs.without_hours, "hours"), (costs.without_bytes, "disk")):
        if count:
            notes.append(
                f"The sum of {what} leaves out {count:,} cells for which there is no figure: run a"
                " few of them here, and this table uses what they took."
            )
    return notes


def hours(value: Range | None) -> str:
    """`12-30`, `0.4`, `unknown`."""
    if value is None:
        return "unknown"
    low, high = (f"{one:,.0f}" if one >= 10 else f"{one:.2g}" for one in value)
    return low if low == high else f"{low}-{high}"


def disk(value: Range | None) -> str:
    """`1.2 GB-2.4 GB`, `unknown`."""
    if value is None:
        return "unknown"
    low, high = size(value[0]), size(value[1])
    return low if low == high else f"{low}-{high}"
