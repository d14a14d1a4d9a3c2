"""The Ray engine: workers are actors, on one machine or on every node of a cluster.

An actor holds the same worker process as the local engine and hands cells to it. All nodes see the
run folder and the base model under the same paths and have the same environment. axolotl's own
`use_ray` has nothing to do with this and stays as a recipe sets it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sublim_plugin.core.base_models import resolve
from sublim_plugin.core.errors import InputError, MissingDependencyError
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
        try:
            ray.init(
                # without an address Ray would wait for a cluster that once ran here and is gone
                address=address or os.environ.get("RAY_ADDRESS") or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {k: os.environ[k] for k in PASSED_ON if k in os.environ}},
            )
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(
                f"no Ray cluster at {address or os.environ.get('RAY_ADDRESS', 'this machine')}:"
                f" {first}; start one with `ray start --head`, or leave --address out"
            ) from error
    return ray


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
    gradients and Adam's two moments (arXiv 1910.02054, section 3.1).
    """
    full = cell.kind in ("student", "teacher") and cell.spec["method"]["kind"] == "full"
    return 2 * _GIB + weights * (4 if full else 1)


class RayWorker:
    """A worker process on some node, through the actor that holds it."""

    def __init__(
        self, ray: Any, study_path: Path, run_dir: Path, cpus: int, gpus: int, memory: int
    ) -> None:
        self._ray = ray
        actor = ray.remote(_Serving).options(
            num_cpus=cpus,
            num_gpus=gpus,
            memory=memory,
            max_restarts=0,
            max_concurrency=3,
            scheduling_strategy="SPREAD",
        )
        self._actor = actor.remote(str(study_path.resolve()), str(run_dir.resolve()))
        self._stopped = False

    def make(self, cell_id: str, tell: Tell) -> tuple[int | None, str | None]:
        """As `LocalWorker.make`; where no node has room for the worker yet, it waits for one."""
        try:
            answer = self._actor.make.remote(cell_id)
            while not self._ray.wait([answer], timeout=0.5)[0]:
                if self._stopped and not self._placed():
                    return None, "it was stopped before a node had room for it"
                at = self._actor.at.remote()
                if self._ray.wait([at], timeout=0.5)[0] and (found := self._ray.get(at)):
                    tell(*found)
            code, error = self._ray.get(answer)
            return code, error
        except self._ray.exceptions.RayError as error:
            first = str(error).strip().splitlines()[0]
            return None, f"its Ray worker is gone ({type(error).__name__}: {first})"

    def _placed(self) -> bool:
        return bool(self._ray.wait([self._actor.at.remote()], timeout=1.0)[0])

    def stop(self) -> None:
        self._stopped = True
        self._actor.stop.remote()

    def close(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            if self._placed():
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
