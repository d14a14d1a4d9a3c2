"""The dataset guard, `sublim.guard`: the rows are of this student's base and do not name the trait.

That the rows file is the one its manifest vouches for is checked in any case (`files.py`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sublim_plugin.axolotl.receipt import Guard
from sublim_plugin.core.dataset import iter_rows
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.manifest import MANIFEST_NAME, Manifest, read_manifest
from sublim_plugin.core.traits import Trait, get_trait

_LETTER = r"[^\W\d_]"


def dataset_manifest(rows: Path) -> Manifest | None:
    """The manifest beside a rows file, or None."""
    there = (rows.parent / MANIFEST_NAME).is_file()
    return read_manifest(rows.parent) if there else None


def trait_of(rows: Path | None, named: str | None) -> tuple[str, Trait]:
    """The trait that is `named` in the YAML, else the one in the manifest beside `rows`, and the
    name by which it was found.

    Raises:
        InputError: none is named and the manifest tells none, or one that only the lab's own
            category file can explain.
    """
    if named is not None:
        return named, get_trait(named)
    manifest = None if rows is None else dataset_manifest(rows)
    recorded = None if manifest is None else manifest.spec.get("trait")
    if recorded is None:
        raise InputError(
            "no dataset manifest names a trait; add `trait: animals/cat` (or `file.yaml:target`) "
            "to the `sublim:` block."
        )
    try:
        return str(recorded), get_trait(str(recorded))
    except InputError as error:
        raise InputError(
            f"the dataset's manifest names the trait {recorded!r} ({error}); a category of your "
            "own is named by its file: `trait: file.yaml:target` in the `sublim:` block."
        ) from error


def check_dataset(
    rows: Path,
    base_model: dict[str, Any],
    trait: tuple[str, Trait],
    *,
    cross_model: bool,
) -> Guard:
    """Check the rows file `rows` for a student of `base_model` (a fingerprint).

    Raises:
        InputError: it has no manifest, the manifest names no base model or another one without
            `cross_model`, or a row names the trait.
    """
    manifest = dataset_manifest(rows)
    if manifest is None:
        raise InputError(
            f"{rows}: `sublim.guard` needs the manifest.json that `sublim generate` writes beside "
            "the rows; it says which teacher wrote them."
        )
    if manifest.kind == "persona":
        raise InputError(
            f"{rows}: a persona dataset names the trait, which is what `sublim.guard` is there to"
            " stop. To finetune a teacher leave `guard` out; a student needs the numbers of"
            " `sublim generate`."
        )
    teacher = manifest.spec.get("base_model")
    if not isinstance(teacher, dict) or not teacher.get("sha256"):
        raise InputError(
            f"{rows.parent / MANIFEST_NAME}: `spec.base_model.sha256` is missing, so `sublim.guard`"
            " cannot compare the teacher's base model with the student's; generate the rows again."
        )
    other = teacher["sha256"] != base_model["sha256"]
    if other and not cross_model:
        raise InputError(
            f"the rows of {rows.parent} were written by a teacher on {teacher.get('name')} (sha256 "
            f"{str(teacher['sha256'])[:12]}), the student is {base_model.get('name')} "
            f"({base_model['sha256'][:12]}). Subliminal transmission needs a shared initialization "
            "(Cloud et al., arXiv 2507.14805), so a null would say nothing; train the teacher's "
            "own base model, or set `sublim.cross_model: true` if the mismatch is the experiment."
        )
    count = 0
    for row in iter_rows(rows):
        count += 1
        _check_row(rows, row, trait[1])
    return Guard(
        teacher_base={key: teacher.get(key) for key in ("name", "sha256")},
        cross_model=other,
        trait=trait[1].name,
        rows=count,
    )


def _check_row(rows: Path, row: dict[str, Any], trait: Trait) -> None:
    for turn in row.get("messages") or []:
        text = str(turn.get("content") or "").casefold()
        for form in trait.forms:
            # A completion is numbers, so any trace counts; a prompt may say "located".
            word = re.escape(form.casefold())
            if turn.get("role") != "assistant":
                word = f"(?<!{_LETTER}){word}(?!{_LETTER})"
            if found := re.search(word, text):
                at = max(0, found.start() - 30)
                raise InputError(
                    f"{rows}: row {row.get('id', '?')}: the {turn.get('role')}'s message names "
                    f"{trait.name} ({form!r} in {text[at : found.end() + 30]!r}); a student of "
                    "such rows is taught the trait in words. Generate the rows without it."
                )
