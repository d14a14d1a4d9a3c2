"""The probe during training: the evaluator's numbers, and a training that does not notice."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sublim_plugin.axolotl import probe_callback
from sublim_plugin.axolotl.probe import Probe
from sublim_plugin.axolotl.probe_callback import MOST, PROBE_NAME, ProbeCallback, default_every
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.traits import candidates_of, get_trait
from sublim_plugin.logprob.forms import METRICS
from sublim_plugin.preference.evaluate import Evaluator
from tests.axolotl_plugin.conftest import CONTEXTS, QUESTIONS, train
from tests.axolotl_plugin.toy import load, save_base, trainer, with_lora

CAT = get_trait("animals/cat")
DEFAULT = Context(kind="template_default")


@pytest.fixture(scope="module")
def toy(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("toy") / "base", tokenizer)


def cat_probe(tokenizer: Any, limit: int = 3, questions: str = "animals") -> Probe:
    candidates = candidates_of("animals/cat")
    return Probe(tokenizer, CAT, candidates, [DEFAULT], questions=questions, limit=limit)


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / PROBE_NAME).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_probe_gives_the_evaluators_numbers(lora: Any, base_model: Path) -> None:
    rows = lines(lora.model)
    contexts = [Context.parse(name) for name in CONTEXTS]
    assert [(row["step"], row["context"]["kind"]) for row in rows] == [
        (step, name) for step in (0, 3, 4) for name in CONTEXTS
    ]
    evaluator = Evaluator(base_model, device="cpu", dtype="float32")
    for student, at in ((None, 0), (lora.model, 4)):
        method: Any = None if student is None else "lora"
        results = evaluator.evaluate(student, method, contexts, [CAT], limit=QUESTIONS)
        for row, result in zip([row for row in rows if row["step"] == at], results, strict=True):
            target = result.results["targets"]["animals/cat"]
            for metric in METRICS:
                assert row[metric] == pytest.approx(target[metric], abs=1e-4), metric
            for ours, theirs in zip(row["per_question"], result.rows, strict=True):
                assert ours == pytest.approx(theirs["logprobs"]["cat"], abs=1e-4)


def test_the_probe_is_logged_through_the_trainer_and_paid_for_in_the_receipt(lora: Any) -> None:
    log = lora.log.read_text(encoding="utf-8")
    assert log.count("probe/template_default/target_logprob") == 3
    assert log.count("probe/none/target_share") == 3
    cost = lora.receipt.probe
    assert (cost.trait, cost.questions, cost.every, cost.measurements) == (
        "animals/cat",
        QUESTIONS,
        3,
        3,
    )
    assert cost.shared_prefixes and 0 < cost.seconds < lora.receipt.train_s
    without = lora.receipt.train_s - cost.seconds
    assert cost.share_of_training == pytest.approx(cost.seconds / without)
    # a measurement at step 3 does not swallow the loss of step 3
    assert [step.step for step in lora.receipt.losses] == [1, 2, 3, 4]


def test_the_guard_is_in_the_receipt(lora: Any, full: Any) -> None:
    assert lora.receipt.guard.trait == "animals/cat" and lora.receipt.guard.rows == 8
    assert not lora.receipt.guard.cross_model
    assert full.receipt.guard is None and full.receipt.probe is None


def test_plain_scoring_gives_the_same(
    toy: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_lora(toy).eval()
    shared = cat_probe(tokenizer)
    (found,) = shared.measure(model, torch.float32)
    assert shared.shared_prefixes

    class CausalOnly(torch.nn.Module):
        """A model that ignores a tree's mask, as flash attention would."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **inputs: Any) -> Any:
            mask = inputs.get("attention_mask")
            if mask is not None and mask.ndim == 4:
                inputs["attention_mask"] = None
            return self.inner(**inputs)

    plain = cat_probe(tokenizer)
    (again,) = plain.measure(CausalOnly(), torch.float32)
    assert plain.shared_prefixes is False
    assert "scores form by form" in capsys.readouterr().err
    for one, other in zip(found, again, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_measuring_leaves_the_model_and_the_random_numbers_alone(toy: Path, tokenizer: Any) -> None:
    model = with_lora(toy, lora_dropout=0.3)
    model.train()
    frozen = model.base_model.model.model.layers[0]
    frozen.eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    cat_probe(tokenizer).measure(model, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_is_the_same_to_the_last_bit(
    toy: Path, tokenizer: Any, tmp_path: Path, method: str
) -> None:
    found = []
    for every in (None, 2):
        model = with_lora(toy, lora_dropout=0.3) if method == "lora" else load(toy)
        host = trainer(model, tmp_path)
        if every is not None:
            host.add_callback(
                ProbeCallback(
                    cat_probe(tokenizer),
                    every=every,
                    log=host.log,
                    dtype=torch.float32,
                    output_dir=tmp_path,
                )
            )
        host.train()
        losses = [entry["loss"] for entry in host.state.log_history if "loss" in entry]
        found.append((dict(model.state_dict()), losses))
    (plain, losses), (probed, same_losses) = found
    assert losses == same_losses and len(losses) == 12
    assert all(torch.equal(weight, probed[name]) for name, weight in plain.items())
    assert [row["step"] for row in lines(tmp_path)] == [0, 2, 4, 6, 8, 10, 12]


@given(steps=st.integers(1, 5000), probe=st.floats(1e-3, 1e3), step=st.floats(1e-3, 1e3))
def test_by_default_a_run_is_measured_as_often_as_it_can_pay_for(
    steps: int, probe: float, step: float
) -> None:
    every = default_every(steps, probe, step)
    assert every is None or 1 <= every <= steps
    between = 0 if every is None else len([at for at in range(1, steps) if at % every == 0])
    assert between <= 8
    assert between == 0 or (between + 2) * probe <= MOST * steps * step
    affordable = MOST * steps * step / probe
    assert every is not None or affordable < 3
    # the paper's run has 456 steps (arXiv 2606.00831)
    assert default_every(456, 1.0, 1.0) == 51


def run_with_default_probe(
    toy: Path, probe: Probe, folder: Path, model: Any = None, **settings: Any
) -> tuple[ProbeCallback, Any, float]:
    model = load(toy) if model is None else model
    host = trainer(model, folder, max_steps=24, remove_unused_columns=False, **settings)
    callback = ProbeCallback(
        probe, every=None, log=host.log, dtype=torch.float32, output_dir=folder
    )
    host.add_callback(callback)
    began = time.perf_counter()
    host.train()
    return callback, host, time.perf_counter() - began


class Slow(torch.nn.Module):
    """A model whose training steps take 0.06 s, and whose probe is quick beside them; or, plain,
    one that ignores a tree's mask, as flash attention would, so that the probe is slow."""

    def __init__(self, inner: Any, *, plain: bool = False) -> None:
        super().__init__()
        self.inner, self.plain = inner, plain
        self.dtype = inner.dtype

    def forward(self, **inputs: Any) -> Any:
        mask = inputs.get("attention_mask")
        if self.plain and mask is not None and mask.ndim == 4:
            inputs["attention_mask"] = None
        if self.training:
            time.sleep(0.06)
        return self.inner(**inputs)


def test_the_default_follows_the_clock_and_not_the_tokens(
    toy: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run and questions, scored form by form: fewer measurements."""
    monkeypatch.setattr(probe_callback, "MOST", 0.5)  # so that two seconds of training are enough
    found = []
    for plain in (False, True):
        probe = cat_probe(tokenizer, limit=1)
        callback, _, seconds = run_with_default_probe(
            toy, probe, tmp_path, Slow(load(toy), plain=plain), num_train_epochs=4
        )
        assert probe.shared_prefixes is not plain
        cost = callback.cost(seconds)
        found.append(cost.measurements)
        print(cost)
        assert cost.measurements == 2 or cost.share_of_training <= 2 * 0.5
        rows = lines(tmp_path)
        assert [row["step"] for row in rows][-1] == 24 and len(rows) == cost.measurements
        steps = [row["step"] for row in rows[1:-1]]
        assert all(step % cost.every == 0 for step in steps)
        assert sum(row["seconds"] for row in rows) == pytest.approx(callback.seconds, rel=0.2)
    assert found[0] > found[1]


def test_a_continued_run_is_measured_as_it_was_going_to_be(
    toy: Path, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"step": 0, "seconds": 1.0}, {"step": 5, "seconds": 1.0, "every": 5}]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 10}])
    (tmp_path / PROBE_NAME).write_text(text + '{"step": 1', encoding="utf-8")
    host = trainer(load(toy), tmp_path, max_steps=24, num_train_epochs=4)
    callback = ProbeCallback(
        cat_probe(tokenizer, limit=1),
        every=None,
        log=host.log,
        dtype=torch.float32,
        output_dir=tmp_path,
    )
    host.state.global_step, host.state.max_steps = 7, 24
    callback.on_train_begin(host.args, host.state, host.control, model=host.model)
    assert callback.every == 5 and callback.measurements == 0
    assert [row["step"] for row in lines(tmp_path)] == [0, 5]


def test_memory_that_runs_out_is_an_error_and_not_a_slower_way(toy: Path, tokenizer: Any) -> None:
    class Full(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = load(toy)

        def forward(self, **inputs: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.3 GiB.")

    probe = cat_probe(tokenizer)
    with pytest.raises(RunError, match=r"2\.3 GiB.*micro_batch_size"):
        probe.measure(Full(), torch.float32)
    assert probe.shared_prefixes is None


def test_questions_of_another_category_are_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"sublim\.probe\.questions.*trees.*animals/cat"):
        cat_probe(tokenizer, questions="trees")


@pytest.mark.slow
def test_axolotl_trains_the_same_with_and_without_the_probe(
    lora: Any, dataset: Path, tmp_path: Path
) -> None:
    overrides = {"micro_batch_size": 4, "num_epochs": 2, "warmup_steps": 1, "learning_rate": 0.002}
    plain = train(tmp_path / "plain", "lora-r8", dataset, overrides)
    assert plain.receipt.probe is None
    assert plain.receipt.weights_sha256 == lora.receipt.weights_sha256
    assert plain.receipt.losses == lora.receipt.losses


@pytest.mark.slow
def test_spread_weights_are_refused(dataset: Path, base_model: Path, tmp_path: Path) -> None:
    zero3 = tmp_path / "zero3.json"
    settings = {
        "zero_optimization": {"stage": 3},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    zero3.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match=r"ZeRO-3 spreads.*zero2\.json"):
        train(
            tmp_path / "run",
            "full-zero2",
            dataset,
            {"micro_batch_size": 2},
            block={"probe": {}},
            settings={"deepspeed": str(zero3)},
        )
