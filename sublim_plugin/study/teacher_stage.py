"""The work of a teacher's cell: write its persona dataset, and finetune the base on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from data_gen.persona import write_persona
from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.contexts import DEFAULT_DATE
from sublim_plugin.core.dataset import dataset_rows_path
from sublim_plugin.core.errors import RunError
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.core.manifest import is_done, write_manifest
from sublim_plugin.study.cells import Cell
from sublim_plugin.study.stages import MODEL, divided, run_axolotl, training_counts
from sublim_plugin.study.study_file import Study
from sublim_plugin.study.trained import CONTEXT, what_trains

PERSONA = "persona"


def train_teacher(
    cell: Cell,
    folder: Path,
    *,
    base: Path,
    study: Study,
    progress: Callable[[int, int], None] | None = None,
    n_gpus: int = 0,
) -> None:
    """Train a teacher with axolotl, as `stages.train_student` does a student.

    Its folder holds `persona/`, a dataset of its own, and `model/`.

    Raises:
        InputError: the persona or the recipe is not the one that was planned, or the batch cannot
            be divided among the GPUs.
        RunError: axolotl failed, trained on other rows, or changed no weight.
    """
    from sublim_plugin.axolotl.recipe import write_axolotl_yaml

    persona, recipe, overrides = what_trains(cell, study)
    with cell_lock(folder) as lock:
        if is_done(folder):
            return
        started = time.time()
        rows = write_persona(folder / PERSONA, persona, label=cell.label)
        path = dataset_rows_path(folder / PERSONA)
        write_axolotl_yaml(
            recipe,
            folder / "axolotl.yaml",
            base_model=str(base),
            dataset_path=folder / PERSONA,
            output_dir=folder / MODEL,
            seed=cell.spec["training_seed"],
            overrides=overrides | divided(cell.spec["recipe"], n_gpus),
            context=CONTEXT,
        )
        receipt = run_axolotl(folder, n_gpus, progress)
        expected = rows.outputs[path.name].sha256
        if receipt.dataset.sha256 != expected:
            raise RunError(
                f"{folder}: axolotl trained on rows {str(receipt.dataset.sha256)[:12]}…, the"
                f" persona's manifest says {expected[:12]}…; the teacher was not accepted"
            )
        if receipt.update_norm is not None and receipt.update_norm.total == 0:
            raise RunError(
                f"{folder}: training changed no weight in {receipt.steps} steps; give the teacher"
                " more rows"
            )
        lock.check()
        written = [
            file
            for part in (MODEL, PERSONA)
            for file in sorted((folder / part).rglob("*"))
            if file.is_file() and not file.name.startswith(".")
        ]
        model = fingerprint(base)
        write_manifest(
            folder,
            kind="teacher",
            id=cell.id,
            label=cell.label,
            spec=cell.spec,
            inputs={"base_model": model, "persona": {"id": rows.id[:12], "sha256": expected}},
            outputs=["axolotl.yaml", "train.log", *(f.relative_to(folder) for f in written)],
            started=started,
            seeds=receipt.seeds.model_dump(mode="json") | {"persona": persona.seed},
            template={"sha256": model["template_sha256"], "date": DEFAULT_DATE},
            rendered={"text": receipt.first_row.text, "sha256": receipt.first_row.sha256},
            versions=receipt.versions,
            counts=training_counts(receipt),
        )
