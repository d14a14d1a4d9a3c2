"""What was read and checked before: a cache of the numbers in a run folder's large files.

`RUN/.cache/` holds, for each finished cell, a seal and what the table needs of the files that were
hashed and checked under that seal. A seal covers each file's name, size, times of change of content
and of inode (mtime, ctime), inode number, and the sha256 that the manifest names; manifests
themselves are always read. A cell whose seal differs is read and checked again. A file that was
changed within the last two seconds gets no seal, as a change that follows at once might leave its
times as they are. The folder may be deleted at any time; an old or damaged one is not used.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic_core import from_json, to_json

from sublim_plugin.analysis.asked import Asked, Floats
from sublim_plugin.core.atomic import write_bytes
from sublim_plugin.core.errors import RunError
from sublim_plugin.core.manifest import Manifest

FORMAT = 2
FOLDER = ".cache"
INDEX = "collected.json"
WORTH_IT = 200
"""New cells below which nothing is written: reading them again takes a fraction of a second."""

_SETTLED_NS = 2_000_000_000


class Host(NamedTuple):
    """What results.json says: targets, and the metrics of each (T, metrics); NaN if missing."""

    targets: tuple[str, ...]
    values_TM: Floats


class Trained(NamedTuple):
    """What the table needs of a receipt."""

    dataset_sha256: str | None
    weights_sha256: str | None
    update_norm: float | None


class Scored(NamedTuple):
    """What the table needs of a probe."""

    asked: Asked
    logprob_QC: Floats
    host: Host


class Seal(NamedTuple):
    """`text` names a state of a cell's files; `settled` whether it can be relied on later."""

    text: str
    settled: bool


def seal(manifest: Manifest, found: Mapping[str, os.stat_result], now_ns: int) -> Seal:
    """The seal of a cell's files.

    Args:
        found: the files that are read, by their names below the cell's folder.
        now_ns: the time.
    """
    parts = [manifest.kind]
    newest = 0
    for name, stat in found.items():
        listed = manifest.outputs.get(name)
        parts.append(
            f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
            f" {listed.sha256 if listed else ''}"
        )
        newest = max(newest, stat.st_mtime_ns, stat.st_ctime_ns)
    text = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    return Seal(text, abs(now_ns - newest) > _SETTLED_NS)


class Seen:
    """The cache of one run folder. Asks are by a cell's folder name and its present seal."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / FOLDER
        self.now_ns = time.time_ns()
        self._asked: dict[Asked, Asked] = {}
        self._old: dict[str, list[Any]] = {}
        self._new: dict[str, list[Any]] = {}
        self._kept: dict[str, list[Any]] = {}
        self._load()

    def _load(self) -> None:
        try:
            index = from_json((self.folder / INDEX).read_bytes())
            if index["format"] != FORMAT:
                return
            data = (self.folder / index["numbers"]).read_bytes()
            if zlib.crc32(data) != index["crc32"]:
                return
            self._numbers: Floats = np.frombuffer(data, dtype="<f8")
            frames = [
                (self.one(Asked(*map(tuple, asked))), tuple(targets))
                for asked, targets in index["frames"]
            ]
            for name, entry in index["probes"].items():
                self._old[name] = [entry[0], *frames[entry[1]], entry[2]]
            self._old |= index["others"]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            self._old = {}

    def one(self, asked: Asked) -> Asked:
        """The same object for equal values, so that comparing them is comparing identities."""
        return self._asked.setdefault(asked, asked)

    def probe(self, name: str, seal: Seal) -> Scored | None:
        """A probe's numbers, if its files are as they were when these were checked."""
        entry = self._old.get(name)
        if entry is None or entry[0] != seal.text or len(entry) != 4:
            return None
        _, asked, targets, at = entry
        shape = (len(asked.ids), len(asked.candidates))
        middle = at + shape[0] * shape[1]
        host = self._numbers[middle : middle + 5 * len(targets)].reshape(len(targets), 5)
        scored = Scored(asked, self._numbers[at:middle].reshape(shape), Host(targets, host))
        self._kept[name] = [seal.text, scored]
        return scored

    def student(self, name: str, seal: Seal) -> Trained | None:
        """What a student's receipt said, if it is as it was when it was checked."""
        entry = self._old.get(name)
        if entry is None or entry[0] != seal.text or len(entry) != 2:
            return None
        self._kept[name] = entry
        return Trained(*entry[1])

    def checked(self, name: str, seal: Seal) -> bool:
        """Whether these very files were hashed before and fitted their manifest."""
        entry = self._old.get(name)
        if entry is None or entry != [seal.text]:
            return False
        self._kept[name] = entry
        return True

    def put(self, name: str, seal: Seal, value: Scored | Trained | None) -> None:
        """Keep what was just read and checked under a seal."""
        if seal.settled:
            self._new[name] = [seal.text] if value is None else [seal.text, value]

    def save(self) -> None:
        """Write the cache if it is worth it. A folder that cannot be written has none."""
        if len(self._new) < WORTH_IT:
            return
        frames: dict[tuple[Asked, tuple[str, ...]], int] = {}
        probes: dict[str, list[Any]] = {}
        others: dict[str, list[Any]] = {}
        numbers: list[Floats] = []
        at = 0
        for name, entry in (self._kept | self._new).items():
            if len(entry) == 2 and isinstance(entry[1], Scored):
                scored = entry[1]
                key = (scored.asked, scored.host.targets)
                place = frames.setdefault(key, len(frames))
                probes[name] = [entry[0], place, at]
                for array in (scored.logprob_QC, scored.host.values_TM):
                    numbers.append(array.ravel())
                    at += array.size
            else:
                others[name] = entry
        data = np.concatenate(numbers).astype("<f8").tobytes() if numbers else b""
        crc32 = zlib.crc32(data)
        file = f"collected-{crc32:08x}-{len(data)}.f8"
        index = {
            "format": FORMAT,
            "numbers": file,
            "crc32": crc32,
            "frames": [
                [[a.ids, a.texts, a.prompts, a.candidates], targets] for a, targets in frames
            ],
            "probes": probes,
            "others": others,
        }
        with suppress(RunError, OSError):
            write_bytes(self.folder / file, data)
            write_bytes(self.folder / INDEX, to_json(index))
            for path in self.folder.glob("collected-*.f8"):
                if path.name != file:
                    path.unlink(missing_ok=True)
