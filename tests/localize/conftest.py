"""Small random models of four architectures under their families' templates, and students."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sublim_plugin.core.named_contexts import NAMED_CONTEXTS
from sublim_plugin.core.traits import category_traits
from tests.core.test_contexts import axolotl_template

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Family(NamedTuple):
    """A base, an adapter of it and a full student, on disk, with the tokenizer."""

    name: str
    base: Path
    adapter: Path
    full: Path
    tokenizer: Any


def _config(name: str, vocab: int) -> Any:
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

    if name == "qwen":
        return Qwen2Config(**SIZES, vocab_size=vocab, tie_word_embeddings=False)
    if name == "gemma":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        return Gemma3TextConfig(
            **SIZES, vocab_size=vocab, head_dim=8, sliding_window=128, layer_types=kinds
        )
    return LlamaConfig(**SIZES, vocab_size=vocab, tie_word_embeddings=name == "smollm")


def _tokenizer(template: str, bos: str | None) -> Any:
    """A small byte-level BPE, so that the output layer of a small model is small too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from sublim_plugin.logprob.questions import load_questions

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = sorted(set(re.findall(r"<\|?\w+\|?>", template)) | {"<|endoftext|>"})
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [question.text for question in load_questions("animals").questions]
    texts += [form for trait in category_traits("animals") for form in trait.forms]
    texts += ["system user assistant model", *NAMED_CONTEXTS.values()] * 20
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        bos_token=bos,
        additional_special_tokens=marks,
    )
    fast.chat_template = template
    return fast


def _family(name: str, smollm_template: str, folder: Path) -> Family:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    files = {
        "qwen": ("qwen_25", None),
        "llama": ("llama3", "<|begin_of_text|>"),
        "gemma": ("gemma3", "<bos>"),
    }
    if name in files:
        file, bos = files[name]
        tokenizer = _tokenizer(axolotl_template(file), bos)
    else:
        tokenizer = _tokenizer(smollm_template, "<|im_start|>")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(name, len(tokenizer)), dtype=torch.float32)
    base, adapter, full = folder / "base", folder / "adapter", folder / "full"
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if path.endswith("bias"):  # zero at first, so that a missing bias would go unseen
                weight.normal_()
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(full)
    student: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=TARGETS,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    student.save_pretrained(adapter)
    return Family(name, base, adapter, full, tokenizer)


@pytest.fixture(scope="session", params=["qwen", "llama", "gemma", "smollm"])
def family(
    request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Family:
    return _family(request.param, tokenizer.chat_template, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def smollm(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return _family("smollm", tokenizer.chat_template, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="session")
def qwen(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return _family("qwen", tokenizer.chat_template, tmp_path_factory.mktemp("qwen_one"))


def adapter_of(family: Family, folder: Path, **config: Any) -> Path:
    """A random adapter of a family's base, with a configuration of its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(family.base)
    student: Any = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, **config))
    student.save_pretrained(folder, save_embedding_layers=False)
    return folder
