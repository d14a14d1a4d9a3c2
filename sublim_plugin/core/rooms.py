"""The sibling packages, which are installed under names that others use too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sublim_plugin.core.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def room(name: str) -> Path:
    """The folder of `data_gen`, `lm_eval_tasks` or `axolotl_configs` beside `sublim_plugin`.

    Raises:
        InputError: another module of that name is found first on `sys.path`, or ours is missing.
    """
    ours = ROOT / name
    if not ours.is_dir():
        raise InputError(f"{ours}: missing from the installation; reinstall sublim")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    places = [*(spec.submodule_search_locations or []), spec.origin or ""] if spec else []
    found = next((Path(place) for place in places if place), None)
    if found is not None and found.resolve() != ours and found.resolve().parent != ours:
        raise InputError(
            f"{found}: this module named '{name}' is found before sublim's own ({ours});"
            " rename it, or start from another folder"
        )
    return ours
