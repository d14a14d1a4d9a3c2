"""A study over a base model of a few bytes, whose cells a test finishes by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.manifest import write_manifest
from sublim_plugin.study.cells import Cell, plan
from sublim_plugin.study.study_file import load_study

QUICKSTART = Path(__file__).parents[2] / "studies" / "quickstart.yaml"


def write_base(folder: Path) -> Path:
    """A folder that passes for a model as long as nobody loads it."""
    folder.mkdir()
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + b"\0" * 4
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    return folder


def write_study(folder: Path, **changes: Any) -> Path:
    """The quickstart on such a model, after changes given as `section__key=value`."""
    base = folder / "base"
    settings = yaml.safe_load(QUICKSTART.read_text())
    settings["base_model"] = str(base if base.is_dir() else write_base(base))
    for key, value in changes.items():
        place = settings
        *path, last = key.split("__")
        for part in path:
            place = place[part]
        place[last] = value
    study = folder / "study.yaml"
    study.write_text(yaml.safe_dump(settings))
    return study


def cells_of(study: Path) -> list[Cell]:
    settings = load_study(study)
    return plan(settings, fingerprint(Path(settings.base_model)))


def finish(cell: Cell, run_dir: Path, files: dict[str, bytes] | None = None, **more: Any) -> Path:
    """Write a finished cell with these files (or one of a byte), all named in its manifest."""
    folder = cell.folder(run_dir)
    for name, data in (files or {"file.txt": b"x"}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_manifest(
        folder, kind=cell.kind, id=cell.id, label=cell.label, spec=cell.spec,
        outputs=[*(files or {"file.txt": b""})], **({"started": 0.0} | more),
    )  # fmt: skip
    return folder
