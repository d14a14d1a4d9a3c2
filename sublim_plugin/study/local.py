"""The local engine: worker processes on this machine, one a GPU, or one where there is none."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from sublim_plugin.core.processes import die_with_parent
from sublim_plugin.study.worker import Tell

GRACE_S = 20.0
"""Seconds in which a worker that is told to stop gives up its locks and keeps what it has."""


class LocalWorker:
    """A worker process that serves; all methods but `stop` are for one thread.

    It ends when its stdin does, and so with this process; `tied` makes it end at once with the
    thread that makes it.
    """

    def __init__(
        self, study_path: Path, run_dir: Path, gpus: str | None = None, *, tied: bool = True
    ) -> None:
        command = [sys.executable, "-P", "-m", "sublim_plugin.study.worker"]
        # Threads that wait without spinning: beside another busy process, spinning costs many
        # times the work.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        self._child = subprocess.Popen(
            [*command, str(study_path), str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the coordinator, which stops its workers
            preexec_fn=die_with_parent() if tied else None,
        )

    def make(self, cell_id: str, tell: Tell) -> tuple[int | None, str | None]:
        """Make a cell; returns its exit code and message, or None and how the worker died."""
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(f"{cell_id}\n".encode())
            self._child.stdin.flush()
        except OSError:
            return None, self._death()
        for line in self._child.stdout:
            said = json.loads(line)
            if "code" in said:
                return said["code"], said["error"]
            tell(said["at"], said["of"])
        return None, self._death()

    def _death(self) -> str:
        code = self._child.wait()
        if code < 0:
            return f"its worker process was killed by {signal.Signals(-code).name}" + (
                " (out of memory?)" if -code == signal.SIGKILL else ""
            )
        return f"its worker process ended with {code}"

    def stop(self) -> None:
        """Ask it to end: at once where it is idle, else by SIGTERM. May be called by any thread."""
        if self._child.poll() is None:
            self._child.terminate()

    def close(self) -> None:
        """Wait until it has ended; it is killed after `GRACE_S` seconds."""
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # it died with a request unread
                pipe.close()
        try:
            self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
