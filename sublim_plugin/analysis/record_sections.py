"""Sections of the report that show what was run: training, cells, failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sublim_plugin.analysis import page
from sublim_plugin.analysis.collect import RunRecords
from sublim_plugin.analysis.figure_files import FigureFiles
from sublim_plugin.analysis.page import Html
from sublim_plugin.analysis.record_tables import count_lines, merged

MOST_STUDENTS, MOST_CELLS, MOST_TROUBLE = 100, 150, 20
"""Lines that are printed; students.csv and cells.csv have all."""
MOST_OF_AN_ERROR = 2000
"""Characters: a log's line may be of any length."""

Lines = Sequence[dict[str, Any]]


def training_section(
    run: RunRecords, students: Lines, losses: FigureFiles | None, norms: FigureFiles | None
) -> Html:
    """Loss curves, sizes of the updates, and what each student's receipt says."""
    if not run.students:
        return page.paragraph("No student has been trained.")
    parts = []
    if losses is not None:
        parts.append(
            page.figure(
                losses,
                "Training loss as logged in each student's receipt. Dotted: neutral. Long curves "
                "are averaged over equal stretches of steps, and with more than 20 students those "
                "of one trait and method share a curve; n_steps and n_students in the CSV say "
                "over how many.",
            )
        )
    if norms is not None:
        parts.append(
            page.figure(
                norms,
                "Size of the update: Frobenius norm of the change in weights, in all and by kind "
                "of module; mean and range over students of one method and learning rate.",
            )
        )
    modules = [name for name in students[0] if name.startswith("norm_")]
    parts.append(
        page.table(
            "Students: data, loss mask, last loss and size of the update, in all and by kind of "
            "module",
            ["student", "rows", "steps", "tokens with loss", "last loss", "‖ΔW‖"]
            + [name.removeprefix("norm_") for name in modules],
            [
                [
                    line["name"],
                    line["rows"],
                    line["steps"],
                    _format(line["loss_share"], ".1%"),
                    _format(line["last_loss"], ".4f"),
                    _format(line["norm"], ".3g"),
                    *[_format(line[name], ".3g") for name in modules],
                ]
                for line in students[:MOST_STUDENTS]
            ],
            numeric=tuple(range(1, 6 + len(modules))),
        )
    )
    parts.append(page.said("All students, with digests of their weights:", "students.csv"))
    return page.join(parts)


def cells_section(run: RunRecords, cells: Lines) -> Html:
    """How many cells of each kind are in each state, the first of them, versions and devices."""
    if not run.cells:
        return page.paragraph("Nothing.")
    states = list(dict.fromkeys(line["state"] for line in cells))
    counts = Counter((line["kind"], line["state"]) for line in cells)
    parts = [
        page.table(
            "Number of cells by kind and state",
            ["kind", *states],
            [
                [kind, *[counts[kind, state] for state in states]]
                for kind in dict.fromkeys(line["kind"] for line in cells)
            ],
            numeric=range(1, 1 + len(states)),
        ),
        page.table(
            "Cells of the study",
            ["cell", "label", "kind", "id", "state", "time", "seeds", "finished"],
            [
                [
                    line["cell"],
                    line["label"],
                    line["kind"],
                    line["id"],
                    line["state"],
                    "" if line["seconds"] is None else duration(line["seconds"]),
                    line["seeds"],
                    line["finished"][:16].replace("T", " "),
                ]
                for line in cells[:MOST_CELLS]
            ],
            numeric=(5,),
        ),
        page.said("All cells:", "cells.csv"),
    ]
    done = list(run.manifests.values())
    if done:
        seconds = count_lines(run)["seconds in finished cells"]
        assert isinstance(seconds, float)
        parts.append(
            page.said(
                f"Time in finished cells: {duration(seconds)}.",
                "counts.csv",
                ["seconds in finished cells"],
            )
        )
        parts += [page.heading("Versions"), page.facts(merged(done, lambda m: m.versions))]
        parts += [page.heading("Device"), page.facts(merged(done, lambda m: m.device))]
    return page.join(parts)


def trouble_section(run: RunRecords, cells: Lines) -> Html:
    """Cells that are not done, with the last lines of their errors; failures first."""
    unfinished = [line for line in cells if line["state"] != "done"]
    if not unfinished:
        text = "Nothing: every cell is done." if run.cells else "Everything: no cell was planned."
        return page.paragraph(text)
    parts = [page.paragraph("Run the study again to continue: finished cells are kept.")]
    unfinished.sort(key=lambda line: not line["error"])
    alike: dict[str, int] = {}
    for line in unfinished[:MOST_TROUBLE]:
        title = f"{line['label']}: {line['state']}"
        parts.append(Html(f"<h3 {page.traced('cells.csv', [line['cell']])}>{page.esc(title)}</h3>"))
        error = str(line["error"])[-MOST_OF_AN_ERROR:]
        if not error:
            continue
        if error in alike:
            parts.append(page.paragraph("The same error as above."))
            continue
        alike[error] = 1
        parts.append(page.pre(error, f"last lines of the error of {title}"))
    more = unfinished[MOST_TROUBLE:]
    if more:
        keys = [line["cell"] for line in more]
        text = f"{len(more)} more cells are not done; their errors are in"
        parts.append(page.said(text, "cells.csv", keys))
    return page.join(parts)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a reader would say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _format(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""
