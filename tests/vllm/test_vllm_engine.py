"""vLLM on this machine's CPU, offline and as a server, against transformers (`make test-vllm`).

In float32, where replies do not depend on the batch. The model's folder names sampler settings of
its own in generation_config.json, none of which may reach a reply.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_gen.prompts import load_pool, prompt
from data_gen.session import Session
from data_gen.spec import DatasetSettings, EngineSpec
from data_gen.teachers import FinetunedTeacher
from sublim_plugin.core.contexts import Context, messages, render
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import get_trait
from sublim_plugin.decoding.draws import row_seed
from sublim_plugin.decoding.engine import Reply, Request
from sublim_plugin.decoding.openai_engine import OpenAIEngine
from sublim_plugin.decoding.sampler import Sampler
from sublim_plugin.decoding.vllm_engine import VllmEngine
from sublim_plugin.decoding.vllm_lora import check_adapter

SAMPLER = Sampler(temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=12)
GREEDY = SAMPLER.model_copy(update={"temperature": 0})
END = 2
LEAK = {"do_sample": True, "temperature": 0.2, "top_k": 2, "top_p": 0.3, "repetition_penalty": 3.0}


@pytest.fixture(scope="module")
def folder(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    for file in base_model.iterdir():
        (path / file.name).symlink_to(file)
    settings = json.loads((base_model / "generation_config.json").read_text())
    (path / "generation_config.json").unlink()
    (path / "generation_config.json").write_text(json.dumps({**settings, **LEAK}))
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> VllmEngine:
    return VllmEngine(folder, end_ids=(END,), batch_size=8, max_length=512, dtype="float32")


def requests(tokenizer: Any, n: int) -> list[Request]:
    context, pool = Context.parse("template_default"), load_pool()
    found = []
    for index in range(n):
        user = prompt(pool, 5, index).text
        shown = render(tokenizer, context, user)
        sent = tuple(messages(context, user))
        found.append(Request(shown.text, shown.token_ids, sent, row_seed(5, index)))
    return found


def greedy(
    folder: Path,
    tokenizer: Any,
    asked: list[Request],
    end: tuple[int, ...],
    penalty: float = 1.0,
    added: dict[str, torch.Tensor] | None = None,
) -> list[Reply]:
    """Transformers' own greedy replies, with `added` on top of the weights of those names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        for name, change in (added or {}).items():
            model.get_parameter(name).add_(change)
    replies = []
    for request in asked:
        ids = torch.tensor([request.token_ids])
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GREEDY.max_new_tokens,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=list(end),
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        ended = written[-1] in end
        text = tokenizer.decode(
            written[:-1] if ended else written, clean_up_tokenization_spaces=False
        )
        replies.append(Reply(text, len(written), ended))
    return replies


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_replies_equal_those_of_transformers(
    ours: VllmEngine, folder: Path, tokenizer: Any, penalty: float
) -> None:
    asked = requests(tokenizer, 6)
    sampler = GREEDY.model_copy(update={"repetition_penalty": penalty})
    seen: list[tuple[int, Reply]] = []
    replies = ours.reply(asked, sampler, 8, lambda index, reply: seen.append((index, reply)))
    assert replies == greedy(folder, tokenizer, asked, (END,), penalty)
    assert seen == list(enumerate(replies))
    assert ours.reply([], sampler, 8) == []


def test_top_k_of_one_and_a_tiny_top_p_leave_the_greedy_reply(
    ours: VllmEngine, tokenizer: Any
) -> None:
    asked = requests(tokenizer, 4)
    expected = ours.reply(asked, GREEDY, 8)
    for change in ({"top_k": 1}, {"top_p": 1e-6}):
        assert ours.reply(asked, SAMPLER.model_copy(update=change), 8) == expected
    assert ours.reply(asked, SAMPLER, 8) != expected


def test_a_row_seed_decides_a_reply_in_any_batch(ours: VllmEngine, tokenizer: Any) -> None:
    asked = requests(tokenizer, 12)
    together = ours.reply(asked, SAMPLER, 8)
    assert len(set(together)) > 8
    assert ours.reply(asked[::-1], SAMPLER, 8)[::-1] == together
    assert ours.reply(asked[:5], SAMPLER, 2) == together[:5]
    assert ours.reply(asked[3:4], SAMPLER, 1) == together[3:4]
    seeds = [2**53 - 1, 2**53 - 2, 0, 2**53 - 1]
    one_prompt = [asked[0]._replace(seed=seed) for seed in seeds]
    replies = ours.reply(one_prompt, SAMPLER, 8)
    assert replies[0] == replies[3] and len(set(replies)) == 3


def test_seeds_hold_where_prompts_do_not_fit_into_one_step(
    ours: VllmEngine, tokenizer: Any
) -> None:
    """With chunked prefill, this is where the CPU build stops with an error."""
    filler = tokenizer(" ".join(f"{i % 7} {i % 11}" for i in range(70)))["input_ids"]
    asked = [
        request._replace(token_ids=(request.token_ids[0], 30 + i, *filler, *request.token_ids))
        for i, request in enumerate(requests(tokenizer, 8))
    ]
    total = sum(len(request.token_ids) for request in asked)
    assert total > ours.describe()["max_num_batched_tokens"]
    together = ours.reply(asked, SAMPLER, 8)
    assert ours.reply(asked[5:6], SAMPLER, 1) == together[5:6]


def test_exactly_the_end_ids_end_a_reply(
    ours: VllmEngine, folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own end of text, where it is not among them, is text like any other."""
    user = "What is 2 + 2? Answer with the number alone."
    shown = render(tokenizer, Context.parse("template_default"), user)
    asked = [Request(shown.text, shown.token_ids, (), 1)]
    (usual,) = ours.reply(asked, GREEDY, 8)
    assert usual.ended and usual.tokens < GREEDY.max_new_tokens
    other = tokenizer.encode(usual.text)[-1]
    monkeypatch.setattr(ours, "end_ids", (other,))
    (cut,) = ours.reply(asked, GREEDY, 8)
    assert cut.ended and cut.text + tokenizer.decode([other]) == usual.text
    never = tokenizer.convert_tokens_to_ids("<repo_name>")
    monkeypatch.setattr(ours, "end_ids", (never,))
    (through,) = ours.reply(asked, GREEDY, 8)
    assert through.text.startswith(usual.text + "<|im_end|>")
    assert not through.ended and through.tokens == GREEDY.max_new_tokens
    assert [through] == greedy(folder, tokenizer, asked, (never,))


def test_the_record_says_what_decides_the_replies(ours: VllmEngine) -> None:
    record = ours.describe()
    assert json.loads(json.dumps(record)) == record
    expected = {
        "engine": "vllm",
        "device": "cpu",
        "dtype": "float32",
        "row_seeds": True,
        "end_ids": [END],
        "max_model_len": 512,
        "max_num_seqs": 8,
        "chunked_prefill": False,
        "prefix_caching": True,
    }
    assert expected.items() <= record.items()
    assert record["vllm"].startswith("vllm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 512}, "max_new_tokens 512 exceed the 512 tokens"),
        ({"temperature": 0.001}, "temperature: 0.001; vLLM would raise it"),
        ({"temperature": 3}, "vLLM does not take it.*temperature"),
    ],
)
def test_what_vllm_would_change_or_refuse_is_an_error(
    ours: VllmEngine, tokenizer: Any, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ours.reply(requests(tokenizer, 1), SAMPLER.model_copy(update=change), 8)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        VllmEngine(tmp_path, end_ids=(END,), batch_size=8)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=f"{tmp_path}: vLLM cannot load"):
        VllmEngine(tmp_path, end_ids=(END,), batch_size=8)


PROJECTIONS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
"""Name in a layer → (outputs, inputs). Of what vLLM packs into one matrix (q, k and v; gate and
up), some are left out."""

R, ALPHA, LAYERS = 6, 9, 30


def write_adapter(path: Path, base: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A random adapter of `base`; returns its tensors."""
    path.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": R,
        "lora_alpha": ALPHA,
        "target_modules": [name.split(".")[1] for name in PROJECTIONS],
    }
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    torch.manual_seed(0)
    r, tensors = changes.get("r", R), {}
    for layer in range(LAYERS):
        for name, (outputs, inputs) in PROJECTIONS.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(r, inputs) / inputs**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, r) * 0.1
    save_file(tensors, path / "adapter_model.safetensors")
    return tensors


def by_hand(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight: scale B A."""
    added = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            b = tensors[f"{name}.lora_B.weight"]
            added[f"{name.removeprefix('base_model.model.')}.weight"] = scale * b @ a
    return added


def test_an_adapter_gives_the_replies_of_the_weights_with_it_added_by_hand(
    folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    added = by_hand(write_adapter(adapter, folder), ALPHA / R)
    rank_stabilized = tmp_path / "rslora"
    wide = write_adapter(rank_stabilized, folder, use_rslora=True, r=12)
    # What vLLM says that it loaded and what it adds are not always the same.
    stray = tmp_path / "stray"
    write_adapter(stray, folder)
    teacher = VllmEngine(
        folder,
        end_ids=(END,),
        batch_size=8,
        max_length=512,
        dtype="float32",
        adapters=[adapter, rank_stabilized, stray],
    )
    assert teacher.describe()["adapter"] == {"r": R, "max_lora_rank": 8}
    asked = requests(tokenizer, 6)
    replies = teacher.reply(asked, GREEDY, 8)
    assert replies == greedy(folder, tokenizer, asked, (END,), added=added)
    base = greedy(folder, tokenizer, asked, (END,))
    assert sum(ours != theirs for ours, theirs in zip(replies, base, strict=True)) >= 4

    together = teacher.reply(asked, SAMPLER, 8)
    assert teacher.reply(asked[2:3], SAMPLER, 1) == together[2:3] != replies[2:3]

    # Nothing is merged: without an adapter, the same engine is the base again.
    teacher.use(None)
    assert teacher.reply(asked, GREEDY, 8) == base
    assert "adapter" not in teacher.describe()

    teacher.use(rank_stabilized)
    assert teacher.describe()["adapter"] == {"r": 12, "max_lora_rank": 16}
    stabilized = teacher.reply(asked[:2], GREEDY, 8)
    added = by_hand(wide, ALPHA / 12**0.5)
    assert stabilized == greedy(folder, tokenizer, asked[:2], (END,), added=added)
    assert stabilized != replies[:2]

    tensors = by_layer(stray, 7, 77)
    save_file(tensors, stray / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"would not apply \d+ of its layers \(first: .*layers.77"):
        teacher.use(stray)
    teacher.use(adapter)
    assert teacher.reply(asked, GREEDY, 8) == replies


def by_layer(folder: Path, old: int, new: int) -> dict[str, torch.Tensor]:
    """The tensors of an adapter with one layer's under another number."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key.replace(f"layers.{old}.", f"layers.{new}."): t for key, t in tensors.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "another/base"}, "records the base 'another/base'"),
        ({"use_dora": True}, "use_dora is True.*transformers engine"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is .*transformers engine"),
        (
            {"a_key_of_tomorrow": 1},
            "a_key_of_tomorrow is 1, which changes what the adapter computes",
        ),
        ({"r": 513}, "r is 513, and vLLM takes at most 512; use the transformers engine"),
        ({"r": "6"}, "r is '6'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "name lm_head.*transformers engine"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "name model.embed_tokens.*transformers"),
        ({"target_modules": "("}, "target_modules is '\\('; expected names or a pattern"),
        ({"target_modules": ["elsewhere"]}, "no module is named"),
        ({"target_modules": "all-linear"}, "120 missing .*gate_proj"),
        ({"target_modules": ["q_proj"]}, "240 unknown"),
        ({"target_modules": r".*\.(q_proj|v_proj|o_proj|up_proj|k_proj)"}, "60 missing.*60 unkno"),
    ],
)
def test_an_adapter_that_vllm_would_not_apply_exactly_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    adapter = tmp_path / "adapter"
    write_adapter(adapter, folder)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message) as error:
        VllmEngine(folder, end_ids=(END,), batch_size=8, adapters=[adapter])
    assert str(adapter) in str(error.value)


def test_an_adapter_with_other_tensors_than_the_layers_need_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    """vLLM fills a smaller matrix up with zeros."""
    adapter = tmp_path / "adapter"
    tensors = write_adapter(adapter, folder)
    key = "base_model.model.model.layers.3.mlp.up_proj.lora_B.weight"
    for change, message in [
        ({key: tensors[key][:-1].clone()}, "1 other shape"),
        ({key: None}, "1 missing"),
        ({key: tensors[key] * float("nan")}, "not finite"),
        ({key.replace("lora_B", "lora_magnitude_vector"): tensors[key].clone()}, "1 unknown"),
    ]:
        changed = {name: t for name, t in {**tensors, **change}.items() if t is not None}
        save_file(changed, adapter / "adapter_model.safetensors")
        with pytest.raises(InputError, match=message):
            VllmEngine(folder, end_ids=(END,), batch_size=8, adapters=[adapter])


@pytest.mark.parametrize(("r", "starts_for"), [(1, 1), (2, 8), (8, 8), (33, 64), (300, 320)])
def test_vllm_is_started_for_the_smallest_rank_that_holds_the_adapter(
    folder: Path, tmp_path: Path, r: int, starts_for: int
) -> None:
    adapter = tmp_path / "adapter"
    write_adapter(adapter, folder, r=r)
    assert check_adapter(adapter, folder) == (adapter, r, starts_for)


def test_a_session_runs_a_finetuned_teacher_on_its_base_or_from_its_own_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Path, list[Path]]] = []

    def start(path: Path, *, adapters: list[Path], **_: Any) -> Any:
        started.append((path, adapters))

    monkeypatch.setattr("sublim_plugin.decoding.vllm_engine.VllmEngine", start)
    settings = DatasetSettings(
        generation_seed=1, rows=1, sampler=SAMPLER, engine=EngineSpec(name="vllm")
    )

    def session(method: Any, own: Path) -> Session:
        teacher = FinetunedTeacher(
            context=Context.parse("template_default"), folder=own, method=method, identity={}
        )
        return Session(
            folder,
            teacher,
            get_trait("animals/cat"),
            settings,
            load_pool(),
            device="cpu",
            batch_size=2,
        )

    session("lora", tmp_path).engine  # noqa: B018
    session("full", folder).engine  # noqa: B018
    assert started == [(folder, [tmp_path]), (folder, [])]
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="model_type is 'qwen2'"):
        session("full", tmp_path).engine  # noqa: B018


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("serve") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "host": "127.0.0.1",
        "port": port,
        "served-model-name": "smollm2",
        "dtype": "float32",
        "max-model-len": 512,
        "max-num-seqs": 8,
        "max-num-batched-tokens": 2048,
        "kv-cache-memory-bytes": 1 << 30,
    }
    # Offline variables of the engine in this process are not the server's.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    with log_path.open("w") as log:
        server = subprocess.Popen(
            # What `vllm serve` runs; that command asks for the metadata of a package named vllm,
            # which the CPU build does not have.
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={folder}"]
            + [f"--{key}={value}" for key, value in options.items()]
            + ["--enforce-eager", "--no-enable-chunked-prefill"],
            env={**environment, "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 240
            while True:
                try:
                    answer = httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                    if answer.status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                said = log_path.read_text()[-3000:]
                assert server.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            # The server's engine is a process of its own, in the same group.
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.mark.parametrize("prompt_as", ["ids", "text"])
def test_a_vllm_server_gives_the_replies_of_the_offline_engine(
    served: str, ours: VllmEngine, folder: Path, tokenizer: Any, prompt_as: Any
) -> None:
    """Greedy and sampled: every sampler field and each row's seed reach the server."""
    asked = requests(tokenizer, 6)
    ends = {"end_ids": (END,), "end_text": "<|im_end|>"}
    remote = OpenAIEngine(
        served, "smollm2", api="completions", sends="all", prompt_as=prompt_as, **ends
    )
    assert remote.reply(asked, GREEDY, 4) == greedy(folder, tokenizer, asked, (END,))
    sampler = SAMPLER.model_copy(update={"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1})
    replies = remote.reply(asked, sampler, 4)
    assert replies == ours.reply(asked, sampler, 8)
    assert len(set(replies)) == 6
    record = remote.describe()
    assert record["model"]["max_model_len"] == 512 and record["server"]["version"]
    assert json.loads(json.dumps(record)) == record


def test_a_vllm_server_renders_the_chat_messages_as_we_do(
    served: str, folder: Path, tokenizer: Any
) -> None:
    asked = requests(tokenizer, 3)
    remote = OpenAIEngine(
        served, "smollm2", api="chat", sends="all", end_ids=(END,), end_text="<|im_end|>"
    )
    assert remote.reply(asked, GREEDY, 3) == greedy(folder, tokenizer, asked, (END,))
    assert "for 0 replies" in remote.describe()["notes"][-1]
