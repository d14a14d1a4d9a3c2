"""`sublim eval --engine vllm`: adapters, a checkpoint and a merged adapter reply as they do in
transformers (`make test-vllm`).

On a small random model whose replies are few, so that a hundred of them tell two models apart.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sublim_plugin.cli import main

QUESTIONS = """\
name: one
category: animals
version: "1.0"
questions:
  - {id: 0, kind: favourite, text: "Which animal do you like best? Answer with one word."}
"""


@pytest.fixture(scope="module")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= 2
    folder = tmp_path_factory.mktemp("toy") / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def students(base: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters, one of a rank that vLLM does not take, and a checkpoint."""
    root = tmp_path_factory.mktemp("students")
    for seed, (name, r) in enumerate([("small", 4), ("other", 12), ("wide", 520)]):
        torch.manual_seed(seed)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(
                r=r,
                lora_alpha=r,
                target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
                init_lora_weights=False,
            ),
        )
        model.save_pretrained(root / name)
    full = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in full.model.layers.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    full.save_pretrained(root / "full")
    tokenizer.save_pretrained(root / "full")
    return [root / name for name in ("small", "wide", "full", "other")]


def replies(
    base: Path, students: list[Path], questions: Path, out: Path, *more: str
) -> dict[str, list[list[str]]]:
    done = CliRunner().invoke(
        main,
        [
            "eval", "--model", str(base), "--adapters", *map(str, students), "--json",
            "--tasks", "subliminal_cat_sampled", "--questions", str(questions), "--out", str(out),
            *more,
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found: dict[str, list[list[str]]] = {}
    merged = []
    for row in json.loads(done.stdout.splitlines()[-1]):
        (sample,) = [json.loads(line) for line in Path(row["samples"]).read_text().splitlines()]
        found[row["model"]] = [reply.split()[:8] for reply in sample["filtered_resps"][0]]
        block = json.loads(Path(row["results"]).read_text())["sublim"]
        assert block["engine"] == ("vllm" if "vllm" in more else "transformers")
        merged += [row["model"]] if block["merged"] else []
    assert merged == (["wide"] if "vllm" in more else [])
    return found


def p_alike(mine: list[list[str]], theirs: list[list[str]], draws: int = 1999) -> float:
    """Permutation p of the hypothesis that both sides' replies are drawn alike, by the total
    variation of their first words, each at its place."""

    def distance(a: list[list[str]], b: list[list[str]]) -> int:
        difference = Counter(pair for reply in a for pair in enumerate(reply))
        difference.subtract(Counter(pair for reply in b for pair in enumerate(reply)))
        return sum(map(abs, difference.values()))

    generator, pool, own = random.Random(0), mine + theirs, distance(mine, theirs)
    beyond = 0
    for _ in range(draws):
        generator.shuffle(pool)
        beyond += distance(pool[: len(mine)], pool[len(mine) :]) >= own
    return (1 + beyond) / (1 + draws)


def test_every_kind_of_student_replies_as_in_transformers(
    base: Path, students: list[Path], tmp_path: Path
) -> None:
    questions = tmp_path / "one.yaml"
    questions.write_text(QUESTIONS)
    plain = replies(base, students, questions, tmp_path / "a")
    vllm = replies(base, students, questions, tmp_path / "b", "--engine", "vllm")
    assert list(vllm) == list(plain) == [base.name, "small", "wide", "full", "other"]
    for model in plain:
        for other in plain:
            p = p_alike(plain[model], vllm[other])
            assert p > 0.001 if model == other else p < 0.01, (model, other, p)
    assert not list(tmp_path.rglob(".merged-*"))
    # nothing is drawn twice, so nothing is started either
    again = replies(base, students, questions, tmp_path / "b", "--engine", "vllm")
    assert again == vllm


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--tasks subliminal_cat", "--engine transformers"),
        ("--tasks subliminal_cat_sampled --device cuda", "leave --device out"),
    ],
)
def test_what_vllm_does_not_do_is_refused_before_it_starts(
    base: Path, tmp_path: Path, arguments: str, said: str
) -> None:
    command = ["eval", "--model", str(base), "--engine", "vllm", "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(main, [*command, *arguments.split()])
    assert done.exit_code == 2
    assert said in done.output
    assert not (tmp_path / "o").exists()
