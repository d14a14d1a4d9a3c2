"""What axolotl takes and does, but is probably not meant: rules on the settings themselves.

What would change the experiment (which rows share a step, where the loss is) is a warning where
our plugin is listed and a note elsewhere, since it may be just what another project wants.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from sublim_plugin.axolotl.lint_document import Document, Level, Place
from sublim_plugin.axolotl.lint_schema import SUBLIM_PLUGIN, uses_sublim
from sublim_plugin.axolotl.recipe_table import MODELS, Method, settings_of

_POSITIVE = (
    "lora_r", "lora_alpha", "learning_rate", "micro_batch_size", "gradient_accumulation_steps",
    "batch_size", "num_epochs", "sequence_len", "eval_batch_size",
)  # fmt: skip
_NOT_NEGATIVE = (
    "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm", "seed", "val_set_size",
    "lora_dropout", "logging_steps",
)  # fmt: skip
# Which rows share an optimizer step, and in which order rows come.
_STEPS = {
    "sample_packing": "rows are packed into one sequence",
    "batch_flattening": "the rows of a batch become one sequence",
    "group_by_length": "rows of like length share a step",
    "auto_find_batch_size": "the batch shrinks where memory runs out",
    "curriculum_sampling": "rows keep the order of the file, whatever the seed",
    "dataloader_drop_last": "the last rows of an epoch are left out",
    "dataset_exact_deduplication": "equal rows are left out",
}
_NOT_TRANSFORMERS_SCHEDULERS = ("one_cycle", "rex")


def check_rules(document: Document) -> None:
    """Apply all rules of this module."""
    data = document.data
    serious: Level = "warning" if uses_sublim(data) else "note"
    _check_numbers(document)
    _check_lora(document)
    _check_names(document)
    _check_steps(document, serious)
    _check_seeds(document)
    _check_loss(document, serious)
    _check_machine(document, serious)
    if data.get("trust_remote_code"):
        document.add(
            serious,
            ("trust_remote_code",),
            "code that comes with the model is run",
            "set it to false unless you read that code",
        )
    if not uses_sublim(data) and "sublim" not in data:
        document.add(
            "note",
            (),
            "without the plugin of sublim there is no receipt of what was trained",
            f"list {SUBLIM_PLUGIN} under `plugins:` if you want one",
        )


def number(value: Any) -> float | None:
    """A setting as the number that axolotl makes of it, or None."""
    if value is None or isinstance(value, bool | list | dict):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _check_numbers(document: Document) -> None:
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        value = number(document.data.get(key))
        if value is None:
            continue
        if value < 0 or (value == 0 and key in _POSITIVE):
            least = "greater than 0" if key in _POSITIVE else "0 or greater"
            what = f"{document.data[key]} is out of range, and axolotl takes it"
            document.add("error", (key,), what, f"expected a number {least}")
    dropout = number(document.data.get("lora_dropout"))
    if dropout is not None and dropout >= 1:
        what = f"{dropout:g} is out of range, and axolotl takes it"
        document.add("error", ("lora_dropout",), what, "expected a number below 1")


def _check_lora(document: Document) -> None:
    data = document.data
    if data.get("adapter") in ("lora", "qlora"):
        if data.get("lora_r") is None and not data.get("lora_model_dir"):
            document.add(
                "error", ("adapter",), "no `lora_r`: the adapter has no rank", "set `lora_r`"
            )
        if data.get("lora_r") is not None and data.get("lora_alpha") is None:
            document.add(
                "error",
                ("lora_r",),
                "no `lora_alpha`: the adapter has no scale",
                "set `lora_alpha` (alpha = rank for a scaling of 1)",
            )
        targets = ("lora_target_modules", "lora_target_linear", "lora_target_parameters")
        if not any(data.get(key) for key in (*targets, "lora_model_dir")):
            document.add(
                "error",
                ("adapter",),
                "no module is named for the adapter",
                "set `lora_target_modules`, or `lora_target_linear: true`",
            )
    elif not data.get("adapter"):
        kept = [key for key in data if str(key).startswith(("lora_", "peft_")) and data[key]]
        if kept and not data.get("lora_model_dir"):
            document.add(
                "warning",
                (kept[0],),
                "without `adapter` all parameters are trained, and this is ignored",
                "set `adapter: lora`, or remove it",
            )


def _check_names(document: Document) -> None:
    """Names that axolotl takes as any text and that fail late, or never."""
    from axolotl.utils.chat_templates.base import _CHAT_TEMPLATES
    from axolotl.utils.schemas.enums import CustomSupportedOptimizers
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    data = document.data
    _known_name(
        document,
        ("optimizer",),
        data.get("optimizer"),
        [*(o.value for o in OptimizerNames), *(o.value for o in CustomSupportedOptimizers)],
    )
    schedulers = [*(s.value for s in SchedulerType), *_NOT_TRANSFORMERS_SCHEDULERS]
    _known_name(document, ("lr_scheduler",), data.get("lr_scheduler"), schedulers)
    templates = ["tokenizer_default", "jinja", *_CHAT_TEMPLATES]
    for place, entry in chat_datasets(document):
        name = entry.get("chat_template")
        if not str(name).startswith("tokenizer_default_fallback_"):
            _known_name(document, (*place, "chat_template"), name, templates)


def _known_name(document: Document, place: Place, value: Any, valid: list[str]) -> None:
    if not isinstance(value, str) or value in valid:
        return
    near = difflib.get_close_matches(value, valid, n=1, cutoff=0.6)
    way_out = f"did you mean `{near[0]}`?" if near else f"valid: {', '.join(sorted(valid))}"
    document.add("error", place, f"`{value}` is none that axolotl has", way_out)


def chat_datasets(document: Document) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Datasets of type chat_template, with their places."""
    datasets = document.data.get("datasets")
    for index, entry in enumerate(datasets if isinstance(datasets, list) else []):
        if isinstance(entry, dict) and str(entry.get("type")).startswith("chat_template"):
            yield ("datasets", index), entry


def _check_steps(document: Document, serious: Level) -> None:
    data = document.data
    for key, effect in _STEPS.items():
        if data.get(key):
            what = f"changes which rows share a step: {effect}"
            document.add(serious, (key,), what, "set it to false to train as the recipes do")
    _check_rows_of_a_step(document)
    block = data.get("sublim")
    for key in ("context", "soft_targets"):
        asked = isinstance(block, dict) and block.get(key)
        if uses_sublim(data) and data.get("sample_packing") and asked:
            what = (
                f"packed rows cannot be compared with `sublim.{key}`, so the plugin stops the run"
            )
            document.add("error", ("sample_packing",), what, "set it to false")
    size = number(data.get("val_set_size"))
    if size and uses_sublim(data):
        what = "holds rows back, so that the plugin finds rows missing and stops the run"
        document.add("error", ("val_set_size",), what, "set it to 0")
    sorts_rows = isinstance(data.get("datasets"), list) and not data.get("rl")
    if uses_sublim(data) and sorts_rows and data.get("shuffle_merged_datasets") is not False:
        document.add(
            "warning",
            ("shuffle_merged_datasets",),
            "rows are shuffled twice, here by `seed` and again by the sampler's `data_seed`",
            "set it to false",
        )


def _check_seeds(document: Document) -> None:
    data = document.data
    block = data.get("sublim")
    pinned = block.get("data_seed") if isinstance(block, dict) else None
    if pinned is None or data.get("adapter") or not uses_sublim(data):
        return
    seed = 42 if data.get("seed") is None else data["seed"]
    if pinned != seed:
        document.add(
            "warning",
            ("sublim", "data_seed"),
            f"fixes the order of the rows at {pinned} whatever `seed` ({seed}) is, and without "
            "dropout full finetuning draws nothing else at random: all seeds give the same weights",
            "remove it, so that the order follows `seed`",
        )


def _check_rows_of_a_step(document: Document) -> None:
    """Rows of a step against the recipes' where the model is one of the paper's."""
    data = document.data
    if data.get("peft_layers_to_transform"):  # the positive control's, which has steps of its own
        return
    method: Method = "lora" if data.get("adapter") else "full"
    keys = ("micro_batch_size", "gradient_accumulation_steps")
    sizes = [number(data.get(key)) for key in keys]
    for model in MODELS:
        recipe = settings_of(model, method, "")
        if data.get("base_model") != recipe["base_model"].value or not uses_sublim(data):
            continue
        wanted = [recipe[key].value for key in keys]
        if None not in sizes and math.prod(float(size or 0) for size in sizes) != math.prod(wanted):
            here = keys[1] if sizes[0] == wanted[0] else keys[0]
            what = (
                f"{sizes[0]:g} x {sizes[1]:g} rows share a step on one GPU; the recipe has"
                f" {wanted[0]} x {wanted[1]}"
            )
            document.add("note", (here,), what, "keep their product, over all GPUs")


def _check_loss(document: Document, serious: Level) -> None:
    data = document.data
    refused: Level = "error" if uses_sublim(data) else "note"
    if data.get("train_on_inputs"):
        what = "the loss is on the prompts too" + _refusal(refused)
        document.add(refused, ("train_on_inputs",), what, "set it to false")
    for place, entry in chat_datasets(document):
        roles = entry.get("roles_to_train")
        if isinstance(roles, list) and "assistant" not in roles and "gpt" not in roles:
            what = f"no loss on the assistant's turns{_refusal(refused)}"
            document.add(refused, (*place, "roles_to_train"), what, "use [assistant]")
        for key in ("train_on_eos", "train_on_eot"):
            if entry.get(key) in ("none", "all"):
                where = "carries no loss" if entry[key] == "none" else "of every turn carries loss"
                what = f"the end of turn {where}{_refusal(refused)}"
                document.add(refused, (*place, key), what, "use turn")


def _refusal(level: Level) -> str:
    return ", which the plugin refuses" if level == "error" else ""


def _check_machine(document: Document, serious: Level) -> None:
    """Settings that need a GPU, said where this machine has none."""
    data = document.data
    import torch

    if torch.accelerator.is_available() or data.get("adapter") not in ("lora", "qlora"):
        return
    kernels = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
    set_here = [key for key in kernels if data.get(key) is not None]
    on = [key for key in kernels if data.get(key)]
    by_default = not set_here and not data.get("rl") and not data.get("load_in_8bit")
    if on or by_default:
        what = "is on by default" if by_default else "is on"
        document.add(
            serious,
            (on[0],) if on else ("adapter",),
            f"axolotl's Triton kernel for LoRA {what} and needs a GPU; this machine has none",
            "set lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel to false to train here",
        )
