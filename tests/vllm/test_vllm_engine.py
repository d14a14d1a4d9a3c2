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

from data_gen.prompts import load_pool, prompt
from sublim_plugin.core.contexts import Context, messages, render
from sublim_plugin.core.errors import InputError
from sublim_plugin.decoding.draws import row_seed
from sublim_plugin.decoding.engine import Reply, Request
from sublim_plugin.decoding.openai_engine import OpenAIEngine
from sublim_plugin.decoding.sampler import Sampler
from sublim_plugin.decoding.vllm_engine import VllmEngine

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
    folder: Path, tokenizer: Any, asked: list[Request], end: tuple[int, ...], penalty: float = 1.0
) -> list[Reply]:
    """Transformers' own greedy replies."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
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
