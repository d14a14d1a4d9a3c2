"""Why a cell is not done: what failed, what it waits for, or which input changed. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import canonical_json
from sublim_plugin.core.manifest import MANIFEST_NAME, find_manifest
from sublim_plugin.study.cells import Cell
from sublim_plugin.study.state import CellState, first_line

SHOWN = 6
"""Changed inputs that are named; the rest is counted."""


class _Stale(NamedTuple):
    """A finished cell that the study no longer names."""

    folder: str
    label: str
    spec: dict[str, Any]


class Reasons:
    """Says of each cell why it is not done.

    A changed input is found by comparing a cell with the finished cells of its kind that the study
    no longer names, and taking the one with the fewest differences; among equals one with the same
    label. Their manifests are read once, whatever the number of cells asked about.
    """

    def __init__(self, cells: Sequence[Cell], run_dir: Path) -> None:
        self.run_dir = run_dir
        self.cells = {cell.id: cell for cell in cells}
        self.planned = {cell.folder_name for cell in cells}

    def why(self, state: CellState) -> str:
        """One line, without the cell's name."""
        if state.state == "failed":
            return f"failed: {first_line(state)}"
        if state.state != "missing":
            return state.state
        stale = self._nearest(state.cell)
        if stale is not None:
            changes = list(self._changes(stale.spec, state.cell.spec))
            more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
            return f"changed since {stale.folder}: {'; '.join(changes[:SHOWN])}{more}"
        waits = [
            cell.folder_name
            for name in state.cell.needs
            if (cell := self.cells.get(name)) is not None and name not in self.finished
        ]
        return f"waits for {', '.join(waits)}" if waits else "not made yet"

    @cached_property
    def finished(self) -> set[str]:
        """Ids of the study's cells that have a manifest."""
        return {
            cell.id
            for cell in self.cells.values()
            if os.path.isfile(f"{self.run_dir}/cells/{cell.folder_name}/{MANIFEST_NAME}")
        }

    @cached_property
    def stale(self) -> dict[str, list[_Stale]]:
        """By kind, in the order of their folders' names."""
        found: dict[str, list[_Stale]] = {}
        try:
            names = sorted(os.listdir(self.run_dir / "cells"))
        except OSError:
            return {}
        for name in names:
            if name in self.planned:
                continue
            try:
                manifest = find_manifest(self.run_dir / "cells" / name)
            except InputError:
                continue
            if manifest is not None:
                own = _Stale(name, manifest.label, manifest.spec)
                found.setdefault(manifest.kind, []).append(own)
        return found

    @cached_property
    def stale_by_id(self) -> dict[str, dict[str, Any]]:
        return {
            stale.folder.rsplit("-", 1)[-1]: stale.spec
            for own in self.stale.values()
            for stale in own
        }

    def _nearest(self, cell: Cell) -> _Stale | None:
        candidates = self.stale.get(cell.kind)
        if not candidates:
            return None
        return candidates[self._places[cell.id]]

    @cached_property
    def _places(self) -> dict[str, int]:
        """For each of the study's cells, the place of the nearest stale one of its kind."""
        found = {}
        specs = self.stale_by_id | {cell.id: cell.spec for cell in self.cells.values()}
        made: dict[str, dict[str, str]] = {}
        for kind, stale in self.stale.items():
            cells = [cell for cell in self.cells.values() if cell.kind == kind]
            ours = [_all_leaves(cell.spec, specs, made) for cell in cells]
            theirs = [_all_leaves(one.spec, specs, made) for one in stale]
            labels = [cell.label for cell in cells], [one.label for one in stale]
            for cell, place in zip(cells, _nearest_places(ours, theirs, *labels), strict=True):
                found[cell.id] = place
        return found

    def _changes(
        self, old: Mapping[str, Any], new: Mapping[str, Any], above: str = ""
    ) -> Iterator[str]:
        """The differences, following the cells that a spec names to what changed in them."""
        for name in sorted({*old, *new}):
            before, after, key = old.get(name), new.get(name), f"{above}{name}"
            if isinstance(before, dict) and isinstance(after, dict):
                yield from self._changes(before, after, f"{key}.")
            elif (
                isinstance(before, str)
                and isinstance(after, str)
                and before != after
                and before in self.stale_by_id
                and after in self.cells
            ):
                inner = self._changes(self.stale_by_id[before], self.cells[after].spec)
                yield from (f"{key}.{change}" for change in inner)
            else:
                yield from differences(before, after, key)


def _nearest_places(
    ours: Sequence[Mapping[str, str]],
    theirs: Sequence[Mapping[str, str]],
    our_labels: Sequence[str],
    their_labels: Sequence[str],
) -> list[int]:
    """For each of our N cells the place of the nearest of their S, by the leaves that differ.

    Leaves that all of them share are left out, so that little is compared: 20,000 cells with as
    many stale ones take seconds.
    """
    import numpy as np

    leaves = [*ours, *theirs]
    codes: dict[str, dict[str, int]] = {}
    keys = sorted({key for own in leaves for key in own})
    table = np.array(
        [[codes.setdefault(key, {}).setdefault(own.get(key, ""), len(codes[key])) for key in keys]
         for own in leaves],
        dtype=np.int32,
    )  # fmt: skip
    table = table[:, (table != table[0]).any(0)]
    ours_NK, theirs_SK = table[: len(ours)], table[len(ours) :]
    # half a difference: a label breaks ties and decides nothing else
    names = {label: number for number, label in enumerate(their_labels)}
    ours_N = np.array([names.get(label, -1) for label in our_labels])
    theirs_S = np.array([names[label] for label in their_labels])
    places: list[int] = []
    step = max(1, 4_000_000 // len(theirs))
    for at in range(0, len(ours), step):
        rows = slice(at, at + step)
        count_NS = 0.5 * (ours_N[rows, None] != theirs_S[None])
        for k in range(table.shape[1]):
            count_NS += ours_NK[rows, None, k] != theirs_SK[None, :, k]
        places += count_NS.argmin(1).tolist()
    return places


def _all_leaves(
    spec: Mapping[str, Any],
    specs: Mapping[str, Mapping[str, Any]],
    made: dict[str, dict[str, str]],
) -> dict[str, str]:
    """The leaves of a spec and, in the place of the ids in it, those of the specs that they name.

    An id changes with everything below it; only what is below says how near two cells are.
    """
    found: dict[str, str] = {}
    for key, value in spec.items():
        inner: dict[str, str]
        if isinstance(value, dict):
            inner = _all_leaves(value, specs, made)
        elif isinstance(value, str) and value in specs:
            if value not in made:
                made[value] = _all_leaves(specs[value], specs, made)
            inner = made[value]
        else:
            if value is not None:
                found[key] = canonical_json([value])
            continue
        found |= {f"{key}.{name}": leaf for name, leaf in inner.items()}
    return found


def differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """`key: old → new` for every value in which two specs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif canonical_json([old]) != canonical_json([new]):
        yield f"{key}: {_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    text = "(absent)" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
