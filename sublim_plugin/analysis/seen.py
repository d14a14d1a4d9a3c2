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
import secrets
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic_core import from_json, to_json

from sublim_plugin.analysis.asked import Asked, Floats
from sublim_plugin.core.atomic import write_bytes, writing
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.manifest import MANIFEST_NAME, Manifest

FORMAT = 3
FOLDER = ".cache"
INDEX = "collected.json"
TABLE = "table.json"
WORTH_IT = 200
"""New cells below which nothing is written: reading them again takes a fraction of a second."""

_SETTLED_NS = 2_000_000_000


METRICS_OF_HOST = 5


class Host(NamedTuple):
    """What results.json says: targets, and the metrics of each (T, metrics); NaN if missing."""

    targets: tuple[str, ...]
    values_TM: Floats


class Trained(NamedTuple):
    """What the table needs of a receipt."""

    dataset_sha256: str | None
    weights_sha256: str | None
    update_norm: float | None


class Numbers:
    """The numbers of a cache, read when the first of them is needed."""

    def __init__(self, path: Path, n_bytes: int, crc32: int) -> None:
        self.path, self._crc32 = path, crc32
        if path.stat().st_size != n_bytes:
            raise ValueError("cut off")

    @cached_property
    def all(self) -> Floats:
        """Raises InputError where the file is not what was written."""
        data = self.path.read_bytes()
        if zlib.crc32(data) != self._crc32:
            raise InputError(
                f"{self.path}: this cache is damaged; delete {self.path.parent} and run again"
            )
        return np.frombuffer(data, dtype="<f8")


class Scored(NamedTuple):
    """What the table needs of a probe: `numbers` are its log-probabilities (questions, candidates)
    and results.json's metrics (targets, metrics), one after the other, from place `at` on."""

    asked: Asked
    targets: tuple[str, ...]
    source: Numbers | None
    at: int
    fresh: tuple[Floats, Floats] | None = None

    @property
    def logprob_QC(self) -> Floats:
        if self.fresh is not None:
            return self.fresh[0]
        shape = (len(self.asked.ids), len(self.asked.candidates))
        return self._part(0, shape)

    @property
    def host(self) -> Host:
        if self.fresh is not None:
            return Host(self.targets, self.fresh[1])
        before = len(self.asked.ids) * len(self.asked.candidates)
        return Host(self.targets, self._part(before, (len(self.targets), METRICS_OF_HOST)))

    def _part(self, before: int, shape: tuple[int, int]) -> Floats:
        assert self.source is not None
        at = self.at + before
        return self.source.all[at : at + shape[0] * shape[1]].reshape(shape)


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


@cache
def _code() -> bytes:
    """A digest of the code that makes tables: a table that other code made is not taken over."""
    digest = hashlib.blake2b(np.__version__.encode())
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *(here.parent / "core").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.digest()


def load_rows(run_dir: Path, key: str) -> list[list[Any]] | None:
    """The values of a table's rows as they were kept under a key."""
    try:
        head, _, rest = (run_dir / FOLDER / TABLE).read_bytes().partition(b"\n")
        if from_json(head) != key:
            return None
        return [row for line in rest.splitlines() for row in from_json(line)]
    except (OSError, ValueError, TypeError):
        return None


def save_rows(run_dir: Path, key: str, rows: Iterator[Sequence[Any]], n: int) -> None:
    """Keep a table of many rows; a folder that cannot be written keeps none."""
    if n < WORTH_IT:
        return
    with suppress(RunError, OSError), writing(run_dir / FOLDER / TABLE) as stream:
        stream.write(to_json(key))
        while part := [*islice(rows, 500)]:
            stream.write(b"\n" + to_json(part, inf_nan_mode="constants"))


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
            path = self.folder / index["numbers"]
            self._numbers = Numbers(path, index["bytes"], index["crc32"])
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
        scored = Scored(asked, targets, self._numbers, at)
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

    def key(self, manifests: Mapping[Path, Manifest]) -> str | None:
        """Names the state of all files that were asked for, manifests included; None if one of them
        was not known or has just been changed."""
        known = self._kept | self._new
        if len(known) != len(manifests):
            return None
        digest = hashlib.blake2b(_code(), digest_size=16)
        for folder in manifests:
            found = os.stat(f"{folder}/{MANIFEST_NAME}")
            if self.now_ns - max(found.st_mtime_ns, found.st_ctime_ns) < _SETTLED_NS:
                return None
            times = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
            digest.update(f"{folder.name} {times} {known[folder.name][0]}\n".encode())
        return digest.hexdigest()

    def save(self) -> None:
        """Write the cache if it is worth it. A folder that cannot be written has none."""
        if len(self._new) < WORTH_IT:
            return
        frames: dict[tuple[Asked, tuple[str, ...]], int] = {}
        probes: dict[str, list[Any]] = {}
        others: dict[str, list[Any]] = {}
        scored: list[Scored] = []
        at = 0
        for name, entry in (self._kept | self._new).items():
            if len(entry) == 2 and isinstance(entry[1], Scored):
                own = entry[1]
                place = frames.setdefault((own.asked, own.targets), len(frames))
                probes[name] = [entry[0], place, at]
                scored.append(own)
                at += len(own.asked.ids) * len(own.asked.candidates)
                at += len(own.targets) * METRICS_OF_HOST
            else:
                others[name] = entry
        file = f"collected-{secrets.token_hex(6)}.f8"
        asked = [[[a.ids, a.texts, a.prompts, a.candidates], targets] for a, targets in frames]
        index = {"format": FORMAT, "numbers": file, "bytes": 8 * at, "frames": asked}
        with suppress(RunError, OSError):
            crc32 = 0
            with writing(self.folder / file) as stream:
                for one in scored:
                    for array in (one.logprob_QC, one.host.values_TM):
                        data = array.astype("<f8").tobytes()
                        crc32 = zlib.crc32(data, crc32)
                        stream.write(data)
            index |= {"crc32": crc32, "probes": probes, "others": others}
            write_bytes(self.folder / INDEX, to_json(index))
            for path in self.folder.glob("collected-*.f8"):
                if path.name != file:
                    path.unlink(missing_ok=True)
