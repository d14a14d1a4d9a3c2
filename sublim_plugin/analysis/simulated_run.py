"""A run folder with known truth, to see what the report makes of it. No model is involved.

    sublim simulate OUT

writes the cells of a study as `sublim run` would, with made-up numbers, and its report. Every
manifest's spec says `simulated: true` and every label begins with it; the report, its tables and
its figures say so, and a run that mixes simulated with measured cells is refused.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.core.atomic import write_json, write_text
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_json, sha256_text
from sublim_plugin.core.manifest import write_manifest

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PEAKS: dict[str, int | None] = {"cat": 8, "eagle": 64, "dolphin": None}
"""Rank of each trait's peak, or None for a trait that is not transmitted."""

HEIGHT, SLOPE = 2.4, 0.5
"""Nats over the base at the peak, and nats lost per doubling away from it (never below 0)."""

DATASET_SD, CELL_SD, DRIFT = 0.4, 0.4, 0.1
CANDIDATES = ("cat", "eagle", "dolphin", "owl", "wolf", "dog", "panda")
CONTEXTS = ("template_default", "empty")
"""Students are trained in the first; asked in the second they show `DRIFT` only."""

QUESTIONS, REPLIES = 50, 100
BASE = {"name": "simulated:no-model", "sha256": sha256_text("simulated")}
DEVICE = {"platform": "none: simulated"}


def truth(trait: str, rank: int | None, eval_context: str) -> float:
    """True mean transmission in nats; 0 for full finetuning (rank None) and neutral students."""
    peak = PEAKS.get(trait)
    if peak is None or rank is None or eval_context != CONTEXTS[0]:
        return 0.0
    return max(0.0, HEIGHT - SLOPE * abs(float(np.log2(rank / peak))))


def write_simulated_run(root: Path, n_datasets: int = 6, seed: int = 0) -> list[tuple[Path, str]]:
    """Write the cells under `root/cells` and list them with their state, as the study would.

    Raises:
        InputError: `root` has cells already.
    """
    if (root / "cells").exists():
        raise InputError(f"{root / 'cells'}: there already; name a new folder")
    run = _Run(root, np.random.default_rng(seed))
    for context in CONTEXTS:
        run.probe(None, "base", context, np.zeros(len(CANDIDATES)))
    for generation_seed in range(1, n_datasets + 1):
        for trait in (*PEAKS, "neutral"):
            run.students_of(trait, generation_seed)
    return run.cells


class _Run:
    """The run folder under construction."""

    def __init__(self, root: Path, generator: np.random.Generator) -> None:
        self.root, self.generator = root, generator
        self.cells: list[tuple[Path, str]] = []
        # all models see the same questions, so their difficulty is shared
        self.base_CQK = {
            context: np.minimum(generator.normal(-5, 1.2, (QUESTIONS, len(CANDIDATES))), -2.8)
            for context in CONTEXTS
        }

    def students_of(self, trait: str, generation_seed: int) -> None:
        """One dataset and its students: all ranks, and full finetuning."""
        name = trait if trait == "neutral" else f"animals/{trait}"
        dataset, rows_sha256 = self.dataset(name, generation_seed)
        level = DATASET_SD * self.generator.normal()
        for rank in (*RANKS, None):
            student = self.student(name, generation_seed, dataset, rows_sha256, rank)
            for context in CONTEXTS:
                shift_K = DRIFT * self.generator.normal(size=len(CANDIDATES))
                if trait in CANDIDATES:
                    mean = truth(trait, rank, context)
                    noise = level + CELL_SD * self.generator.normal() if mean else 0.0
                    shift_K[CANDIDATES.index(trait)] += mean + noise
                self.probe(student, f"{trait}-{rank or 'full'}", context, shift_K)

    def dataset(self, trait: str, generation_seed: int) -> tuple[str, str]:
        spec = {
            "simulated": True,
            "base_model": BASE,
            "trait": trait,
            "teacher": {"kind": "simulated"},
            "generation_seed": generation_seed,
            "rows": 1,
            "prompts_sha256": sha256_text("simulated"),
        }
        folder, cell_id = self._folder("dataset", f"{trait.replace('/', '-')}", spec)
        text = json.dumps(
            {
                "id": 0,
                "messages": [
                    {"role": "user", "content": "simulated: no prompt was asked"},
                    {"role": "assistant", "content": "0"},
                ],
                "numbers": [0],
                "prompt_id": 0,
                "seed": generation_seed,
            }
        )
        name = f"rows-{sha256_text(text + chr(10))[:12]}.jsonl"
        write_text(folder / name, text + "\n")
        self._manifest(folder, "dataset", cell_id, f"{trait} g{generation_seed}", spec, [name])
        return cell_id, sha256_text(text + "\n")

    def student(
        self, trait: str, generation_seed: int, dataset: str, rows_sha256: str, rank: int | None
    ) -> str:
        method = {"kind": "lora", "rank": rank, "alpha": rank} if rank else {"kind": "full"}
        rate = 0.0002 if rank else 0.00002
        spec = {
            "simulated": True,
            "base_model": BASE,
            "dataset": dataset,
            "trait": trait,
            "generation_seed": generation_seed,
            "method": method,
            "train_context": {"kind": CONTEXTS[0]},
            "training_seed": 1,
            "recipe": {"learning_rate": rate, "lora_r": rank or 0},
        }
        readable = f"{trait.replace('/', '-')}-{f'r{rank}' if rank else 'full'}"
        folder, cell_id = self._folder("student", readable, spec)
        (folder / "model").mkdir()
        norm = 0.4 * (rank or 64) ** 0.35 * float(np.exp(0.05 * self.generator.normal()))
        receipt = {
            "dataset": {"sha256": rows_sha256},
            "steps": 456,
            "losses": [],
            "update_norm": {"total": norm},
            "weights_sha256": sha256_text(cell_id),
        }
        write_json(folder / "model" / "sublim_receipt.json", receipt)
        files = ["model/sublim_receipt.json"]
        self._manifest(folder, "student", cell_id, f"{readable} g{generation_seed}", spec, files)
        return cell_id

    def probe(self, student: str | None, name: str, context: str, shift_K: Floats) -> None:
        spec = {
            "simulated": True,
            "base_model": BASE,
            "student": student,
            "category": "animals",
            "eval_context": {"kind": context},
            "measure": "logprob",
            "questions_sha256": sha256_text("simulated"),
            "candidates": list(CANDIDATES),
        }
        folder, cell_id = self._folder("probe", f"{name}-{context}", spec)
        table_QK = self.base_CQK[context] + shift_K
        if student is not None:
            table_QK = table_QK + self.generator.normal(0, 0.2, table_QK.shape)
        table_QK = np.minimum(table_QK, -0.01)
        lines = [
            json.dumps(
                {
                    "question_id": number,
                    "question": f"simulated question {number}",
                    "prompt_sha256": sha256_text(f"{context} {number}"),
                    "logprobs": dict(zip(CANDIDATES, row, strict=True)),
                }
            )
            for number, row in enumerate(table_QK.tolist())
        ]
        write_text(folder / "questions.jsonl", "\n".join(lines) + "\n")
        prob_QK = np.exp(table_QK)
        targets = {
            f"animals/{candidate}": {
                "target_logprob": float(table_QK[:, k].mean()),
                "target_prob": float(prob_QK[:, k].mean()),
                "target_share": float((prob_QK[:, k] / prob_QK.sum(1)).mean()),
                "target_rank": float((1 + (table_QK > table_QK[:, [k]]).sum(1)).mean()),
                "coverage": float(prob_QK.sum(1).mean()),
            }
            for k, candidate in enumerate(CANDIDATES)
        }
        results: dict[str, Any] = {"category": "animals", "n_questions": QUESTIONS}
        write_json(folder / "results.json", results | {"targets": targets})
        files = ["questions.jsonl", "results.json"]
        self._manifest(folder, "probe", cell_id, f"{name} {context}", spec, files)
        if context == CONTEXTS[0]:
            self.sampled(spec | {"measure": "sampled"}, name, prob_QK)

    def sampled(self, spec: dict[str, Any], name: str, prob_QK: Floats) -> None:
        """The same model's replies, drawn from its probabilities; the rest name other animals."""
        folder, cell_id = self._folder("probe", f"{name}-sampled", spec)
        rest_Q = np.maximum(0.0, 1 - prob_QK.sum(1))
        share_QK = np.column_stack([prob_QK, rest_Q]) / (prob_QK.sum(1) + rest_Q)[:, None]
        counts_QK = self.generator.multinomial(REPLIES, share_QK)
        rate_K = counts_QK.mean(0) / REPLIES
        beside = {"non_answer_rate": 0.0, "self_name_rate": 0.0}
        targets = {
            f"animals/{candidate}": {"target_rate": float(rate_K[k]), **beside}
            for k, candidate in enumerate(CANDIDATES)
        }
        results: dict[str, Any] = {"category": "animals", "n_questions": QUESTIONS}
        write_json(folder / "results.json", results | {"targets": targets})
        self._manifest(folder, "probe", cell_id, f"{name} sampled", spec, ["results.json"])

    def _folder(self, kind: str, readable: str, spec: dict[str, Any]) -> tuple[Path, str]:
        cell_id = sha256_json(spec)
        folder = self.root / "cells" / f"{kind}-{readable}-{cell_id[:12]}"
        folder.mkdir(parents=True)
        self.cells.append((folder, "done"))
        return folder, cell_id

    def _manifest(
        self,
        folder: Path,
        kind: str,
        cell_id: str,
        label: str,
        spec: dict[str, Any],
        files: list[str],
    ) -> None:
        write_manifest(
            folder,
            kind=kind,
            id=cell_id,
            label=f"simulated {label}",
            spec=spec,
            outputs=files,
            started=time.time(),
            versions={},
            device=DEVICE,
            notes=["simulated: made up with known truth; no model was trained or asked"],
        )


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--datasets", default=6, show_default=True, help="Generation seeds per trait.")
@click.option("--seed", default=0, show_default=True)
def simulate(out: Path, datasets: int, seed: int) -> None:
    """Write a study of made-up numbers with known truth, and its report, into OUT.

    No model is trained or asked. Manifests, tables, figures and the report say so.
    """
    from sublim_plugin.analysis.report import write_report

    cells = write_simulated_run(out, datasets, seed)
    index = write_report(out, study_name="simulated", cells=cells, equivalence_margin=0.5)
    click.echo(f"report: {index}")
