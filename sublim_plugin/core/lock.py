"""One process per cell: an advisory lock that the kernel releases when its holder dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sublim_plugin.core.atomic import write_failure
from sublim_plugin.core.errors import BusyError

LOCK_NAME = ".lock"


@contextmanager
def cell_lock(folder: Path) -> Iterator[None]:
    """Hold a folder's lock for the length of the block.

    Raises:
        BusyError: another process holds it (exit code 75).
    """
    path = Path(folder) / LOCK_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise write_failure(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise write_failure(path, error) from error
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            raise BusyError(
                f"{folder}: another process is working on it ({holder or 'unknown'});"
                " wait for it or stop it"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def held(folder: Path) -> bool:
    """Whether a process holds a folder's lock, or that of the dataset that is written into it."""
    for path in (f"{folder}/{LOCK_NAME}", f"{folder}/work/lock"):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return True
        finally:
            os.close(descriptor)
    return False
