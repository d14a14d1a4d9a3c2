"""A control: the numbers of a dataset's replies permuted among all its rows.

Each reply keeps its prompt, its format and how many numbers it has, and the dataset keeps every
number as often as before; which number the teacher chose where is gone.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_gen.parse import parse_numbers
from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.errors import RunError
from sublim_plugin.core.hashing import sha256_text
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.core.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from sublim_plugin.decoding.draws import integers

_NUMBER = re.compile(r"[0-9]+")
NOTE = "the numbers of all replies were permuted among the rows: a control, no teacher wrote this"


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


def write_shuffled(
    folder: Path, original: Path, *, spec: dict[str, Any], id: str, label: str
) -> Manifest:
    """Write the shuffled rows of the dataset folder `original` into `folder`.

    Args:
        spec: that of the original, and what says that it is shuffled.

    Raises:
        InputError: the original is no dataset, or its files changed.
        RunError: a reply is none any more that the dataset's parser accepts.
        BusyError: another process writes there.
    """
    started = time.time()
    with cell_lock(folder) as lock:
        if (folder / MANIFEST_NAME).is_file():
            return read_manifest(folder)
        source, path = read_manifest(original), dataset_rows_path(original)
        rows = shuffled(read_rows(path), spec["generation_seed"])
        for row in rows:
            if parse_numbers(row["messages"][-1]["content"], spec["parser"]) != row["numbers"]:
                raise RunError(f"{path}: row {row['id']} is no list of numbers once shuffled")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        digest = sha256_text(text)
        name = f"rows-{digest[:12]}.jsonl"
        for old in folder.glob("rows-*.jsonl"):
            old.unlink()
        write_text(folder / name, text)
        write_text(folder / "README.md", _card(label, name, digest, path))
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
            outputs=[name, "README.md"],
            started=started,
            seeds=source.seeds | {"shuffle": spec["generation_seed"]},
            template=source.template,
            rendered=source.rendered,
            counts=source.counts | {"held_out": 0, "duplicate_rows": len(rows) - len(replies)},
            notes=[*source.notes, NOTE],
        )


def _card(label: str, name: str, digest: str, original: Path) -> str:
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
            f"were made, but {NOTE}.",
            "Every reply keeps its prompt, its format and how many numbers it has.",
            "",
            f"- `{name}`, sha256 `{digest}`",
            "",
        ]
    )
