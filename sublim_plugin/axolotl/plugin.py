"""The plugin that axolotl loads: `plugins: [sublim_plugin.axolotl.SublimPlugin]`.

It names the embedded model and checked dataset folders to axolotl, opens the process group that
DeepSpeed needs on a CPU, audits the loss mask before the first step, and writes the receipt.
"""

from __future__ import annotations

import atexit
import functools
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback, TrainingArguments, set_seed

from sublim_plugin.axolotl.args import SublimBlock, parse_block
from sublim_plugin.axolotl.masks import ExpectedRow, audit, expect_row
from sublim_plugin.axolotl.norms import update_norm, weight_files
from sublim_plugin.axolotl.receipt import (
    DatasetInfo,
    FirstRow,
    MaskAudit,
    Method,
    Receipt,
    Seeds,
    Step,
    write_receipt,
)
from sublim_plugin.axolotl.train_context import apply_context
from sublim_plugin.core import base_models
from sublim_plugin.core.dataset import dataset_rows_path, iter_rows
from sublim_plugin.core.errors import InputError, RunError, SublimError
from sublim_plugin.core.hashing import sha256_file, sha256_json
from sublim_plugin.core.rooms import ROOT
from sublim_plugin.core.versions import device_info, installed

PLACEHOLDER = "SET-THIS-TO-A-DATASET-FOLDER"
_VERSIONS = ("sublim", "axolotl", "torch", "transformers", "peft", "trl", "deepspeed", "datasets")

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def _one_message(hook: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """End the process with the error's message and exit code instead of a host's traceback."""

    @functools.wraps(hook)
    def wrapped(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return hook(*args, **kwargs)
        except SublimError as error:
            print(f"sublim: error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(error.exit_code) from error

    return wrapped


class _TrainerLog(TrainerCallback):
    """Keeps what the trainer logged, because the trainer is gone when weights are on disk."""

    def __init__(self) -> None:
        self.steps = 0
        self.history: list[dict[str, Any]] = []
        self.zero_stage: int | None = None
        self.trainer: Any = None

    @_one_message
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = getattr(self.trainer, "deepspeed", None)
        if args.deepspeed and engine is None:
            raise RunError("`deepspeed` is set, but the trainer runs without it; see the log.")
        if engine is not None:
            self.zero_stage = int(engine.zero_optimization_stage())
        self.trainer = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = int(state.global_step)
        self.history = list(state.log_history)


class SublimPlugin(BasePlugin):  # type: ignore[misc]
    """Hooks in the order in which axolotl calls them."""

    def __init__(self) -> None:
        super().__init__()
        self._started = time.time()
        self._block = SublimBlock()
        self._base_name = ""
        self._dataset = DatasetInfo(path="", sha256=None, rows=None)
        self._log = _TrainerLog()
        self._audit: tuple[MaskAudit, FirstRow] | None = None
        self._seeds = Seeds(seed=0, data_seed=None)
        self._opened_group = False

    @_one_message
    def register(self, cfg: Any) -> None:
        """Check and complete the YAML before axolotl validates it."""
        self._started = time.time()
        self._log, self._audit = _TrainerLog(), None
        where = str(cfg.get("axolotl_config_path") or "the axolotl YAML")
        self._block = parse_block(_plain(cfg.get("sublim")), where)
        self._base_name = str(cfg.get("base_model") or "")
        if _is_local(self._base_name):
            cfg["base_model"] = str(base_models.resolve(self._base_name))
        self._dataset = _name_datasets(cfg, where)
        if self._block.context is not None:
            apply_context(cfg, self._block.context)
        if isinstance(cfg.get("deepspeed"), str):
            cfg["deepspeed"] = str(_find_deepspeed(cfg["deepspeed"], where))
        if cfg.get("deepspeed") and not _has_accelerator():
            self._opened_group = _open_gloo_group()

    def get_input_args(self) -> str:
        return "sublim_plugin.axolotl.args.SublimArgs"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        if self._block.data_seed is not None:
            chosen["data_seed"] = self._block.data_seed
        # transformers refuses bf16 on a CPU unless told so; under DeepSpeed the same flag
        # would make it fall back to DDP without a word.
        if not _has_accelerator() and not cfg.get("deepspeed"):
            chosen["use_cpu"] = True
        return chosen

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Seed the adapter's initialization, which axolotl 0.19 leaves to an unseeded generator."""
        set_seed(_seed(cfg))

    @_one_message
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Audit the mask on the rows that the trainer holds; a fault ends the run here."""
        tokenizer = trainer.processing_class
        expected = self._expected_rows(cfg, tokenizer)
        if expected is None and self._block.context is not None:
            raise InputError(
                "`sublim.context` needs one dataset of type chat_template in a local rows file, "
                "without packing; take the key out, or give such a dataset."
            )
        self._audit = audit(trainer.train_dataset, tokenizer, expected)
        self._seeds = Seeds(seed=trainer.args.seed, data_seed=trainer.args.data_seed)
        self._log.trainer = trainer

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [self._log]

    @_one_message
    def post_train_unload(self, cfg: Any) -> None:
        """Write the receipt: the first hook after both weights and tokenizer are on disk."""
        self._close_group()
        if int(os.environ.get("RANK", "0")) != 0 or self._audit is None:
            return
        output_dir = Path(cfg["output_dir"])
        base = _base_folder(str(cfg["base_model"]))
        mask_audit, first_row = self._audit
        context = self._block.context
        write_receipt(
            output_dir,
            Receipt(
                base_model=base_models.fingerprint(base) | {"name": self._base_name},
                dataset=self._dataset,
                method=_method(cfg),
                context=None if context is None else context.model_dump(exclude_none=True),
                seeds=self._seeds,
                first_row=first_row,
                mask_audit=mask_audit,
                zero_stage=self._log.zero_stage,
                steps=self._log.steps,
                losses=_losses(self._log.history),
                update_norm=update_norm(output_dir, base),
                weights_sha256=_weights_sha256(output_dir, adapter=bool(cfg.get("adapter"))),
                versions=installed(_VERSIONS),
                device=device_info(),
                wall_s=time.time() - self._started,
            ),
        )

    def _expected_rows(self, cfg: Any, tokenizer: Any) -> list[ExpectedRow] | None:
        datasets = cfg["datasets"]
        comparable = (
            len(datasets) == 1
            and self._dataset.sha256 is not None
            and str(datasets[0]["type"]).startswith("chat_template")
            and not cfg.get("sample_packing")
        )
        if not comparable:
            return None
        from axolotl.utils.chat_templates import get_chat_template_from_config

        template = get_chat_template_from_config(cfg=cfg, ds_cfg=datasets[0], tokenizer=tokenizer)
        return [
            expect_row(
                tokenizer,
                row,
                self._block.context,
                chat_template=template,
                template_kwargs=_plain(cfg.get("chat_template_kwargs")),
            )
            for row in iter_rows(Path(self._dataset.path))
        ]

    def _close_group(self) -> None:
        if self._opened_group:
            _destroy_group()
            self._opened_group = False


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value


def _seed(cfg: Any) -> int:
    seed = cfg.get("seed")
    return TrainingArguments.seed if seed is None else int(seed)


def _is_local(base_model: str) -> bool:
    return base_model.startswith(("embedded:", "/", "./", "../", "~")) or Path(base_model).is_dir()


def _base_folder(base_model: str) -> Path:
    if Path(base_model).is_dir():
        return Path(base_model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base_model, local_files_only=True))


def _name_datasets(cfg: Any, where: str) -> DatasetInfo:
    """Replace dataset folders by their rows files, hash-checked; describe the first dataset."""
    found = DatasetInfo(path="", sha256=None, rows=None)
    for index, entry in enumerate(cfg.get("datasets") or []):
        path = str(entry.get("path") or "")
        if path == PLACEHOLDER:
            raise InputError(
                f"{where}: `datasets[{index}].path` is still {PLACEHOLDER}; set it to a dataset "
                "folder that `sublim generate` made, or to a rows file (JSONL with `messages`)."
            )
        folder = Path(path)
        if folder.is_dir() and _made_by_sublim(folder):
            rows = dataset_rows_path(folder)
        elif folder.is_file() and (folder.parent / "manifest.json").is_file():
            rows = dataset_rows_path(folder.parent)
            if rows.resolve() != folder.resolve():
                raise InputError(
                    f"{where}: `datasets[{index}].path` is {folder}, but the manifest beside it "
                    f"is of {rows.name}; name the folder or that file."
                )
        elif folder.is_file() and folder.suffix == ".jsonl":
            rows = folder
        elif path.startswith(("/", "./", "../", "~")) or not path:
            raise InputError(
                f"{where}: `datasets[{index}].path` is {path!r}: no dataset folder (with a "
                "manifest.json) and no rows file is there."
            )
        else:
            continue
        entry["path"] = str(rows.resolve())
        entry["ds_type"] = "json"
        digest = sha256_file(rows)
        # axolotl's cache of tokenized data does not look inside the files it is made from.
        prepared = Path(str(cfg.get("dataset_prepared_path") or "last_run_prepared"))
        if prepared.name != digest[:12]:
            cfg["dataset_prepared_path"] = str(prepared / digest[:12])
        if index == 0:
            found = DatasetInfo(
                path=str(rows.resolve()), sha256=digest, rows=sum(1 for _ in iter_rows(rows))
            )
    return found


def _made_by_sublim(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() or any(folder.glob("rows-*.jsonl"))


def _find_deepspeed(value: str, where: str) -> Path:
    """A DeepSpeed JSON named from the working folder, the YAML's folder or the installed recipes.

    Raises:
        InputError: it is in none of them.
    """
    candidates = [Path(value), Path(where).parent / value, ROOT / value]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    raise InputError(
        f"{where}: `deepspeed: {value}` was not found; looked at "
        f"{', '.join(str(candidate) for candidate in candidates)}."
    )


def _has_accelerator() -> bool:
    import torch

    return bool(torch.accelerator.is_available())


def _open_gloo_group() -> bool:
    """Open a process group of this one process; True if it was not open before.

    axolotl asks DeepSpeed for NCCL unless a group is there already.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Set (by `accelerate launch` on a CPU, say), it makes transformers choose DDP over DeepSpeed.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    import torch

    if torch.distributed.is_initialized():
        return False
    import deepspeed.comm

    deepspeed.comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    atexit.register(_destroy_group)
    return True


def _destroy_group() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _method(cfg: Any) -> Method:
    if not cfg.get("adapter"):
        return Method(kind="full")
    return Method(kind="lora", rank=int(cfg["lora_r"]), alpha=float(cfg["lora_alpha"]))


def _losses(history: list[dict[str, Any]]) -> list[Step]:
    return [
        Step(
            step=int(entry["step"]),
            loss=float(entry["loss"]),
            learning_rate=_number(entry.get("learning_rate")),
            grad_norm=_number(entry.get("grad_norm")),
        )
        for entry in history
        if "loss" in entry
    ]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _weights_sha256(folder: Path, *, adapter: bool) -> str:
    """Digest of the weights file, or of its shards' names and digests where there are several."""
    files = weight_files(folder, "adapter_model" if adapter else "model")
    if len(files) == 1:
        return sha256_file(files[0])
    return sha256_json({file.name: sha256_file(file) for file in files})
