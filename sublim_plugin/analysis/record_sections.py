"""Sections of the report that show what was run: training, data, prompts, cells, failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from sublim_plugin.analysis import page
from sublim_plugin.analysis.collect import RunRecords, error_text, in_order, student_names
from sublim_plugin.analysis.figures import FigureFiles
from sublim_plugin.analysis.methods import CONSTRAINED
from sublim_plugin.analysis.page import Html
from sublim_plugin.core.dataset import dataset_rows_path, iter_rows
from sublim_plugin.core.manifest import Manifest

SAMPLE_ROWS = 6


def training_section(run: RunRecords, files: FigureFiles | None) -> Html:
    """Loss curves, and what each student's receipt says of data, mask and update."""
    if not run.students:
        return page.paragraph("No student has been trained.")
    parts = []
    if files is not None:
        parts.append(
            page.figure(
                files, "Training loss as logged in each student's receipt. Dotted: neutral."
            )
        )
    names = student_names(run)
    modules = list(
        dict.fromkeys(
            name
            for student in run.students
            for name in student.receipt.update_norm.get("by_module", {})
        )
    )
    parts.append(
        page.table(
            "Students: data, loss mask and size of the update (Frobenius norm of the change in "
            "weights, total and by module kind)",
            ["student", "rows", "steps", "tokens with loss", "last loss", "‖ΔW‖", *modules],
            [
                [
                    names[student.id],
                    student.receipt.dataset.get("rows"),
                    student.receipt.steps,
                    _format(student.receipt.mask_audit.get("loss_share"), ".1%"),
                    _format(student.receipt.losses[-1].loss, ".4f")
                    if student.receipt.losses
                    else "",
                    _format(student.receipt.update_norm.get("total"), ".3g"),
                    *[
                        _format(student.receipt.update_norm.get("by_module", {}).get(name), ".3g")
                        for name in modules
                    ],
                ]
                for student in in_order(run.students)
            ],
            numeric=tuple(range(1, 6 + len(modules))),
        )
    )
    return page.join(parts)


def numbers_section(run: RunRecords) -> Html:
    """Counts and first rows of each dataset."""
    if not run.datasets:
        return page.paragraph("No dataset has been written.")
    parts: list[Html] = []
    for dataset in run.datasets:
        counts = dataset.manifest.counts
        spec = dataset.spec
        parts.append(page.heading(f"{spec.trait}, generation seed {spec.generation_seed}"))
        if spec.constrain == "numbers":
            parts.append(page.notice(CONSTRAINED))
        asked, accepted = counts.get("asked"), counts.get("accepted")
        facts: list[tuple[str, object]] = [
            ("asked", asked),
            ("accepted", accepted),
            ("keep rate", f"{accepted / asked:.1%}" if asked and accepted is not None else ""),
            ("rejected", counts.get("rejected")),
            (
                "reasons",
                ", ".join(f"{reason} {n}" for reason, n in counts.get("reasons", {}).items())
                or "none",
            ),
            ("distinct prompts", counts.get("distinct_prompts")),
            ("duplicate rows", counts.get("duplicate_rows")),
            ("teacher's system prompt", spec.teacher.get("context", {}).get("text") or "none"),
        ]
        parts.append(page.facts(facts))
        rows = list(islice(iter_rows(dataset_rows_path(dataset.folder)), SAMPLE_ROWS))
        parts.append(
            page.table(
                f"First {len(rows)} of {accepted} rows",
                ["row", "user", "assistant (the teacher)"],
                [
                    [
                        row.get("id"),
                        page.reply(_said(row, "user")),
                        page.reply(_said(row, "assistant")),
                    ]
                    for row in rows
                ],
            )
        )
    return page.join(parts)


def prompts_section(run: RunRecords) -> Html:
    """One rendered prompt per base model and eval context."""
    examples: dict[tuple[str, str], str] = {}
    for probe in run.probes:
        text = probe.results.rendered_example.get("text")
        if isinstance(text, str):
            key = (probe.spec.base_model.name, probe.spec.eval_context.slug)
            examples.setdefault(key, text)
    if not examples:
        return page.paragraph("No prompt has been rendered.")
    several = len({model for model, _ in examples}) > 1
    parts = []
    for (model, context), text in examples.items():
        title = f"{context} ({model})" if several else context
        parts += [page.heading(title), page.pre(text, f"rendered prompt, eval context {title}")]
    return page.join(parts)


def cells_section(run: RunRecords) -> Html:
    """Every cell with its state and time; versions and devices."""
    if not run.cells:
        return page.paragraph("Nothing.")
    lines = []
    for cell in run.cells:
        manifest = run.manifests.get(cell.folder)
        lines.append(
            [
                cell.label or (manifest.label if manifest else "") or cell.folder.name,
                manifest.kind if manifest else "",
                manifest.id[:12] if manifest else "",
                cell.state,
                _duration(manifest.wall_s) if manifest else "",
                page.pairs(manifest.seeds) if manifest else "",
                manifest.finished[:16].replace("T", " ") if manifest else "",
            ]
        )
    done = list(run.manifests.values())
    parts = [
        page.table(
            "Cells of the study",
            ["cell", "kind", "id", "state", "time", "seeds", "finished"],
            lines,
            numeric=(4,),
        )
    ]
    if done:
        parts.append(
            page.paragraph(f"Time in finished cells: {_duration(sum(m.wall_s for m in done))}.")
        )
        parts += [page.heading("Versions"), page.facts(_merged(done, lambda m: m.versions))]
        parts += [page.heading("Device"), page.facts(_merged(done, lambda m: m.device))]
    return page.join(parts)


def trouble_section(run: RunRecords) -> Html:
    """Cells that are not done, with the last lines of their errors."""
    unfinished = [cell for cell in run.cells if cell.state != "done"]
    if not unfinished:
        text = "Nothing: every cell is done." if run.cells else "Everything: no cell was planned."
        return page.paragraph(text)
    parts = [page.paragraph("Run the study again to continue: finished cells are kept.")]
    for cell in unfinished:
        parts.append(page.heading(f"{cell.label or cell.folder.name}: {cell.state}"))
        error = error_text(cell)
        if error:
            parts.append(page.pre(error, "last lines of the error"))
    return page.join(parts)


def _merged(
    manifests: Sequence[Manifest], field: Callable[[Manifest], dict[str, Any]]
) -> list[tuple[str, object]]:
    """Each key with its value, or with all values and their kinds of cell where they differ."""
    seen: dict[str, dict[str, set[str]]] = {}
    for manifest in manifests:
        for name, value in field(manifest).items():
            seen.setdefault(name, {}).setdefault(str(value), set()).add(manifest.kind)
    return [
        (
            name,
            next(iter(values))
            if len(values) == 1
            else "; ".join(f"{v} ({', '.join(sorted(kinds))})" for v, kinds in values.items()),
        )
        for name, values in sorted(seen.items())
    ]


def _said(row: dict[str, Any], role: str) -> str:
    return "\n".join(
        str(message.get("content", ""))
        for message in row.get("messages", [])
        if message.get("role") == role
    )


def _format(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
