"""From names in an axolotl YAML to checked files: base model, datasets, DeepSpeed settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sublim_plugin.axolotl.receipt import DatasetInfo
from sublim_plugin.core.dataset import dataset_rows_path, iter_rows
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.core.rooms import ROOT

PLACEHOLDER = "SET-THIS-TO-A-DATASET-FOLDER"


def is_local(base_model: str) -> bool:
    """Whether `base_model` names the embedded model or a folder, and not a model of a hub."""
    return base_model.startswith(("embedded:", "/", "./", "../", "~")) or Path(base_model).is_dir()


def base_folder(base_model: str, revision: str | None = None) -> Path:
    """The folder of a base model that axolotl has loaded; a hub's lies in its cache.

    Raises:
        InputError: the cache does not hold that model in that revision.
    """
    if Path(base_model).expanduser().is_dir():
        return Path(base_model).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base_model, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        at = f" in revision {revision}" if revision else ""
        raise InputError(
            f"{base_model}{at} is not in the hub's cache on this machine; download it, or give a "
            "local folder."
        ) from error


def name_datasets(cfg: Any, where: str) -> list[DatasetInfo]:
    """Replace dataset folders by their rows files, hash-checked; describe every dataset.

    Raises:
        InputError: a path is the recipes' placeholder or leads nowhere, or a file was changed.
    """
    found = []
    for index, entry in enumerate(cfg.get("datasets") or []):
        path = str(entry.get("path") or "")
        if path == PLACEHOLDER:
            raise InputError(
                f"{where}: `datasets[{index}].path` is still {PLACEHOLDER}; set it to a dataset "
                "folder that `sublim generate` made, or to a rows file (JSONL with `messages`)."
            )
        folder = Path(path).expanduser()
        if folder.is_dir() and _made_by_sublim(folder):
            rows = dataset_rows_path(folder)
        elif folder.is_file() and (folder.parent / "manifest.json").is_file():
            rows = dataset_rows_path(folder.parent)
            if rows.resolve() != folder.resolve():
                raise InputError(
                    f"{where}: `datasets[{index}].path` is {folder}, but the manifest beside it "
                    f"is of {rows.name}; name the folder or that file."
                )
        elif folder.is_file() and folder.suffix == ".jsonl":
            rows = folder
        elif not folder.exists() and (path.startswith(("/", "./", "../", "~")) or not path):
            raise InputError(
                f"{where}: `datasets[{index}].path` is {path!r}: nothing is there; give a dataset "
                "folder (with a manifest.json) or a rows file."
            )
        else:
            found.append(DatasetInfo(path=path, sha256=None, rows=None))
            continue
        entry["path"] = str(rows.resolve())
        entry["ds_type"] = "json"
        digest = sha256_file(rows)
        # axolotl's cache of tokenized data does not look inside the files it is made from.
        prepared = Path(str(cfg.get("dataset_prepared_path") or "last_run_prepared"))
        if prepared.name != digest[:12]:
            cfg["dataset_prepared_path"] = str(prepared / digest[:12])
        count = sum(1 for _ in iter_rows(rows))
        found.append(DatasetInfo(path=str(rows.resolve()), sha256=digest, rows=count))
    return found


def _made_by_sublim(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() or any(folder.glob("rows-*.jsonl"))


def find_file(key: str, value: str, where: str) -> Path:
    """The file that `key: value` of the YAML at `where` names, looked for from the working folder,
    the YAML's folder and the installed recipes.

    Raises:
        InputError: it is in none of them.
    """
    named = Path(value).expanduser()
    candidates = [named, Path(where).parent / named, ROOT / named]
    for candidate in candidates:
        if candidate.exists():
            return candidate.resolve()
    raise InputError(
        f"{where}: `{key}: {value}` was not found; looked at "
        f"{', '.join(str(candidate) for candidate in candidates)}."
    )
