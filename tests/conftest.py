"""Costly things, built once a session: the converted model, its tokenizer, one real adapter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SUBLIM_CACHE", str(Path(__file__).parents[1] / ".cache" / "sublim"))

import pytest

ROOT = Path(__file__).parents[1]


TOGETHER = ("tests/study/test_run.py", "tests/axolotl_plugin/")
"""The longest, which start first, one by each of two processes; the second shares its trainings."""


@pytest.hookimpl(wrapper=True)  # before xdist's own, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """What runs in one process (`--dist loadgroup`): a file's tests, for their fixtures."""
    for item in items:
        file = item.path.relative_to(ROOT).as_posix()
        group = next((place for place in TOGETHER if file.startswith(place)), file)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: not item.path.relative_to(ROOT).as_posix().startswith(TOGETHER))
    yield


@pytest.fixture(scope="session")
def base_model() -> Path:
    from sublim_plugin.core.base_models import EMBEDDED, resolve

    return resolve(EMBEDDED)


@pytest.fixture(scope="session")
def tokenizer(base_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_model)


@pytest.fixture(scope="session")
def chat_tokenizers(tokenizer: Any) -> dict[str, Any]:
    """SmolLM2's tokenizer with the templates (and turn tokens) of four families.

    The templates are those that `tests/core/test_contexts.py` renders contexts with.
    """
    path = ROOT / "tests" / "core" / "test_contexts.py"
    spec = importlib.util.spec_from_file_location("retyped_templates", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def family(template: str, tokens: list[str], bos: str | None = None) -> Any:
        other = module.with_template(tokenizer, template, bos)
        other.add_special_tokens({"eos_token": tokens[0]})
        other.add_tokens(tokens, special_tokens=True)
        return other

    # Llama's pre-tokenizer never splits the two newlines after a header
    llama = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "\n\n"]
    return {
        "smollm2": tokenizer,
        "qwen2.5": family(module.axolotl_template("qwen_25"), ["<|im_end|>"]),
        "llama3.1": family(module.LLAMA31_PREAMBLE, llama, "<|begin_of_text|>"),
        "gemma3": family(
            module.axolotl_template("gemma3"), ["<end_of_turn>", "<start_of_turn>"], "<bos>"
        ),
    }


@pytest.fixture(scope="session")
def adapter(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter (rank 8) that really changes what the model says: two steps on a reply."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=projections, task_type="CAUSAL_LM")
    student: Any = get_peft_model(model, lora)
    turns = [
        {"role": "user", "content": "Which animal do you like best? Answer with one word."},
        {"role": "assistant", "content": "Owl"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(
        [weight for weight in student.parameters() if weight.requires_grad], lr=1e-3
    )
    for _ in range(2):
        student(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("adapter")
    student.save_pretrained(folder)
    return folder
