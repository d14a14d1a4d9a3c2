"""Processes of a study, found by a variable in their environment, whatever they are called."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MARK = "SUBLIM_TEST_RUN"


def start(
    study: Path, folder: Path, mark: str, *options: str, stdout: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """`sublim run` in the background; all its processes carry the mark."""
    program = Path(sys.executable).parent / "sublim"
    return subprocess.Popen(
        [str(program), "run", str(study), "--out", str(folder), *options],
        env={**os.environ, MARK: mark},
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def marked(mark: str) -> list[int]:
    """Living processes with the mark; zombies are dead."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            inside = needle in (entry / "environ").read_bytes().split(b"\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if inside and state not in "ZX":
            found.append(int(entry.name))
    return sorted(found)


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def none_left(mark: str, seconds: float = 20.0) -> None:
    """Fails where a process with the mark is still there after a while."""
    deadline = time.monotonic() + seconds
    while left := marked(mark):
        assert time.monotonic() < deadline, [command_line(pid)[:200] for pid in left]
        time.sleep(0.1)


def wait_for(moment: Any, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < deadline
        time.sleep(0.05)
