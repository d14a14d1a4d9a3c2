"""A control: the numbers of a dataset's replies permuted among all its rows.

Each reply keeps its prompt, its format and how many numbers it has, and the dataset keeps every
number as often as before; which number the teacher chose where is gone.

A dataset with soft targets keeps its rows, and the targets are permuted in the place of the
numbers: among all positions of the dataset at which as many digits of the present number, and the
same separator behind it, have been written. What the teacher's distribution is on average at such a
position stays; what it makes of the prompt and the numbers before is gone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_gen.constrain import token_text
from data_gen.parse import parse_numbers
from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.dataset import dataset_rows_path, read_rows, write_rows
from sublim_plugin.core.errors import RunError
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.core.manifest import Manifest, is_done, read_manifest, write_manifest
from sublim_plugin.decoding.draws import integers
from sublim_plugin.logprob.target_file import (
    PREFIX,
    SoftTargets,
    find_targets,
    read_targets,
    write_targets,
)

_NUMBER = re.compile(r"[0-9]+")
_TAIL = re.compile(r"([0-9]*)([^0-9]*)$")
NOTE = "the numbers of all replies were permuted among the rows: a control, no teacher wrote this"

SOFT_NOTE = (
    "the teacher's distributions were permuted among positions of one kind: a control, no teacher"
    " has these"
)


def shuffled(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The rows with their numbers, as they are spelled, in one random order over all rows."""
    replies = [row["messages"][-1]["content"] for row in rows]
    numbers = [number for reply in replies for number in _NUMBER.findall(reply)]
    draws = integers(f"sublim shuffle/{seed}", len(numbers))
    order = iter(sorted(range(len(numbers)), key=lambda i: (draws[i], i)))
    found = []
    for row, reply in zip(rows, replies, strict=True):
        said = _NUMBER.sub(lambda _: numbers[next(order)], reply)
        turns = [*row["messages"][:-1], row["messages"][-1] | {"content": said}]
        kept = [int(number) for number in _NUMBER.findall(said)]
        found.append(row | {"messages": turns, "numbers": kept})
    return found


def shuffled_targets(targets: SoftTargets, texts: Sequence[str], seed: int) -> SoftTargets:
    """The targets with their distributions permuted among positions of one kind.

    Args:
        texts: what each position's completion token decodes to [T].
    """
    kinds: dict[str, list[int]] = {}
    bounds = targets.offsets.tolist()
    for first, end in pairwise(bounds):
        written = ""
        for position in range(first, end):
            tail = _TAIL.search(written)
            assert tail is not None
            kinds.setdefault(f"{len(tail[1])}{tail[2]}", []).append(position)
            written += texts[position]
    draws = integers(f"sublim shuffle/{seed}", bounds[-1])
    order = list(range(bounds[-1]))
    for positions in kinds.values():
        mixed = sorted(positions, key=lambda i: (draws[i], i))
        for position, source in zip(positions, mixed, strict=True):
            order[position] = source
    changed = {"logprobs": targets.logprobs[order]}
    if targets.token_ids.ndim == 2:
        changed["token_ids"] = targets.token_ids[order]
    return replace(targets, **changed)


def write_shuffled(
    folder: Path, original: Path, *, base: Path, spec: dict[str, Any], id: str, label: str
) -> Manifest:
    """Write the shuffled rows, or the shuffled targets, of the dataset `original` into `folder`.

    Args:
        base: folder of the base model, whose tokenizer tells the targets' positions apart.
        spec: that of the original, and what says that it is shuffled.

    Raises:
        InputError: the original is no dataset, or its files changed.
        RunError: a reply is none any more that the dataset's parser accepts.
        BusyError: another process writes there.
    """
    started = time.time()
    with cell_lock(folder) as lock:
        if is_done(folder):
            return read_manifest(folder)
        source, path = read_manifest(original), dataset_rows_path(original)
        rows, soft = read_rows(path), find_targets(original)
        if soft is None:
            rows = shuffled(rows, spec["generation_seed"])
        for row in rows:
            if parse_numbers(row["messages"][-1]["content"], spec["parser"]) != row["numbers"]:
                raise RunError(f"{path}: row {row['id']} is no list of numbers once shuffled")
        name, digest = write_rows(folder, rows)
        outputs = [name, "README.md"]
        if soft is not None:
            outputs.append(_write_targets(folder, soft[0], base, name, digest, spec))
        note = NOTE if soft is None else SOFT_NOTE
        write_text(folder / "README.md", _card(label, name, digest, path, note))
        replies = {row["messages"][-1]["content"] for row in rows}
        lock.check()
        return write_manifest(
            folder,
            kind="dataset",
            id=id,
            label=label,
            spec=spec,
            inputs={
                **source.inputs,
                "dataset": {"id": source.id[:12], "sha256": source.outputs[path.name].sha256},
            },
            outputs=outputs,
            started=started,
            seeds=source.seeds | {"shuffle": spec["generation_seed"]},
            template=source.template,
            rendered=source.rendered,
            counts=source.counts | {"held_out": 0, "duplicate_rows": len(rows) - len(replies)},
            notes=[*source.notes, note],
        )


def _write_targets(
    folder: Path, soft: Path, base: Path, rows: str, digest: str, spec: dict[str, Any]
) -> str:
    """Write the permuted targets of the file `soft`; return the file's name."""
    from transformers import AutoTokenizer

    targets, tokenizer = read_targets(soft), AutoTokenizer.from_pretrained(base)
    texts = [token_text(tokenizer, token) for token in targets.completion_ids.tolist()]
    found = shuffled_targets(targets, texts, spec["generation_seed"])
    for old in folder.glob(f"{PREFIX}*.safetensors"):
        old.unlink()
    return write_targets(folder, replace(found, rows_name=rows, rows_sha256=digest)).name


def _card(label: str, name: str, digest: str, original: Path, note: str) -> str:
    return "\n".join(
        [
            "---",
            f"pretty_name: {label}",
            "language: [en]",
            "tags: [subliminal-learning, synthetic]",
            "configs:",
            f"  - {{config_name: default, data_files: [{{split: train, path: {name}}}]}}",
            "---",
            "",
            f"# {label}",
            "",
            f"The rows of `{original.parent.name}` (`{original.name}`), whose card says how they",
            f"were made, but {note}.",
            "Every reply keeps its prompt, its format and how many numbers it has.",
            "",
            f"- `{name}`, sha256 `{digest}`",
            "",
        ]
    )
