"""The JSON schema of study files: current, described, and of one mind with the loader."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sublim_plugin.study import schema
from sublim_plugin.study.cells import plan
from sublim_plugin.study.study_file import load_study

STUDIES = Path(__file__).parents[2] / "studies"


def validator() -> Any:
    return jsonschema.Draft202012Validator(json.loads((STUDIES / "study.schema.json").read_text()))


def test_the_committed_schema_is_current() -> None:
    written = (STUDIES / "study.schema.json").read_text()
    assert written == schema.text(), (
        "python -m sublim_plugin.study.schema studies/study.schema.json"
    )
    jsonschema.Draft202012Validator.check_schema(json.loads(written))


def test_every_key_has_a_description() -> None:
    def keys(value: Any, path: str = "") -> Iterator[str]:
        if isinstance(value, dict):
            for name, one in value.get("properties", {}).items():
                if not one.get("description"):
                    yield f"{path}/{name}"
            for name, one in value.items():
                yield from keys(one, f"{path}/{name}")
        elif isinstance(value, list):
            for one in value:
                yield from keys(one, path)

    assert list(keys(schema.schema())) == []


def test_our_studies_name_it_fit_it_and_can_be_planned_without_their_models() -> None:
    paths = sorted(STUDIES.glob("*.yaml"))
    names = {path.stem for path in paths}
    for what in ("rank-sweep", "context-grid", "localization"):
        for model in ("", "-llama-3.1-8b", "-gemma-3-4b"):
            assert f"paper-{what}{model}" in names
        assert f"smollm2-{what}" in names
    for path in paths:
        text = path.read_text()
        assert text.startswith("# yaml-language-server: $schema=study.schema.json\n")
        assert list(validator().iter_errors(yaml.safe_load(text))) == []
        study = load_study(path)
        assert study.name == path.stem
        cells = plan(study, {"name": study.base_model, "sha256": "not there"})
        if path.stem == "smollm2-rank-sweep":
            assert 40 <= len(cells) < 50
        if path.stem == "paper-rank-sweep":
            loras = [c for c in cells if c.kind == "student" and "rank" in c.spec["method"]]
            assert sum(c.spec["trait"] != "neutral" for c in loras) == 300


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lora_ranks: [2, 8, 64]", "lora_ranks: [0]"),
        ("lora_ranks: [2, 8, 64]", "lora_rnaks: [2]"),
        ("contexts: [template_default]", "contexts: [emtpy]"),
        ("[animals/cat, neutral]", "[animals/cta]"),
        ("measures: [logprob]", "measures: [greedy]"),
        ("  rows: 64\n", ""),
        ("full: true", "full: {norm_matched_to: [r8]}"),
        ("full: true", "alphas: [2 x]"),
        ("  rows: 64", "  rows: 64\n  teachers: [{kind: steered, layers: []}]"),
        ("  rows: 64", "  rows: 64\n  teachers: [tuned]"),
        ("name: quickstart", "name: quickstart\nexclude: [{rank: r8}]"),
        ("name: quickstart", "name: ../x"),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(tmp_path: Path, old: str, new: str) -> None:
    from sublim_plugin.core.errors import InputError

    text = (STUDIES / "quickstart.yaml").read_text()
    assert old in text
    path = tmp_path / "s.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError):
        load_study(path)
    assert list(validator().iter_errors(yaml.safe_load(path.read_text())))


def test_the_schema_takes_what_the_loader_takes(tmp_path: Path) -> None:
    value = yaml.safe_load((STUDIES / "quickstart.yaml").read_text())
    value["datasets"]["teachers"] = [
        "prompted",
        {"kind": "steered", "name": "strong", "layers": [3], "strength": 2, "context": "claude"},
        {"kind": "student", "lora_rank": 8, "alpha": "rank", "generations": 2,
         "traits": ["animals/cat"], "train_context": "template_default", "training_seed": 42},
    ]  # fmt: skip
    value["students"][0] |= {
        "alphas": ["rank", "2 x rank", 16, {"rslora": 8}],
        "learning_rates": [0.001],
        "full": {"norm_matched_to": [8, {"lora_rank": 2, "alpha": 16}], "learning_rates": [2e-5]},
    }
    value["probes"] |= {"measures": ["logprob", "sampled"], "samples": 10, "limit": 3}
    value["include"] = [{"trait": ["animals/cat", "neutral"], "eval_context": ["none"]}]
    value["exclude"] = [{"alpha": {"rslora": 8}, "rank": [2], "measure": "sampled"}]
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(value))
    assert list(validator().iter_errors(value)) == []
    assert plan(load_study(path), {"name": "x", "sha256": "y"})


def test_the_examples_of_the_documentation_are_a_study() -> None:
    """Every key of every part but those of an entry of include or exclude."""
    from sublim_plugin.study.study_file import Study

    text = (STUDIES.parent / "docs" / "study.md").read_text()
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, flags=re.MULTILINE)
    value: dict[str, Any] = {}
    for block in blocks:
        value |= yaml.safe_load(textwrap.dedent(block)) or {}
    value["datasets"]["teachers"] = value.pop("teachers")
    assert list(validator().iter_errors(value)) == []
    Study.model_validate(value)
    assert {*value} == {*Study.model_fields}
    for part in ("datasets", "training", "probes", "localizations", "signals"):
        model = Study.model_fields[part].annotation
        names = getattr(model, "model_fields", None) or model.__args__[0].model_fields
        assert {*value[part]} == {*names}
