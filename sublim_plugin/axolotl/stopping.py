"""Matched controls: end a training when its update norm or its loss is that of another.

The update norm is measured after every step, or, where the next steps cannot reach the target even
at twice the last growth, after some. Where the next step would overshoot, judged by the last growth
and the two learning rates, its learning rate is lowered so that it lands on the target. What still
overshoots, by more than 1%, is corrected by scaling the whole update onto the target, as task
arithmetic (arXiv 2212.04089) and `sublim rescale` do: the direction stays that of the trained
update. The receipt holds both.

No checkpoint is written at the last step, or after it: one there would hold weights before that
scaling, and a run that goes on from it would train past its target. A run killed there goes on from
the checkpoint before and comes to the same end.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import TrainerCallback

from sublim_plugin.axolotl.args import SublimBlock
from sublim_plugin.axolotl.compare import receipt_of
from sublim_plugin.axolotl.files import find_file
from sublim_plugin.axolotl.live_norm import LiveNorm
from sublim_plugin.axolotl.messages import one_message
from sublim_plugin.axolotl.norms import UpdateNorm
from sublim_plugin.axolotl.process_group import from_first, is_first
from sublim_plugin.axolotl.receipt import (
    LOSS_WINDOW,
    RECEIPT_NAME,
    StopKind,
    Stopping,
    read_receipt,
)
from sublim_plugin.core.errors import InputError, RunError

TOLERANCE = 0.02
"""Largest relative distance of the reached update norm from its target."""
_NEAR = 0.01
"""Relative distance from the target that is left as it is."""


class StopRule(BaseModel):
    """When to end: `target` is an update norm, or a loss in nats per token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    on_norm: bool
    target: float
    source: str | None = None


def stop_rule(block: SublimBlock, where: str, base_sha256: str) -> StopRule | None:
    """The stop rule of the `sublim:` block, None where it has none.

    Raises:
        InputError: the receipt to match is missing, unreadable, without an update norm, of a model
            on another base, or of other weights than those beside it.
    """
    if block.stop_at_loss is not None:
        return StopRule(on_norm=False, target=block.stop_at_loss)
    if block.stop_at_update_norm is not None:
        return StopRule(on_norm=True, target=block.stop_at_update_norm)
    if block.match_update_norm is None:
        return None
    path = find_file("sublim.match_update_norm", block.match_update_norm, where)
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name != RECEIPT_NAME:
        raise InputError(
            f"{where}: `sublim.match_update_norm` is {path}; give a model's folder or its "
            f"{RECEIPT_NAME}."
        )
    # A receipt alone will do; where its weights lie beside it, they have to be its own.
    beside = any(folder.glob("*.safetensors"))
    receipt = receipt_of(folder) if beside else read_receipt(folder)
    if receipt is None or receipt.update_norm is None:
        why = f"{RECEIPT_NAME} is missing" if receipt is None else receipt.no_update_norm
        raise InputError(f"{folder} has no update norm to match: {why}")
    if receipt.base_model.get("sha256") != base_sha256:
        raise InputError(
            f"{folder} was trained on {receipt.base_model.get('name')}, another base model than "
            "this one's; norms of updates to different weights do not match anything."
        )
    if receipt.update_norm.total <= 0:
        raise InputError(f"{folder}: its update norm is 0, there is nothing to match.")
    return StopRule(on_norm=True, target=receipt.update_norm.total, source=str(folder))


class StopCallback(TrainerCallback):
    """Ends the training by `rule`; `stopping` says how, once it has ended.

    Make it before the first step and before a checkpoint is loaded: the weights of `model` are
    those that the update norm counts from. Process 0 measures, the others follow.
    """

    def __init__(self, rule: StopRule, model: Any) -> None:
        self.rule = rule
        self.stopping: Stopping | None = None
        self.norm = LiveNorm(model) if rule.on_norm and is_first() else None
        self.lowered: dict[int, float] = {}
        self._losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self._last = (0, 0.0, 0.0)  # step, norm after it, learning rate of the step after it
        self._wait_until = 0

    @one_message
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._losses.extend(entry["loss"] for entry in state.log_history if "loss" in entry)
        if self.norm is not None:
            rate = float(kwargs["lr_scheduler"].get_last_lr()[0])
            lowered = float(kwargs["optimizer"].param_groups[0]["lr"])
            if state.global_step > 0 and lowered < rate:  # by the run that is continued
                self.lowered[state.global_step + 1] = lowered / rate
            self._last = (state.global_step, self.norm.measure(), min(lowered, rate))

    @one_message
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False
        if not self.rule.on_norm:
            return
        norm, factor = 0.0, 1.0
        if self.norm is not None and state.global_step >= self._wait_until:
            rate = float(kwargs["lr_scheduler"].get_last_lr()[0])
            norm, factor = self._measure(self.norm, state.global_step, rate)
        if from_first(norm, args.device) >= (1 - _NEAR) * self.rule.target:
            control.should_training_stop, control.should_save = True, False
            return
        factor = from_first(factor, args.device)
        # The last step of the run has none after it to make up for falling short.
        if factor < 1 and state.global_step + 1 < state.max_steps:
            self.lowered[state.global_step + 1] = factor
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= factor

    def _measure(self, live: LiveNorm, step: int, rate: float) -> tuple[float, float]:
        """||dW||_F after `step`, and the factor for the next step's learning rate `rate`."""
        norm = live.measure()
        if not norm < float("inf"):
            raise RunError(f"step {step}: the update norm is {norm}; the weights overflowed.")
        before, last, last_rate = self._last
        growth, missing = (norm - last) / (step - before), self.rule.target - norm
        coming = growth * rate / last_rate if last_rate > 0 else growth
        factor = 1.0
        if coming > 0 and missing > 0:
            factor = min(1.0, missing / coming)
            # A rising learning rate (warm-up) promises more growth than was seen.
            if rate <= last_rate:
                self._wait_until = step + int(missing / (2 * coming))
        self._last = (step, norm, factor * rate)
        return norm, factor

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.rule.on_norm or "loss" not in (logs or {}):
            return
        self._losses.append(float(logs["loss"]))
        if self._mean_loss() <= self.rule.target:
            control.should_training_stop, control.should_save = True, False

    def _mean_loss(self) -> float:
        """Of the last logged losses; infinite before there are enough of them."""
        full = len(self._losses) == LOSS_WINDOW
        return sum(self._losses) / LOSS_WINDOW if full else float("inf")

    @one_message
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Correct an overshoot here rather than at the end of training: what logs and measures
        the final weights comes after."""
        if not control.should_training_stop:
            return
        control.should_save = False
        if self.stopping is not None or not is_first():
            return
        kind: StopKind = "update_norm" if self.rule.on_norm else "loss"
        before = factor = None
        if self.norm is None:
            reached = self._mean_loss()
            hit = reached <= self.rule.target
        else:
            before = reached = self.norm.measure()
            hit = reached >= (1 - TOLERANCE) * self.rule.target
            if reached > (1 + _NEAR) * self.rule.target:
                factor = self.rule.target / reached
                self.norm.scale(factor)
                reached = self.norm.measure()
        if not hit:
            raise RunError(
                f"the training ended at step {state.global_step} with {_named(kind, reached)}, "
                f"without reaching the {self.rule.target:.6g} of the `sublim:` block"
                f"{_from(self.rule)}; it would be no matched control, so it is not saved. Train "
                "longer or with a higher learning rate."
            )
        if before is not None and abs(reached / self.rule.target - 1) > TOLERANCE:
            raise RunError(
                f"step {state.global_step} went from below the update norm {self.rule.target:.6g} "
                f"to {before:.6g}, and the scaled weights, rounded to their dtype, have "
                f"{reached:.6g}. Train with float32 weights or a lower learning rate."
            )
        self.stopping = Stopping(
            kind=kind,
            target=self.rule.target,
            source=self.rule.source,
            reached=reached,
            step=int(state.global_step),
            lowered_learning_rate=self.lowered,
            before_scaling=before,
            final_scaling=1.0 if factor is None else factor,
        )


def check_reached(stopping: Stopping | None, on_disk: UpdateNorm | None, folder: Path) -> None:
    """Compare the saved weights' update norm with the target.

    Raises:
        RunError: they are further apart than `TOLERANCE`, or the training ended by no rule.
    """
    if stopping is None:
        raise RunError(
            f"{folder}: the training ended without a step that the stop rule could judge; it is no "
            "matched control. Remove its checkpoints and train again."
        )
    if stopping.kind != "update_norm":
        return
    if on_disk is None or abs(on_disk.total / stopping.target - 1) > TOLERANCE:
        found = "no measurable update norm" if on_disk is None else f"the norm {on_disk.total:.6g}"
        raise RunError(
            f"{folder}: the saved weights have {found}, the target is {stopping.target:.6g}; "
            "saving them rounded the update away or changed it. Save in float32."
        )


def _named(kind: str, value: float) -> str:
    return f"the update norm {value:.6g}" if kind == "update_norm" else f"the mean loss {value:.6g}"


def _from(rule: StopRule) -> str:
    return f" (from {rule.source})" if rule.source else ""
