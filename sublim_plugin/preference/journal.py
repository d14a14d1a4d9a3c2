"""What one model has answered so far, on disk: append-only, so that a kill loses a moment's work.

lm-eval's own response cache has no model in its key. A journal belongs to one model: its first line
is that model's identity, and a journal of another one is refused.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.hashing import canonical_json, sha256_json

FLUSH_SECONDS = 1.0


class Journal:
    """Answers by key, loaded from `path` and appended to it.

    Raises InputError where the file belongs to another model or is garbled before its last line
    (an incomplete last line is cut off), RunError where the disk refuses.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        self._waiting: list[str] = []
        self._flushed = time.monotonic()
        self._whole = 0  # bytes of the file that hold whole lines
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            self._load(identity)
        else:
            self._waiting.append(canonical_json(identity))
            self.flush()

    def _load(self, identity: dict[str, Any]) -> None:
        offset = 0
        with self.path.open("r+b") as file:
            size = self.path.stat().st_size
            for number, line in enumerate(file, 1):
                try:
                    if not line.endswith(b"\n"):
                        raise ValueError("no line end")
                    value = json.loads(line)
                    if number > 1:
                        key, answer = value
                        self.answers[key] = answer
                except (ValueError, TypeError) as error:
                    if offset + len(line) < size:
                        raise InputError(
                            f"{self.path}, line {number}, byte {offset}: garbled before the last "
                            f"line ({error}); delete the file to score again"
                        ) from error
                    file.truncate(offset)
                    break
                if number == 1 and canonical_json(value) != canonical_json(identity):
                    raise InputError(
                        f"{self.path} holds answers of another model ({value}); use another folder"
                    )
                offset += len(line)
        self._whole = offset
        if offset == 0:
            self._waiting.append(canonical_json(identity))
            self.flush()

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer; it reaches the disk with one `FLUSH_SECONDS` later, or at `flush`.

        Raises ValueError for a number that is not finite, which is no answer.
        """
        self._waiting.append(json.dumps([key, answer], ensure_ascii=False, allow_nan=False))
        self.answers[key] = answer
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            lines = "".join(f"{line}\n" for line in self._waiting).encode()
            try:
                with self.path.open("ab") as file:
                    file.truncate(self._whole)  # what a failed write left is no line to continue
                    file.write(lines)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise RunError(
                    f"{self.path}: {error.strerror}; the answers written before are safe, run the "
                    "same command again once the disk takes them"
                ) from error
            self._whole += len(lines)
        self._waiting.clear()
        self._flushed = time.monotonic()


def key(kind: str, *what: Any) -> str:
    """The key of one answer: of everything that determines it beside the model."""
    return f"{kind}:{sha256_json(list(what))[:24]}"
