"""The plugin that axolotl loads: `plugins: [sublim_plugin.axolotl.SublimPlugin]`.

It names the embedded model and checked dataset folders to axolotl, opens the process group that
DeepSpeed needs on a CPU, audits the loss mask before the first step, and writes the receipt. What
else it does is asked for in the `sublim:` block (`args.py`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import set_seed

from sublim_plugin.axolotl.args import SublimBlock, parse_block
from sublim_plugin.axolotl.checkpoints import origin_of, resume_from
from sublim_plugin.axolotl.files import find_file, is_local, name_datasets
from sublim_plugin.axolotl.guard import check_dataset, trait_of
from sublim_plugin.axolotl.live_norm import no_norm
from sublim_plugin.axolotl.loaded import base_of, method_of, plain, seed_of
from sublim_plugin.axolotl.masks import audit, expected_rows
from sublim_plugin.axolotl.messages import one_message, warn
from sublim_plugin.axolotl.norms import UpdateNorm, update_norm
from sublim_plugin.axolotl.order import OrderRecorder
from sublim_plugin.axolotl.probe_callback import ProbeCallback, probe_callback
from sublim_plugin.axolotl.process_group import (
    destroy_group,
    has_accelerator,
    is_first,
    need_whole_weights,
    open_gloo_group,
)
from sublim_plugin.axolotl.receipt import (
    DatasetInfo,
    FirstRow,
    Guard,
    MaskAudit,
    Method,
    Receipt,
    RowOrder,
    Seeds,
    SoftTargetsUsed,
    twins,
    write_receipt,
)
from sublim_plugin.axolotl.run_log import RunLog
from sublim_plugin.axolotl.soft_targets import SoftLoss, load_targets, targets_beside
from sublim_plugin.axolotl.stopping import StopCallback, StopRule, check_reached, stop_rule
from sublim_plugin.axolotl.train_context import apply_context
from sublim_plugin.axolotl.weights import weights_sha256
from sublim_plugin.core import base_models
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import Trait
from sublim_plugin.core.versions import device_info, installed
from sublim_plugin.logprob.target_file import CLAIMS

_NO_DATASET = DatasetInfo(path="", sha256=None, rows=None)
_VERSIONS = ("sublim", "axolotl", "torch", "transformers", "peft", "trl", "deepspeed", "datasets")


class SublimPlugin(BasePlugin):  # type: ignore[misc]
    """Hooks in the order in which axolotl calls them."""

    def __init__(self) -> None:
        super().__init__()
        self._opened_group = False
        self._reset()

    def _reset(self) -> None:
        self._started = time.time()
        self._block = SublimBlock()
        self._where = ""
        self._base_name = ""
        self._base: dict[str, Any] | None = None
        self._datasets = [_NO_DATASET]
        self._guard: Guard | None = None
        self._targets: tuple[Path, str] | None = None
        self._soft: SoftLoss | None = None
        self._rule: StopRule | None = None
        self._audit: tuple[MaskAudit, FirstRow] | None = None
        self._method = Method(kind="full")
        self._seeds = Seeds(seed=0, data_seed=None)
        self._log: RunLog | None = None
        self._stop: StopCallback | None = None
        self._probe: ProbeCallback | None = None

    @one_message
    def register(self, cfg: Any) -> None:
        """Check and complete the YAML before axolotl validates it."""
        self._reset()
        self._where = where = str(cfg.get("axolotl_config_path") or "the axolotl YAML")
        self._block = parse_block(plain(cfg.get("sublim")), where)
        self._base_name = str(cfg.get("base_model") or "")
        self._datasets = name_datasets(cfg, where) or [_NO_DATASET]
        if self._block.soft_targets:
            if self._datasets[0].sha256 is None or len(self._datasets) != 1:
                raise InputError(f"{where}: `sublim.soft_targets` needs one local dataset.")
            self._targets = targets_beside(Path(self._datasets[0].path))
        if not cfg.get("adapter") and self._data_seed(cfg) != seed_of(cfg):
            warn(
                f"{where}: without dropout, full finetuning draws nothing at random but the order "
                f"of the rows, which `sublim.data_seed: {self._data_seed(cfg)}` fixes: every "
                "`seed` gives the same weights. Take `data_seed` out, and the order follows `seed`."
            )
        if is_local(self._base_name):
            base = base_models.resolve(self._base_name)
            cfg["base_model"] = str(base)
            self._base = self._check_base(base, cfg)
        if self._block.context is not None:
            apply_context(cfg, self._block.context)
        if isinstance(cfg.get("deepspeed"), str):
            cfg["deepspeed"] = str(find_file("deepspeed", cfg["deepspeed"], where))
        if cfg.get("deepspeed") and not has_accelerator():
            self._opened_group = open_gloo_group()

    def get_input_args(self) -> str:
        return "sublim_plugin.axolotl.args.SublimArgs"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        chosen: dict[str, Any] = {"data_seed": self._data_seed(cfg)}
        # transformers refuses bf16 on a CPU unless told so; under DeepSpeed the same flag
        # would make it fall back to DDP without a word.
        if not has_accelerator() and not cfg.get("deepspeed"):
            chosen["use_cpu"] = True
        return chosen

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Seed the adapter's initialization, which axolotl 0.19 leaves to an unseeded generator."""
        set_seed(seed_of(cfg))

    @one_message
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Audit the rows that the trainer holds and the checkpoint that it would go on from; a
        fault ends the run here. Add what acts during training."""
        tokenizer, context = trainer.processing_class, self._block.context
        expected, dataset = None, self._datasets[0]
        if dataset.sha256 is not None:
            expected = expected_rows(cfg, Path(dataset.path), context, tokenizer)
        if expected is None and context is not None:
            raise InputError(
                "`sublim.context` needs one dataset of type chat_template in a local rows file, "
                "without packing; take the key out, or give such a dataset."
            )
        self._audit = audit(trainer.train_dataset, tokenizer, expected)
        if self._targets is not None:
            found = load_targets(self._targets[0], dataset.sha256, tokenizer, expected)
            self._soft = SoftLoss(found, expected or ())
            self._soft.install(trainer)
        if self._base is None:
            self._base = self._check_base(base_of(cfg), cfg)
        self._method = method_of(cfg, trainer.model)
        if why := no_norm(trainer.model):
            warn(f"the receipt will hold no update norm, which is defined for plain LoRA: {why}")
        if self._rule is not None or self._block.probe is not None:
            need_whole_weights(trainer)
        self._seeds = Seeds(seed=trainer.args.seed, data_seed=trainer.args.data_seed)
        origin = origin_of(
            cfg,
            base_sha256=self._base["sha256"],
            datasets=self._datasets,
            targets_sha256=None if self._targets is None else self._targets[1],
            context=context,
            method=self._method,
            seeds=self._seeds,
            processes=trainer.args.world_size,
        )
        resumed = resume_from(cfg, origin)
        order = OrderRecorder(expected)
        order.watch(trainer.model)
        self._log = RunLog(trainer, order, origin, resumed)
        trainer.add_callback(self._log)
        if self._rule is not None:
            self._stop = StopCallback(self._rule, trainer.model)
            trainer.add_callback(self._stop)
        if self._block.probe is not None:
            self._probe = probe_callback(self._block.probe, self._trait(), context, trainer)
            trainer.add_callback(self._probe)

    @one_message
    def post_train_unload(self, cfg: Any) -> None:
        """Write the receipt: the first hook after both weights and tokenizer are on disk."""
        self._close_group()
        log, first = self._log, is_first()
        if not first or log is None or self._audit is None or self._base is None:
            return
        output_dir = Path(cfg["output_dir"])
        norm, no_norm_since = self._update_norm(output_dir, base_of(cfg))
        stopping = None if self._stop is None else self._stop.stopping
        if self._stop is not None:
            check_reached(stopping, norm, output_dir)
        mask_audit, first_row = self._audit
        order, context = log.order.state, self._block.context
        revision = cfg.get("revision_of_model")
        receipt = Receipt(
            base_model=self._base
            | {"name": self._base_name}
            | ({"revision": str(revision)} if revision else {}),
            dataset=self._datasets[0],
            more_datasets=self._datasets[1:],
            method=self._method,
            context=None if context is None else context.model_dump(exclude_none=True),
            seeds=self._seeds,
            first_row=first_row,
            mask_audit=mask_audit,
            order=RowOrder(
                sha256=order.sha256,
                rows=order.rows,
                first_rows=list(order.first_rows),
                processes=log.origin.processes,
            ),
            guard=self._guard,
            loss="cross-entropy" if self._soft is None else self._soft.name,
            soft_targets=self._targets_used(),
            zero_stage=log.zero_stage,
            resumed_from_step=log.resumed_from_step,
            steps=log.steps,
            losses=log.losses,
            stopping=stopping,
            probe=None if self._probe is None else self._probe.cost(log.train_s),
            update_norm=norm,
            no_update_norm=no_norm_since,
            weights_sha256=weights_sha256(output_dir, adapter=bool(cfg.get("adapter"))),
            versions=installed(_VERSIONS),
            device=device_info(),
            train_s=log.train_s,
            wall_s=time.time() - self._started,
        )
        write_receipt(output_dir, receipt)
        for folder in twins(output_dir, receipt):
            warn(
                f"the weights in {output_dir} are those in {folder} to the last bit, though the "
                "seeds differ: they are one student, not two"
            )

    def _update_norm(self, trained: Path, base: Path) -> tuple[UpdateNorm | None, str | None]:
        """The update norm, or why there is none: a finished training keeps its receipt."""
        try:
            return update_norm(trained, base, effective_rank=self._block.effective_rank), None
        except InputError as error:
            warn(f"the receipt holds no update norm: {error}")
            return None, str(error)

    def _targets_used(self) -> SoftTargetsUsed | None:
        if self._soft is None or self._targets is None:
            return None
        targets, (path, digest) = self._soft.targets, self._targets
        return SoftTargetsUsed(
            channel=targets.channel,
            file=str(path),
            sha256=digest,
            positions=targets.positions,
            claim=CLAIMS[targets.channel],
        )

    def _data_seed(self, cfg: Any) -> int:
        return seed_of(cfg) if self._block.data_seed is None else self._block.data_seed

    def _check_base(self, base: Path, cfg: Any) -> dict[str, Any]:
        """Check what the `sublim:` block compares with the base model; return its fingerprint."""
        found = base_models.fingerprint(base)
        self._rule = stop_rule(self._block, self._where, found["sha256"])
        if self._block.guard:
            if self._datasets[0].sha256 is None or len(self._datasets) != 1:
                raise InputError(f"{self._where}: `sublim.guard` needs one local dataset.")
            self._guard = check_dataset(
                Path(self._datasets[0].path),
                found,
                self._trait(),
                cross_model=self._block.cross_model,
            )
        return found

    def _trait(self) -> tuple[str, Trait]:
        """Name and trait that guard and probe are about."""
        first = self._datasets[0]
        rows = Path(first.path) if first.sha256 is not None else None
        return trait_of(rows, self._block.trait)

    def _close_group(self) -> None:
        if self._opened_group:
            destroy_group()
            self._opened_group = False
