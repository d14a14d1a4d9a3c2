"""Package versions and the machine, as manifests record them. Imports none of the packages."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

HOSTS = (
    "sublim", "torch", "transformers", "peft", "trl", "axolotl", "deepspeed", "lm_eval", "datasets",
    "safetensors", "numpy",
)  # fmt: skip


def installed(names: Iterable[str] = HOSTS) -> dict[str, str]:
    """Versions of those of `names` that are installed, with Python's own first."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_info() -> dict[str, Any]:
    """The machine that did the work: system, processor architecture, cores, thread setting."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }
