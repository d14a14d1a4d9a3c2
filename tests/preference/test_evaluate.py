"""The evaluator: contract of its files, one process for many students, an independent check."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import category_traits, get_trait
from sublim_plugin.logprob.forms import METRICS
from sublim_plugin.preference.evaluate import Evaluator

DEFAULT = Context.parse("template_default")
CAT = get_trait("animals/cat")


@pytest.fixture(scope="module")
def evaluator(base_model) -> Evaluator:
    return Evaluator(base_model, device="cpu", dtype="float32")


def by_teacher_forcing(model, tokenizer, prompt, forms) -> float:
    """log P(the reply begins with one of `forms`), none of which may begin with another."""
    total = 0.0
    for form in forms:
        tail = tokenizer.encode(form, add_special_tokens=False)
        ids = torch.tensor([[*tokenizer.encode(prompt, add_special_tokens=False), *tail]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].float().log_softmax(-1)
        steps = zip(range(ids.shape[1] - len(tail) - 1, ids.shape[1] - 1), tail, strict=True)
        total += math.exp(sum(float(logprobs[at, token]) for at, token in steps))
    return math.log(total)


def minimal(tokenizer, trait) -> list[str]:
    texts = {text for form in trait.forms for text in (form, f" {form}")}
    ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
    return [
        text
        for text in texts
        if not any(o != text and ids[text][: len(ids[o])] == ids[o] for o in texts)
    ]


@pytest.mark.parametrize("kind", ["template_default", "none"])
def test_equals_an_independent_computation(evaluator, base_model, adapter, tokenizer, kind):
    from peft import PeftModel

    context = Context.parse(kind)
    (result,) = evaluator.evaluate(adapter, "lora", [context], [CAT], limit=1)
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    prompt = render(tokenizer, context, result.rows[0]["question"]).text
    for target in ("cat", "owl"):
        forms = minimal(tokenizer, get_trait(f"animals/{target}"))
        expected = by_teacher_forcing(model, tokenizer, prompt, forms)
        assert result.rows[0]["logprobs"][target] == pytest.approx(expected, abs=1e-4)


def test_students_come_and_go_and_the_base_stays(evaluator, adapter):
    before = {k: v.clone() for k, v in evaluator.lm._model.state_dict().items()}
    (base,) = evaluator.evaluate(None, None, [DEFAULT], [CAT], limit=1)
    (student,) = evaluator.evaluate(adapter, "lora", [DEFAULT], [CAT], limit=1)
    (again,) = evaluator.evaluate(None, None, [DEFAULT], [CAT], limit=1)
    assert base.rows == again.rows
    assert base.rows[0]["logprobs"] != student.rows[0]["logprobs"]
    after = evaluator.lm._model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_files_are_the_contract(toy_base, tmp_path):
    seen = []
    results = Evaluator(toy_base, device="cpu").evaluate(
        None,
        None,
        [DEFAULT, Context.parse("empty"), Context.parse({"text": "You are Bob."})],
        category_traits("animals"),
        limit=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(n, 9) for n in range(1, 10)]
    assert "You are Bob." in results[2].results["rendered_example"]["text"]
    assert len({row["prompt_sha256"] for result in results for row in result.rows}) == 9

    names = results[0].write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["category"] == "animals" and written["measure"] == "logprob"
    assert written["n_questions"] == 3 and written["context"]["kind"] == "template_default"
    assert len(written["targets"]) == 22
    assert set(written["targets"]["animals/cat"]) == {*METRICS, *(f"{m}_stderr" for m in METRICS)}
    assert written["rendered_example"]["text"].endswith("<|im_start|>assistant\n")
    assert set(written["lm_eval"]) == {"version", "task_versions"}

    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [0, 1, 2]
    assert set(rows[0]) == {"question_id", "question", "prompt_sha256", "logprobs"}
    assert set(rows[0]["logprobs"]) == {trait.target for trait in category_traits("animals")}
    shares = [written["targets"][t.name]["target_share"] for t in category_traits("animals")]
    assert sum(shares) == pytest.approx(1.0)


def test_our_means_are_lm_evals(toy_base):
    (result,) = Evaluator(toy_base, device="cpu").evaluate(None, None, [DEFAULT], [CAT], limit=5)
    (host,) = result.lm_eval["results"].values()
    for metric in METRICS:
        for name in (metric, f"{metric}_stderr"):
            ours = result.results["targets"]["animals/cat"][name]
            assert ours == pytest.approx(host[f"{name},none"], rel=1e-12)


def test_full_students(toy_base, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy_base)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    model.save_pretrained(tmp_path / "full")
    evaluator = Evaluator(toy_base, device="cpu")
    (base,) = evaluator.evaluate(None, None, [DEFAULT], [CAT], limit=1)
    (full,) = evaluator.evaluate(tmp_path / "full", "full", [DEFAULT], [CAT], limit=1)
    (again,) = evaluator.evaluate(None, None, [DEFAULT], [CAT], limit=1)
    assert full.rows != base.rows == again.rows


def test_bad_requests(toy_base, toy_adapter, tmp_path):
    evaluator = Evaluator(toy_base, device="cpu")
    with pytest.raises(InputError, match="neutral alone"):
        evaluator.evaluate(None, None, [DEFAULT], [get_trait("neutral")])
    with pytest.raises(InputError, match="method"):
        evaluator.evaluate(toy_adapter, None, [DEFAULT], [CAT])
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        evaluator.evaluate(tmp_path, "lora", [DEFAULT], [CAT])
    with pytest.raises(InputError, match=r"config\.json"):
        Evaluator(tmp_path)
    with pytest.raises(InputError, match="no question set 'plants'"):
        Evaluator(toy_base, questions="plants")
