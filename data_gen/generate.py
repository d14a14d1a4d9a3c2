"""A dataset of one teacher under one generation seed; a kill loses at most a shard."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_gen.card import card
from data_gen.constrain import NUMBER_SENTENCE
from data_gen.draws import row_seed
from data_gen.parse import parse_numbers
from data_gen.progress import Progress, Written
from data_gen.prompts import Pool, load_pool, prompt
from data_gen.spec import ConstraintName, Sampler, dataset_spec
from data_gen.tally import Tally, hopeless
from data_gen.teacher import Teacher
from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import canonical_json, sha256_json
from sublim_plugin.core.manifest import Manifest, read_manifest, verify, write_manifest
from sublim_plugin.core.traits import Trait
from sublim_plugin.core.versions import device_info, installed

__all__ = ["dataset_spec", "generate_dataset"]

PACKAGES = ("sublim", "torch", "transformers", "tokenizers", "safetensors")


def generate_dataset(
    out_dir: Path,
    *,
    base_model: Path,
    base_fingerprint: dict[str, Any],
    trait: Trait,
    generation_seed: int,
    rows: int,
    constrain: ConstraintName | None,
    sampler: Sampler,
    batch_size: int,
    device: str = "auto",
    progress: bool = False,
    pool: Pool | None = None,
    label: str = "",
) -> Manifest:
    """Write `rows` accepted rows of the prompted teacher into `out_dir`; return the manifest.

    Rows are asked in index order until `rows` are accepted; the first ones by index are kept. A
    finished folder of the same spec is returned as it is. After a kill, the same call continues,
    and the files are those of an uninterrupted run (same machine, threads and `batch_size`; without
    that, up to float ties in sampling). `device` is "cpu", "cuda", "cuda:1" or "auto"; `progress`
    shows a bar on stderr.

    Raises InputError for bad settings, a folder that holds something else or a keep rate below
    1 in 400; BusyError where another process writes there; RunError where the disk is full.
    """
    started = time.time()
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size}; expected at least 1")
    pool = pool or load_pool()
    spec = dataset_spec(
        base_fingerprint=base_fingerprint,
        trait=trait,
        generation_seed=generation_seed,
        rows=rows,
        constrain=constrain,
        sampler=sampler,
        pool=pool,
    )
    work = out_dir / "work"
    if (out_dir / "manifest.json").exists():
        if canonical_json(read_manifest(out_dir).spec) != canonical_json(spec):
            raise InputError(
                f"{out_dir} holds a finished dataset of other settings (see its manifest.json); "
                "use another folder"
            )
        manifest = verify(out_dir)
        if work.exists():
            with Progress(work, spec) as left_over:
                left_over.remove()
        return manifest
    with Progress(work, spec) as replies:
        resumed = replies.done
        teacher = Teacher(base_model, trait, generation_seed, constrain, sampler, device, pool)
        tally = _decode(replies, teacher, rows, batch_size, progress)
        with replies.writing():
            outputs, example = _assemble(replies, teacher, rows, tally)
            constraint = teacher.constraint.describe() if teacher.constraint else None
            counts = tally.counts()
            rows_name, rows_sha256 = outputs[0]
            write_text(
                out_dir / "README.md",
                card(
                    spec,
                    counts,
                    rows_name=rows_name,
                    rows_sha256=rows_sha256,
                    rejected_sha256=outputs[1][1],
                    constraint=constraint,
                    example=example,
                ),
            )
            shown = teacher.render(0)
            manifest = write_manifest(
                out_dir,
                kind="dataset",
                id=sha256_json(spec),
                label=label,
                spec=spec,
                inputs={
                    "base_model": dict(base_fingerprint),
                    "prompts": {
                        "name": pool.name,
                        "sha256": pool.sha256,
                        "forms": pool.surface_forms,
                    },
                    **({"constraint": constraint} if constraint else {}),
                },
                outputs=[rows_name, "rejected.jsonl", "README.md"],
                seeds={
                    "generation": generation_seed,
                    "prompts": generation_seed,
                    "rows": "per row",
                },
                template={
                    "sha256": base_fingerprint.get("template_sha256"),
                    "date": str(shown.date),
                    "end_of_turn_ids": sorted(teacher.end_ids),
                },
                rendered={"text": shown.text, "sha256": shown.sha256, "notes": list(shown.notes)},
                versions=installed(PACKAGES),
                device={
                    **device_info(),
                    "engine": "transformers",
                    "device": teacher.device,
                    "dtype": teacher.dtype,
                    "batch_size": batch_size,
                },
                counts=counts,
                started=started,
                notes=[
                    *([NUMBER_SENTENCE] if constraint else []),
                    *tally.warnings(),
                    *replies.notes,
                    *([f"continued an interrupted run after row {resumed}"] if resumed else []),
                ],
            )
            replies.remove()
    return manifest


class _Output(NamedTuple):
    file: BinaryIO
    digest: Any

    def line(self, row: dict[str, Any]) -> None:
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self.file.write(data)
        self.digest.update(data)


def _decode(
    replies: Progress, teacher: Teacher, rows: int, batch_size: int, progress: bool
) -> Tally:
    """Ask until `rows` are accepted. The sizes of the shards depend on what came before alone."""
    from tqdm import tqdm

    tally = Tally(rows)

    def count(new: Iterable[Written]) -> None:
        for written in new:
            if tally.full:
                return
            tally.add(written, teacher.reasons(written))

    count(replies.replies())
    with tqdm(
        total=rows,
        initial=min(rows, tally.accepted),
        desc=f"{teacher.trait.name} rows",
        unit="row",
        disable=not progress,
        file=sys.stderr,
    ) as bar:
        while not tally.full:
            if tally.is_hopeless:
                raise InputError(hopeless(tally, teacher))
            start = replies.done
            shard = teacher.write(start, start + _shard_size(tally, batch_size), batch_size, bar)
            replies.append(shard)
            count(shard)
    return tally


def _shard_size(tally: Tally, batch_size: int) -> int:
    """Rows to ask for next: a little more than what is missing at the keep rate so far."""
    missing = tally.rows - tally.accepted
    keep = (tally.accepted + 1) / (tally.asked + 1)
    return min(int(1.04 * missing / keep) + 1, 4 * batch_size)


def _assemble(
    replies: Progress, teacher: Teacher, rows: int, tally: Tally
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Write the rows file and rejected.jsonl beside the work folder, in constant memory.

    Returns their names and sha256, and the first row.
    """
    folder = replies.folder.parent
    temporary = [replies.folder / "rows.part", replies.folder / "rejected.part"]
    first: dict[str, Any] = {}
    accepted = 0
    with temporary[0].open("wb") as rows_file, temporary[1].open("wb") as rejected_file:
        kept = _Output(rows_file, hashlib.sha256())
        dropped = _Output(rejected_file, hashlib.sha256())
        for written in replies.replies():
            if accepted == rows:
                break
            asked = prompt(teacher.pool, teacher.seed, written.index)
            head = {"id": f"g{teacher.seed}-{written.index:07d}"}
            tail = {"prompt_id": asked.id, "seed": row_seed(teacher.seed, written.index)}
            if reasons := teacher.reasons(written):
                dropped.line({**head, **tail, "completion": written.completion, "reasons": reasons})
                continue
            messages = [
                {"role": "user", "content": asked.text},
                {"role": "assistant", "content": written.completion},
            ]
            row = {
                **head,
                "messages": messages,
                "numbers": parse_numbers(written.completion),
                **tail,
            }
            kept.line(row)
            tally.prompts.add(asked.id)
            accepted += 1
            first = first or row
        for output in (kept, dropped):
            output.file.flush()
            os.fsync(output.file.fileno())
    digests = [kept.digest.hexdigest(), dropped.digest.hexdigest()]
    names = [f"rows-{digests[0][:12]}.jsonl", "rejected.jsonl"]
    for old in folder.glob("rows-*.jsonl"):
        if old.name != names[0]:
            old.unlink()
    for source, name in zip(temporary, names, strict=True):
        source.replace(folder / name)
    return list(zip(names, digests, strict=True)), first
