"""`make test-chaos`: a study is killed over and over at random and ends as if nothing had been.

Each kill is a SIGKILL of one process of the run, drawn at random: the coordinator, a worker, the
server that trainings are forked from, a training. Half of them come within the first seconds of
what has just been started, where folders, locks and plans are made; the others up to ten seconds
later, and every eighth waits for a training to be there or for a further cell to be done, which a
run that dies every few seconds rarely comes to. Whatever ended is started again with the
same command, sometimes twice at once. `CHAOS_KILLS` (200), `CHAOS_MINUTES` (20) and `CHAOS_SEED`
set how many, for how long at most before the run is let alone, and which.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sublim_plugin.core.manifest import verify

from .conftest import sublim
from .processes import command_line, marked, none_left, start

KILLS = int(os.environ.get("CHAOS_KILLS", "200"))
MINUTES = float(os.environ.get("CHAOS_MINUTES", "20"))
SEED = int(os.environ.get("CHAOS_SEED", str(random.SystemRandom().randrange(10**6))))

PATIENCE_S, PAUSE_S = 30.0, 10.0
"""How long is waited at most for a training or a cell, and between two kills; less when late."""

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]


def test_random_kills_lose_nothing(
    write_study: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    study, _ = write_study("chaos", full=True)
    undisturbed, folder, mark = study.parent / "undisturbed", tmp_path / "run", str(tmp_path)
    done = sublim("run", study, "--out", undisturbed)
    assert done.returncode == 0, done.stderr[-3000:]

    chance = random.Random(SEED)
    print(f"seed {SEED}")
    deadline = time.monotonic() + 60 * MINUTES
    killed: Counter[str] = Counter()
    finished: dict[Path, int] = {}
    runs: list[subprocess.Popen[str]] = []
    rounds = 0
    while sum(killed.values()) < KILLS:
        assert time.monotonic() < deadline, (
            f"only {sum(killed.values())} kills in {MINUTES} minutes"
        )
        runs = [run for run in runs if run.poll() is None]
        if not runs:
            if all_done(folder, undisturbed):
                # another round, from an empty folder
                equal(folder, undisturbed)
                rounds += 1
                folder = tmp_path / f"run{rounds}"
                finished = {}
            runs = [quietly(study, folder, mark) for _ in range(1 + (chance.random() < 0.15))]
        number = sum(killed.values())
        left = (deadline - time.monotonic()) / (KILLS - number)
        patience, pause = min(PATIENCE_S, 5 * left), min(PAUSE_S, left)
        if number % 8 == 3:
            awaited = until(lambda: "training" in by_kind(mark), mark, patience)
        elif number % 8 == 7:
            awaited = until(partial(differs, folder, done_in(folder)), mark, patience)
        else:
            awaited = False
        time.sleep(
            chance.uniform(0.05, min(3.0, pause))
            if chance.random() < 0.5
            else chance.uniform(0, pause)
        )
        victims = by_kind(mark)
        if not victims:
            continue
        # workers and trainings are few beside their helpers; take kinds alike
        name = chance.choice(sorted(victims))
        if awaited and "training" in victims:
            name = "training"
        try:
            os.kill(chance.choice(victims[name]), signal.SIGKILL)
        except ProcessLookupError:
            continue
        killed[name] += 1
        for path, stamp in finished.items():
            assert path.stat().st_mtime_ns == stamp, f"{path} was made again"
        finished |= {p: p.stat().st_mtime_ns for p in folder.glob("cells/*/manifest.json")}
    for run in runs:
        run.kill()
        run.wait()
    none_left(mark)
    done = sublim("run", study, "--out", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    equal(folder, undisturbed)
    none_left(mark, 1)
    assert not [*folder.rglob(".lock-*"), *folder.glob("cells/*/.model.*")]
    again = sublim("run", study, "--out", folder)
    assert again.returncode == 0 and "done, in" in again.stderr
    print(f"{sum(killed.values())} kills ({dict(killed)}), {rounds} whole rounds before the last")


def quietly(study: Path, folder: Path, mark: str) -> subprocess.Popen[str]:
    return start(study, folder, mark, stdout=subprocess.DEVNULL)


def by_kind(mark: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for pid in marked(mark):
        found.setdefault(kind(pid), []).append(pid)
    return found


def kind(pid: int) -> str:
    line = command_line(pid)
    for word, name in (
        (b"study.worker", "worker"), (b"sublim\0run", "coordinator"),
        (b"axolotl", "training"), (b"resource_tracker", "resource tracker"),
        (b"multiprocess.", "tokenizing"),
    ):  # fmt: skip
        if word in line:
            return name
    if b"multiprocessing.forkserver" not in line:
        return "other"
    # a training is a copy of the server it was forked from, in a session of its own
    with contextlib.suppress(ProcessLookupError):
        return "training" if os.getsid(pid) == pid else "fork server"
    return "other"


def until(moment: Callable[[], bool], mark: str, patience: float) -> bool:
    """Whether the moment came, within `patience` seconds and while a run was alive."""
    deadline = time.monotonic() + patience
    while not (now := moment()) and time.monotonic() < deadline and marked(mark):
        time.sleep(0.05)
    return now


def differs(run: Path, cells: set[str]) -> bool:
    return done_in(run) != cells


def done_in(run: Path) -> set[str]:
    return {path.parent.name for path in run.glob("cells/*/manifest.json")}


def all_done(folder: Path, undisturbed: Path) -> bool:
    return done_in(folder) == done_in(undisturbed)


def equal(folder: Path, undisturbed: Path) -> None:
    """The same cells, the same rows, and every probe's numbers to 1e-5."""
    assert all_done(folder, undisturbed)
    for path in folder.glob("cells/*/manifest.json"):
        theirs = undisturbed / "cells" / path.parent.name
        manifest, expected = verify(path.parent), verify(theirs)
        assert manifest.spec == expected.spec
        if manifest.kind == "dataset":
            assert manifest.outputs == expected.outputs
        if manifest.kind == "probe":
            for ours, other in zip(
                (path.parent / "questions.jsonl").open(),
                (theirs / "questions.jsonl").open(),
                strict=True,
            ):
                assert json.loads(ours)["logprobs"] == pytest.approx(
                    json.loads(other)["logprobs"], abs=1e-5
                )
