"""Files for axolotl's `--sweep`: lists of values by key, and under `_` runs of several keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from sublim_plugin.axolotl.lint_document import Document, Place
from sublim_plugin.axolotl.lint_schema import check_mapping


def is_sweep(data: Mapping[str, Any]) -> bool:
    """Whether this is a sweep and no config: it names no model, and lists under every key."""
    if "base_model" in data or "datasets" in data:
        return False
    return "_" in data or all(isinstance(value, list) for value in data.values())


def check_sweep(document: Document, model: type[BaseModel]) -> None:
    """Hold each value of each run to axolotl's schema, and find runs that are not meant."""
    data = document.data
    for key, values in data.items():
        if not isinstance(values, list):
            what = f"expected a list of values to sweep over, found {values!r}"
            document.add("error", (key,), what, f"write [{values}]")
        elif key != "_":
            for index, value in enumerate(values):
                _check_setting(document, key, value, (key, index), model)
    runs = data.get("_")
    for index, run in enumerate(runs if isinstance(runs, list) else []):
        if isinstance(run, dict):
            check_mapping(document, run, model, ("_", index))
        else:
            what = f"expected a mapping of settings, found {run!r}"
            document.add("error", ("_", index), what, "write {key: value, ...}")
    _check_runs(document, [run for run in runs if isinstance(run, dict)] if runs else [])


def _check_setting(
    document: Document, key: str, value: Any, place: Place, model: type[BaseModel]
) -> None:
    document.lines.setdefault((*place, key), document.line(place))
    if place in document.written:
        document.written.setdefault((*place, key), document.written[place])
    check_mapping(document, {key: value}, model, place)


def _check_runs(document: Document, runs: list[dict[Any, Any]]) -> None:
    folders: dict[str, int] = {}
    for index, run in enumerate(runs):
        folder = run.get("output_dir")
        if folder is None:
            continue
        place = ("_", index, "output_dir")
        if str(folder) in folders:
            what = f"{folder} is also the folder of the run on line {folders[str(folder)]}"
            document.add("error", place, what, "give each run a folder of its own")
        folders.setdefault(str(folder), document.line(place))
    ranks, alphas = document.data.get("lora_r"), document.data.get("lora_alpha")
    if isinstance(ranks, list) and isinstance(alphas, list):
        what = f"axolotl trains every alpha with every rank, {len(ranks) * len(alphas)} runs"
        document.add(
            "warning", ("lora_alpha",), what, "pair them under `_`: - {lora_r: 8, lora_alpha: 8}"
        )
    elif isinstance(ranks, list):
        what = "alpha stays as in the config, so that the scaling alpha / r changes with the rank"
        document.add(
            "warning", ("lora_r",), what, "pair them under `_`: - {lora_r: 8, lora_alpha: 8}"
        )
