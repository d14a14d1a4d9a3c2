"""`include` and `exclude`: partial matches over the axes of the grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import canonical_json
from sublim_plugin.core.strict_yaml import nearest
from sublim_plugin.study.methods import LOSS, NORM, Alpha, Rank, Rate, Strict

if TYPE_CHECKING:
    from sublim_plugin.study.cells import Cell

MethodName = Literal["lora", "full", "norm_matched", "loss_matched"]
MeasureName = Literal["logprob", "sampled"]
Seed = Annotated[int, Field(ge=0)]
Axes = dict[str, tuple[Any, ...]]
"""What a cell is on each of its axes: the values that name it there, none where it has none (a
fully finetuned student's rank)."""


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


_LIST = BeforeValidator(_listed)


class Selector(Strict):
    """A partial match over the axes of the grid; a key's value is one value or a list of them."""

    trait: Annotated[tuple[str, ...], _LIST] = Field(default=(), description="Of the dataset.")
    generation_seed: Annotated[tuple[Seed, ...], _LIST] = Field(
        default=(), description="Of the dataset."
    )
    teacher: Annotated[tuple[str, ...], _LIST] = Field(
        default=(), description="Name of the dataset's teacher; a chain's name is that of all its "
        "generations, 'student 2' one of them.",
    )  # fmt: skip
    method: Annotated[tuple[MethodName, ...], _LIST] = Field(
        default=(), description="lora, full (plain), norm_matched or loss_matched."
    )
    rank: Annotated[tuple[Rank, ...], _LIST] = Field(
        default=(), description="LoRA rank; a fully finetuned student has none."
    )
    alpha: Annotated[tuple[Alpha, ...], _LIST] = Field(
        default=(),
        description="rank, '2 x rank', a number or {rslora: ...}: students that have this alpha.",
    )
    learning_rate: Annotated[tuple[Rate, ...], _LIST] = Field(
        default=(), description="Learning rate, the recipe's among them."
    )
    train_context: Annotated[tuple[Context, ...], _LIST] = Field(
        default=(), description="Context of the student's training prompts, and of a signal's rows."
    )
    training_seed: Annotated[tuple[Seed, ...], _LIST] = Field(
        default=(), description="Of the student."
    )
    eval_context: Annotated[tuple[Context, ...], _LIST] = Field(
        default=(), description="Context in which a probe or localization asks."
    )
    measure: Annotated[tuple[MeasureName, ...], _LIST] = Field(
        default=(), description="Of a probe."
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        given = self.model_fields_set
        if not given:
            raise ValueError("an entry without keys matches every cell; name an axis")
        for key in given:
            if not getattr(self, key):
                raise ValueError(f"{key}: an empty list matches nothing; give a value")
        return self

    @property
    def wanted(self) -> dict[str, tuple[Any, ...]]:
        """The values of each key that is given, contexts as cells hold them."""
        return {
            key: tuple(_plain(value) for value in getattr(self, key))
            for key in type(self).model_fields
            if key in self.model_fields_set
        }


def _plain(value: Any) -> Any:
    return canonical_json(value.fields()) if isinstance(value, Context) else value


def selected(
    cells: Sequence[Cell],
    include: Sequence[Selector],
    exclude: Sequence[Selector],
    teachers: dict[str, tuple[str, ...]],
) -> list[Cell]:
    """The cells that stay.

    `include`: a cell stays where one entry at least agrees with it on all axes that the cell has
    (a dataset has no rank, so that one of {rank: 8} keeps all datasets and no student of rank 2).
    `exclude`: a cell goes where one entry's keys are all axes of the cell and agree with it.

    Args:
        teachers: the names of each dataset's teacher, by the cell's id.

    Raises:
        InputError: a value that no cell has, an entry that matches no cell, or a cell that stays
            and needs one that does not.
    """
    if not include and not exclude:
        return list(cells)
    axes = _axes(cells, teachers)
    kept = set(axes)
    for key, entries in (("include", include), ("exclude", exclude)):
        wanted = [entry.wanted for entry in entries]
        for number, one in enumerate(wanted):
            _check(f"{key}.{number}", one, axes.values())
        if key == "include" and wanted:
            kept = {i for i in kept if any(_agrees(one, axes[i], all_keys=False) for one in wanted)}
        if key == "exclude":
            kept -= {i for i in kept if any(_agrees(one, axes[i], all_keys=True) for one in wanted)}
    by_id = {cell.id: cell for cell in cells}
    # a teacher has no axes: it stays with the datasets that it writes
    written = (need for cell in cells if cell.id in kept for need in cell.needs)
    kept |= {need for need in written if by_id[need].kind == "teacher"}
    for cell in cells:
        for need in cell.needs:
            if cell.id in kept and need not in kept:
                raise InputError(
                    f"include and exclude keep the {cell.kind} '{cell.label}' and leave out the"
                    f" {by_id[need].kind} '{by_id[need].label}' that it needs; keep both, or"
                    " neither"
                )
    return [cell for cell in cells if cell.id in kept]


def _axes(cells: Sequence[Cell], teachers: dict[str, tuple[str, ...]]) -> dict[str, Axes]:
    found: dict[str, Axes] = {}
    contexts: dict[int, str] = {}
    for cell in cells:
        spec = cell.spec
        if cell.kind == "teacher":
            continue
        if cell.kind == "dataset":
            found[cell.id] = {
                "trait": (spec["trait"],),
                "generation_seed": (spec["generation_seed"],),
                "teacher": teachers[cell.id],
            }
            continue
        if cell.kind == "student":
            matched = spec.get("matched", {})
            kind = spec["method"]["kind"]
            name = (
                "norm_matched" if NORM in matched else "loss_matched" if LOSS in matched else kind
            )
            rank = spec["method"].get("rank")
            stabilized = bool(spec["recipe"].get("peft_use_rslora"))
            found[cell.id] = found[spec["dataset"]] | {
                "method": (name,),
                "rank": () if rank is None else (rank,),
                "alpha": () if rank is None else ((rank, spec["method"]["alpha"], stabilized),),
                "learning_rate": (spec["recipe"].get("learning_rate"),),
                "train_context": (_context(spec["train_context"], contexts),),
                "training_seed": (spec["training_seed"],),
            }
            continue
        if cell.kind == "signal":
            read_in = _context(spec["train_context"], contexts)
            found[cell.id] = found[spec["dataset"]] | {"train_context": (read_in,)}
            continue
        own = {} if spec["student"] is None else dict(found[spec["student"]])
        own["eval_context"] = (_context(spec["eval_context"], contexts),)
        if cell.kind == "probe":
            own["measure"] = (spec["measure"],)
        found[cell.id] = own
    return found


def _context(fields: dict[str, str], known: dict[int, str]) -> str:
    """The context as canonical JSON; cells of one plan share their contexts' mappings."""
    text = known.get(id(fields))
    if text is None:
        text = known[id(fields)] = canonical_json(fields)
    return text


def _agrees(wanted: dict[str, tuple[Any, ...]], axes: Axes, *, all_keys: bool) -> bool:
    for key, values in wanted.items():
        own = axes.get(key)
        if own is None:
            if all_keys:
                return False
        elif not any(_is(one, value) for one in own for value in values):
            return False
    return True


def _is(own: Any, wanted: Any) -> bool:
    if isinstance(wanted, Alpha):
        rank, alpha, stabilized = own
        return bool(wanted.at(rank) == alpha) and wanted.rslora == stabilized
    return bool(own == wanted)


def _check(where: str, wanted: dict[str, tuple[Any, ...]], axes: Iterable[Axes]) -> None:
    """Raises InputError for a value that no cell has, and where none has all of them at once."""
    axes = list(axes)
    for key, values in wanted.items():
        there = {value: None for own in axes for value in own.get(key, ())}
        for value in values:
            if not any(_is(own, value) for own in there):
                raise InputError(
                    f"{where}.{key}: no cell of this study has {value}{_hint(value, there)}"
                )
    if not any(_agrees(wanted, own, all_keys=True) for own in axes):
        raise InputError(f"{where}: no cell of this study has all of {', '.join(wanted)} at once")


def _hint(value: Any, there: Iterable[Any]) -> str:
    if isinstance(value, Alpha):
        known = [f"{a} at rank {r}{' (rslora)' if s else ''}" for r, a, s in there]
        return f"; there are {', '.join(known[:12]) or 'none'}"
    if isinstance(value, str):
        return nearest(value, [str(one) for one in there])
    return f"; there are {', '.join(f'{one:g}' for one in sorted(there)) or 'none'}"
