"""What was run, as lines of CSV files: cells, students, datasets, and counts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from sublim_plugin.analysis.collect import RunRecords, error_text, in_order, student_names
from sublim_plugin.core.manifest import Manifest

MOST_VALUES = 6
"""Different values of a setting that are spelled out."""

CELL_COLUMNS = ("cell", "kind", "id", "state", "seconds", "seeds", "finished", "label", "error")


def cell_lines(run: RunRecords) -> list[dict[str, Any]]:
    """Every cell of the grid: C1, C2, ... in the study's order. `seconds` is its wall time."""
    lines = []
    for number, cell in enumerate(run.cells, start=1):
        manifest = run.manifests.get(cell.folder)
        kind, _, _ = cell.folder.name.partition("-")
        lines.append(
            {
                "cell": f"C{number}",
                "kind": manifest.kind if manifest else kind,
                "id": manifest.id[:12] if manifest else "",
                "state": cell.state,
                "seconds": manifest.wall_s if manifest else None,
                "seeds": _pairs(manifest.seeds) if manifest else "",
                "finished": manifest.finished if manifest else "",
                "label": cell.label or (manifest.label if manifest else "") or cell.folder.name,
                "error": "" if cell.state == "done" else error_text(cell),
            }
        )
    return lines


def student_lines(run: RunRecords) -> tuple[list[dict[str, Any]], list[str]]:
    """Every student with its receipt, in the report's order, and the columns.

    Norms are Frobenius norms of the change in weights, `norm` in all and `norm_q_proj` and so on
    by kind of module.
    """
    names = student_names(run)
    modules = list(
        dict.fromkeys(
            name
            for student in run.students
            for name in student.receipt.update_norm.get("by_module") or {}
        )
    )
    columns = ["student", "name", "trait", "method", "rank", "alpha", "generation_seed"]
    columns += ["training_seed", "train_context", "learning_rate", "rows", "steps", "loss_share"]
    columns += ["last_loss", "norm", *(f"norm_{name}" for name in modules)]
    columns += ["dataset", "weights_sha256"]
    lines = []
    for student in in_order(run.students):
        spec, receipt = student.spec, student.receipt
        by_module = receipt.update_norm.get("by_module") or {}
        values = {
            "student": student.id,
            "name": names[student.id],
            "trait": spec.trait,
            "method": spec.method.name,
            "rank": spec.method.rank,
            "alpha": spec.method.alpha,
            "generation_seed": spec.generation_seed,
            "training_seed": spec.training_seed,
            "train_context": spec.train_context.slug,
            "learning_rate": spec.recipe.get("learning_rate"),
            "rows": receipt.dataset.get("rows"),
            "steps": receipt.steps,
            "loss_share": receipt.mask_audit.get("loss_share"),
            "last_loss": receipt.losses[-1].loss if receipt.losses else None,
            "norm": receipt.update_norm.get("total"),
            "dataset": spec.dataset[:12],
            "weights_sha256": receipt.weights_sha256,
        }
        lines.append(values | {f"norm_{name}": by_module.get(name) for name in modules})
    return lines, columns


DATASET_COLUMNS = (
    "dataset",
    "trait",
    "generation_seed",
    "constrain",
    "asked",
    "accepted",
    "keep_rate",
    "rejected",
    "reasons",
    "distinct_prompts",
    "duplicate_rows",
    "system_prompt",
    "rows_sha256",
)


def dataset_lines(run: RunRecords) -> list[dict[str, Any]]:
    """Every dataset with its counts and the hash of its rows' file."""
    lines = []
    for dataset in run.datasets:
        spec, counts = dataset.spec, dataset.manifest.counts
        asked, accepted = counts.get("asked"), counts.get("accepted")
        reasons = counts.get("reasons") or {}
        hashes = [
            file.sha256
            for name, file in dataset.manifest.outputs.items()
            if name.startswith("rows-")
        ]
        lines.append(
            {
                "dataset": dataset.id,
                "trait": spec.trait,
                "generation_seed": spec.generation_seed,
                "constrain": spec.constrain or "",
                "asked": asked,
                "accepted": accepted,
                "keep_rate": accepted / asked if asked and accepted is not None else None,
                "rejected": counts.get("rejected"),
                "reasons": ", ".join(f"{reason} {n}" for reason, n in reasons.items()),
                "distinct_prompts": counts.get("distinct_prompts"),
                "duplicate_rows": counts.get("duplicate_rows"),
                "system_prompt": spec.teacher.get("context", {}).get("text") or "",
                "rows_sha256": " ".join(hashes),
            }
        )
    return lines


SAMPLED_COLUMNS = ("sampled", "student", "name", "eval_context", "target", "target_rate",
                   "non_answer_rate", "self_name_rate", "distinct_replies", "warning")  # fmt: skip


def sampled_lines(run: RunRecords, targets: Sequence[str]) -> list[dict[str, Any]]:
    """Shares of sampled replies by model and target, with why a rate should not be read.

    A trait's students are listed for their own target; base and neutral students for every one.
    """
    from sublim_plugin.analysis.agreement import warnings_of

    names = student_names(run)
    traits = {student.id: student.spec.trait for student in run.students}
    lines: list[dict[str, Any]] = []
    for record in run.sampled:
        student = (record.spec.student or "")[:12]
        for target in targets:
            if traits.get(student, "neutral") not in (target, "neutral"):
                continue
            rates = record.rates(target)
            beside = {
                name: rates.get(name)
                for name in ("non_answer_rate", "self_name_rate", "distinct_replies")
            }
            lines.append(
                {
                    "sampled": f"S{len(lines) + 1}",
                    "student": student,
                    "name": names.get(student, "base"),
                    "eval_context": record.spec.eval_context.slug,
                    "target": target,
                    "target_rate": rates["target_rate"],
                    **beside,
                    "warning": "; ".join(warnings_of(**beside)),
                }
            )
    return lines


def count_lines(run: RunRecords) -> dict[str, object]:
    """How many cells there are in each state, how long they took, and when this was written."""
    states = Counter(cell.state for cell in run.cells)
    counts: dict[str, object] = {"cells": len(run.cells)}
    counts |= {f"cells {state}": number for state, number in sorted(states.items())}
    counts["cells not done"] = len(run.cells) - states["done"]
    counts["seconds in finished cells"] = round(sum(m.wall_s for m in run.manifests.values()), 3)
    counts["written"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return counts


def merged(
    manifests: Sequence[Manifest], field: Callable[[Manifest], dict[str, Any]]
) -> list[tuple[str, object]]:
    """Each key with its value, or with all values and their kinds of cell where they differ."""
    seen: dict[str, dict[str, set[str]]] = {}
    for manifest in manifests:
        for name, value in field(manifest).items():
            seen.setdefault(name, {}).setdefault(str(value), set()).add(manifest.kind)
    found: list[tuple[str, object]] = []
    for name, values in sorted(seen.items()):
        if len(values) == 1:
            found.append((name, next(iter(values))))
            continue
        texts = [f"{v} ({', '.join(sorted(kinds))})" for v, kinds in values.items()]
        more = len(texts) - MOST_VALUES
        after = [f"and {more} more"] if more > 0 else []
        found.append((name, "; ".join([*texts[:MOST_VALUES], *after])))
    return found


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
