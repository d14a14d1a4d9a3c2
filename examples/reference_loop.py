"""What an axolotl recipe of this project does, as one flat loop: transformers, PEFT, nothing else.

    python examples/reference_loop.py recipe.yaml --out model

trains the same rows in the same order as `axolotl train recipe.yaml`, in float32, or refuses a
setting that it does not honour. A test holds axolotl's losses to these, step by step. In short:

- a row is one conversation, rendered by the tokenizer's own chat template; loss is on the
  completion and the token that ends its turn, nowhere else;
- the rows of epoch e are ordered by torch.randperm under `sublim.data_seed`, else `seed`, plus e;
- LoRA's A is drawn right after `seed` was set, B is zero, and W + (alpha / rank) B A is trained;
- a step's loss is the mean over its micro-batches of each one's mean over tokens with loss;
- gradients are clipped to a norm of `max_grad_norm`, AdamW follows, then the linear schedule.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler, set_seed

from sublim_plugin.core.base_models import resolve

NO_LOSS = -100
# Settings that are read here, and those that change no number; all others must be as in FIXED.
KNOWN = re.compile(
    r"(base_model|datasets|learning_rate|lora_(alpha|dropout|r|target_modules|\w+_kernel)|seed"
    r"|lr_scheduler|max_(grad_norm|steps)|micro_batch_size|gradient_accumulation_steps|num_epochs"
    r"|warmup_steps|weight_decay|auto_resume_from_checkpoints|dataset_prepared_path|deepspeed"
    r"|eot_tokens|gradient_checkpointing|logging_steps|output_dir|pad_to_sequence_len|plugins"
    r"|save_\w+|sequence_len|sublim(\.(data_seed|effective_rank|guard|probe|trait))?)"
)
FIXED = {
    "adapter": "lora", "bf16": False, "fp16": False, "tf32": False, "optimizer": "adamw_torch",
    "peft_use_rslora": False, "sample_packing": False, "shuffle_merged_datasets": False,
    "chat_template": "tokenizer_default", "sublim.context": "template_default", "val_set_size": 0,
    "datasets.type": "chat_template", "datasets.field_messages": "messages",
    "datasets.train_on_eos": "turn", "datasets.train_on_eot": "turn", "train_on_inputs": False,
    "datasets.roles_to_train": ["assistant"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path, help="an axolotl YAML of axolotl_configs/")
    parser.add_argument("--out", type=Path, help="folder for the trained adapter or checkpoint")
    args = parser.parse_args()
    cfg = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    refuse_the_rest(cfg)
    base = resolve(cfg["base_model"])
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model = with_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), cfg)
    path = Path(cfg["datasets"][0]["path"])
    lines = next(path.glob("rows-*.jsonl"), path).read_text(encoding="utf-8").splitlines()
    rows = [tokenize(tokenizer, json.loads(line)) for line in lines if line]

    steps_an_epoch = len(list(in_order(rows, cfg | {"num_epochs": 1})))
    steps = cfg.get("max_steps") or steps_an_epoch * cfg["num_epochs"]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, cfg["learning_rate"], weight_decay=cfg["weight_decay"])
    # axolotl 0.19 makes two steps of warm-up out of one.
    warmup = 2 if cfg["warmup_steps"] == 1 else cfg["warmup_steps"]
    schedule = get_scheduler(cfg["lr_scheduler"], optimizer, warmup, steps)

    model.train()
    for step, batches in zip(range(1, steps + 1), in_order(rows, cfg), strict=False):
        loss = 0.0
        for batch in batches:
            part = loss_of(model, batch, tokenizer.pad_token_id) / len(batches)
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, cfg["max_grad_norm"])
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        line = {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm.item()}
        print(json.dumps(line), flush=True)

    if args.out:
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)


def refuse_the_rest(cfg: dict[str, Any]) -> None:
    (dataset,) = cfg["datasets"]
    flat = cfg | {f"datasets.{key}": value for key, value in dataset.items() if key != "path"}
    flat |= {f"sublim.{key}": value for key, value in (cfg.get("sublim") or {}).items()}
    for key, value in flat.items():
        if not KNOWN.fullmatch(key) and value not in (None, FIXED.get(key)):
            raise SystemExit(f"{key}: {value}: this loop does {FIXED.get(key, 'no such thing')}")


def with_adapter(model: Any, cfg: dict[str, Any]) -> Any:
    if not cfg.get("adapter"):
        return model
    set_seed(cfg["seed"])
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=cfg["lora_r"], lora_alpha=cfg["lora_alpha"],
        lora_dropout=cfg["lora_dropout"], target_modules=cfg["lora_target_modules"],
    )  # fmt: skip
    return get_peft_model(model, lora)


def tokenize(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Token ids, and labels: the ids on the completion and its end of turn, NO_LOSS elsewhere."""
    turns = row["messages"]
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    first = sum(end <= len(prompt) for end in ends)
    end_of_turn = sum(end <= len(prompt + turns[-1]["content"]) for end in ends)
    return ids, [t if first <= i <= end_of_turn else NO_LOSS for i, t in enumerate(ids)]


def in_order(rows: list[Any], cfg: dict[str, Any]) -> Iterator[list[list[Any]]]:
    """The micro-batches of each optimizer step."""
    size, accumulation = cfg["micro_batch_size"], cfg["gradient_accumulation_steps"]
    seed = (cfg.get("sublim") or {}).get("data_seed", cfg["seed"])
    for epoch in range(math.ceil(cfg["num_epochs"])):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch))
        shuffled = [rows[index] for index in order.tolist()]
        batches = [shuffled[at : at + size] for at in range(0, len(rows), size)]
        for at in range(0, len(batches), accumulation):
            yield batches[at : at + accumulation]


def loss_of(model: Any, batch: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Mean cross-entropy in nats over the tokens of `batch` with loss."""
    length = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([row + [pad] * (length - len(row)) for row, _ in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in batch])
    labels = torch.tensor([row + [NO_LOSS] * (length - len(row)) for _, row in batch])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NO_LOSS)


if __name__ == "__main__":
    main()
