"""Stop rules in transformers' own Trainer, on a toy student; the norms against the disk's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sublim_plugin.axolotl.args import SublimBlock
from sublim_plugin.axolotl.live_norm import LiveNorm, no_norm
from sublim_plugin.axolotl.norms import update_norm
from sublim_plugin.axolotl.receipt import write_receipt
from sublim_plugin.axolotl.stopping import (
    LOSS_WINDOW,
    StopCallback,
    StopRule,
    check_reached,
    stop_rule,
)
from sublim_plugin.core.errors import InputError, RunError
from tests.axolotl_plugin.toy import load, save_base, save_full, trainer, with_lora


@pytest.fixture(scope="module")
def toy(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("toy") / "base", tokenizer)


def student(toy: Path, method: str) -> Any:
    if method == "full":
        return load(toy)
    model = with_lora(toy)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data.zero_()
    return model


def run(
    toy: Path, folder: Path, rule: StopRule, method: str = "full", **settings: Any
) -> tuple[StopCallback, Any]:
    model = student(toy, method)
    host = trainer(model, folder, **settings)
    callback = StopCallback(rule, model)
    host.add_callback(callback)
    host.train()
    model.save_pretrained(folder / "model")
    return callback, host


def norm_rule(target: float) -> StopRule:
    return StopRule(on_norm=True, target=target)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_live_norm_is_the_one_on_disk(toy: Path, tmp_path: Path, method: str) -> None:
    model = load(save_full(tmp_path / "x", toy)) if method == "full" else with_lora(toy)
    live = LiveNorm(load(toy) if method == "full" else model)
    live._model = model
    model.save_pretrained(tmp_path / "model")
    saved = update_norm(tmp_path / "model", toy).total
    assert live.measure() == pytest.approx(saved, rel=1e-9)
    live.scale(0.3)
    assert live.measure() == pytest.approx(0.3 * saved, rel=1e-6)
    model.save_pretrained(tmp_path / "scaled")
    assert update_norm(tmp_path / "scaled", toy).total == pytest.approx(0.3 * saved, rel=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_norm_on_disk_is_the_target(
    toy: Path, tmp_path: Path, method: str, schedule: str, warmup: int
) -> None:
    model = student(toy, method)
    trainer(model, tmp_path, max_steps=2, lr_scheduler_type="constant").train()
    model.save_pretrained(tmp_path / "two_steps")
    target = 1.7 * update_norm(tmp_path / "two_steps", toy).total
    callback, host = run(
        toy,
        tmp_path,
        norm_rule(target),
        method,
        lr_scheduler_type=schedule,
        warmup_steps=warmup,
        num_train_epochs=8,
    )
    stopping = callback.stopping
    assert stopping is not None and host.state.global_step < host.state.max_steps
    saved = update_norm(tmp_path / "model", toy).total
    assert saved == pytest.approx(target, rel=0.02)
    assert saved == pytest.approx(stopping.reached, rel=1e-6)
    assert stopping.step == host.state.global_step
    assert stopping.final_scaling > 0.9 and stopping.lowered_learning_rate
    check_reached(stopping, update_norm(tmp_path / "model", toy), tmp_path)


def test_a_first_step_that_overshoots_is_scaled_onto_the_target(toy: Path, tmp_path: Path) -> None:
    callback, host = run(toy, tmp_path, norm_rule(0.01), learning_rate=0.01)
    stopping = callback.stopping
    assert stopping is not None and host.state.global_step == 1
    assert stopping.before_scaling is not None and stopping.before_scaling > 0.02
    assert stopping.final_scaling == pytest.approx(0.01 / stopping.before_scaling)
    assert update_norm(tmp_path / "model", toy).total == pytest.approx(0.01, rel=1e-4)


def test_an_update_that_rounding_swallows_is_an_error(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(toy, tmp_path, norm_rule(1e-6))
    assert "rounded to their dtype" in capsys.readouterr().err


def test_measuring_is_spared_where_the_target_is_far(toy: Path, tmp_path: Path) -> None:
    measured = []
    model = load(toy)
    callback = StopCallback(norm_rule(0.3), model)
    assert callback.norm is not None
    measure = callback.norm.measure

    def counted() -> float:
        measured.append(host.state.global_step)
        return measure()

    callback.norm.measure = counted  # type: ignore[method-assign]
    host = trainer(model, tmp_path, num_train_epochs=10, learning_rate=3e-5)
    host.add_callback(callback)
    host.train()
    assert callback.stopping is not None
    assert callback.stopping.reached == pytest.approx(0.3, rel=0.02)
    assert len(measured) < host.state.global_step


def test_a_target_that_is_not_reached_is_an_error(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rule, words in (
        (norm_rule(1e6), "update norm"),
        (StopRule(on_norm=False, target=0.01), "mean loss"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(toy, tmp_path, rule, num_train_epochs=1)
        assert caught.value.code == 1
        said = capsys.readouterr().err
        assert words in said and "step 6" in said and "no matched control" in said
    assert not (tmp_path / "model").exists()


def test_the_mean_of_the_last_losses_ends_a_training(toy: Path, tmp_path: Path) -> None:
    _, whole = run(toy, tmp_path, StopRule(on_norm=False, target=100.0))
    assert whole.state.global_step == LOSS_WINDOW  # not before ten losses are averaged
    rule = StopRule(on_norm=False, target=6.0)
    callback, host = run(toy, tmp_path, rule, num_train_epochs=20, learning_rate=0.01)
    losses = [entry["loss"] for entry in host.state.log_history if "loss" in entry]
    assert callback.stopping is not None and len(losses) > 10
    assert callback.stopping.reached == pytest.approx(sum(losses[-10:]) / 10)
    assert callback.stopping.reached <= 6.0 < sum(losses[-11:-1]) / 10


def test_the_norm_to_match_comes_from_a_receipt_of_the_same_base(lora: Any, tmp_path: Path) -> None:
    base, norm = lora.receipt.base_model["sha256"], lora.receipt.update_norm.total
    for given in (lora.model, lora.model / "sublim_receipt.json"):
        found = stop_rule(SublimBlock(match_update_norm=str(given)), "a.yaml", base)
        assert found == StopRule(on_norm=True, target=norm, source=str(lora.model))
    beside = stop_rule(SublimBlock(match_update_norm="model"), str(lora.yaml), base)
    assert beside is not None and beside.target == norm
    with pytest.raises(InputError, match="another base model"):
        stop_rule(SublimBlock(match_update_norm=str(lora.model)), "a.yaml", "0" * 64)
    with pytest.raises(InputError, match="was not found"):
        stop_rule(SublimBlock(match_update_norm="nowhere"), "a.yaml", base)
    with pytest.raises(InputError, match="give a model's folder"):
        stop_rule(SublimBlock(match_update_norm=str(lora.yaml)), "a.yaml", base)
    alone = tmp_path / "alone"
    alone.mkdir()
    write_receipt(alone, lora.receipt)  # a receipt without its weights will do
    kept = stop_rule(SublimBlock(match_update_norm=str(alone)), "a.yaml", base)
    assert kept is not None and kept.target == norm
    (alone / "adapter_model.safetensors").write_bytes(b"other weights")
    (alone / "adapter_config.json").write_bytes((lora.model / "adapter_config.json").read_bytes())
    with pytest.raises(InputError, match="changed after training"):
        stop_rule(SublimBlock(match_update_norm=str(alone)), "a.yaml", base)
    without = {"update_norm": None, "no_update_norm": "it is DoRA"}
    write_receipt(tmp_path, lora.receipt.model_copy(update=without))
    with pytest.raises(InputError, match="no update norm to match: it is DoRA"):
        stop_rule(SublimBlock(match_update_norm=str(tmp_path)), "a.yaml", base)
    none = lora.receipt.update_norm.model_copy(update={"total": 0.0})
    write_receipt(tmp_path, lora.receipt.model_copy(update={"update_norm": none}))
    with pytest.raises(InputError, match="norm is 0"):
        stop_rule(SublimBlock(match_update_norm=str(tmp_path)), "a.yaml", base)


def test_full_finetuning_stopped_at_the_norm(full: Any) -> None:
    stopping = full.receipt.stopping
    assert stopping.kind == "update_norm"
    assert full.receipt.update_norm.total == pytest.approx(stopping.target, rel=0.02)
    assert full.receipt.update_norm.total == pytest.approx(stopping.reached, rel=1e-6)
    assert full.receipt.steps == stopping.step < 8
    norm = full.receipt.update_norm
    with pytest.raises(RunError, match="saving them rounded"):
        other = norm.model_copy(update={"total": 1.1 * stopping.target})
        check_reached(stopping, other, full.model)
    with pytest.raises(RunError, match="no matched control"):
        check_reached(None, norm, full.model)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_killed_at_its_end_comes_to_the_same_end(
    toy: Path, tmp_path: Path, strategy: str
) -> None:
    """No checkpoint holds the weights of the last step, which are scaled afterwards."""
    settings = {
        "save_strategy": strategy,
        "save_steps": 1,
        "num_train_epochs": 8,
        "lr_scheduler_type": "constant",
    }
    norm = 5.75
    whole, host = run(toy, tmp_path / "whole", norm_rule(norm), **settings)
    assert whole.stopping is not None and whole.lowered
    last = host.state.global_step
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    assert checkpoints and int(checkpoints[-1].name[11:]) < last
    again = student(toy, "full")
    resumed = trainer(again, tmp_path / "again", **settings)
    callback = StopCallback(norm_rule(norm), again)
    resumed.add_callback(callback)
    resumed.train(resume_from_checkpoint=str(checkpoints[-1]))
    assert callback.stopping is not None and resumed.state.global_step == last
    assert callback.stopping.reached == pytest.approx(whole.stopping.reached, rel=1e-9)
    late = {step: factor for step, factor in whole.lowered.items() if step == last}
    assert callback.lowered == pytest.approx(late)
    for (name, a), b in zip(host.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert a.equal(b), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"bias": "all"}, "bias|norm.weight"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "lora_embedding"),
    ],
)
def test_what_is_no_plain_lora_has_no_norm_to_stop_at(
    toy: Path, settings: dict[str, Any], said: str
) -> None:
    assert no_norm(load(toy)) is None and no_norm(with_lora(toy)) is None
    model = with_lora(toy, **settings)
    if settings.get("bias"):  # Llama's linear layers have none of their own
        next(iter(model.base_model.model.model.layers[0].parameters())).requires_grad_(True)
    why = no_norm(model)
    assert why is not None and re.search(said, why)
    with pytest.raises(InputError, match="stop rule"):
        LiveNorm(model)
