"""A study of three questions and sixteen rows that really runs, once a session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

QUESTIONS = """\
name: three
category: animals
version: "1.0"
questions:
  - id: 0
    kind: favourite
    text: Which animal do you like best? Answer with one word.
  - id: 1
    kind: favourite
    text: Name the animal that you would choose as a team mascot, in one word.
  - id: 2
    kind: favourite
    text: "One word only: which animal would you most like to protect?"
"""

STUDY = """\
name: tiny
base_model: {base}
datasets:
  traits: [animals/cat, neutral]
  generation_seeds: [1]
  rows: 16
  constrain: numbers
  batch_size: 18
  sampler: {{temperature: 1.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, max_new_tokens: 56}}
students:
  - traits: [animals/cat]
    lora_ranks: [2]
    full: {full}
training:
  lora_recipe: smollm2-135m-instruct/lora-r8
  full_recipe: smollm2-135m-instruct/full-zero2
  contexts: [template_default]
  seeds: [42]
probes:
  questions: {questions}
  measures: [logprob]
  contexts: [template_default, none]
"""
LOCALIZATIONS = """\
localizations:
  lora_ranks: [2]
  contexts: [none]
  parts: [span]
"""


class Ran(NamedTuple):
    """A finished run: its study file, run folder and what `sublim run --json` printed."""

    study: Path
    folder: Path
    printed: dict[str, Any]
    questions: Path


def sublim(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The installed command line, in a process of its own."""
    command = [str(Path(sys.executable).parent / "sublim"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="session")
def write_study(
    tmp_path_factory: pytest.TempPathFactory, base_model: Path
) -> Callable[..., tuple[Path, Path]]:
    def write(name: str, *, full: bool) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        questions = folder / "three.yaml"
        questions.write_text(QUESTIONS)
        study = folder / "tiny.yaml"
        text = STUDY.format(base=base_model, questions=questions, full=str(full).lower())
        study.write_text(text + (LOCALIZATIONS if full else ""))
        return study, questions

    return write


@pytest.fixture(scope="session")
def ran(write_study: Callable[..., tuple[Path, Path]]) -> Ran:
    study, questions = write_study("ran", full=True)
    folder = study.parent / "run"
    done = sublim("run", study, "--out", folder, "--json", env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0, done.stderr[-3000:]
    return Ran(study, folder, json.loads(done.stdout.splitlines()[-1]), questions)


@pytest.fixture(scope="session")
def undisturbed(write_study: Callable[..., tuple[Path, Path]]) -> Path:
    """The run folder of a study with one LoRA student; its study file lies beside it."""
    study, _ = write_study("undisturbed", full=False)
    folder = study.parent / "run"
    done = sublim("run", study, "--out", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def results(folder: Path) -> dict[str, list[dict[str, float]]]:
    return {
        path.parent.name: [json.loads(line)["logprobs"] for line in path.open()]
        for path in sorted((folder / "cells").glob("probe-*/questions.jsonl"))
    }


def equal(folder: Path, undisturbed: Path) -> None:
    """Every probe of a run has the undisturbed one's numbers."""
    ours, theirs = results(folder), results(undisturbed)
    assert ours
    for name, rows in ours.items():
        for row, expected in zip(rows, theirs[name], strict=True):
            assert row == pytest.approx(expected, abs=1e-5), name
