"""The rows file of a dataset folder, which its manifest vouches for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file, sha256_text
from sublim_plugin.core.manifest import read_manifest

KINDS = ("dataset", "persona")
"""Kinds of manifest that vouch for rows: numbers of a teacher, and what a teacher is trained on."""


def dataset_rows_path(folder: Path) -> Path:
    """The `rows-<sha12>.jsonl` of a dataset folder, checked against name and manifest.

    Raises:
        InputError: no manifest, none or several rows files, or a hash that does not match.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    names = [name for name in manifest.outputs if name.startswith("rows-") and "/" not in name]
    if manifest.kind not in KINDS or len(names) != 1:
        raise InputError(
            f"{folder}: the manifest is of kind '{manifest.kind}' and names {len(names)} rows"
            " files; expected a dataset folder with exactly one rows-<sha12>.jsonl"
        )
    strays = [path.name for path in folder.glob("rows-*.jsonl") if path.name != names[0]]
    if strays:
        raise InputError(f"{folder}: holds {strays[0]} beside {names[0]}; remove the stray file")
    path = folder / names[0]
    if not path.is_file():
        raise InputError(f"{path}: named in the manifest but missing; generate the dataset again")
    found = sha256_file(path)
    expected = manifest.outputs[names[0]].sha256
    if found != expected or path.stem.removeprefix("rows-") != expected[:12]:
        raise InputError(
            f"{path}: sha256 {found[:12]}…, manifest and name say {expected[:12]}…; the rows were"
            " changed after they were made: restore the file or generate the dataset again"
        )
    return path


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Write the rows file of `folder`, in the place of any other there; its name and sha256."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    digest = sha256_text(text)
    name = f"rows-{digest[:12]}.jsonl"
    for old in folder.glob("rows-*.jsonl"):
        old.unlink()
    write_text(folder / name, text)
    return name, digest


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file; see `iter_rows`."""
    return list(iter_rows(path))


def iter_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one in memory at a time; blank lines and a missing final newline
    are accepted.

    Raises:
        InputError: a line that is not a JSON object, with file, line and byte offset.
    """
    offset = 0
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _row(path, number, offset, line)
                offset += len(line)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _row(path: Path, number: int, offset: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        cut = "" if line.endswith(b"\n") else " (the line has no end: the file was cut off)"
        raise InputError(f"{path}:{number}: byte {offset}: not JSON{cut}: {error}") from error
    if not isinstance(row, dict):
        raise InputError(
            f"{path}:{number}: byte {offset}: expected an object, found {type(row).__name__}"
        )
    return row
