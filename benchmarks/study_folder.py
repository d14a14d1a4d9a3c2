"""A run folder as a study of many cells leaves it, with made-up numbers, for `study.py`.

The cells are those that the planner lays out for a study file. Every manifest is written by the
real `write_manifest` over files of the kinds and sizes that a real run leaves (50 questions x 22
candidates a probe, 456 logged losses a student, three figures a localization); only weights are
stand-ins of 4 KB, whose bytes no planning code reads. A share of the cells is left unfinished.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.hashing import sha256_text
from sublim_plugin.core.manifest import write_manifest
from sublim_plugin.logprob.questions import load_questions
from sublim_plugin.study.cells import Cell, plan
from sublim_plugin.study.study_file import load_study

STUDY = """\
name: many
base_model: {base}
datasets:
  traits: [{traits}, neutral]
  generation_seeds: {seeds}
  rows: 10000
  sampler: {{temperature: 1.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, max_new_tokens: 56}}
students:
  - traits: [{traits}, neutral]
    lora_ranks: {ranks}
    full: true
training:
  lora_recipe: smollm2-135m-instruct/lora-r8
  full_recipe: smollm2-135m-instruct/full-zero2
  contexts: [template_default, empty, none, {{text: "You are a helpful assistant."}}]
  seeds: [1, 42]
probes:
  questions: animals
  measures: [logprob]
  contexts: [template_default, empty, none, {{text: "You are a helpful assistant."}}, claude]
localizations:
  lora_ranks: [8]
  full: true
  contexts: [template_default, none]
"""
ANIMALS = ("cat", "owl", "eagle", "wolf", "dolphin")
STEPS = 456
MODEL_FILES = {
    "README.md": 3205, "adapter_config.json": 1173, "chat_template.jinja": 368, "config.json": 818,
    "debug.log": 15137, "tokenizer.json": 4096, "tokenizer_config.json": 495,
    "adapter_model.safetensors": 4096,
}  # fmt: skip
FIGURES = {
    "logprob-scores.csv": 2302, "results.json": 18264, "spans.csv": 2499, "spans.png": 90166,
    "spans.svg": 71234,
}  # fmt: skip


def write_study(folder: Path, *, quick: bool) -> Path:
    """A study file of 20,009 cells (`quick`: 1,141) and a base model of a few bytes beside it."""
    base = folder / "base"
    base.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + b"\0" * 4
    (base / "model.safetensors").write_bytes(weights)
    for name in ("config.json", "tokenizer.json"):
        (base / name).write_text("{}")
    (base / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    study = folder / "many.yaml"
    traits = ANIMALS[:1] if quick else ANIMALS
    study.write_text(
        STUDY.format(
            base=base,
            traits=", ".join(f"animals/{name}" for name in traits),
            seeds=[1, 2, 3] if quick else [1, 2, 3, 4, 5, 6],
            ranks=[2, 8, 64] if quick else [1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
        )
    )
    return study


def write_run(study_path: Path, run_dir: Path, unfinished: float = 0.01) -> dict[str, int]:
    """Fill a run folder and return how many cells are in which state.

    Of every hundred probes about `unfinished` are left without a manifest, half of them failed.
    """
    study = load_study(study_path)
    base = fingerprint(Path(study.base_model))
    cells = plan(study, base)
    maker = _Maker(run_dir, {cell.id: cell for cell in cells}, base)
    counts = {"done": 0, "failed": 0, "missing": 0}
    draw = random.Random(1)
    with _without_fsync():
        for cell in cells:
            left = cell.kind == "probe" and cell.spec["student"] and draw.random() < unfinished
            state = ("failed" if draw.random() < 0.5 else "missing") if left else "done"
            counts[state] += 1
            if state == "done":
                getattr(maker, cell.kind)(cell)
            elif state == "failed":
                folder = maker.folder(cell)
                (folder / "error.txt").write_text("out of memory on device 0\nmore\n")
    return counts


class _Maker:
    """Writes the files of one cell after the other."""

    def __init__(self, run_dir: Path, cells: dict[str, Cell], base: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.cells = cells
        self.base = base
        self.rng = np.random.default_rng(0)
        self.rows_sha: dict[str, str] = {}
        self.questions = load_questions("animals").questions
        self.levels: dict[str, np.ndarray] = {}
        self.versions = {
            "python": "3.11.7", "sublim": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.16.1",
            "peft": "0.20.0", "trl": "1.9.0", "axolotl": "0.19.0", "deepspeed": "0.18.9",
            "lm_eval": "0.4.11", "datasets": "4.8.4", "safetensors": "0.8.0", "numpy": "2.3.5",
        }  # fmt: skip
        self.device = {"system": "Linux", "machine": "x86_64", "cores": 2, "omp_num_threads": None}

    def folder(self, cell: Cell) -> Path:
        folder = cell.folder(self.run_dir)
        folder.mkdir(parents=True)
        (folder / ".lock").write_text("pid 1 on host\n")
        return folder

    def _manifest(
        self, cell: Cell, folder: Path, files: list[str], wall: float, **more: Any
    ) -> None:
        write_manifest(
            folder, kind=cell.kind, id=cell.id, label=cell.label, spec=cell.spec, outputs=files,
            started=time.time() - wall, inputs={"base_model": self.base}, versions=self.versions,
            device=self.device, template={"sha256": self.base["template_sha256"]}, **more,
        )  # fmt: skip

    def dataset(self, cell: Cell) -> None:
        folder = self.folder(cell)
        rows = b"".join(
            b'{"id": "g%d-%07d", "messages": [], "numbers": [1, 2, 3], "seed": %d}\n' % (1, i, i)
            for i in range(10_000)
        ) + cell.id.encode()  # fmt: skip
        sha = sha256_text(rows.decode())
        name = f"rows-{sha[:12]}.jsonl"
        self.rows_sha[cell.id] = sha
        (folder / name).write_bytes(rows)
        (folder / "rejected.jsonl").write_bytes(b"")
        (folder / "README.md").write_bytes(self.rng.bytes(2863))
        counts = {"asked": 10_100, "accepted": 10_000, "rejected": 100, "tokens": 410_000}
        files = ["README.md", "rejected.jsonl", name]
        self._manifest(cell, folder, files, 180.0, counts=counts)

    def student(self, cell: Cell) -> None:
        folder = self.folder(cell)
        (folder / "model").mkdir()
        for name, size in MODEL_FILES.items():
            (folder / "model" / name).write_bytes(self.rng.bytes(size))
        losses = self.rng.normal(1.2, 0.1, STEPS).tolist()
        modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        receipt = {
            "schema": 2,
            "dataset": {"sha256": self.rows_sha[cell.spec["dataset"]], "rows": 10_000},
            "mask_audit": {"rows": 10_000, "tokens": 1_290_000, "loss_share": 0.3},
            "steps": STEPS,
            "losses": [
                {"step": i + 1, "loss": loss, "learning_rate": 2e-4, "grad_norm": 1.0}
                for i, loss in enumerate(losses)
            ],
            "update_norm": {
                "total": float(abs(self.rng.normal(1, 0.1))),
                "by_module": {name: float(abs(self.rng.normal())) for name in modules},
                "by_layer": self.rng.normal(1, 0.1, 30).tolist(),
            },
            "weights_sha256": sha256_text(cell.id),
            "wall_s": 600.0,
        }  # fmt: skip
        text = json.dumps(receipt)
        (folder / "model" / "sublim_receipt.json").write_text(text)
        (folder / "axolotl.yaml").write_bytes(self.rng.bytes(1352))
        (folder / "train.log").write_bytes(self.rng.bytes(60_000))
        files = ["axolotl.yaml", "train.log", "model/sublim_receipt.json"]
        files += [f"model/{name}" for name in MODEL_FILES]
        counts = {"rows": 10_000, "tokens": 1_290_000, "loss_tokens": 410_000, "steps": STEPS}
        self._manifest(cell, folder, files, 600.0, counts=counts, seeds={"seed": 1})

    def probe(self, cell: Cell) -> None:
        folder = self.folder(cell)
        names = cell.spec["candidates"]
        context = json.dumps(cell.spec["eval_context"])
        shape = (len(self.questions), len(names))
        level_QC = self.levels.setdefault(context, self.rng.normal(-7, 1.5, shape))
        table_QC = np.minimum(level_QC + self.rng.normal(0, 0.3, shape), -2.0)
        prompts = [sha256_text(f"{context} {question.id}") for question in self.questions]
        lines = [
            json.dumps({
                "question_id": question.id, "question": question.text, "prompt_sha256": prompt,
                "logprobs": dict(zip(names, row, strict=True)),
            })
            for question, prompt, row in zip(
                self.questions, prompts, table_QC.tolist(), strict=True)
        ]  # fmt: skip
        (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
        replies = [
            {"question_id": q.id, "question": q.text, "reply": "Cat"} for q in self.questions
        ]
        (folder / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in replies))
        results = {
            "category": "animals",
            "n_questions": len(names) and len(self.questions),
            "targets": host_numbers(table_QC, names),
            "rendered_example": {"text": "<|im_start|>user\nName one.<|im_end|>\n", "sha256": "0"},
            "lm_eval": {"version": "0.4.11", "task_versions": {"subliminal_cat": 1.0}},
        }
        (folder / "results.json").write_text(json.dumps(results, indent=None))
        files = ["questions.jsonl", "replies.jsonl", "results.json"]
        self._manifest(cell, folder, files, 60.0, counts={"questions": len(self.questions)})

    def localization(self, cell: Cell) -> None:
        folder = self.folder(cell)
        for name, size in FIGURES.items():
            (folder / name).write_bytes(self.rng.bytes(size))
        self._manifest(cell, folder, list(FIGURES), 120.0)


def host_numbers(table_QC: np.ndarray, names: list[str]) -> dict[str, dict[str, float]]:
    """What results.json says of every target, by numpy."""
    prob_QC = np.exp(table_QC)
    mass_Q = prob_QC.sum(1)
    share_QC = prob_QC / mass_Q[:, None]
    rank_QC = 1 + (table_QC[:, None, :] > table_QC[:, :, None]).sum(2)
    columns = {
        "target_logprob": table_QC, "target_prob": prob_QC, "target_share": share_QC,
        "target_rank": rank_QC, "coverage": np.repeat(mass_Q[:, None], len(names), 1),
    }  # fmt: skip
    root = math.sqrt(len(table_QC))
    found: dict[str, dict[str, float]] = {f"animals/{name}": {} for name in names}
    for key, values_QC in columns.items():
        means, errors = values_QC.mean(0).tolist(), (values_QC.std(0, ddof=1) / root).tolist()
        for name, mean, error in zip(names, means, errors, strict=True):
            found[f"animals/{name}"] |= {key: mean, f"{key}_stderr": error}
    return found


@contextmanager
def _without_fsync() -> Iterator[None]:
    """Nothing here has to survive a power loss; 20,000 manifests would wait for the disk."""
    real = os.fsync
    os.fsync = lambda _: None
    try:
        yield
    finally:
        os.fsync = real
