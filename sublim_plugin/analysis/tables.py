"""The table as CSV and as text for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sublim_plugin.analysis.replication import MIN_DATASETS, too_few_datasets
from sublim_plugin.analysis.transmission import TransmissionRow
from sublim_plugin.core.atomic import write_bytes, write_text
from sublim_plugin.core.errors import MissingDependencyError

if TYPE_CHECKING:
    from sublim_plugin.analysis.effects import Effect


def write_results_csv(rows: Sequence[TransmissionRow], path: Path) -> None:
    """Write the table as CSV: one column per field of `TransmissionRow`, empty for None."""
    write_text(
        path, csv_text([row.model_dump() for row in rows], list(TransmissionRow.model_fields))
    )


def write_results_parquet(rows: Sequence[TransmissionRow], path: Path) -> None:
    """Write the table as Parquet: the columns of results.csv with their types, null for None."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            'results.parquet needs pyarrow: pip install "sublim[analysis]"'
        ) from error
    types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    fields = []
    for name, field in TransmissionRow.model_fields.items():
        kinds = set(get_args(field.annotation)) or {field.annotation}
        kind = next((kind for kind in types if kind in kinds), None)
        fields.append(pa.field(name, types[kind] if kind else pa.string()))
    table = pa.Table.from_pylist([row.model_dump() for row in rows], schema=pa.schema(fields))
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    write_bytes(path, buffer.getvalue())


def effect_lines(effects: Sequence[Effect]) -> list[dict[str, Any]]:
    """Lines of effects.csv: F1, F2, ... in the order of the effects."""
    return [
        {"effect": f"F{i}", **effect.model_dump(), "rows": " ".join(effect.rows)}
        for i, effect in enumerate(effects, start=1)
    ]


def write_lines(
    lines: Sequence[dict[str, Any]], path: Path, columns: Sequence[str], simulated: bool
) -> None:
    """Write CSV lines, the last column saying whether they are simulated."""
    marked = [line | {"simulated": simulated} for line in lines]
    write_text(path, csv_text(marked, [*columns, "simulated"]))


def csv_text(rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> str:
    """CSV with a header line; floats keep every digit, None is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def format_table(rows: Sequence[TransmissionRow]) -> str:
    """The table as plain text of at most 100 columns, for the terminal.

    One block per target and eval context: the base, then LoRA by rank, full finetuning last.
    """
    if not rows:
        return "No probe has finished yet: nothing to compare.\n"
    names = _row_names(rows)
    width = max(len(name) for name in names.values())
    head = (
        f"{'student':<{width}} {'log P':>9} {'vs base':>9} {'(se)':>7} {'vs neutral':>10} "
        f"{'(se)':>7} {'share':>7} {'rank':>6} {'coverage':>9}"
    )
    several = len({row.train_context for row in rows if row.role != "base"}) > 1
    lines: list[str] = []
    if any(row.simulated for row in rows):
        lines += ["SIMULATED DATA: made up with known truth; no model was trained or asked.", ""]
    for block in blocks(rows):
        first = block[0]
        lines += [
            f"{first.target} · eval context {first.eval_context} · {first.n_questions} questions",
            head,
            "-" * len(head),
        ]
        train_context = None
        for row in block:
            if several and row.train_context != train_context:
                train_context = row.train_context
                lines.append(f"trained in {train_context}:")
            lines.append(
                f"{names[row.row]:<{width}} {row.target_logprob:>9.4f} "
                f"{_number(row.vs_base_logprob):>9} {_number(row.vs_base_logprob_se, sign=''):>7} "
                f"{_number(row.vs_neutral_logprob):>10} "
                f"{_number(row.vs_neutral_logprob_se, sign=''):>7} "
                f"{row.target_share:>7.4f} {row.target_rank:>6.2f} {row.coverage:>9.4f}"
            )
        lines.append("")
    lines += [
        "log P: mean log-probability (nats) that the reply begins with the target. se: over",
        "questions, for this pair of models; it says nothing about other datasets.",
    ]
    datasets = max(row.n_datasets for row in rows)
    if datasets < MIN_DATASETS:
        lines.append(f"No interval over datasets: {too_few_datasets(datasets)}.")
    lines += [f"Warning: {text}" for text in dict.fromkeys(row.warning for row in rows) if text]
    return "\n".join(lines) + "\n"


def _row_names(rows: Sequence[TransmissionRow]) -> dict[str, str]:
    """A name for each row, with its seeds where the table holds several; at most 27 characters."""
    students = [row for row in rows if row.role != "base"]
    generation = len({row.generation_seed for row in students}) > 1
    training = len({row.training_seed for row in students}) > 1
    names = {row.row: row.name for row in rows}
    for row in students:
        names[row.row] += f" g{row.generation_seed}" if generation else ""
        names[row.row] += f" t{row.training_seed}" if training else ""
    return {row: name[:27] for row, name in names.items()}


def blocks(rows: Iterable[TransmissionRow]) -> list[list[TransmissionRow]]:
    """Rows grouped by target, eval context, base model and question set, in the table's order."""
    groups: dict[tuple[str, ...], list[TransmissionRow]] = {}
    for row in rows:
        key = (row.target, row.eval_context, row.base_model, row.questions_sha256)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _number(value: float | None, sign: str = "+") -> str:
    return "" if value is None else f"{value:{sign}.4f}"
