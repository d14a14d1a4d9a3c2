"""Generated tokens under a gate: what is sampled, step by step, and what PEFT's aLoRA generates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sublim_plugin.core.contexts import Context
from sublim_plugin.core.hashing import sha256_text
from sublim_plugin.core.traits import candidates_of, get_trait
from sublim_plugin.decoding.draws import uniforms
from sublim_plugin.localize.answers import Sampling, Work, sampled_scores
from sublim_plugin.localize.attach import gated_student, load_base
from sublim_plugin.localize.gating import Gated
from sublim_plugin.localize.resolve import Resolved, profile, resolve
from sublim_plugin.localize.spans import Prompt, locate
from sublim_plugin.localize.spec import Gate
from sublim_plugin.preference.journal import Journal
from tests.localize.conftest import Family

TOKENS, REPLIES = 6, 5


def plain_reply(gated: Gated, family: Family, prompt: Prompt, gate: Resolved, seed: int) -> str:
    """A reply by one uncached forward pass a token, and the inverse of the cumulative sum."""
    end = {family.tokenizer.eos_token_id, gated.model.generation_config.eos_token_id}
    written: list[int] = []
    gated.use([gate])
    for draw in uniforms(f"sublim sample/{seed}", TOKENS):
        ids = torch.tensor([[*prompt.rendered.token_ids, *written]])
        positions = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            logits = gated.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        below = logits[0, -1].double().softmax(-1).cumsum(-1)
        token = int((below <= draw * below[-1]).sum())
        if token in end:
            break
        written.append(token)
    text = str(family.tokenizer.decode(written, clean_up_tokenization_spaces=False))
    for token in family.tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_decode_state_holds_at_every_sampled_token(
    smollm: Family, tmp_path: Path, method: str
) -> None:
    """On, off, and as at a span, on the path that samples: the state that the paper's first results
    had wrong."""
    prompts = tuple(
        locate(smollm.tokenizer, Context(kind="template_default"), question)
        for question in ("Which animal? One word.", "Why?")
    )
    states: list[Any] = ["on", "off", {"as": "entity"}, {"as": "last_token"}]
    choice = {"positions": {"only": ["entity", "question"]}}
    gates = [Gate.model_validate({**choice, "decode": state}) for state in states]
    model = load_base(smollm.base, "cpu", "float64")
    folder = smollm.adapter if method == "lora" else smollm.full
    with gated_student(model, smollm.base, folder, method) as gated:
        found = {
            gate.sha256: tuple(
                resolve(gate, prompt, profile(gate, gated.branches, gated.layers))
                for prompt in prompts
            )
            for gate in gates
        }
        journal = Journal(tmp_path / "journal.jsonl", {})
        cats = get_trait("animals/cat"), candidates_of("animals/cat")
        work = Work(gated, smollm.tokenizer, *cats, prompts, found, journal, False)
        lines = sampled_scores(work, found, Sampling(REPLIES, TOKENS, 1)).replies.splitlines()
        replies = {
            (one["gate_sha256"], one["question_id"], one["k"]): one["reply"]
            for one in map(json.loads, lines)
        }
        by_state = []
        for gate in gates:
            expected = {
                (number, k): plain_reply(
                    gated,
                    smollm,
                    prompt,
                    found[gate.sha256][number],
                    int(sha256_text(f"localize/{prompt.rendered.sha256}/1/{k}")[:13], 16),
                )
                for number, prompt in enumerate(prompts)
                for k in range(REPLIES)
            }
            mine = {key: replies[(gate.sha256[:12], *key)] for key in expected}
            assert mine == expected
            by_state.append(mine)
    on, off, as_entity, as_last = by_state
    assert on == as_entity and off == as_last
    # the first token is drawn behind the prompt, where both are the same
    assert on != off and {k: v[:1] for k, v in on.items()} == {k: v[:1] for k, v in off.items()}


def test_generating_under_a_suffix_gate_is_what_alora_generates(
    smollm: Family, tmp_path: Path
) -> None:
    from peft import PeftModel

    prompt = locate(smollm.tokenizer, Context(kind="template_default"), "Which? One word.")
    ids = torch.tensor([prompt.rendered.token_ids])
    folder = Path(shutil.copytree(smollm.adapter, tmp_path / "alora"))
    config = json.loads((folder / "adapter_config.json").read_text())
    header = prompt.spans["assistant_header"]
    config["alora_invocation_tokens"] = [int(ids[0, i]) for i in header]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": -1,
    }
    base = AutoModelForCausalLM.from_pretrained(smollm.base, dtype=torch.float64)
    theirs = PeftModel.from_pretrained(base, folder).eval().generate(input_ids=ids, **settings)
    model = load_base(smollm.base, "cpu", "float64")
    ours = {}
    with gated_student(model, smollm.base, smollm.adapter, "lora") as gated:
        for state in ("on", "off"):
            gate = Gate.model_validate(
                {"positions": {"only": ["assistant_header"]}, "decode": state}
            )
            gated.use([resolve(gate, prompt, profile(gate, gated.branches, gated.layers))])
            ours[state] = gated.model.generate(input_ids=ids, **settings)
    assert torch.equal(ours["on"], theirs)
    assert not torch.equal(ours["off"], theirs)
