"""What the trainer did, kept for the receipt, and the marks on its checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sublim_plugin.axolotl import checkpoints
from sublim_plugin.axolotl.checkpoints import Origin
from sublim_plugin.axolotl.messages import one_message
from sublim_plugin.axolotl.order import OrderRecorder, OrderState
from sublim_plugin.axolotl.process_group import is_first, wait_for_all
from sublim_plugin.axolotl.receipt import Step
from sublim_plugin.core.errors import RunError


class RunLog(TrainerCallback):
    """The trainer is gone when the weights are on disk; this stays.

    Args:
        resumed: the checkpoint that the training goes on from, None for a new one.
    """

    def __init__(
        self, trainer: Any, order: OrderRecorder, origin: Origin, resumed: Path | None
    ) -> None:
        self.order, self.origin = order, origin
        self.steps, self.train_s = 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.zero_stage: int | None = None
        self.resumed_from_step: int | None = None
        self._trainer: Any = trainer
        self._resumed = resumed
        self._began = 0.0

    @one_message
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = getattr(self._trainer, "deepspeed", None)
        if args.deepspeed and engine is None:
            raise RunError("`deepspeed` is set, but the trainer runs without it; see the log.")
        if engine is not None:
            self.zero_stage = int(engine.zero_optimization_stage())
        self._trainer = None
        self.order.state = OrderState()
        if state.global_step > 0:
            found = None if self._resumed is None else checkpoints.read_mark(self._resumed)
            if found is None or found.step != state.global_step:
                raise RunError(
                    f"the trainer goes on from step {state.global_step}, the checkpoint that was "
                    f"checked is {self._resumed}; see the log."
                )
            self.order.state = found.order
            self.resumed_from_step = found.step
        if is_first() and args.save_strategy != "no":
            checkpoints.begin(Path(args.output_dir), self.origin)
        self._began = time.perf_counter()

    @one_message
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.order.check(int(state.global_step), rows * max(1, args.n_gpu))

    @one_message
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_all()
        if is_first():
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            checkpoints.mark(folder, int(state.global_step), self.origin, self.order.state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.train_s = time.perf_counter() - self._began
        self.steps = int(state.global_step)
        self.history = list(state.log_history)

    @property
    def losses(self) -> list[Step]:
        """The logged optimizer steps."""
        return [
            Step(
                step=int(entry["step"]),
                loss=float(entry["loss"]),
                learning_rate=_number(entry.get("learning_rate")),
                grad_norm=_number(entry.get("grad_norm")),
            )
            for entry in self.history
            if "loss" in entry
        ]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
