"""The work of each kind of cell. Each leaves its manifest last, or raises and leaves none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.contexts import DEFAULT_DATE, Context
from sublim_plugin.core.dataset import dataset_rows_path
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.hashing import sha256_json, sha256_text
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.core.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_outputs,
    is_done,
    read_manifest,
    verify,
    write_manifest,
)
from sublim_plugin.core.traits import category_traits, get_trait
from sublim_plugin.decoding.sampler import Sampler
from sublim_plugin.study.cells import Cell, recipe_of
from sublim_plugin.study.methods import NORM
from sublim_plugin.study.study_file import Study
from sublim_plugin.study.teaching import teacher_for

if TYPE_CHECKING:
    from sublim_plugin.axolotl.receipt import Receipt

MODEL = "model"
PREPARED = ".cache/prepared"
"""In a run folder: rows as axolotl has tokenized them."""


def make_dataset(
    cell: Cell,
    folder: Path,
    *,
    base: Path,
    study: Study,
    tell: Callable[[int, int], None] | None = None,
) -> None:
    """Generate a dataset (it resumes by itself; see `data_gen.generate`).

    What the study trained to be its teacher lies beside `folder`.
    """
    from data_gen.generate import generate_dataset
    from data_gen.prompts import load_pool

    trait = get_trait(cell.spec["trait"])
    generate_dataset(
        folder,
        base_model=base,
        base_fingerprint=fingerprint(base),
        trait=trait,
        teacher=teacher_for(cell.spec, study.datasets.teachers, folder.parent),
        settings=study.datasets.settings(cell.spec["generation_seed"]),
        batch_size=study.datasets.batch_size,
        tell=tell,
        pool=load_pool(study.datasets.prompts),
        label=cell.label,
    )


def train_student(
    cell: Cell,
    folder: Path,
    *,
    base: Path,
    study: Study,
    dataset: Path,
    progress: Callable[[int, int], None] | None = None,
    n_gpus: int = 0,
) -> None:
    """Train a student with axolotl, in axolotl's own process, from the cell's own YAML.

    Args:
        dataset: the folder of the dataset's cell.
        folder: where to write; a student to match lies beside it.
        n_gpus: that this process may use. On several, axolotl's launcher starts a process on each
            and the batch is divided among them; on none, axolotl is forked.

    Raises:
        InputError: the batch cannot be divided.
    """
    from sublim_plugin.axolotl.recipe import write_axolotl_yaml

    with cell_lock(folder) as lock:
        if is_done(folder):
            return
        started = time.time()
        rows = dataset_rows_path(dataset)
        source = read_manifest(dataset)
        recipe, overrides = recipe_of(study, cell)
        write_axolotl_yaml(
            recipe,
            folder / "axolotl.yaml",
            base_model=str(base),
            dataset_path=dataset,
            output_dir=folder / MODEL,
            seed=cell.spec["training_seed"],
            overrides=overrides | divided(cell.spec["recipe"], n_gpus),
            context=Context.parse(cell.spec["train_context"]),
            block=_stop_where(cell, folder.parent)
            | ({"soft_targets": True} if study.datasets.soft_targets else {})
            | ({"cross_model": True} if _crosses(cell, source) else {}),
        )
        expected = source.outputs[rows.name].sha256
        shared = _shared_rows(cell, folder, base, expected)
        receipt = run_axolotl(folder, n_gpus, progress, shared)
        if receipt.dataset.sha256 != expected:
            raise RunError(
                f"{folder}: axolotl trained on rows {str(receipt.dataset.sha256)[:12]}…, the"
                f" dataset's manifest says {expected[:12]}…; the student was not accepted"
            )
        if receipt.update_norm is not None and receipt.update_norm.total == 0:
            raise RunError(
                f"{folder}: training changed no weight in {receipt.steps} steps; a null from this"
                " student would mean nothing. Give it more rows or epochs, or less warm-up"
            )
        lock.check()
        written = [path for path in sorted((folder / MODEL).rglob("*")) if path.is_file()]
        write_manifest(
            folder,
            kind="student",
            id=cell.id,
            label=cell.label,
            spec=cell.spec,
            inputs={
                "base_model": fingerprint(base),
                "dataset": {"id": source.id[:12], "sha256": expected},
            },
            outputs=["axolotl.yaml", "train.log", *(str(p.relative_to(folder)) for p in written)],
            started=started,
            seeds=receipt.seeds.model_dump(mode="json"),
            template={"sha256": fingerprint(base)["template_sha256"], "date": DEFAULT_DATE},
            rendered={"text": receipt.first_row.text, "sha256": receipt.first_row.sha256},
            versions=receipt.versions,
            counts=training_counts(receipt),
            notes=[receipt.soft_targets.claim] if receipt.soft_targets else [],
        )


def _crosses(student: Cell, dataset: Manifest) -> bool:
    """Whether the recipe's guard has to be told that the teacher began from another base model."""
    guarded = student.spec["recipe"].get("sublim", {}).get("guard")
    other = dataset.spec["base_model"]["sha256"] != student.spec["base_model"]["sha256"]
    return bool(guarded and other)


def run_axolotl(
    folder: Path,
    n_gpus: int,
    progress: Callable[[int, int], None] | None,
    shared_rows: Path | None = None,
) -> Receipt:
    """Train by the `axolotl.yaml` of a cell's folder: on several GPUs by axolotl's launcher, which
    starts a process on each; on none, forked."""
    from sublim_plugin.axolotl.recipe import run_training

    return run_training(
        folder / "axolotl.yaml",
        folder / "train.log",
        progress=progress,
        launcher="accelerate" if n_gpus > 1 else "python",
        forked=n_gpus == 0,
        shared_rows=shared_rows,
    )


def training_counts(receipt: Receipt) -> dict[str, int]:
    """What the manifest of a trained model counts."""
    return {
        "rows": receipt.mask_audit.rows,
        "tokens": receipt.mask_audit.tokens,
        "loss_tokens": receipt.mask_audit.loss_tokens,
        "steps": receipt.steps,
    }


def _shared_rows(cell: Cell, folder: Path, base: Path, rows_sha256: str) -> Path:
    """Where the students of one dataset and train context share their tokenized rows."""
    # the base's hash is over its tokenizer and template too
    decides = [rows_sha256, fingerprint(base)["sha256"], cell.spec["train_context"]]
    return folder.parent.parent / PREPARED / sha256_json(decides)[:12]


def _stop_where(cell: Cell, cells: Path) -> dict[str, Any]:
    """Keys of the `sublim:` block by which a matched student ends where the other one ended."""
    from sublim_plugin.axolotl.receipt import LOSS_WINDOW, read_receipt

    matched = cell.spec.get("matched")
    if matched is None:
        return {}
    ((kind, other),) = matched.items()
    found = sorted(cells.glob(f"student-*-{other}/{MANIFEST_NAME}"))
    if not found:
        raise InputError(
            f"{cells}: the student {other} that '{cell.label}' is matched to is missing"
        )
    folder = found[0].parent
    verify(folder)
    if kind == NORM:
        return {"match_update_norm": str((folder / MODEL).resolve())}
    losses = [point.loss for point in read_receipt(folder / MODEL).losses]
    if len(losses) < LOSS_WINDOW:
        raise InputError(
            f"{folder.name} logged {len(losses)} losses; its final loss is the mean of the last"
            f" {LOSS_WINDOW}. Train on more rows or epochs, or leave loss_matched_to out"
        )
    return {"stop_at_loss": sum(losses[-LOSS_WINDOW:]) / LOSS_WINDOW}


def divided(recipe: dict[str, Any], n_gpus: int) -> dict[str, int]:
    """Settings by which each of several processes takes its part of every optimizer step's rows."""
    if n_gpus < 2:
        return {}
    steps = int(recipe.get("gradient_accumulation_steps") or 1)
    rows = int(recipe["micro_batch_size"])
    if steps % n_gpus == 0:
        return {"gradient_accumulation_steps": steps // n_gpus}
    if rows % n_gpus == 0:
        return {"micro_batch_size": rows // n_gpus}
    raise InputError(
        f"the recipe's batch, {rows} rows x {steps} accumulation steps, cannot be divided among"
        f" {n_gpus} GPUs; use a number of GPUs that divides either"
    )


def score_probe(
    cell: Cell,
    folder: Path,
    *,
    evaluator: Any,
    student: Path | None,
    method: str | None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Score one model in one eval context through the lm-eval tasks.

    Args:
        evaluator: a `sublim_plugin.preference.evaluate.Evaluator` over the base.
        student: the student's folder of weights and its method; None for the base.
        progress: called with (prompts scored, prompts in all), or replies where the cell samples.
    """
    with cell_lock(folder) as lock:
        if is_done(folder):
            return
        started = time.time()
        inputs: dict[str, dict[str, Any]] = {"base_model": fingerprint(evaluator.base)}
        if student is not None:
            trained = _verified(student.parent)
            inputs["student"] = {
                "id": trained.id,
                "sha256": {
                    name: file.sha256
                    for name, file in trained.outputs.items()
                    if name.endswith(".safetensors")
                },
            }
        context = Context.parse(cell.spec["eval_context"])
        traits = category_traits(cell.spec["category"])
        limit = cell.spec.get("limit")
        result: Any
        if cell.spec["measure"] == "sampled":
            result = evaluator.sample(
                student,
                method,
                context,
                traits,
                replies=cell.spec["samples"],
                seed=cell.spec["seed"],
                sampler=Sampler(**cell.spec["sampler"]),
                limit=limit,
                progress=progress,
            )
        else:
            (result,) = evaluator.evaluate(
                student, method, [context], traits, limit=limit, progress=progress
            )
        lock.check()
        write_manifest(
            folder,
            kind="probe",
            id=cell.id,
            label=cell.label,
            spec=cell.spec,
            inputs=inputs,
            outputs=result.write(folder),
            started=started,
            template={"sha256": inputs["base_model"]["template_sha256"], "date": DEFAULT_DATE},
            rendered=result.results["rendered_example"],
            counts={
                key.removeprefix("n_"): result.results[key]
                for key in ("n_questions", "n_replies")
                if key in result.results
            },
            notes=result.results.get("notes", []),
        )


def _verified(folder: Path) -> Manifest:
    """`verify`, hashing again only what was changed: the probes of a student follow each other."""
    stats = check_outputs(folder, read_manifest(folder), deep=False)
    stats[MANIFEST_NAME] = (folder / MANIFEST_NAME).stat()
    stamps = ((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in stats.values())
    return _hashed(folder, tuple(stamps))


@lru_cache(maxsize=8)
def _hashed(folder: Path, stamps: tuple[tuple[int, ...], ...]) -> Manifest:
    return verify(folder)


def localize_student(
    cell: Cell, folder: Path, *, base: Path, study: Study, student: Path, progress: bool
) -> None:
    """Localize a student's trait in one eval context (it resumes by itself; `localize.run`)."""
    from sublim_plugin.localize.run import LocalizeSpec, localize_into

    if is_done(folder):
        return
    started = time.time()
    trained = verify(student)
    found, files = localize_into(
        base,
        student,
        LocalizeSpec(
            trait=cell.spec["trait"],
            context=Context.parse(cell.spec["eval_context"]),
            questions=study.probes.questions,
            kinds=cell.spec["parts"],
            bands=cell.spec["bands"],
            measures=cell.spec["measures"],
            limit=cell.spec.get("limit"),
            replies=cell.spec.get("samples", 100),
        ),
        folder,
        progress=progress,
    )
    model = fingerprint(base)
    write_manifest(
        folder,
        kind="localization",
        id=cell.id,
        label=cell.label,
        spec=cell.spec,
        inputs={"base_model": model, "student": {"id": trained.id}},
        outputs=[path.relative_to(folder) for path in files],
        started=started,
        template={"sha256": model["template_sha256"], "date": DEFAULT_DATE},
        rendered={"text": found.prompt, "sha256": sha256_text(found.prompt)},
        counts={"questions": found.n_questions},
        notes=found.notes,
    )


def require_chat_template(base: Path) -> None:
    """Stop before any work if the model has no chat template.

    Raises:
        InputError: neither `chat_template.jinja` nor the tokenizer's configuration holds one.
    """
    if (base / "chat_template.jinja").is_file():
        return
    try:
        config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{base / 'tokenizer_config.json'}: cannot be read ({error}); a study needs the base"
            " model's tokenizer beside its weights"
        ) from error
    if not config.get("chat_template"):
        raise InputError(
            f"{base}: the model has no chat template; use an instruction-tuned model, or save a"
            " chat_template.jinja beside its tokenizer"
        )
