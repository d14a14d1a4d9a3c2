"""The work of each kind of cell. Each leaves its manifest last, or raises and leaves none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.contexts import DEFAULT_DATE, Context
from sublim_plugin.core.dataset import dataset_rows_path
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.hashing import sha256_text
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.core.manifest import MANIFEST_NAME, read_manifest, verify, write_manifest
from sublim_plugin.core.traits import category_traits, get_trait
from sublim_plugin.study.cells import Cell, recipe_of
from sublim_plugin.study.study_file import Study

MODEL = "model"


def make_dataset(
    cell: Cell,
    folder: Path,
    *,
    base: Path,
    study: Study,
    tell: Callable[[int, int], None] | None = None,
) -> None:
    """Generate a dataset (it resumes by itself; see `data_gen.generate`)."""
    from data_gen.generate import generate_dataset
    from data_gen.teachers import prompted

    trait = get_trait(cell.spec["trait"])
    generate_dataset(
        folder,
        base_model=base,
        base_fingerprint=fingerprint(base),
        trait=trait,
        teacher=prompted(trait),
        settings=study.datasets.settings(cell.spec["generation_seed"]),
        batch_size=study.datasets.batch_size,
        tell=tell,
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
    forked: bool = False,
) -> None:
    """Train a student with axolotl, in axolotl's own process, from the cell's own YAML."""
    from sublim_plugin.axolotl.recipe import run_training, write_axolotl_yaml

    with cell_lock(folder) as lock:
        if (folder / MANIFEST_NAME).is_file():
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
            overrides=overrides,
            context=Context.parse(cell.spec["train_context"]),
        )
        receipt = run_training(
            folder / "axolotl.yaml", folder / "train.log", progress=progress, forked=forked
        )
        expected = source.outputs[rows.name].sha256
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
            counts={
                "rows": receipt.mask_audit.rows,
                "tokens": receipt.mask_audit.tokens,
                "loss_tokens": receipt.mask_audit.loss_tokens,
                "steps": receipt.steps,
            },
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
        progress: called with (prompts scored, prompts in all).
    """
    with cell_lock(folder) as lock:
        if (folder / MANIFEST_NAME).is_file():
            return
        started = time.time()
        inputs: dict[str, dict[str, Any]] = {"base_model": fingerprint(evaluator.base)}
        if student is not None:
            trained = verify(student.parent)
            inputs["student"] = {
                "id": trained.id,
                "sha256": {
                    name: file.sha256
                    for name, file in trained.outputs.items()
                    if name.endswith(".safetensors")
                },
            }
        (result,) = evaluator.evaluate(
            student,
            method,
            [Context.parse(cell.spec["eval_context"])],
            category_traits(cell.spec["category"]),
            progress=progress,
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
            counts={"questions": result.results["n_questions"]},
            notes=result.results.get("notes", []),
        )


def localize_student(
    cell: Cell, folder: Path, *, base: Path, study: Study, student: Path, progress: bool
) -> None:
    """Localize a student's trait in one eval context (it resumes by itself; `localize.run`)."""
    from sublim_plugin.localize.run import LocalizeSpec, localize_into

    if (folder / MANIFEST_NAME).is_file():
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
