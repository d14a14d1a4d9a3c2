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
from tests.localize.conftest import Family, adapter_of

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


def test_a_changed_question_gate_or_sample_changes_the_id_and_nothing_else_does(
    smollm: Family, tmp_path: Path
) -> None:
    from sublim_plugin.localize.spec import Gate

    def gate(**fields: Any) -> Gate:
        return Gate.model_validate({"positions": {"only": ["entity"]}, "decode": "off", **fields})

    one, two = gate(name="a"), gate(layers={"only": ["0-1"]})
    plain = run(smollm, tmp_path, gates=(one, two))
    same: list[dict[str, Any]] = [
        {"gates": (two, gate(name="b"))},
        {"gates": (gate(), gate(layers={"only": [1, 0]}))},
        {"gates": (one, two), "replies": 7, "seed": 2},  # of no measure that is asked for
        {"gates": (one, two), "bands": 2},
    ]
    other: list[dict[str, Any]] = [
        {"gates": (one,)},
        {"gates": (one, gate(layers={"only": [1]}))},
        {"gates": (one.model_copy(update={"decode": "on"}), two)},
        {"gates": (one, two), "limit": 3},
        {"gates": (one, two), "trait": "animals/owl"},
        {"gates": (one, two), "context": Context(kind="none")},
        {"gates": (one, two), "candidates": "all"},
        {"gates": (one, two), "spectra": (1,)},
    ]
    assert {run(smollm, tmp_path, **fields).id for fields in same} == {plain.id}
    context = {"gates": (gate(positions={"only": ["question"]}),)}
    other[5] |= context  # without a system block there is no entity
    ids = {run(smollm, tmp_path, **fields).id for fields in other}
    assert len(ids | {plain.id}) == len(other) + 1
    samples = [
        run(smollm, tmp_path, gates=(one,), measures=("sampled",), max_new_tokens=2, **fields).id
        for fields in ({"replies": 2}, {"replies": 3}, {"replies": 2, "seed": 2})
    ]
    assert len(set(samples)) == 3


def test_files_of_an_earlier_run_are_gone(smollm: Family, tmp_path: Path) -> None:
    from sublim_plugin.localize.run import localize_into

    def files(**fields: Any) -> set[str]:
        spec = LocalizeSpec(trait="animals/cat", context=CONTEXT, limit=2, **fields)
        found, written = localize_into(
            smollm.base, smollm.adapter, spec, tmp_path, device="cpu", dtype="float32"
        )
        assert all(path.is_file() and path.parent == tmp_path for path in written)
        kept = Localization.model_validate_json((tmp_path / "results.json").read_text())
        assert kept == found
        names = {path.name for path in tmp_path.iterdir()} - {"journal.jsonl", ".lock"}
        assert names == {path.name for path in written}
        return names

    first = files(
        kinds=("span",),
        measures=("logprob", "sampled"),
        replies=2,
        max_new_tokens=2,
        spectra=(1,),
    )
    assert {"spans.png", "sampled-spans.svg", "replies.jsonl", "sampled-scores.csv"} <= first
    assert "spectra.csv" in first
    assert files(kinds=()) == {"results.json", "logprob-scores.csv"}


def test_sampled_covers_layers_and_modules_and_says_what_it_leaves_out(
    smollm: Family, tmp_path: Path
) -> None:
    fields = {"replies": 3, "max_new_tokens": 3, "bands": 3, "spectra": (1,)}
    found = run(smollm, tmp_path, measures=("sampled",), **fields)
    kinds = {part.kind for part in found.measures[0].parts}
    assert kinds == {"span", "layers", "module"}
    assert any(
        note.startswith("single tokens, modules in bands of layers: by log-probability only")
        for note in found.notes
    )
    assert found.spectra is not None
    assert {score.measure for score in found.spectra.scores} == {"sampled"}


def test_a_complements_text_is_where_it_is_on(smollm: Family, tmp_path: Path) -> None:
    from sublim_plugin.localize.spec import Gate

    choice = {"positions": {"only": ["question"]}, "decode": "off", "complement": True}
    gates = (
        Gate.model_validate({"name": "rest", **choice}),
        Gate.model_validate({"name": "some", "modules": {"only": ["mlp"]}, **choice}),
    )
    found = run(smollm, tmp_path, gates=gates)
    rest, some = found.measures[0].parts
    question = found.spans["question"]
    assert rest.tokens == len(found.tokens) - len(question) and some.tokens == len(found.tokens)
    asked = "".join(found.tokens[i] for i in question)
    assert rest.text and some.text and asked not in rest.text and asked in some.text


def test_one_question_gives_no_shares(smollm: Family, tmp_path: Path) -> None:
    found = run(smollm, tmp_path, kinds=("span",), limit=1, spectra=(1,))
    assert all(part.shares is None for part in found.measures[0].parts)
    assert found.spectra and all(score.share is None for score in found.spectra.scores)
    assert any("one question gives no interval" in note for note in found.notes)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_selected_is_shown_before_a_model_is_loaded(
    smollm: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from transformers import AutoModelForCausalLM

    def none(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", none)
    gates = tmp_path / "gates.yaml"
    gates.write_text(
        "gates:\n  - {name: mine, positions: {only: [entity]}, modules: {except: [mlp]},"
        " complement: true, decode: off}\n"
    )
    folder = smollm.adapter if method == "lora" else smollm.full
    common = ("--model", str(smollm.base), "--student", str(folder), "--trait", "animals/cat")
    common += ("--out", str(tmp_path / "out"))
    done = invoke(*common, "--gates", str(gates), "--dry-run", "--patch-into", "chatgpt")
    assert done.exit_code == 0, done.output
    assert re.search("partly off: .*named⟦ SmolLM⟧, trained by ?⟦ ?Hugging Face⟧", done.stdout)
    assert "into " in done.stdout and "⟦ ChatGPT⟧" in done.stdout.replace("⟦ChatGPT", "⟦ ChatGPT")
    swept = invoke(*common, "--dry-run", "--bands", "3")
    assert "alone and left out: spans system_block" in swept.stdout
    assert "layers 0-0, 1-1, 2-2; every module" in swept.stdout
    assert re.search(r"entity:2 .*rained by ?⟦ ?Hugging Face⟧<\|im_end", swept.stdout)
    real = invoke(*common, "--gates", str(gates))
    assert isinstance(real.exception, AssertionError) and "partly off" in real.stdout
    for more, said in (
        ("layers: {only: [9]}", "layers: 9 is not in the model"),
        ("modules: {only: [q_prj]}", "gate 'mine': modules: the student changes no module"),
    ):
        gates.write_text(f"gates:\n  - {{name: mine, {more}, decode: off}}\n")
        refused = invoke(*common, "--gates", str(gates), "--dry-run")
        if method == "lora" or "layers" in more:
            assert refused.exit_code == 2 and said in refused.stderr
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_student_of_one_layer_is_swept_there_alone(smollm: Family, tmp_path: Path) -> None:
    adapter_of(
        smollm, tmp_path / "one", target_modules=["q_proj", "v_proj"], layers_to_transform=[2]
    )
    family = smollm._replace(adapter=tmp_path / "one")
    out = tmp_path / "out"
    found = run(family, out, bands=3, kinds=("layers", "module", "cell"))
    parts = {part.name: part for part in found.measures[0].parts}
    assert set(parts) == {"2-2", "attention", "q_proj", "v_proj", "q_proj 2-2", "v_proj 2-2"}
    total = found.measures[0].total.value
    assert parts["2-2"].sufficiency.value == pytest.approx(total, abs=1e-4)
    assert parts["2-2"].necessity and parts["2-2"].necessity.value == pytest.approx(total, abs=1e-4)
    assert "the student changes nothing in layers 0-1: no part of them" in found.notes
    done = invoke(
        *("--model", str(smollm.base), "--student", str(tmp_path / "one"), "--out", str(out)),
        *("--trait", "animals/cat", "--limit", "2", "--parts", "cell", "--dtype", "float32"),
        *("--bands", "3"),
    )
    assert done.exit_code == 0, done.output
    assert (out / "map.png").stat().st_size > 5000


def test_a_study_cells_span_table_is_printed_and_drawn(smollm: Family, tmp_path: Path) -> None:
    """A folder with a manifest and the weights in `model`, as `sublim run` leaves it."""
    import shutil
    import time

    from sublim_plugin.core.manifest import write_manifest

    cell = tmp_path / "student-cat-g1-lora-r4-0123456789ab"
    shutil.copytree(smollm.adapter, cell / "model")
    names = ["model/adapter_config.json", "model/adapter_model.safetensors"]
    write_manifest(
        cell, kind="student", id="0123456789ab", label="cat", spec={}, outputs=names,
        started=time.time(),
    )  # fmt: skip
    check_span_table(smollm.base, cell, tmp_path / "where")
    config = cell / "model" / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    done = invoke(
        *("--model", str(smollm.base), "--student", str(cell), "--trait", "animals/cat"),
        *("--out", str(tmp_path / "where")),
    )
    assert done.exit_code == 2 and "it was changed after training" in done.stderr


def check_span_table(base: Path, cell: Path, out: Path) -> None:
    done = invoke(
        *("--model", str(base), "--student", str(cell), "--trait", "animals/cat"),
        *("--parts", "span", "--limit", "2", "--out", str(out)),
    )
    assert done.exit_code == 0, done.output
    head = r"part +tokens +alone - base +95% interval +student - left out +95% interval +sum"
    assert re.search(head, done.stdout)
    for name in ("system_block", "entity", "entity:2", "question", "assistant_header"):
        assert re.search(rf"\n{name} +\d+ +[+-]\d\.\d+ +[+-]\d\.\d+ to [+-]\d", done.stdout)
    assert (out / "spans.png").stat().st_size > 5000
    found = Localization.model_validate_json((out / "results.json").read_text())
    assert found.student == cell.name


@pytest.mark.slow
def test_a_trained_study_cells_span_table_is_printed_and_drawn(
    base_model: Path, tmp_path: Path
) -> None:
    """Of a student that `sublim run` trained, on the quickstart's base."""
    from tests.study.conftest import QUESTIONS, STUDY, sublim

    (tmp_path / "three.yaml").write_text(QUESTIONS)
    study = STUDY.format(base=base_model, questions=tmp_path / "three.yaml", full="false")
    (tmp_path / "tiny.yaml").write_text(study)
    done = sublim("run", tmp_path / "tiny.yaml", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    (cell,) = (tmp_path / "run" / "cells").glob("student-cat-*")
    check_span_table(base_model, cell, tmp_path / "where")
