"""Atomic writes: a reader sees the old file or the new one, never a part of it.

The temporary file lies beside its target (same file system), is fsynced, renamed over
the target, and the folder is fsynced, so that a crash after return keeps the new file.
On any failure, a full disk included, the temporary file is removed and the old one stays.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from sublim_plugin.core.errors import RunError

TEMPORARY_PREFIX = ".tmp-"


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary binary file that replaces `path` when the block ends without error.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        _discard(temporary)
        raise write_failure(path, error) from error
    except BaseException:
        _discard(temporary)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with writing(path) as stream:
        stream.write(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_failure(path: Path, error: OSError) -> RunError:
    """The message for a failed write: what happened, and that a re-run continues."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why = "the disk is full; free some space"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        why = "the folder cannot be written; check its permissions or choose another --out"
    else:
        why = str(error)
    return RunError(f"{path}: cannot write: {why}. Nothing was lost; the same command continues.")


def _discard(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
