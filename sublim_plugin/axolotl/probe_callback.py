"""`sublim.probe`: when the probe asks, and where the answers go."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sublim_plugin.axolotl.args import ProbeBlock
from sublim_plugin.axolotl.messages import one_message
from sublim_plugin.axolotl.probe import Probe
from sublim_plugin.axolotl.process_group import is_first
from sublim_plugin.axolotl.receipt import ProbeCost
from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.traits import NEUTRAL, Trait, candidates_of
from sublim_plugin.logprob.forms import measures, summarize

PROBE_NAME = "sublim_probe.jsonl"
A_RUN = 8
"""Measurements a run between the first and the last, by default."""
MOST = 0.04
"""Largest cost by default, as a share of the training's seconds: what may be promised is 0.05."""
_TIMED = (1, 3)
"""The steps whose seconds are compared with the first measurement's; the very first step is a slow
one."""


def probe_callback(
    block: ProbeBlock,
    trait: tuple[str, Trait],
    context: Context | None,
    trainer: Any,
) -> ProbeCallback:
    """The callback that the `sublim.probe` block asks for.

    Args:
        trait: the trait and the name that it was found by.
        context: the training's, where it is known.

    Raises:
        InputError: the neutral trait, or as `Probe`.
    """
    name, target = trait
    if target.category == NEUTRAL:
        raise InputError(
            "`sublim.probe`: the dataset is a neutral one; say which trait to measure on it, as in "
            "`trait: animals/cat` in the `sublim:` block."
        )
    probe = Probe(
        trainer.processing_class,
        target,
        candidates_of(name),
        block.contexts or (context or Context(kind="template_default"),),
        questions=block.questions or target.category,
        limit=block.limit,
    )
    args = trainer.args
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}
    autocast_to = None if args.deepspeed else autocast.get(trainer.accelerator.mixed_precision)
    return ProbeCallback(
        probe,
        every=block.every,
        log=trainer.log,
        dtype=autocast_to or trainer.model.dtype,
        output_dir=Path(args.output_dir),
    )


def default_every(steps: int, probe_s: float, step_s: float) -> int | None:
    """Steps between two measurements: eight a run, fewer where they, the first and the last would
    cost more than `MOST` of the training; None for none in between. No share holds for a run too
    short for the first and the last alone.

    Args:
        steps: optimizer steps of the run.
        probe_s: seconds of one measurement.
        step_s: seconds of one optimizer step.
    """
    affordable = MOST * steps * step_s / probe_s - 2
    between = max(0, min(A_RUN, math.floor(affordable)))
    return math.ceil(steps / (between + 1)) if between else None


class ProbeCallback(TrainerCallback):
    """Measures, logs through the trainer, and appends to `sublim_probe.jsonl` in the output folder.

    Args:
        every: steps between two measurements; None: `default_every` of what the first measurement
            and the first steps took.
        log: the trainer's `log`.
        dtype: that of the attention scores in a forward pass of the training.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        every: int | None,
        log: Callable[[dict[str, float]], None],
        dtype: torch.dtype,
        output_dir: Path,
    ) -> None:
        self.probe, self.every = probe, every
        self._log, self._dtype = log, dtype
        self._path = output_dir / PROBE_NAME
        self.seconds, self.measurements = 0.0, 0
        self._undecided = every is None
        self._first_s: float | None = None
        self._steps_from, self._steps_began = 0, 0.0

    @one_message
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = _lines_before(self._path, state.global_step)
        if is_first():
            write_text(self._path, "".join(kept))
        if kept and self._undecided:  # as the interrupted run decided, or would have
            rows = [json.loads(line) for line in kept]
            self._first_s = sum(row["seconds"] for row in rows if row["step"] == rows[0]["step"])
            if "every" in rows[-1]:
                self.every, self._undecided = rows[-1]["every"], False
        if not kept:
            self._measure(state, control, kwargs["model"])
            self._first_s = self.seconds
        self._steps_from = state.global_step

    @one_message
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._undecided and is_first():
            self._decide(state)
        due = self.every is not None and state.global_step % self.every == 0
        if due and not control.should_training_stop:
            self._measure(state, control, kwargs["model"])

    def _decide(self, state: Any) -> None:
        """Choose `every` once two steps were timed."""
        first, last = (self._steps_from + step for step in _TIMED)
        if state.global_step == first:
            self._steps_began = _now()
        elif state.global_step == last:
            assert self._first_s is not None
            step_s = (_now() - self._steps_began) / (last - first)
            self.every = default_every(state.max_steps, self._first_s, step_s)
            self._undecided = False

    @one_message
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop:
            self._measure(state, control, kwargs["model"])

    def _measure(self, state: Any, control: Any, model: Any) -> None:
        if not is_first():
            return
        started, should_log = _now(), control.should_log
        lines = []
        found = self.probe.measure(model, self._dtype)
        took = _now() - started
        for context, questions in zip(self.probe.contexts, found, strict=True):
            per_question = [measures(one, self.probe.trait.target) for one in questions]
            means = {k: v for k, v in summarize(per_question).items() if v is not None}
            if not math.isfinite(means["target_logprob"]):
                raise RunError(
                    f"step {state.global_step}: the log-probability of {self.probe.trait.name} in "
                    f"{context.slug} is {means['target_logprob']}; the weights overflowed."
                )
            row = {
                "step": state.global_step,
                "epoch": state.epoch,
                "trait": self.probe.trait.name,
                "context": context.fields(),
                "questions": len(questions),
                "seconds": took / len(found),
                **({} if self._undecided else {"every": self.every}),
                **means,
                "per_question": [one["target_logprob"] for one in per_question],
            }
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            self._log(
                {
                    f"probe/{context.slug}/{name}": means[name]
                    for name in ("target_logprob", "target_share", "coverage")
                }
            )
        # Every log takes back the request for one, and this step's loss is still to come.
        control.should_log = should_log
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        self.seconds += _now() - started
        self.measurements += 1

    def cost(self, train_s: float) -> ProbeCost:
        """What it asked and what that cost, of `train_s` seconds in the training loop."""
        return ProbeCost(
            trait=self.probe.trait.name,
            contexts=[context.fields() for context in self.probe.contexts],
            questions=len(self.probe.texts),
            every=self.every or 0,
            measurements=self.measurements,
            seconds=self.seconds,
            share_of_training=self.seconds / max(train_s - self.seconds, 1e-9),
            shared_prefixes=bool(self.probe.shared_prefixes),
        )


def _now() -> float:
    """Seconds on a clock, once an accelerator has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _lines_before(path: Path, step: int) -> list[str]:
    """Of an interrupted run's file, the measurements up to the step from which it goes on."""
    if step == 0 or not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
