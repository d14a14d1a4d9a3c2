"""One process per folder, on one machine or on several that share a file system.

A lock is a file `.lock-N`, made by a hard link, which is exclusive over NFS too; it names its
owner, who rewrites a counter in it every `HEARTBEAT_S` seconds. An owner on this machine is alive
as long as its process is: a dead one's lock is taken over at once, a stopped one's never. An
owner elsewhere is dead when its counter has not moved for `STALE_S` seconds; no clock is compared
to decide that, only to see quickly that a lock is fresh. Who takes over makes `.lock-(N+1)`, so
that of several who try one succeeds, and an owner that was frozen and wakes up finds it and stops.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sublim_plugin.core.atomic import TEMPORARY_PREFIX, write_failure
from sublim_plugin.core.errors import BusyError, RunError

PREFIX = ".lock-"
HEARTBEAT_S = 5.0
STALE_S = 60.0
_SIZE = 600
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


class Lock:
    """A lock that this process holds; `check` before what must not be done by two."""

    def __init__(self, folder: Path, number: int, owner: dict[str, Any]) -> None:
        self.folder, self.number, self._owner = folder, number, owner
        self.path = folder / f"{PREFIX}{number}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises RunError where another process has taken this lock over."""
        if _owner(self.folder / f"{PREFIX}{self.number + 1}") is not None:
            raise RunError(
                f"{self.folder}: this process did not move for over {STALE_S:.0f} s and another"
                " one took its work over; nothing was written"
            )

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(HEARTBEAT_S):
            beat += 1
            with suppress(OSError):  # a folder that is gone, a disk that is full
                descriptor = os.open(self.path, os.O_WRONLY)
                try:
                    os.pwrite(descriptor, _text(self._owner | {"beat": beat}), 0)
                finally:
                    os.close(descriptor)  # closing is what other machines see it by

    def release(self) -> None:
        """Give the lock up, with those of dead owners before it."""
        self._ended.set()
        self._thread.join()
        for number in _numbers(self.folder):
            if number <= self.number:
                (self.folder / f"{PREFIX}{number}").unlink(missing_ok=True)


@contextmanager
def cell_lock(folder: Path) -> Iterator[Lock]:
    """Hold a folder's lock for the length of the block.

    It may take up to `STALE_S` seconds where the owner is on another machine and seems dead.

    Raises:
        BusyError: another process holds it (exit code 75).
        RunError: the folder cannot be written.
    """
    folder = Path(folder)
    lock = _take(folder)
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def cell_lock_in_turn(folder: Path) -> Iterator[Lock]:
    """Hold a folder's lock, after whoever else holds it: for work of seconds.

    Raises:
        RunError: the folder cannot be written.
    """
    with ExitStack() as opened:
        while True:
            try:
                lock = opened.enter_context(cell_lock(folder))
                break
            except BusyError:
                time.sleep(0.5)
        yield lock


def held(folder: Path) -> bool:
    """Whether a process works on a folder; read-only and without waiting.

    An owner on another machine counts as alive while its last heartbeat is less than `STALE_S`
    old by this machine's clock.
    """
    numbers = _numbers(folder)
    if not numbers:
        return False
    path = folder / f"{PREFIX}{max(numbers)}"
    owner = _owner(path)
    if owner is None:
        return False
    alive = _alive(owner)
    if alive is not None:
        return alive
    try:
        return time.time() - path.stat().st_mtime < STALE_S
    except OSError:
        return False


def _take(folder: Path) -> Lock:
    me = _me()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            last = max(_numbers(folder), default=0)
            dead: dict[str, Any] | None = None
            if last:
                dead = _owner(folder / f"{PREFIX}{last}")
                if dead is None:  # released meanwhile
                    continue
                if not _is_dead(folder, last, dead):
                    raise BusyError(
                        f"{folder}: another process is working on it (pid {dead.get('pid')} on"
                        f" {dead.get('host')}); wait for it or stop it"
                    )
            if not _create(folder, last + 1, me):
                continue
            # between the look and the file, others may have come and gone
            before = _owner(folder / f"{PREFIX}{last}") if last else None
            same = before is None or before.get("token") == (dead or {}).get("token")
            if same and max(_numbers(folder), default=0) <= last + 1:
                return Lock(folder, last + 1, me)
            (folder / f"{PREFIX}{last + 1}").unlink(missing_ok=True)
            time.sleep(0.01 + secrets.randbelow(50) / 1000)
    except OSError as error:
        raise write_failure(folder / PREFIX, error) from error


def _create(folder: Path, number: int, owner: dict[str, Any]) -> bool:
    """Make the lock's file with its content, or find that it exists."""
    path = folder / f"{PREFIX}{number}"
    temporary = folder / f"{TEMPORARY_PREFIX}lock.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        temporary.write_bytes(_text(owner))
        try:
            os.link(temporary, path)
        except FileExistsError:
            # an answer lost on the network: the link was made if there are two of them
            return os.stat(temporary).st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_links(path, owner)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _create_without_links(path: Path, owner: dict[str, Any]) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(_text(owner))
    return True


def _numbers(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    tails = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    return [int(tail) for tail in tails if tail.isdigit()]


def _owner(path: Path) -> dict[str, Any] | None:
    """Who made a lock; None where it is gone. One that cannot be read has an owner elsewhere."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError):
        return {"host": "unknown"}
    try:
        found = json.loads(text)
    except ValueError:
        return {"host": "unknown", "text": text}
    return found if isinstance(found, dict) else {"host": "unknown", "text": text}


def _is_dead(folder: Path, number: int, owner: dict[str, Any]) -> bool:
    alive = _alive(owner)
    if alive is not None:
        return not alive
    path = folder / f"{PREFIX}{number}"
    if _age_by_the_files_own_clock(path) is not None:
        return False
    until = time.monotonic() + STALE_S
    while time.monotonic() < until:
        time.sleep(min(HEARTBEAT_S, STALE_S) / 5)
        if _owner(path) != owner:
            return False
    return True


def _age_by_the_files_own_clock(path: Path) -> float | None:
    """Seconds since the last heartbeat where these are few; None where one has to watch.

    Both times are the file server's, so machines need not agree on the time.
    """
    probe = path.parent / f"{TEMPORARY_PREFIX}clock.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        probe.touch()
        age = probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return None
    finally:
        probe.unlink(missing_ok=True)
    return age if 0 <= age < STALE_S else None


def _alive(owner: dict[str, Any]) -> bool | None:
    """Whether the owner's process lives; None for an owner on another machine."""
    me = _me()
    if any(owner.get(key) != me[key] for key in ("host", "machine")):
        return None
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return None
    started = _started(pid)
    if started is not None:
        return bool(started) and started == owner.get("started")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _me() -> dict[str, Any]:
    """This process: a pid means something only within one boot and one pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = ""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": machine,
        "pid": pid,
        "started": _started(pid) or "",
        "token": secrets.token_hex(8),
        "beat": 0,
    }


def _started(pid: int) -> str | None:
    """When a process began, in clock ticks since boot; "" if it is no more, None without /proc."""
    if not Path("/proc/self/stat").exists():
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _text(owner: dict[str, Any]) -> bytes:
    """Of one length, so that a heartbeat replaces all of it."""
    return json.dumps(owner).ljust(_SIZE - 1).encode() + b"\n"
