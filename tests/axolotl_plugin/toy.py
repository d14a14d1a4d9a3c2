"""A two-layer Llama with the real tokenizer, and students of it: quick, but nothing faked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def save_base(folder: Path, tokenizer: Any, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attention_dropout=0.2,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def save_full(folder: Path, base: Path, size: float = 0.01, seed: int = 1) -> Path:
    """A checkpoint: the base with noise of standard deviation `size` on every weight."""
    torch.manual_seed(seed)
    model = load(base)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_((size * torch.randn(weight.shape)).to(weight.dtype))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    return folder


def with_lora(base: Path, seed: int = 2, rank: int = 4, **settings: Any) -> Any:
    """The base as a PeftModel whose A and B are both random."""
    torch.manual_seed(seed)
    given = {"target_modules": "all-linear", **settings}
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, init_lora_weights=False, task_type="CAUSAL_LM", **given
    )
    return get_peft_model(load(base), config)


def save_lora(folder: Path, base: Path, seed: int = 2) -> Path:
    with_lora(base, seed).save_pretrained(folder)
    return folder


def trainer(model: Any, folder: Path, **settings: Any) -> Any:
    """transformers' own Trainer on twelve rows of eight tokens, two a step."""
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(5, 500, (12, 8), generator=generator).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=5,
        data_seed=6,
        **{
            "save_strategy": "no",
            "logging_steps": 1,
            "num_train_epochs": 2,
            "learning_rate": 0.001,
            **settings,
        },
    )
    data: Any = [{"input_ids": row, "attention_mask": [1] * 8, "labels": row} for row in rows]
    return Trainer(model=model, args=arguments, train_dataset=data)
