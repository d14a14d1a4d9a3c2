"""Manifests: `manifest.json`, written last in a cell's folder; its presence means done."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import to_json

from sublim_plugin.core.atomic import write_json
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.core.versions import device_info, installed

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class OutputFile:
    """One file beside the manifest. No model: of these there are tens of thousands at a time."""

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """What a cell was made from and what it made.

    `spec` is the resolved semantic input, whose hash gives `id`; `label` and every other
    field never enter it. Times are UTC in ISO 8601; `wall_s` is in seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    kind: str
    id: str
    label: str
    spec: dict[str, Any]
    inputs: dict[str, dict[str, Any]] = {}
    outputs: dict[str, OutputFile]
    seeds: dict[str, Any] = {}
    template: dict[str, Any] = {}
    rendered: dict[str, Any] = {}
    versions: dict[str, str] = {}
    device: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    started: str
    finished: str
    wall_s: float
    notes: list[str] = []


def write_manifest(
    folder: Path,
    *,
    kind: str,
    id: str,
    label: str,
    spec: dict[str, Any],
    outputs: Iterable[Path | str],
    started: float,
    inputs: dict[str, dict[str, Any]] | None = None,
    seeds: dict[str, Any] | None = None,
    template: dict[str, Any] | None = None,
    rendered: dict[str, Any] | None = None,
    versions: dict[str, str] | None = None,
    device: dict[str, Any] | None = None,
    counts: dict[str, Any] | None = None,
    notes: Iterable[str] = (),
) -> Manifest:
    """Hash the named outputs (paths relative to `folder`) and write the manifest, last.

    Args:
        started: `time.time()` when the work on this cell began.
        versions, device: default to what is installed and to this machine.

    Raises:
        InputError: an output is missing.
    """
    folder = Path(folder)
    hashed: dict[str, OutputFile] = {}
    for name in sorted(str(name) for name in outputs):
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: this output is missing, so the cell cannot be completed")
        hashed[name] = OutputFile(sha256=sha256_file(path), bytes=path.stat().st_size)
    now = time.time()
    manifest = Manifest(
        kind=kind,
        id=id,
        label=label,
        spec=spec,
        inputs=inputs or {},
        outputs=hashed,
        seeds=seeds or {},
        template=template or {},
        rendered=rendered or {},
        versions=installed() if versions is None else versions,
        device=device_info() if device is None else device,
        counts=counts or {},
        started=_utc(started),
        finished=_utc(now),
        wall_s=round(max(0.0, now - started), 3),
        notes=list(notes),
    )
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))
    return manifest


def is_done(folder: Path) -> bool:
    """Whether the folder has its manifest, which is written last."""
    return (folder / MANIFEST_NAME).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        InputError: there is none, or it does not parse.
    """
    found = find_manifest(folder)
    if found is None:
        path = Path(folder) / MANIFEST_NAME
        raise InputError(f"{path}: no manifest, so this folder was not completed")
    return found


def find_manifest(folder: Path) -> Manifest | None:
    """A folder's manifest; None if it has none.

    Raises:
        InputError: it does not parse.
    """
    path = f"{folder}/{MANIFEST_NAME}"
    try:
        data = _read(path)
        return None if data is None else Manifest.model_validate_json(data)
    except (OSError, ValidationError) as error:
        raise InputError(
            f"{path}: not a readable manifest ({error}); delete the folder to have it made again"
        ) from error


_REPEATED = ("inputs", "template", "rendered", "versions", "device")


def share(manifest: Manifest, pool: dict[bytes, Any]) -> Manifest:
    """Let equal parts of many manifests be one object: half of what 20,000 of them take."""
    for name in _REPEATED:
        value = manifest.__dict__[name]
        manifest.__dict__[name] = pool.setdefault(to_json(value), value)
    for name, value in manifest.spec.items():
        if isinstance(value, dict | list):
            manifest.spec[name] = pool.setdefault(to_json(value), value)
    return manifest


def _read(path: str) -> bytes | None:
    """A small file's bytes in the fewest system calls, as 20,000 of them are read at once."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        data = b""
        while more := os.read(descriptor, 1 << 17):
            data += more
        return data
    finally:
        os.close(descriptor)


def verify(folder: Path, deep: bool = True) -> Manifest:
    """Read the manifest and compare it with what lies beside it.

    Args:
        deep: compare sha256 as well as size.

    Raises:
        InputError: an output is missing or differs.
    """
    manifest = read_manifest(folder)
    check_outputs(folder, manifest, deep)
    return manifest


def check_outputs(folder: Path, manifest: Manifest, deep: bool) -> dict[str, os.stat_result]:
    """Compare a manifest that was read with what lies beside it.

    Returns:
        What the file system says of each output, by name.

    Raises:
        InputError: an output is missing or differs.
    """
    stats = {}
    for name, expected in manifest.outputs.items():
        path = f"{folder}/{name}"
        try:
            found = os.stat(path)
        except OSError:
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: named in the manifest but missing; {_way_out(folder)}")
        if found.st_size != expected.bytes:
            raise InputError(
                f"{path}: {found.st_size} bytes, the manifest says {expected.bytes};"
                f" {_way_out(folder)}"
            )
        if deep:
            check_sha256(path, sha256_file(Path(path)), expected, folder)
        stats[name] = found
    return stats


def check_sha256(path: Path | str, digest: str, expected: OutputFile, folder: Path) -> None:
    """Compare a file's digest with what the manifest of `folder` expects.

    Raises:
        InputError: they differ.
    """
    if digest != expected.sha256:
        raise InputError(
            f"{path}: sha256 {digest[:12]}…, the manifest says {expected.sha256[:12]}…;"
            f" {_way_out(folder)}"
        )


def _way_out(folder: Path) -> str:
    return f"it was changed after it was made: restore the file, or delete {folder} and run again"


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
