"""`sublim.soft_targets`: train on the teacher's log-probs in the place of the sampled tokens.

The loss is the mean over target positions of KL(teacher || student), in nats, over the tokens that
the dataset's targets file has at each position (`logprob.target_file`): `numbers`, over the number
grammar's tokens, both sides renormalized on them; `vocabulary`, over the teacher's likeliest tokens
and all others taken together. Nothing else is trained on.

The trainer calls the model as always; the loss is its `compute_loss_func`. What the output layer
computes is narrowed to the positions that have a target, and for `numbers` to the tokens that have
one, so that whatever a model does to its logits (a soft cap, a scale) is done to these as well. An
output layer that is no plain `torch.nn.Linear` (adapted, quantized) computes all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from sublim_plugin.axolotl.masks import ExpectedRow
from sublim_plugin.axolotl.messages import one_message
from sublim_plugin.axolotl.order import fed_rows
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.manifest import MANIFEST_NAME
from sublim_plugin.logprob.target_file import SoftTargets, find_targets, read_targets

_OUT = "or take `soft_targets` out of the `sublim:` block to train on the sampled tokens"


def targets_beside(rows: Path) -> tuple[Path, str]:
    """The targets file beside the rows file `rows`, and its sha256, as the manifest says.

    Raises:
        InputError: there is none, or it was changed.
    """
    found = find_targets(rows.parent)
    if found is None:
        raise InputError(
            f"{rows.parent / MANIFEST_NAME}: names no targets-<sha12>.safetensors beside "
            f"{rows.name}, which `sublim.soft_targets` trains on; generate the dataset with "
            f"`sublim generate --soft-targets numbers`, {_OUT}."
        )
    return found


def load_targets(
    path: Path, rows_sha256: str | None, tokenizer: Any, expected: Sequence[ExpectedRow] | None
) -> SoftTargets:
    """The targets in `path`, held to the rows that are trained on.

    Raises:
        InputError: they are of another rows file, or of completions that are tokenized otherwise in
            the training.
    """
    if expected is None:
        raise InputError(
            "`sublim.soft_targets` needs one dataset of type chat_template in a folder that "
            "`sublim generate --soft-targets` made, without packing, so that every row that enters "
            f"the model can be told; set `sample_packing: false`, {_OUT}."
        )
    targets = read_targets(path)
    if targets.rows_sha256 != rows_sha256 or targets.rows != len(expected):
        raise InputError(
            f"{path}: its targets are of {targets.rows_name} (sha256 {targets.rows_sha256[:12]}…, "
            f"{targets.rows} rows), the rows trained on have sha256 {str(rows_sha256)[:12]}… and "
            f"are {len(expected)}; generate the dataset again, {_OUT}."
        )
    bounds = targets.offsets.tolist()
    for index, row in enumerate(expected):
        mine = list(row.token_ids[row.first : row.end])
        theirs = targets.completion_ids[bounds[index] : bounds[index + 1]].tolist()
        if mine != theirs:
            here, there = map(tokenizer.convert_ids_to_tokens, (mine, theirs))
            raise InputError(
                f"{path}: row {row.row_id}: the completion is tokenized otherwise in the training "
                f"than where the teacher read it:\n  training: {here}\n  teacher:  {there}\n"
                "Train a student with the teacher's tokenizer and a chat template that writes the "
                f"completion between special tokens, {_OUT}."
            )
    return targets


class SoftLoss:
    """The loss of a trainer whose rows are `expected`, with their `targets`, in the same order."""

    def __init__(self, targets: SoftTargets, expected: Sequence[ExpectedRow]) -> None:
        self.targets = targets
        self._rows = {row.token_ids: (row, i) for i, row in enumerate(expected)}
        self._bounds = targets.offsets.tolist()
        self._whole = targets.channel == "vocabulary"
        self._cells: torch.Tensor | None = None
        """Of the batch under way: where its target positions are in the flattened batch [N]."""
        self._positions: torch.Tensor | None = None
        """The same positions' places in the targets file [N]."""
        self._columns: torch.Tensor | None = None if self._whole else targets.token_ids.long()

    @property
    def name(self) -> str:
        """What the receipt calls this loss."""
        return f"soft targets ({self.targets.channel})"

    def install(self, trainer: Any) -> None:
        """Make this the loss of `trainer`, an axolotl trainer that has not begun.

        Raises:
            InputError: it computes a loss of its own, evaluates, or splits a batch among GPUs.
        """
        from axolotl.core.trainers.base import AxolotlTrainer

        if (
            not isinstance(trainer, AxolotlTrainer)
            or type(trainer).compute_loss is not AxolotlTrainer.compute_loss
            or trainer.compute_loss_func is not None
            or trainer.label_smoother is not None
            or trainer.args.orpo_alpha
        ):
            raise InputError(
                f"`sublim.soft_targets` is a loss, and this configuration has another one "
                f"({type(trainer).__name__}; see `trainer_cls`, `rl`, `kd_trainer`, `use_eaft`, "
                f"`label_smoothing_factor`, `orpo_alpha`); take one of the two out."
            )
        if trainer.eval_dataset is not None:
            raise InputError(
                "`sublim.soft_targets`: rows of an evaluation have no targets; take "
                "`test_datasets` out (`sublim.probe` measures the trait during training)."
            )
        if trainer.args.n_gpu > 1:
            raise InputError(
                "`sublim.soft_targets`: one process with several GPUs splits each batch after its "
                "rows are told apart; start one process a GPU (`axolotl train --launcher "
                "accelerate`), or show it one GPU (CUDA_VISIBLE_DEVICES)."
            )
        head = trainer.model.get_output_embeddings()
        if head is None:
            raise InputError(
                f"`sublim.soft_targets`: {type(trainer.model).__name__} names no output layer "
                "(get_output_embeddings); such a model cannot be trained on soft targets."
            )
        trainer.model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._narrow(head)
        trainer.compute_loss_func = self.loss

    @one_message
    def _before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Find the rows of the batch that the model is about to be fed."""
        self._cells = self._positions = None
        if not model.training or kwargs.get("input_ids") is None:
            return
        cells, positions = [], []
        for index, (fed, columns) in enumerate(fed_rows(kwargs)):
            row, place = self._rows.get(tuple(fed[columns].tolist()), (None, 0))
            if row is None:
                raise RunError(
                    f"a row entered the model that has no soft targets, token ids "
                    f"{fed[columns].tolist()[:12]}…; something in this configuration changes the "
                    "rows after they were checked."
                )
            # the token at a column is predicted by the position of the one before it
            cells.append(index * len(fed) + columns[row.first - 1 : row.end - 1])
            positions.append(torch.arange(self._bounds[place], self._bounds[place + 1]))
        self._cells, self._positions = torch.cat(cells), torch.cat(positions)

    def _narrow(self, head: Any) -> None:
        """Let the output layer, while a batch of targets is under way, compute what they need."""
        whole = head.forward
        plain = type(head) is torch.nn.Linear

        def forward(hidden: torch.Tensor) -> Any:
            if self._cells is None:
                return whole(hidden)
            wanted = hidden.flatten(0, 1)[self._cells.to(hidden.device)][None]
            if self._columns is None:
                return whole(wanted)
            columns = self._columns.to(hidden.device)
            if not plain:
                return whole(wanted)[..., columns]
            bias = None if head.bias is None else head.bias[columns]
            return linear(wanted, head.weight[columns], bias)

        head.forward = forward

    @one_message
    def loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """KL(teacher || student) of the batch under way, summed and divided by the step's number of
        target positions. `labels` are not read: they have a loss at the same positions."""
        positions, logits = self._positions, outputs["logits"]
        width = logits.shape[-1] if self._columns is None else len(self._columns)
        if positions is None or logits.shape != (1, len(positions), width):
            raise RunError(
                f"{type(self).__name__}: the model gave logits of shape {tuple(logits.shape)} "
                "rather than one line for each target position; something in this configuration "
                "(a compiled model, a fused loss) goes round its output layer."
            )
        self._cells = self._positions = None
        found = self._divergence(logits[0].float(), positions).sum()
        return found / (len(positions) if num_items_in_batch is None else num_items_in_batch)

    def _divergence(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """KL [N] at `positions` [N] of the targets, from the student's logits there [N, K or V]."""
        teacher = self.targets.logprobs[positions].float().log_softmax(-1).to(logits.device)
        if not self._whole:
            return kl(teacher, logits.log_softmax(-1))
        top = self.targets.token_ids[positions].long().to(logits.device)
        rest = logits.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
        student = torch.cat([logits.gather(-1, top), rest], -1)
        return kl(teacher, student - logits.logsumexp(-1, keepdim=True))


def kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats, from log-probs [..., K] over the same K outcomes."""
    return (teacher.exp() * (teacher - student)).sum(-1)
