"""Replies on disk while a dataset is being written: append-only, one fsync a shard.

A shard is a run of consecutive rows that are decoded together. It counts once it is complete on
disk; whatever a kill leaves after the last complete shard is cut off and decoded again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from sublim_plugin.core.atomic import write_json
from sublim_plugin.core.errors import BusyError, InputError, RunError
from sublim_plugin.core.hashing import canonical_json


class Written(BaseModel):
    """One reply: row `index`, the half-open range of its shard, and what was sampled."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    index: int
    shard: tuple[int, int]
    completion: str
    ended: bool
    tokens: int
    """Sampled tokens, the end of turn among them."""
    stopped: bool = False
    """Whether decoding stopped because the reply could no longer be accepted."""


class Progress:
    """The work folder of one dataset, locked while open (use it as a context manager).

    Raises BusyError where another process has it open, and InputError where it was begun with other
    settings or is damaged before its last line.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.path = folder / "replies.jsonl"
        self.settings = settings
        self.notes: list[str] = []
        self.done = 0

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be written ({error.strerror}); use another folder"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise BusyError(f"{self.folder}: another process is writing this dataset") from error
        try:
            self._check_settings()
            self.done = self._repair()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _check_settings(self) -> None:
        path = self.folder / "settings.json"
        if not path.exists() or not self.path.exists():
            write_json(path, self.settings)
            return
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}); delete {self.folder}") from error
        if canonical_json(old) != canonical_json(self.settings):
            changed = sorted(
                key
                for key in {*old, *self.settings}
                if canonical_json(old.get(key)) != canonical_json(self.settings.get(key))
            )
            raise InputError(
                f"{self.folder}: begun with other settings ({', '.join(changed)}); continue with "
                "those of its settings.json, use another folder, or delete this one to begin again"
            )

    def _repair(self) -> int:
        """Cut off what follows the last complete shard; return the number of rows before it."""
        if not self.path.exists():
            return 0
        size = self.path.stat().st_size
        done = good = 0
        for written, end in self._lines():
            if written.index + 1 == written.shard[1]:
                done, good = written.shard[1], end
        if good < size:
            self.notes.append(
                f"{self.path.name}: the {size - good} bytes after row {done} were an incomplete "
                "shard (the run was interrupted); they were removed and decoded again"
            )
            with self.path.open("r+b") as file:
                file.truncate(good)
                os.fsync(file.fileno())
        return done

    def _lines(self) -> Iterator[tuple[Written, int]]:
        """Each reply with the byte offset of its end; a garbled last line ends the iteration."""
        offset = 0
        with self.path.open("rb") as file:
            last = self.path.stat().st_size
            for number, line in enumerate(file, 1):
                try:
                    if not line.endswith(b"\n"):
                        raise ValueError("no line end")
                    written = Written.model_validate_json(line)
                    if written.index != number - 1:
                        raise ValueError(f"row {written.index} where row {number - 1} was expected")
                except (ValidationError, ValueError) as error:
                    if offset + len(line) == last:
                        return
                    raise InputError(
                        f"{self.path}, line {number}, byte {offset}: garbled before the last line "
                        f"({str(error).splitlines()[0]}); delete {self.folder} to begin again"
                    ) from error
                offset += len(line)
                yield written, offset

    def replies(self) -> Iterator[Written]:
        """The replies of all complete shards, in index order."""
        if self.path.exists():
            for written, _ in self._lines():
                yield written

    def append(self, shard: Sequence[Written]) -> None:
        """Add a complete shard and sync it to disk. Raises RunError where the disk refuses."""
        data = "".join(written.model_dump_json() + "\n" for written in shard).encode()
        with self.writing(), self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.done = shard[-1].shard[1]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError, a full disk say, into a RunError that says what is safe."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{error.filename or self.path}: {error.strerror}; {self.done} replies are "
                "safe, run the same command again once the disk takes them"
            ) from error

    def remove(self) -> None:
        """Delete the work folder."""
        shutil.rmtree(self.folder)
