"""The lock of a folder: one owner; dead ones are overtaken, distant ones judged by heartbeat."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from sublim_plugin.core import lock
from sublim_plugin.core.errors import BusyError, RunError
from sublim_plugin.core.lock import PREFIX, cell_lock, held

HOLD = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from sublim_plugin.core.lock import cell_lock
    with cell_lock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
    """
)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that holds the lock of `tmp_path`."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"held\n"
    yield child
    child.kill()
    child.wait()


def as_if_elsewhere(folder: Path) -> Path:
    """The one lock of a folder, rewritten as if its owner were on another machine."""
    (path,) = folder.glob(f"{PREFIX}*")
    owner = json.loads(path.read_text()) | {"host": "elsewhere", "machine": "another"}
    path.write_text(json.dumps(owner))
    return path


def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(lock, "STALE_S", 0.6)


def test_it_is_held_by_one_and_released_by_death(tmp_path: Path, holder: Any) -> None:
    with pytest.raises(BusyError, match=f"pid {holder.pid}") as caught, cell_lock(tmp_path):
        pass
    assert caught.value.exit_code == 75
    assert held(tmp_path)
    holder.kill()
    holder.wait()
    assert not held(tmp_path)
    with cell_lock(tmp_path):
        assert held(tmp_path)
        assert not list(tmp_path.glob(".tmp-*"))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_stopped_keeps_its_lock(
    tmp_path: Path, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly(monkeypatch)
    os.kill(holder.pid, signal.SIGSTOP)
    time.sleep(1.0)
    with pytest.raises(BusyError), cell_lock(tmp_path):
        pass


def test_a_zombie_is_dead(tmp_path: Path, holder: Any) -> None:
    holder.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
    with cell_lock(tmp_path):
        pass


def test_a_pid_that_another_process_got_is_not_the_owner(tmp_path: Path, holder: Any) -> None:
    (path,) = tmp_path.glob(f"{PREFIX}*")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": "1"}))
    with cell_lock(tmp_path):
        pass


@pytest.mark.parametrize("jump", [-7200, 7200])
def test_an_owner_elsewhere_lives_by_its_heartbeat_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: int
) -> None:
    """The file's time is two hours off, as after a jump; the counter moves, so it is alive."""
    quickly(monkeypatch)
    (tmp_path / f"{PREFIX}1").write_text("{}")
    path = as_if_elsewhere(tmp_path)
    beats = multiprocessing.get_context("fork").Process(target=_beat, args=(path, jump))
    beats.start()
    try:
        with pytest.raises(BusyError, match="on elsewhere"), cell_lock(tmp_path):
            pass
    finally:
        beats.kill()
        beats.join()
    os.utime(path, (time.time() + jump, time.time() + jump))
    started = time.monotonic()
    with cell_lock(tmp_path):
        assert time.monotonic() - started >= lock.STALE_S / 2
    assert list(tmp_path.iterdir()) == []


def _beat(path: Path, jump: int) -> None:
    owner = json.loads(path.read_text())
    while True:
        owner["beat"] = owner.get("beat", 0) + 1
        descriptor = os.open(path, os.O_WRONLY)
        os.pwrite(descriptor, lock._text(owner), 0)
        os.close(descriptor)
        os.utime(path, (time.time() + jump, time.time() + jump))
        time.sleep(0.05)


def test_an_owner_that_was_overtaken_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken for dead while it was frozen elsewhere, it wakes up and finds the other's lock."""
    monkeypatch.setattr(lock, "STALE_S", 0.3)
    with cell_lock(tmp_path) as mine:
        mine.check()
        path = as_if_elsewhere(tmp_path)
        os.utime(path, (0, 0))
        with cell_lock(tmp_path) as other:
            other.check()
            with pytest.raises(RunError, match="took its work over"):
                mine.check()
        # the other one is done; its lock and the dead one's are gone
        assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_read_counts_as_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly(monkeypatch)
    (tmp_path / f"{PREFIX}1").write_bytes(b"\xff garbled")
    with pytest.raises(BusyError), cell_lock(tmp_path):
        pass
    time.sleep(1.5 * lock.STALE_S)
    with cell_lock(tmp_path):
        pass


def test_of_many_who_want_a_dead_ones_lock_one_gets_it_at_a_time(tmp_path: Path) -> None:
    """Six processes, twenty turns each, and now and then one that dies with the lock."""
    context = multiprocessing.get_context("fork")
    counter = tmp_path / "counter"
    counter.write_text("0")
    crowd = [context.Process(target=_turns, args=(tmp_path, counter)) for _ in range(6)]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join(120)
        assert process.exitcode == 0
    assert counter.read_text() == "120"


def _turns(folder: Path, counter: Path) -> None:
    done = 0
    while done < 20:
        try:
            with cell_lock(folder):
                # not atomic: two at once would lose a turn
                value = int(counter.read_text())
                time.sleep(0.0005)
                counter.write_text(str(value + 1))
                done += 1
            if done % 5 == 0:
                _die_with_the_lock(folder)
        except BusyError:
            time.sleep(0.001)


def _die_with_the_lock(folder: Path) -> None:
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BusyError):
            lock._take(folder)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
