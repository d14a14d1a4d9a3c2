"""The Ray engine on a real cluster of two nodes: equal results, also when a worker or node dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import equal, sublim
from .processes import command_line, marked, none_left, start, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """A head and another node, each with one CPU; each test has its own."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def on_ray(undisturbed: Path, tmp_path: Path, cluster: Any) -> Any:
    study, folder = undisturbed.parent / "tiny.yaml", tmp_path / "run"
    address = ("--engine", "ray", "--address", cluster.address)
    return start(study, folder, str(tmp_path), *address)


def training(folder: Path) -> bool:
    return bool(list(folder.glob("cells/student-*/.model.partial")))


def test_two_nodes_make_what_one_machine_makes(
    undisturbed: Path, tmp_path: Path, cluster: Any
) -> None:
    child = on_ray(undisturbed, tmp_path, cluster)
    out, _ = child.communicate(timeout=550)
    assert child.returncode == 0, out[-3000:]
    equal(tmp_path / "run", undisturbed)
    none_left(str(tmp_path))


def test_a_worker_that_is_killed_is_replaced(
    undisturbed: Path, tmp_path: Path, cluster: Any
) -> None:
    child = on_ray(undisturbed, tmp_path, cluster)
    wait_for(lambda: training(tmp_path / "run"))
    run = str(tmp_path / "run").encode()
    (pid, *_) = [
        pid for pid in processes() if b"study.worker" in command_line(pid)
        and run in command_line(pid)
    ]  # fmt: skip
    os.kill(pid, signal.SIGKILL)
    out, _ = child.communicate(timeout=550)
    assert child.returncode == 0, out[-3000:]
    assert "killed by SIGKILL (out of memory?); tried again" in out
    equal(tmp_path / "run", undisturbed)


def processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def test_a_node_that_dies_costs_its_cell_alone(
    undisturbed: Path, tmp_path: Path, cluster: Any
) -> None:
    folder = tmp_path / "run"
    child = on_ray(undisturbed, tmp_path, cluster)
    wait_for(lambda: training(folder))
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/manifest.json")}
    assert finished
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    out, _ = child.communicate(timeout=590)
    assert child.returncode == 0, out[-3000:]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    equal(folder, undisturbed)
    assert not marked(str(tmp_path))


def test_a_cluster_that_is_not_there_is_named(undisturbed: Path, tmp_path: Path) -> None:
    options = ("--engine", "ray", "--address", "127.0.0.1:1")
    done = sublim("run", undisturbed.parent / "tiny.yaml", "--out", tmp_path / "run", *options)
    assert done.returncode == 2
    assert "127.0.0.1:1" in done.stderr and "ray start --head" in done.stderr
    assert not (tmp_path / "run" / "cells").exists()
