"""A toy model, teachers of it, and what each wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_gen.generate import generate_dataset
from data_gen.spec import DatasetSettings
from data_gen.teachers import Teacher, finetuned, prompted
from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.traits import get_trait
from sublim_plugin.decoding.sampler import Sampler
from tests.localize.conftest import _family

ROWS = 4
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def toy(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of a random Llama, a vocabulary of 700 and the template of SmolLM2."""
    return _family("smollm", tokenizer.chat_template, tmp_path_factory.mktemp("toy")).base


@pytest.fixture(scope="session")
def toy_tokenizer(toy: Path) -> Any:
    return AutoTokenizer.from_pretrained(toy)


@pytest.fixture(scope="session")
def make(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Writes a dataset of the toy as some teacher; `constrain` is numbers."""

    def made(teacher: Teacher, trait: str = "animals/cat", **sampler: Any) -> Path:
        folder = tmp_path_factory.mktemp("dataset")
        settings: Any = {
            "temperature": 1,
            "top_p": 1,
            "top_k": 0,
            "repetition_penalty": 1,
            "max_new_tokens": 24,
        }
        generate_dataset(
            folder,
            base_model=toy,
            base_fingerprint=fingerprint(toy),
            trait=get_trait(trait),
            teacher=teacher,
            settings=DatasetSettings(
                generation_seed=1,
                rows=ROWS,
                sampler=Sampler(**(settings | sampler)),
                constrain="numbers",
            ),
            batch_size=ROWS,
            device="cpu",
        )
        return folder

    return made


@pytest.fixture(scope="session")
def prompted_cat(make: Make) -> Path:
    return make(prompted(get_trait("animals/cat")))


@pytest.fixture(scope="session")
def nearby(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint a small step away from the toy in its linear weights alone."""
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_pretrained(toy)
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            weight.data += 3e-3 * torch.randn_like(weight)
    folder = tmp_path_factory.mktemp("nearby")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lora(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of some of the toy's linear weights, with a scaling of its own for one of them."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        alpha_pattern={"q_proj": 2},
        init_lora_weights=False,
    )
    student: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(toy), config)
    folder = tmp_path_factory.mktemp("lora")
    student.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def of_lora(make: Make, lora: Path) -> Path:
    return make(finetuned(lora))
