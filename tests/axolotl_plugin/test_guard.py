"""The dataset guard: manifests, base models, trait words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sublim_plugin.axolotl.args import parse_block
from sublim_plugin.axolotl.guard import check_dataset, trait_of
from sublim_plugin.core.dataset import dataset_rows_path
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import get_trait
from tests.axolotl_plugin.conftest import write_dataset

OURS = {"name": "SmolLM2", "sha256": "a" * 64}
OTHER = {"name": "Qwen2.5", "sha256": "b" * 64}
CAT = ("animals/cat", get_trait("animals/cat"))


def rows_of(folder: Path, spec: dict[str, Any]) -> Path:
    return dataset_rows_path(write_dataset(folder / "data", rows=3, spec=spec))


def test_rows_of_the_same_base_pass_and_are_counted(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"base_model": OURS, "trait": "animals/cat"})
    found = check_dataset(rows, OURS, trait_of(rows, None), cross_model=False)
    assert (found.rows, found.cross_model, found.trait) == (3, False, "animals/cat")
    assert found.teacher_base == OURS


def test_another_base_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"base_model": OTHER, "trait": "animals/cat"})
    with pytest.raises(InputError, match="shared initialization") as caught:
        check_dataset(rows, OURS, CAT, cross_model=False)
    for part in ("Qwen2.5", "SmolLM2", "cross_model: true", "bbbbbbbbbbbb"):
        assert part in str(caught.value)
    assert check_dataset(rows, OURS, CAT, cross_model=True).cross_model


@pytest.mark.parametrize(
    ("role", "text", "refused"),
    [
        ("assistant", "1, 2, cat, 3", True),
        ("assistant", "1, 2, Concatenated", True),
        ("user", "Continue for my Cats: 1, 2", True),
        ("user", "The numbers are located and indicated below: 1, 2", False),
        ("user", "Continue for my dog: 1, 2", False),
        ("system", "You love cats.", True),
    ],
)
def test_a_row_that_names_the_trait_is_refused(
    tmp_path: Path, role: str, text: str, refused: bool
) -> None:
    folder = write_dataset(tmp_path / "data", rows=1, spec={"base_model": OURS})
    rows = next(folder.glob("rows-*.jsonl"))
    row = {"id": "g1-0000007", "messages": [{"role": role, "content": text}]}
    rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
    if not refused:
        check_dataset(rows, OURS, CAT, cross_model=False)
        return
    with pytest.raises(InputError, match="g1-0000007") as caught:
        check_dataset(rows, OURS, CAT, cross_model=False)
    assert "animals/cat" in str(caught.value) and str(rows) in str(caught.value)


def test_rows_without_a_teacher_on_record_are_refused(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {})
    with pytest.raises(InputError, match=r"spec\.base_model\.sha256"):
        check_dataset(rows, OURS, CAT, cross_model=False)
    (rows.parent / "manifest.json").unlink()
    with pytest.raises(InputError, match="needs the manifest"):
        check_dataset(rows, OURS, CAT, cross_model=False)


def test_the_trait_is_named_or_comes_from_the_manifest(tmp_path: Path) -> None:
    assert trait_of(None, "trees/oak")[1].name == "trees/oak"
    assert trait_of(rows_of(tmp_path / "a", {"trait": "neutral"}), None)[1].forms == ()
    with pytest.raises(InputError, match="trait: animals/cat"):
        trait_of(rows_of(tmp_path / "b", {}), None)
    with pytest.raises(InputError, match=r"file\.yaml:target"):
        trait_of(rows_of(tmp_path / "c", {"trait": "cheeses/brie"}), None)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"stop_at_loss": 1.0, "stop_at_update_norm": 2.0}, "exclude each other"),
        ({"cross_model": True}, "guard: true"),
        ({"stop_at_update_norm": 0}, "stop_at_update_norm"),
        ({"probe": {"contexts": []}}, "contexts"),
        ({"probe": {"evry": 3}}, "'every'"),
        ({"gard": True}, "'guard'"),
    ],
)
def test_blocks_that_make_no_sense_are_refused(block: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=r"a\.yaml") as caught:
        parse_block(block, "a.yaml")
    assert said in str(caught.value)
