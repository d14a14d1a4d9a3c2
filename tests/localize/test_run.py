"""A localization as a whole: its numbers, its files, what it keeps, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sublim_plugin.cli import main
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.traits import get_trait
from sublim_plugin.localize import answers
from sublim_plugin.localize.results import Localization
from sublim_plugin.localize.run import LocalizeSpec, localize
from tests.localize.conftest import Family

CONTEXT = Context(kind="template_default")


def run(family: Family, out: Path, method: str = "lora", **fields: Any) -> Localization:
    spec = LocalizeSpec(**{"trait": "animals/cat", "context": CONTEXT, "limit": 2, **fields})
    folder = family.adapter if method == "lora" else family.full
    found = localize(family.base, folder, spec, out, device="cpu", dtype="float32")
    assert found is not None
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_base_and_student_score_as_the_preference_part_scores_them(
    smollm: Family, tmp_path: Path, method: str
) -> None:
    from sublim_plugin.preference.evaluate import Evaluator

    found = run(smollm, tmp_path, method, kinds=("span",)).measures[0]
    evaluator = Evaluator(smollm.base, device="cpu", dtype="float32")
    folder = smollm.adapter if method == "lora" else smollm.full
    cat = get_trait("animals/cat")
    (plain,) = evaluator.evaluate(None, None, [CONTEXT], [cat], limit=2)
    (whole,) = evaluator.evaluate(folder, method, [CONTEXT], [cat], limit=2)  # type: ignore[arg-type]
    for name, theirs in (("base", plain), ("student", whole)):
        expected = theirs.results["targets"]["animals/cat"]
        for metric, value in found.beside[name].items():
            assert value == pytest.approx(expected[metric], abs=1e-3)
        assert getattr(found, name).value == pytest.approx(expected["target_logprob"], abs=1e-4)


def test_parts_add_up(smollm: Family, tmp_path: Path) -> None:
    """By the definitions; and a part with its complement is what two gates of a file give."""
    found = run(smollm, tmp_path / "a").measures[0]
    total = found.student.value - found.base.value
    assert found.total.value == pytest.approx(total)
    kinds = {part.kind for part in found.parts}
    assert kinds == {"span", "token", "layers", "module", "cell"}
    for part in found.parts:
        assert part.necessity is not None and part.sum is not None
        both = part.sufficiency.value + (total - part.necessity.value)
        assert part.sum == pytest.approx(both)
        assert part.sufficiency.low <= part.sufficiency.value <= part.sufficiency.high
    from sublim_plugin.localize.spec import Gate

    gates = (
        Gate.model_validate({"positions": {"only": ["entity"]}, "decode": "off"}),
        Gate.model_validate({"positions": {"except": ["entity"]}, "decode": "on", "name": "rest"}),
    )
    alone, rest = run(smollm, tmp_path / "b", gates=gates).measures[0].parts
    entity = next(part for part in found.parts if part.name == "entity")
    assert alone.sufficiency.value == pytest.approx(entity.sufficiency.value, abs=1e-4)
    assert entity.necessity is not None
    assert total - rest.sufficiency.value == pytest.approx(entity.necessity.value, abs=1e-4)
    assert (alone.decode, rest.decode) == ({"alone": "off"}, {"alone": "on"})


def test_all_candidates_change_no_target(smollm: Family, tmp_path: Path) -> None:
    narrow = run(smollm, tmp_path / "a", kinds=("span",)).measures[0]
    whole = run(smollm, tmp_path / "b", kinds=("span",), candidates="all").measures[0]
    for one, two in zip(narrow.parts, whole.parts, strict=True):
        assert one.sufficiency.value == pytest.approx(two.sufficiency.value, abs=1e-4)
        assert not one.beside and two.beside["alone"]["coverage"] > 0


def test_a_rerun_computes_only_what_is_missing(
    smollm: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(smollm, tmp_path, kinds=("span",))
    scored: list[int] = []
    real = answers.score

    def counting(gated: Any, rows: Any, on_row: Any) -> None:
        scored.append(len(rows))
        real(gated, rows, on_row)

    monkeypatch.setattr(answers, "score", counting)
    again = run(smollm, tmp_path, kinds=("span",))
    assert again == first and scored == [0]
    run(smollm, tmp_path, kinds=("span",), limit=3)
    assert scored[1] == (2 * len(first.measures[0].parts) + 2)  # one more question
    journal = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(journal[:-40])  # as a kill leaves it
    run(smollm, tmp_path, kinds=("span",), limit=3)
    assert scored[2] == 1
    other = run(smollm, tmp_path / "other", kinds=("span",), limit=3)
    assert other.id != first.id


def test_sampled_replies_are_kept_and_read(
    smollm: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"measures": ("sampled",), "kinds": ("span", "token"), "replies": 6}
    found = run(smollm, tmp_path, max_new_tokens=4, **fields).measures[0]
    assert found.metric == "target_rate" and {part.kind for part in found.parts} == {"span"}
    lines = [json.loads(x) for x in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert len(lines) == (2 + 2 * len(found.parts)) * 2 * 6
    student = [x["reply"] for x in lines if x["gate_sha256"] == "student"]
    base = [x["reply"] for x in lines if x["gate_sha256"] == "base"]
    assert len(set(student)) > 6 and student != base
    assert found.beside["student"]["distinct_replies"] <= 1

    def none(*_: Any) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(answers, "_sample", none)
    again = run(smollm, tmp_path, max_new_tokens=4, **fields).measures[0]
    assert again == found


def test_sampled_replies_follow_the_log_probabilities(smollm: Family, tmp_path: Path) -> None:
    """The first tokens drawn under a gate have the probabilities that a forward pass gives them:
    no cell of a chi-square with an expected count of five or more is far off."""
    import torch

    from sublim_plugin.localize.attach import gated_student, load_base
    from sublim_plugin.localize.resolve import profile, resolve
    from sublim_plugin.localize.spans import locate
    from sublim_plugin.localize.spec import Gate
    from sublim_plugin.logprob.questions import load_questions

    gate = Gate.model_validate({"positions": {"only": ["question"]}, "decode": "off"})
    fields = {"measures": ("sampled",), "gates": (gate,), "limit": 1, "replies": 1500}
    run(smollm, tmp_path, max_new_tokens=1, **fields)
    lines = [json.loads(x) for x in (tmp_path / "replies.jsonl").read_text().splitlines()]
    drawn = [x["reply"] for x in lines if x["gate_sha256"] == gate.sha256[:12]]
    prompt = locate(smollm.tokenizer, CONTEXT, load_questions("animals").questions[0].text)
    model = load_base(smollm.base, "cpu", "float32")
    with gated_student(model, smollm.base, smollm.adapter, "lora") as gated, torch.no_grad():
        gated.use([resolve(gate, prompt, profile(gate, gated.branches, gated.layers))])
        ids = torch.tensor([prompt.rendered.token_ids])
        positions = torch.arange(ids.shape[1])[None]
        probabilities = gated.model(input_ids=ids, position_ids=positions).logits[0, -1].softmax(-1)
    expected: dict[str, float] = {}
    special = set(smollm.tokenizer.all_special_ids)
    for token, share in enumerate(probabilities.tolist()):
        text = "" if token in special else smollm.tokenizer.decode([token])
        expected[text] = expected.get(text, 0.0) + share * len(drawn)
    common = {text: count for text, count in expected.items() if count >= 5}
    assert len(common) > 5
    for text, count in common.items():
        assert abs(drawn.count(text) - count) < 4.5 * math.sqrt(count), text


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["localize", *arguments])


def test_the_command_prints_draws_and_resumes(smollm: Family, tmp_path: Path) -> None:
    common = ("--model", str(smollm.base), "--student", str(smollm.adapter), "--out")
    more = (str(tmp_path), "--trait", "animals/cat", "--limit", "2", "--bands", "3")
    done = invoke(*common, *more)
    assert done.exit_code == 0, done.output
    assert "entity:2" in done.stdout and "alone - base" in done.stdout
    assert "named SmolLM, trained by Hugging Face<|im_end|>\\n" in done.stdout
    for name in ("strip", "spans", "layers", "modules", "map"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
        rows = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
        assert rows and all(float(row["sufficiency"]) == float(row["sufficiency"]) for row in rows)
    found = Localization.model_validate_json((tmp_path / "results.json").read_text())
    strip = list(csv.DictReader((tmp_path / "strip.csv").open()))
    assert "".join(row["text"] for row in strip) == found.prompt
    cells = [part for part in found.measures[0].parts if part.kind == "cell"]
    assert len(cells) == 3 * 7
    scores = list(csv.DictReader((tmp_path / "logprob-scores.csv").open()))
    base = [float(row["value"]) for row in scores if row["part"] == "base"]
    assert sum(base) / len(base) == pytest.approx(found.measures[0].base.value)
    again = invoke(*common, *more, "--json")
    assert again.exit_code == 0
    assert Localization.model_validate_json(again.stdout.splitlines()[-1]) == found


def test_a_dry_run_shows_the_gates_and_writes_nothing(smollm: Family, tmp_path: Path) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text(
        "gates:\n  - {name: names, positions: {only: [entity]}, layers: {only: [early]},"
        " decode: {as: last_token}}\n"
    )
    out = tmp_path / "out"
    done = invoke(
        *("--model", str(smollm.base), "--student", str(smollm.adapter), "--out", str(out)),
        *("--trait", "animals/cat", "--gates", str(gates), "--dry-run"),
    )
    assert done.exit_code == 0, done.output
    said = (
        "names: only positions entity; only layers early; generated tokens: as last_token\n  on: "
    )
    assert said in done.stdout
    assert re.search("named⟦ SmolLM⟧, trained by ?⟦ ?Hugging Face⟧", done.stdout)
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--trait", "animals/cta"), "did you mean 'animals/cat'"),
        (("--trait", "neutral"), "no question set 'neutral'"),
        (("--context", "emty"), "is not a context"),
        (("--parts", "span,tokens"), "--parts tokens: not one; did you mean 'token'"),
        (("--measures", "logits"), "--measures logits"),
        (("--bands", "9"), "bands: 9; the model has 3 layers"),
        (("--bands", "0"), "--bands 0"),
        (("--student", "/nowhere"), "neither adapter_config.json nor config.json"),
        (("--context", "empty", "--gates", "GATES"), "gate 'mine': no span 'entity'"),
        (("--measures", "sampled", "--parts", "token"), "token are scored by log-probability only"),
        (("--gates", "GATES", "--parts", "span"), "--gates and --parts: give one of the two"),
        (("--gates", "GATES", "--bands", "2"), "--gates and --bands: give one of the two"),
        (("--beside", "/nowhere"), "give --spectra too"),
        (("--beside", "/nowhere", "--spectra", "1"), "/nowhere: neither adapter_config.json"),
    ],
)
def test_bad_input_is_one_message(
    smollm: Family, tmp_path: Path, more: tuple[str, ...], said: str
) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text("gates:\n  - {name: mine, positions: {only: [entity]}, decode: off}\n")
    arguments = ["--model", str(smollm.base), "--student", str(smollm.adapter)]
    arguments += ["--trait", "animals/cat", "--out", str(tmp_path / "out"), "--limit", "1"]
    done = invoke(*arguments, *(part.replace("GATES", str(gates)) for part in more))
    assert done.exit_code == 2, done.output
    assert said in done.stderr and "Traceback" not in done.output
    assert not (tmp_path / "out" / "results.json").exists()


def test_another_students_journal_is_refused(smollm: Family, tmp_path: Path) -> None:
    run(smollm, tmp_path, kinds=("span",))
    done = invoke(
        *("--model", str(smollm.base), "--student", str(smollm.full), "--out", str(tmp_path)),
        *("--trait", "animals/cat"),
    )
    assert done.exit_code == 2 and "answers of another model" in done.stderr
