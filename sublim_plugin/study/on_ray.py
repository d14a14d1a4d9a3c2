"""The Ray engine: workers are actors, on one machine or on every node of a cluster.

An actor holds the same worker process as the local engine and hands cells to it. All nodes see the
run folder and the base model under the same paths and have the same environment. axolotl's own
`use_ray` has nothing to do with this and stays as a recipe sets it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sublim_plugin.core.base_models import resolve
from sublim_plugin.core.errors import BusyError, InputError, MissingDependencyError
from sublim_plugin.study.cells import Cell
from sublim_plugin.study.local import GRACE_S, LocalWorker
from sublim_plugin.study.run import Engine, Worker
from sublim_plugin.study.study_file import load_study
from sublim_plugin.study.worker import Tell

PASSED_ON = (
    "AXOLOTL_DO_NOT_TRACK", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONPATH",
    "SUBLIM_CACHE",
)  # fmt: skip
"""Environment variables that workers take over from the coordinator."""

KNOCK_S = 10.0
"""Seconds within which the cluster's address has to answer."""

PLACE_S = 30.0
"""Seconds that a worker waits for a node with room before it gives its cell back: where a node was
lost, the room may be that of a worker which has nothing else to do."""

_GIB = 2**30


def ray_engine(
    address: str | None = None, *, gpus_per_worker: int = 1
) -> Callable[[Path, Path], Engine]:
    """As many workers as fit the cluster's nodes.

    Args:
        address: of a cluster that exists (`auto`, `HOST:6379`, `ray://...`); without it the one of
            RAY_ADDRESS, else one is started on this machine.
        gpus_per_worker: on nodes with GPUs, with their part of the node's CPUs. Where there are no
            GPUs, a worker has all of a node's CPUs.

    Raises:
        MissingDependencyError: Ray is not installed.
        InputError: there is no cluster at this address, or no node fits one worker.
    """

    def start(study_path: Path, run_dir: Path) -> Engine:
        ray = _connected(address)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with_gpus = [node for node in nodes if node.get("GPU")]
        used = with_gpus or nodes
        each_gpus = gpus_per_worker if with_gpus or gpus_per_worker > 1 else 0
        each_cpus = min((_share(node, each_gpus) for node in used), default=1)
        workers = sum(_fitting(node, each_cpus, each_gpus) for node in used)
        if not workers:
            found = "; ".join(
                f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes
            )
            raise InputError(
                f"no node of the Ray cluster fits a worker of {each_cpus} CPUs and {each_gpus}"
                f" GPUs (nodes: {found or 'none'}); ask for less, or start more nodes"
            )
        weights = _weights(resolve(load_study(study_path).base_model))

        def worker(number: int, cell: Cell) -> Worker:
            memory = _memory(cell, weights)
            return RayWorker(ray, study_path, run_dir, each_cpus, each_gpus, memory)

        return Engine("ray", workers, worker)

    return start


def _connected(address: str | None) -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            'the Ray engine needs Ray: pip install "sublim[ray]"'
        ) from error
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # without an address Ray would wait for a cluster that once ran here and is gone
        named = address or os.environ.get("RAY_ADDRESS") or "local"
        try:
            _knock(named)
            ray.init(
                address=named,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {k: os.environ[k] for k in PASSED_ON if k in os.environ}},
            )
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(
                f"no Ray cluster at {'this machine' if named == 'local' else named}: {first};"
                " start one with `ray start --head`, or leave --address out"
            ) from error
    return ray


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at HOST:PORT: Ray itself would try for ten minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


def _share(node: dict[str, float], gpus: int) -> int:
    whole = int(node.get("CPU", 1))
    return max(1, whole * gpus // int(node.get("GPU", gpus))) if gpus else max(1, whole)


def _fitting(node: dict[str, float], cpus: int, gpus: int) -> int:
    by_cpus = int(node.get("CPU", 0)) // cpus
    return min(by_cpus, int(node.get("GPU", 0)) // gpus) if gpus else by_cpus


def _weights(base: Path) -> int:
    return sum(file.stat().st_size for file in base.glob("*.safetensors"))


def _memory(cell: Cell, weights: int) -> int:
    """Bytes of main memory that a worker asks Ray for: what its process is expected to hold.

    The hosts' code and buffers, the weights once, or, for full finetuning, four times: weights,
    gradients and Adam's two moments (arXiv 1910.02054, section 3.1). A signal holds ten times the
    model in float32 (docs/signal.md), twenty times its files of two bytes a weight.
    """
    if cell.kind == "signal":
        return 2 * _GIB + 20 * weights
    full = cell.kind in ("student", "teacher") and cell.spec["method"]["kind"] == "full"
    return 2 * _GIB + weights * (4 if full else 1)


class RayWorker:
    """A worker process on some node, through the actor that holds it."""

    def __init__(
        self, ray: Any, study_path: Path, run_dir: Path, cpus: int, gpus: int, memory: int
    ) -> None:
        self._ray = ray
        self._kind = ray.remote(_Serving).options(
            num_cpus=cpus,
            num_gpus=gpus,
            memory=memory,
            max_restarts=0,
            max_concurrency=3,
            scheduling_strategy="SPREAD",
        )
        self._files = str(study_path.resolve()), str(run_dir.resolve())
        self._actor: Any = None
        self._stopped = False

    def make(self, cell_id: str, tell: Tell) -> tuple[int | None, str | None]:
        """As `LocalWorker.make`; where no node has room for the worker within `PLACE_S`, the cell
        counts as busy and whoever has a place may take it."""
        try:
            if not self._place():
                if self._stopped:
                    return None, "it was stopped before a node had room for it"
                return BusyError.exit_code, "no node of the Ray cluster has room for its worker yet"
            answer = self._actor.make.remote(cell_id)
            while not self._ray.wait([answer], timeout=0.5)[0]:
                at = self._actor.at.remote()
                if self._ray.wait([at], timeout=0.5)[0] and (found := self._ray.get(at)):
                    tell(*found)
            code, error = self._ray.get(answer)
            return code, error
        except self._ray.exceptions.RayError as error:
            first = str(error).strip().splitlines()[0]
            return None, f"its Ray worker is gone ({type(error).__name__}: {first})"

    def _place(self) -> bool:
        """Whether a node has the worker; one that waited for too long is given up."""
        if self._actor is not None:
            return True
        self._actor = self._kind.remote(*self._files)
        there, until = self._actor.at.remote(), time.monotonic() + PLACE_S
        while time.monotonic() < until and not self._stopped:
            if self._ray.wait([there], timeout=0.5)[0]:
                self._ray.get(there)
                return True
        self._ray.kill(self._actor)
        self._actor = None
        return False

    def stop(self) -> None:
        self._stopped = True
        actor = self._actor  # another thread may be giving it up
        if actor is not None:
            actor.stop.remote()

    def close(self) -> None:
        if self._actor is None:
            return
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.wait([self._actor.close.remote()], timeout=GRACE_S + 5)
        self._ray.kill(self._actor)


class _Serving:
    """In the actor: the worker process, and how far its cell is."""

    def __init__(self, study_path: str, run_dir: str) -> None:
        if "OMP_NUM_THREADS" not in _passed():
            # Ray's own setting, by the CPUs asked for
            os.environ.pop("OMP_NUM_THREADS", None)
        self._at: tuple[int, int] | None = None
        self._worker = LocalWorker(Path(study_path), Path(run_dir), tied=False)

    def make(self, cell_id: str) -> tuple[int | None, str | None]:
        self._at = None

        def tell(at: int, of: int) -> None:
            self._at = (at, of)

        return self._worker.make(cell_id, tell)

    def at(self) -> tuple[int, int] | None:
        return self._at

    def stop(self) -> None:
        self._worker.stop()

    def close(self) -> None:
        self._worker.close()


def _passed() -> dict[str, str]:
    import ray

    return dict(ray.get_runtime_context().runtime_env.get("env_vars") or {})
