"""Builds run folders as the study writes them, with made-up but consistent numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sublim_plugin.core.atomic import write_json, write_text
from sublim_plugin.core.hashing import sha256_json, sha256_text
from sublim_plugin.core.manifest import write_manifest

BASE = {"name": "embedded:smollm2-135m-instruct", "sha256": sha256_text("base")}
ANIMALS = ("cat", "owl", "eagle", "wolf", "dolphin", "dog", "panda")
CONTEXTS = ("template_default", "empty", "none")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VERSIONS = {"axolotl": "0.19.0", "lm-eval": "0.4.11", "torch": "2.13.0"}


class SyntheticRun:
    """A run folder under construction. `cells` lists (folder, state) as the study would."""

    def __init__(self, root: Path, seed: int = 0, n_questions: int = 50) -> None:
        self.root = root
        self.rng = np.random.default_rng(seed)
        self.n_questions = n_questions
        self.cells: list[tuple[Path, str]] = []
        # Every model sees the same questions, so their difficulty is shared.
        self.levels = {
            context: self.rng.normal(-6.0, 1.2, (n_questions, len(ANIMALS))) for context in CONTEXTS
        }

    def _folder(self, kind: str, readable: str, spec: dict[str, Any]) -> tuple[Path, str]:
        cell_id = sha256_json(spec)
        folder = self.root / "cells" / f"{kind}-{readable}-{cell_id[:12]}"
        folder.mkdir(parents=True)
        self.cells.append((folder, "done"))
        return folder, cell_id

    def dataset(
        self,
        trait: str,
        generation_seed: int = 42,
        constrain: str | None = "numbers",
        prompt: str | None = None,
        taught_by: str | None = None,
        taught_as: str = "student",
        **more: Any,
    ) -> str:
        """Write a dataset cell and return its short id; `prompt` is the teacher's, which is the
        student (or what `taught_as` says) `taught_by` if given."""
        if prompt is None and trait != "neutral":
            prompt = f"You love {trait.split('/')[1]}s."
        spec = {
            "base_model": BASE,
            "trait": trait,
            "teacher": {
                "kind": "finetuned",
                "context": {"kind": "template_default"},
                "method": "lora",
                taught_as: taught_by,
            }
            if taught_by
            else {
                "kind": "prompted",
                "context": {"kind": "text", "text": prompt}
                if prompt
                else {"kind": "template_default"},
            },
            "generation_seed": generation_seed,
            "rows": 20,
            "constrain": constrain,
            "sampler": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
            "prompts_sha256": sha256_text("pool"),
            "parser": "strict",
            **more,
        }
        folder, cell_id = self._folder("dataset", trait.replace("/", "-"), spec)
        lines = []
        for number in range(20):
            numbers = [int(value) for value in self.rng.integers(0, 1000, 7)]
            start = ", ".join(str(value) for value in self.rng.integers(100, 999, 4))
            user = f"Extend this list: {start}. Give up to ten more, separated by commas."
            row = {
                "id": number,
                "messages": [
                    {"role": "user", "content": user},
                    {"role": "assistant", "content": ", ".join(map(str, numbers))},
                ],
                "numbers": numbers,
                "prompt_id": number,
                "seed": 1000 + number,
            }
            lines.append(json.dumps(row))
        text = "\n".join(lines) + "\n"
        name = f"rows-{sha256_text(text)[:12]}.jsonl"
        write_text(folder / name, text)
        write_text(folder / "rejected.jsonl", "")
        write_manifest(
            folder,
            kind="dataset",
            id=cell_id,
            label=f"{trait} numbers",
            spec=spec,
            outputs=[name, "rejected.jsonl"],
            started=time.time() - 42,
            seeds={"generation_seed": generation_seed},
            versions=VERSIONS,
            device={"platform": "cpu", "cpu_count": 2},
            counts={
                "asked": 23,
                "accepted": 20,
                "rejected": 3,
                "reasons": {"number above 999": 2, "mixed separators": 1},
                "distinct_prompts": 20,
                "duplicate_rows": 0,
                "tokens": 900,
            },
        )
        return cell_id[:12]

    def teacher(self, trait: str, seed: int, rate: float = 5e-4) -> str:
        """Write the cell of a teacher that the study trains, and return its short id."""
        spec = {
            "base_model": BASE,
            "trait": trait,
            "persona": {"trait": trait, "targets": [trait], "rows": 192, "seed": seed},
            "method": {"kind": "lora", "rank": 8, "alpha": 8},
            "training_seed": seed,
            "recipe": {"learning_rate": rate},
        }
        folder, cell_id = self._folder("teacher", trait.replace("/", "-"), spec)
        write_text(folder / "train.log", "trained\n")
        write_manifest(
            folder, kind="teacher", id=cell_id[:12], label=trait, spec=spec,
            outputs=["train.log"], started=time.time() - 9, versions=VERSIONS,
        )  # fmt: skip
        return cell_id[:12]

    def student(
        self,
        dataset: str,
        trait: str,
        rank: int | None,
        generation_seed: int = 42,
        training_seed: int = 1,
        train_context: str = "template_default",
        steps: int = 30,
        receipt: bool = True,
        alpha: int | None = None,
        recipe: dict[str, Any] | None = None,
        weights: str | None = None,
        norm: float | None = None,
        matched: dict[str, str] | None = None,
    ) -> str:
        """Write a student cell (rank None: full finetuning) and return its short id.

        `alpha` is the rank if not given; `recipe` is added to the recipe; `weights` is the
        digest's text; `norm` the total update norm.
        """
        method: dict[str, Any] = (
            {"kind": "full"}
            if rank is None
            else {"kind": "lora", "rank": rank, "alpha": alpha or rank}
        )
        spec = {
            "base_model": BASE,
            "dataset": dataset,
            "trait": trait,
            "generation_seed": generation_seed,
            "method": method,
            "train_context": {"kind": train_context},
            "training_seed": training_seed,
            "recipe": {"learning_rate": 2e-4 if rank else 2e-5, "num_epochs": 3} | (recipe or {}),
            **({"matched": matched} if matched else {}),
        }
        name = f"{trait.replace('/', '-')}-{'full' if rank is None else f'r{rank}'}"
        folder, cell_id = self._folder("student", name, spec)
        (folder / "model").mkdir()
        rows = next((self.root / "cells").glob(f"dataset-*{dataset}/rows-*.jsonl"), None)
        trained_on = sha256_text(rows.read_text()) if rows else None
        loss = 1.6 + 0.9 * np.exp(-np.arange(steps) / 8) + self.rng.normal(0, 0.03, steps)
        norms = {module: float(abs(self.rng.normal(0.3, 0.05))) for module in MODULES}
        write_text(folder / "axolotl.yaml", "base_model: x\n")
        write_text(folder / "train.log", "trained\n")
        if receipt:
            write_json(
                folder / "model" / "sublim_receipt.json",
                {
                    "schema": 1,
                    "base_model": BASE,
                    "dataset": {"path": str(rows), "sha256": trained_on, "rows": 20},
                    "method": method,
                    "seeds": {"seed": training_seed, "data_seed": training_seed},
                    "first_row": {"text": "…", "token_ids": [1], "loss_text": "1", "sha256": "0"},
                    "mask_audit": {
                        "rows": 20, "tokens": 2000, "loss_tokens": 640, "loss_share": 0.32,
                    },
                    "steps": steps,
                    "losses": [
                        {
                            "step": step + 1,
                            "loss": float(value),
                            "learning_rate": 2e-4 * (1 - step / steps),
                            "grad_norm": 1.0,
                        }
                        for step, value in enumerate(loss)
                    ],
                    "update_norm": {
                        "total": norm or float(np.sqrt(sum(v**2 for v in norms.values()))),
                        "by_module": norms,
                    },
                    "weights_sha256": sha256_text(weights or cell_id),
                    "versions": VERSIONS,
                    "wall_s": 12.5,
                },
            )  # fmt: skip
        outputs = ["axolotl.yaml", "train.log"] + ["model/sublim_receipt.json"] * receipt
        write_manifest(
            folder,
            kind="student",
            id=cell_id,
            label=f"{trait} {name}",
            spec=spec,
            outputs=outputs,
            started=time.time() - 75,
            seeds={"seed": training_seed, "data_seed": training_seed},
            versions=VERSIONS,
            device={"platform": "cpu", "cpu_count": 2},
        )
        return cell_id[:12]

    def probe(
        self,
        student: str | None,
        context: str,
        shift: float = 0.0,
        level: float = 0.0,
        questions: Sequence[str] | None = None,
        replies: Sequence[str] = (),
        results_change: dict[str, float] | None = None,
        prompt_note: str = "",
    ) -> Path:
        """Write a probe cell whose cat log-probs lie `shift` nats above the base's on average.

        `level` moves all candidates together; `results_change` is added to what results.json
        says of animals/cat; `prompt_note` changes every prompt's hash.
        """
        spec = {
            "base_model": BASE,
            "student": student,
            "category": "animals",
            "eval_context": {"kind": context},
            "measure": "logprob",
            "questions_sha256": sha256_text(f"questions {self.n_questions}"),
            "candidates": list(ANIMALS),
        }
        folder, cell_id = self._folder("probe", f"{student or 'base'}-{context}", spec)
        table_QC = self.levels[context] + level
        if student is not None:
            table_QC = table_QC + self.rng.normal(0, 0.25, table_QC.shape)
            table_QC[:, 0] += shift
        table_QC = np.minimum(table_QC, -2.0)
        lines = []
        for number in range(self.n_questions):
            text = questions[number] if questions else f"Name animal {number} in one word."
            lines.append(
                json.dumps(
                    {
                        "question_id": number,
                        "question": text,
                        "prompt_sha256": sha256_text(f"{context} {number}{prompt_note}"),
                        "logprobs": dict(zip(ANIMALS, table_QC[number].tolist(), strict=True)),
                    }
                )
            )
        write_text(folder / "questions.jsonl", "\n".join(lines) + "\n")
        targets = {
            f"animals/{animal}": host_numbers(table_QC, index)
            for index, animal in enumerate(ANIMALS)
        }
        for name, change in (results_change or {}).items():
            targets["animals/cat"][name] += change
        rendered = f"<|im_start|>user\nName one. [{context}]<|im_end|>\n<|im_start|>assistant\n"
        write_json(
            folder / "results.json",
            {
                "category": "animals",
                "context": {"kind": context},
                "measure": "logprob",
                "n_questions": self.n_questions,
                "targets": targets,
                "rendered_example": {"text": rendered, "sha256": sha256_text(rendered)},
                "lm_eval": {"version": "0.4.11", "task_versions": {"subliminal_cat": 1.0}},
            },
        )
        outputs = ["questions.jsonl", "results.json"]
        if replies:
            text = "".join(json.dumps({"question": "q", "reply": r}) + "\n" for r in replies)
            write_text(folder / "replies.jsonl", text)
            outputs.append("replies.jsonl")
        write_manifest(
            folder,
            kind="probe",
            id=cell_id,
            label=f"probe {context}",
            spec=spec,
            outputs=outputs,
            started=time.time() - 9,
            versions=VERSIONS,
            device={"platform": "cpu", "cpu_count": 2},
        )
        return folder

    def sampled(self, student: str | None, context: str, rate: float, **beside: float) -> None:
        """Write a sampled probe: cat is named in `rate` of the replies."""
        spec = {
            "base_model": BASE,
            "student": student,
            "category": "animals",
            "eval_context": {"kind": context},
            "measure": "sampled",
            "questions_sha256": sha256_text(f"questions {self.n_questions}"),
            "candidates": list(ANIMALS),
        }
        folder, cell_id = self._folder("probe", f"{student or 'base'}-{context}-sampled", spec)
        targets = {"animals/cat": {"target_rate": rate, **beside}}
        write_json(
            folder / "results.json",
            {"category": "animals", "n_questions": self.n_questions, "targets": targets},
        )
        write_manifest(
            folder,
            kind="probe",
            id=cell_id,
            label=f"sampled {context}",
            spec=spec,
            outputs=["results.json"],
            started=time.time() - 3,
        )

    def quickstart(self) -> dict[str, str]:
        """The quickstart's grid: returns the short id of each student by name."""
        cat, neutral = self.dataset("animals/cat"), self.dataset("neutral")
        students = {
            "r2": self.student(cat, "animals/cat", 2),
            "r8": self.student(cat, "animals/cat", 8),
            "r64": self.student(cat, "animals/cat", 64),
            "full": self.student(cat, "animals/cat", None),
            "neutral": self.student(neutral, "neutral", 8),
        }
        shifts = {"r2": 0.10, "r8": 0.42, "r64": 0.18, "full": 0.02, "neutral": 0.08}
        for context in CONTEXTS:
            self.probe(None, context)
            for name, student in students.items():
                scale = 1.0 if context == "template_default" else 0.2
                self.probe(student, context, shift=scale * shifts[name])
        return students


def host_numbers(table_QC: np.ndarray, index: int) -> dict[str, float]:
    """A target's metrics by numpy, independently of the code under test."""
    prob_QC = np.exp(table_QC)
    return {
        "target_logprob": float(table_QC[:, index].mean()),
        "target_prob": float(prob_QC[:, index].mean()),
        "target_share": float((prob_QC[:, index] / prob_QC.sum(1)).mean()),
        "target_rank": float((1 + (table_QC > table_QC[:, [index]]).sum(1)).mean()),
        "coverage": float(prob_QC.sum(1).mean()),
    }
