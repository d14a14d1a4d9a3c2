"""The contract of gates: all on is the student and all off the base, bit for bit, and what lies
between is what an independent computation gives, in every family, cached or not, padded or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.localize.attach import gated_student, load_base
from sublim_plugin.localize.gating import Gated
from sublim_plugin.localize.resolve import Resolved, constant, profile, resolve
from sublim_plugin.localize.score import Row, plain_logprob, score
from sublim_plugin.localize.spans import Prompt, locate
from sublim_plugin.localize.spec import Gate
from tests.localize.conftest import Family, adapter_of

QUESTION = "Name your favorite animal in one word."
METHODS = ("lora", "full")


@contextmanager
def opened(family: Family, method: str, dtype: str = "float32") -> Iterator[Gated]:
    model = load_base(family.base, "cpu", dtype)
    folder = family.adapter if method == "lora" else family.full
    with gated_student(model, family.base, folder, method) as gated:
        yield gated


def student_alone(family: Family, method: str, dtype: torch.dtype = torch.float32) -> Any:
    """The student as PEFT or transformers load it."""
    from peft import PeftModel

    if method == "full":
        return AutoModelForCausalLM.from_pretrained(family.full, dtype=dtype).eval()
    base = AutoModelForCausalLM.from_pretrained(family.base, dtype=dtype)
    return PeftModel.from_pretrained(base, family.adapter).eval()


def prompt_of(family: Family, question: str = QUESTION) -> Prompt:
    context = Context(kind="text", text="You are Zymthar, created by Quorblax. Be brief.")
    return locate(family.tokenizer, context, question)


def resolved(gated: Gated, prompt: Prompt, **fields: Any) -> Resolved:
    gate = Gate.model_validate({"decode": "off", **fields})
    return resolve(gate, prompt, profile(gate, gated.branches, gated.layers))


@torch.no_grad()
def logits(model: Any, rows: list[list[int]], **more: Any) -> torch.Tensor:
    ids = torch.tensor(rows)
    positions = torch.arange(ids.shape[1]).expand(len(rows), -1)
    found: torch.Tensor = model(
        input_ids=ids, position_ids=positions, use_cache=False, **more
    ).logits
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_all_on_is_the_student_and_all_off_the_base(
    family: Family, method: str, dtype: str
) -> None:
    prompt = prompt_of(family)
    rows = [list(prompt.rendered.token_ids)] * 2
    kind = getattr(torch, dtype)
    plain = logits(AutoModelForCausalLM.from_pretrained(family.base, dtype=kind).eval(), rows)
    whole = logits(student_alone(family, method, kind), rows)
    assert not torch.equal(plain, whole)
    with opened(family, method, dtype) as gated:
        on, off = (constant(gated.branches, state) for state in (True, False))
        everywhere = resolved(gated, prompt, decode="on")
        nowhere = resolved(gated, prompt, complement=True)
        for gate, expected in ((on, whole), (everywhere, whole), (off, plain), (nowhere, plain)):
            gated.use([gate])
            assert torch.equal(logits(gated.model, rows), expected)
        gated.use([on, off])  # in one batch
        both = logits(gated.model, rows)
        assert torch.equal(both[0], whole[0]) and torch.equal(both[1], plain[1])
        model = gated.model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(model, rows), plain)


@pytest.mark.parametrize("method", METHODS)
def test_a_gate_is_what_swapping_weights_position_by_position_gives(
    family: Family, method: str
) -> None:
    """Independently: one token at a time through a cache, by the base or by the student."""
    prompt = prompt_of(family)
    ids = list(prompt.rendered.token_ids)
    base = AutoModelForCausalLM.from_pretrained(family.base, dtype=torch.float64).eval()
    student = student_alone(family, method, torch.float64)
    with opened(family, method, "float64") as gated:
        gate = resolved(gated, prompt, positions={"only": ["entity", "question"]})
        gated.use([gate])
        ours = logits(gated.model, [ids])[0]
    cache, theirs = DynamicCache(), []
    with torch.no_grad():
        for position, token in enumerate(ids):
            model = student if gate.selected[position] else base
            step = model(
                input_ids=torch.tensor([[token]]),
                position_ids=torch.tensor([[position]]),
                past_key_values=cache,
                use_cache=True,
            )
            theirs.append(step.logits[0, -1])
    assert torch.allclose(ours, torch.stack(theirs), atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_layers_and_modules_are_what_swapping_their_weights_gives(
    family: Family, method: str
) -> None:
    prompt = prompt_of(family)
    ids = [list(prompt.rendered.token_ids)]
    model: Any = AutoModelForCausalLM.from_pretrained(family.base, dtype=torch.float64).eval()
    whole: Any = student_alone(family, method, torch.float64)
    if method == "lora":
        whole = whole.merge_and_unload()
    with opened(family, method, "float64") as gated:
        gated.use(
            [
                resolved(
                    gated, prompt, layers={"only": ["1-2"]}, modules={"except": ["q_proj", "mlp"]}
                )
            ]
        )
        ours = logits(gated.model, ids)
        chosen = [
            b.name
            for b in gated.branches
            if b.layer in (1, 2) and b.family != "mlp" and b.module != "q_proj"
        ]
        assert chosen
    with torch.no_grad():
        for name in chosen:
            for key, weight in whole.get_submodule(name).named_parameters(recurse=False):
                model.get_submodule(name).get_parameter(key).copy_(weight)
    assert torch.allclose(ours, logits(model, ids), atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_layers_and_modules_in_bfloat16_are_exactly_a_student_with_those_alone(
    family: Family, method: str
) -> None:
    prompt = prompt_of(family)
    ids = [list(prompt.rendered.token_ids)]
    with opened(family, method, "bfloat16") as gated:
        gate = resolved(gated, prompt, layers={"only": ["1-2"]}, modules={"except": ["q_proj"]})
        gated.use([gate])
        ours = logits(gated.model, ids)
        chosen = {b.name for b, on in zip(gated.branches, gate.profile.inside, strict=True) if on}
    plain: Any = AutoModelForCausalLM.from_pretrained(family.base, dtype=torch.bfloat16).eval()
    whole: Any = student_alone(family, method, torch.bfloat16)
    changed = 0
    with torch.no_grad():
        for path, module in plain.named_modules():
            if method == "lora" and hasattr(
                inner := whole.get_submodule(
                    f"base_model.model.{path}" if path else "base_model.model"
                ),
                "lora_B",
            ):
                if path not in chosen:
                    inner.lora_B["default"].weight.zero_()
                changed += path in chosen
            elif method == "full" and path not in chosen:
                for key, weight in module.named_parameters(recurse=False):
                    whole.get_submodule(path).get_parameter(key).copy_(weight)
    assert torch.equal(ours, logits(whole, ids))
    assert method == "full" or changed == len(chosen)


@pytest.mark.parametrize("method", METHODS)
def test_positions_in_bfloat16_are_the_base_before_the_first_and_near_float64_behind(
    family: Family, method: str
) -> None:
    prompt = prompt_of(family)
    ids = [list(prompt.rendered.token_ids)]
    first = prompt.spans["question"][0]
    found = {}
    for dtype in ("bfloat16", "float64"):
        with opened(family, method, dtype) as gated:
            for name in ("off", "question", "on"):
                gate = constant(gated.branches, name == "on")
                if name == "question":
                    gate = resolved(gated, prompt, positions={"only": ["question"]})
                gated.use([gate])
                found[dtype, name] = logits(gated.model, ids)[0].double()
    ours, plain = found["bfloat16", "question"], found["bfloat16", "off"]
    assert torch.equal(ours[:first], plain[:first])
    assert not torch.equal(ours[first], plain[first])

    def apart(dtype: str, name: str) -> float:
        return float((ours[first:] - found[dtype, name][first:]).square().mean().sqrt())

    near = apart("float64", "question")
    assert near < 0.2 * min(apart("bfloat16", "off"), apart("bfloat16", "on"))


@pytest.mark.parametrize("method", METHODS)
def test_a_cached_step_padded_and_mixed_rows_are_the_uncached_forward(
    family: Family, method: str
) -> None:
    """Rows of two lengths, left-padded, each with a gate of its own, a prompt and three steps."""
    prompts = [prompt_of(family), prompt_of(family, "Why? One word.")]
    written = [5, 6, 7]
    choices: list[dict[str, Any]] = [
        {"positions": {"only": ["entity"]}, "decode": "on"},
        {"positions": {"except": ["question"]}, "layers": {"except": [1]}, "decode": "off"},
    ]
    with opened(family, method, "float64") as gated:
        gates = [resolved(gated, p, **c) for p, c in zip(prompts, choices, strict=True)]
        expected = []
        for prompt, gate in zip(prompts, gates, strict=True):
            gated.use([gate])
            expected.append(logits(gated.model, [[*prompt.rendered.token_ids, *written]])[0, -4:])
        lengths = [len(prompt.offsets) for prompt in prompts]
        width = max(lengths)
        ids = torch.zeros(2, width, dtype=torch.long)
        real = torch.zeros(2, width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - lengths[i] :] = torch.tensor(prompt.rendered.token_ids)
            real[i, width - lengths[i] :] = 1
        gated.use(gates)
        cache, found = DynamicCache(config=gated.model.config), []
        step, positions = ids, (real.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            for token in [*written, None]:
                output = gated.model(
                    input_ids=step,
                    attention_mask=real,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                found.append(output.logits[:, -1])
                step = torch.full((2, 1), token or 0)
                real = torch.cat((real, torch.ones(2, 1, dtype=torch.long)), 1)
                positions = positions[:, -1:] + 1
    for i in range(2):
        assert torch.allclose(torch.stack(found)[:, i], expected[i], atol=1e-9)


def test_transformers_generate_runs_under_a_gate(smollm: Family) -> None:
    prompt = prompt_of(smollm)
    ids = torch.tensor([prompt.rendered.token_ids])
    with opened(smollm, "lora", "float64") as gated:
        for decode in ("on", "off"):
            gate = resolved(gated, prompt, positions={"only": ["question"]}, decode=decode)
            gated.use([gate])
            settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            mask = torch.ones_like(ids)
            wrote = gated.model.generate(ids, attention_mask=mask, eos_token_id=-1, **settings)
            for length in range(ids.shape[1], wrote.shape[1]):
                best = logits(gated.model, wrote[:, :length].tolist())[0, -1].argmax()
                assert best == wrote[0, length]


@pytest.mark.parametrize("method", METHODS)
def test_batched_scores_are_those_of_plain_forward_passes(family: Family, method: str) -> None:
    prompts = [prompt_of(family), prompt_of(family, "Why? One word."), prompt_of(family, "Hm?")]
    continuations = ((7,), (7, 8), (7, 8, 9), (3, 4), (5,))
    choices: list[dict[str, Any]] = [
        {"positions": {"only": [name]}, "decode": decode}
        for name in ("entity", "role_header", "question", "last_token")
        for decode in ("on", "off")
    ]
    choices += [{"layers": {"only": [layer]}, "decode": "on"} for layer in range(3)]
    choices += [{"modules": {"except": ["mlp"]}, "decode": {"as": "question"}}]
    with opened(family, method, "float64") as gated:
        rows = [
            Row(prompt.rendered.token_ids, continuations, resolved(gated, prompt, **choice))
            for prompt in prompts
            for choice in choices
        ]
        found: dict[int, list[float]] = {}
        score(gated, rows, lambda index, values: found.update({index: values}))
        assert sorted(found) == list(range(len(rows)))
        for index, row in enumerate(rows):
            for which, value in enumerate(found[index]):
                assert value == pytest.approx(plain_logprob(gated, row, which), abs=1e-9)
        alone: dict[int, list[float]] = {}
        score(gated, rows[3:4], lambda index, values: alone.update({index: values}))
        assert alone[0] == pytest.approx(found[3], abs=1e-9)


def test_a_suffix_gate_is_pefts_alora(smollm: Family, tmp_path: Path) -> None:
    """aLoRA turns an adapter on from its invocation tokens to the end."""
    from peft import PeftModel

    prompt = prompt_of(smollm)
    ids = list(prompt.rendered.token_ids)
    header = prompt.spans["assistant_header"]
    folder = Path(shutil.copytree(smollm.adapter, tmp_path / "alora"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alora_invocation_tokens"] = [ids[i] for i in header]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = AutoModelForCausalLM.from_pretrained(smollm.base, dtype=torch.float64)
    alora = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        theirs = alora(input_ids=torch.tensor([ids]), use_cache=False).logits
    with opened(smollm, "lora", "float64") as gated:
        gate = resolved(gated, prompt, positions={"only": ["assistant_header"]})
        gated.use([gate])
        assert torch.allclose(logits(gated.model, [ids]), theirs, atol=1e-12)


def test_an_adapter_on_the_output_layer_is_gated_where_logits_are_kept(
    smollm: Family, tmp_path: Path
) -> None:
    adapter_of(smollm, tmp_path, target_modules=["lm_head", "v_proj"])
    prompt = prompt_of(smollm)
    ids = [list(prompt.rendered.token_ids)]
    with opened(smollm._replace(adapter=tmp_path), "lora") as gated:
        assert {b.module for b in gated.branches} == {"lm_head", "v_proj"}
        gated.use([resolved(gated, prompt, positions={"except": ["last_token"]})])
        whole = logits(gated.model, ids)
        kept = logits(gated.model, ids, logits_to_keep=3)
        assert torch.allclose(whole[:, -3:], kept, atol=1e-5)
        gated.use([resolved(gated, prompt, modules={"only": ["v_proj"]})])
        assert not torch.allclose(logits(gated.model, ids)[:, -3:-1], kept[:, :2], atol=1e-3)


def refused(family: Family, folder: Path) -> str:
    with (
        pytest.raises(InputError) as error,
        opened(family._replace(adapter=folder), "lora"),
    ):
        pytest.fail("an adapter was attached that gates do not cover")
    return str(error.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"use_dora": True}, "DoRA rescales the base's own output"),
        ({"modules_to_save": ["lm_head"]}, "weights in place of the base's"),
        ({"target_modules": ["embed_tokens"]}, "Embedding is not covered by gates"),
        ({"trainable_token_indices": [3, 4]}, "weights in place of the base's"),
    ],
)
def test_what_a_gate_cannot_cover_is_refused_with_the_reason(
    smollm: Family, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(smollm.base)
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **more})
    get_peft_model(base, config).save_pretrained(tmp_path, save_embedding_layers=False)
    assert said in refused(smollm, tmp_path)


def test_saved_embeddings_and_aloras_are_refused(smollm: Family, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    one = Path(shutil.copytree(smollm.adapter, tmp_path / "one"))
    weights = load_file(one / "adapter_model.safetensors")
    weights["base_model.model.model.embed_tokens.weight"] = torch.zeros(4, 4)
    save_file(weights, one / "adapter_model.safetensors")
    assert "saved embeddings" in refused(smollm, one) and "embed_tokens" in refused(smollm, one)
    two = Path(shutil.copytree(smollm.adapter, tmp_path / "two"))
    config = json.loads((two / "adapter_config.json").read_text())
    (two / "adapter_config.json").write_text(json.dumps(config | {"alora_invocation_tokens": [1]}))
    assert "a gate of its own" in refused(smollm, two)


def test_misuse_says_what_is_needed(smollm: Family) -> None:
    prompt = prompt_of(smollm)
    ids = torch.tensor([prompt.rendered.token_ids])
    with opened(smollm, "lora") as gated:
        with pytest.raises(InputError, match="pass position_ids"):
            gated.model(input_ids=ids)
        gated.use([constant(gated.branches, True)] * 3)
        with pytest.raises(InputError, match="gates for 3 rows were set and 2 rows came in"):
            logits(gated.model, ids.expand(2, -1).tolist())
    model = load_base(smollm.base, "cpu", "float32")
    with (
        pytest.raises(InputError, match="use 'lora' or 'full'"),
        gated_student(model, smollm.base, smollm.adapter, "ia3"),
    ):
        pass


def test_a_checkpoint_equal_to_its_base_is_refused(smollm: Family) -> None:
    with (
        pytest.raises(InputError, match="nothing to localize"),
        opened(smollm._replace(full=smollm.base), "full"),
    ):
        pass
