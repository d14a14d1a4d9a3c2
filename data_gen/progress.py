"""Replies on disk while a dataset is being written: append-only, one fsync a shard.

A shard is a run of consecutive rows that are decoded together. It counts once it is complete on
disk; whatever a kill leaves after the last complete shard is cut off and decoded again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from sublim_plugin.core.atomic import TEMPORARY_PREFIX, write_json
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.hashing import canonical_json
from sublim_plugin.core.lock import cell_lock


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
        with ExitStack() as opened:
            opened.enter_context(cell_lock(self.folder))
            self._check_settings()
            self.done = self._repair()
            self._open = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

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
        # under another name first: who comes just now makes a folder of their own
        gone = self.folder.with_name(f"{TEMPORARY_PREFIX}{self.folder.name}.{os.getpid()}")
        self.folder.rename(gone)
        shutil.rmtree(gone)
