"""A simulated study of thousands of cells, with training curves, norms, replies and failures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from sublim_plugin.analysis.collect import CellRef
from sublim_plugin.analysis.simulated_run import write_simulated_run

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS = 456


def write_large_run(root: Path, n_datasets: int, failed: int) -> list[CellRef]:
    """The cells of `write_simulated_run`, with all that makes a report long.

    Every student has `STEPS` losses and norms by module, every sampled probe 20 replies of 2,000
    characters each, and `failed` further cells ended with an error of their own.
    """
    cells = write_simulated_run(root, n_datasets)
    generator = np.random.default_rng(1)
    replies = "".join(
        json.dumps({"question": f"simulated question {i}", "reply": "cat " * 500}) + "\n"
        for i in range(20)
    )
    for folder, _ in cells:
        if folder.name.startswith("student-"):
            path = folder / "model" / "sublim_receipt.json"
            receipt = json.loads(path.read_text())
            loss = 1.6 + 0.9 * np.exp(-np.arange(STEPS) / 90) + generator.normal(0, 0.03, STEPS)
            receipt["losses"] = [
                {"step": step, "loss": value} for step, value in enumerate(loss.tolist(), start=1)
            ]
            norm = receipt["update_norm"]
            norm["by_module"] = dict.fromkeys(MODULES, norm["total"] / 7**0.5)
            _replace(folder, "model/sublim_receipt.json", json.dumps(receipt))
        elif "-sampled-" in folder.name:
            _replace(folder, "replies.jsonl", replies)
    refs = [CellRef(folder=folder, state=state) for folder, state in cells]
    return refs + [
        CellRef(
            folder=root / "cells" / f"student-failed-{i}",
            state="failed",
            label=f"simulated cat lora r8 t{i}",
            error=f"step {i}\n" + "Traceback of a long line " * 200,
        )
        for i in range(failed)
    ]


def _replace(folder: Path, name: str, text: str) -> None:
    """Change a file and its hash in the manifest; no fsync, there are thousands."""
    data = text.encode()
    (folder / name).write_bytes(data)
    path = folder / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text())
    manifest["outputs"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    path.write_text(json.dumps(manifest))
