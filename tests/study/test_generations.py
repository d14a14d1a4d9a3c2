"""A matched student, a chain and sampled replies, really run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from sublim_plugin.core.manifest import read_manifest
from tests.study.conftest import sublim

STUDY = """\
name: generations
base_model: {base}
datasets:
  traits: [animals/cat]
  generation_seeds: [1]
  teachers: [prompted, {{kind: student, lora_rank: 2, generations: 2}}]
  rows: 16
  constrain: numbers
  batch_size: 18
  sampler: {{temperature: 1.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, max_new_tokens: 56}}
students:
  - {{traits: [animals/cat], lora_ranks: [2]}}
  - {{traits: [animals/cat], teachers: [prompted], full: {{plain: false, norm_matched_to: [2]}}}}
training:
  lora_recipe: smollm2-135m-instruct/lora-r8
  full_recipe: smollm2-135m-instruct/full-zero2
  contexts: [template_default]
  seeds: [42]
probes: {{questions: animals, limit: 3, measures: [sampled], samples: 4, contexts: [none]}}
"""


@pytest.mark.slow
def test_a_chain_and_a_matched_student_run_to_the_report(base_model: Path, tmp_path: Path) -> None:
    study, run = tmp_path / "study.yaml", tmp_path / "run"
    study.write_text(STUDY.format(base=base_model))
    done = sublim("run", study, "--out", run)
    assert done.returncode == 0, done.stderr[-3000:]

    def receipt(name: str) -> dict[str, dict[str, float]]:
        (path,) = run.glob(f"cells/student-{name}-????????????/model/sublim_receipt.json")
        found: dict[str, dict[str, float]] = json.loads(path.read_text())
        return found

    lora, full = receipt("cat-g1-lora-r2-t42"), receipt("cat-g1-full-norm-of-r2-t42")
    target = lora["update_norm"]["total"]
    assert full["stopping"]["target"] == target
    assert full["update_norm"]["total"] == pytest.approx(target, rel=0.02)
    before = "cat-g1-lora-r2-t42"
    for generation in (1, 2):
        (dataset,) = run.glob(f"cells/dataset-cat-g1-chain{generation}-*")
        (student,) = run.glob(f"cells/student-{before}-????????????")
        manifest = read_manifest(dataset)
        weights = read_manifest(student).outputs["model/adapter_model.safetensors"].sha256
        assert manifest.inputs["teacher"]["sha256"]["adapter_model.safetensors"] == weights
        before = f"cat-g1-chain{generation}-lora-r2-t42"
    with (run / "report" / "sampled.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len({line["name"] for line in lines}) == len(lines) == 5
    assert sublim("run", study, "--out", run).returncode == 0
