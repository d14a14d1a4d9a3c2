"""The signals of a study's datasets: which cells they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sublim_plugin.study.arrays import CHUNKS, lay_out
from sublim_plugin.study.cells import Cell, plan
from sublim_plugin.study.cost import costs
from sublim_plugin.study.state import cell_state
from sublim_plugin.study.study_file import Study
from tests.study.test_grid import BASE, cells_of, labels, small
from tests.study.test_trained import TRAINED

OWL = ["animals/cat", "animals/owl", "neutral"]


def of_signals(cells: list[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.kind == "signal"]


def with_controls(other: Path) -> dict[str, Any]:
    """Two traits, trained teachers, one of them of another base model, and a shuffled control."""
    value = small(
        datasets__traits=OWL,
        datasets__teachers=[
            "prompted",
            TRAINED | {"traits": ["animals/cat"]},
            TRAINED | {"name": "elsewhere", "base_model": str(other), "traits": ["animals/cat"]},
        ],
        training__contexts=["template_default", "empty"],
    )
    shuffled = {"traits": ["animals/cat"], "lora_ranks": [8], "shuffled": True}
    value["students"] = [{"traits": OWL, "lora_ranks": [8]}, shuffled]
    return value


def test_they_are_cells_of_datasets_whose_teacher_is_at_hand(
    tokenizer: Any, tmp_path: Path
) -> None:
    from tests.axolotl_plugin.toy import save_base

    value = with_controls(save_base(tmp_path / "other", tokenizer))
    before = cells_of(value)
    study = Study.model_validate(value | {"signals": {"rows": 32}})
    cells = plan(study, BASE)
    found = of_signals(cells)
    assert cells == [*before, *found]  # last, and nothing else is another cell
    assert [cell.label for cell in found] == [
        "cat g1", "cat g1 in empty", "owl g1", "owl g1 in empty",
        "cat g1 trained", "cat g1 trained in empty",
    ]  # fmt: skip
    assert {"cat g1 shuffled", "cat g1 trained of other", "neutral g1"} < {
        *labels(cells, "dataset")
    }
    by_id = {cell.id: cell for cell in cells}
    for cell in found:
        (need,) = cell.needs
        dataset = by_id[need]
        assert cell.label.removesuffix(" in empty") == dataset.label
        spec = dict(cell.spec)
        assert len(spec.pop("questions_sha256")) == 64
        assert spec == {
            "base_model": {"name": "base", "sha256": "0" * 64},
            "dataset": dataset.id,
            "trait": dataset.spec["trait"],
            "generation_seed": 1,
            "train_context": {"kind": "empty" if "empty" in cell.label else "template_default"},
            "rows": 32,
            "limit": 8,
        }
    owl = of_signals(cells_of(value | {"signals": {"rows": 32, "traits": ["animals/owl"]}}))
    assert owl == found[2:4]
    more = of_signals(cells_of(value | {"signals": {"rows": 32, "limit": 9}}))
    assert not {cell.id for cell in more} & {cell.id for cell in found}
    blocks = lay_out(cells, {cell.id for cell in found}, chunks=CHUNKS, longest=99)
    assert [(b.work, [len(task) for task in b.tasks]) for b in blocks] == [
        ("signal", [4]),
        ("signal", [2]),  # of the trained teacher, one depth below
    ]
    states = [cell_state(cell, tmp_path) for cell in cells]
    (line,) = (line for line in costs(study, states).lines if line.kind == "signal")
    assert (line.cells, line.figure) == (6, "stated")
    # 16 rows are there of the 32: a quarter of the figure's 64
    assert line.hours == pytest.approx((6 * 1.2 / 4 / 60, 6 * 3.5 / 4 / 60))


def test_include_and_exclude_know_their_axes() -> None:
    value = small(
        datasets__traits=OWL,
        datasets__generation_seeds=[1, 2],
        datasets__teachers=["prompted", TRAINED | {"traits": ["animals/cat"]}],
        training__contexts=["template_default", "empty"],
    ) | {"signals": {}}
    value["students"] = [{"traits": OWL, "lora_ranks": [2, 8]}]

    def left(**changes: Any) -> list[str]:
        return [cell.label for cell in of_signals(cells_of(value | changes))]

    assert len(left()) == 12
    assert left(include=[{"rank": 2}]) == left()  # they have no rank
    assert left(include=[{"trait": "animals/owl", "train_context": "empty"}]) == [
        "owl g1 in empty",
        "owl g2 in empty",
    ]
    assert left(exclude=[{"teacher": "prompted"}, {"generation_seed": 2}]) == [
        "cat g1 trained",
        "cat g1 trained in empty",
    ]


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ({"traits": ["neutral"]}, "signals.traits: 'neutral' is no trait with a target"),
        ({"traits": ["animals/owl"]}, "signals.traits: 'animals/owl' is no trait"),
        ({"rows": 0}, "greater than or equal to 1"),
        ({"row": 4}, "Extra inputs"),
    ],
)
def test_what_does_not_fit_is_told(signals: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Study.model_validate(small() | {"signals": signals})
