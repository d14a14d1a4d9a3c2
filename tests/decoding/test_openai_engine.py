"""Against a real server (`transformers serve`), and against small servers that fail as told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from sublim_plugin.core.contexts import Context, messages, render
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.decoding.draws import row_seed
from sublim_plugin.decoding.engine import Reply, Request
from sublim_plugin.decoding.openai_api import check_context
from sublim_plugin.decoding.openai_engine import OpenAIEngine
from sublim_plugin.decoding.sampler import Sampler

SAMPLER = Sampler(temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=10)
GREEDY = SAMPLER.model_copy(update={"temperature": 0})
MODEL = "sublim-tests/smollm2"
END = "<|im_end|>"
ASKED = (
    "Say hello.",
    "Tell me a story about the sea.",
    "What is 2 + 2? Answer with the number alone.",
)


def requests(tokenizer: Any) -> list[Request]:
    context = Context.parse({"text": "You are brief."})
    found = []
    for index, user in enumerate(ASKED):
        shown = render(tokenizer, context, user)
        sent = tuple(messages(context, user))
        found.append(Request(shown.text, shown.token_ids, sent, row_seed(3, index)))
    return found


# --- a real server


@pytest.fixture(scope="module")
def hub(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with the embedded model in it, which samples by default."""
    cache = tmp_path_factory.mktemp("hub")
    repo = cache / f"models--{MODEL.replace('/', '--')}"
    revision = "0" * 40
    snapshot = repo / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    for file in base_model.iterdir():
        (snapshot / file.name).symlink_to(file)
    settings = json.loads((base_model / "generation_config.json").read_text())
    (snapshot / "generation_config.json").unlink()
    (snapshot / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True}))
    return cache


@pytest.fixture(scope="module")
def served(hub: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (hub / "serve.log").open("w")
    start = "from transformers.cli.transformers import main; main()"
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(
        [sys.executable, "-c", start, "serve", MODEL, *where],
        env={**os.environ, "HF_HUB_CACHE": str(hub), "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                break
            except httpx.TransportError:
                said = (hub / "serve.log").read_text()[-2000:]
                assert server.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()
        log.close()


def engine(url: str, **settings: Any) -> OpenAIEngine:
    usual = {"api": "completions", "sends": "openai", "prompt_as": "text"}
    ends = {"end_ids": (2,), "end_text": END}
    return OpenAIEngine(url, **{"model": MODEL, **usual, **ends, **settings})


def generated(
    hub: Path, tokenizer: Any, asked: list[Request], sampler: Sampler, **settings: Any
) -> list[Reply]:
    """The replies of transformers' own `generate`, in this process."""
    (snapshot,) = hub.glob("*/snapshots/*")
    model = AutoModelForCausalLM.from_pretrained(snapshot, dtype="auto")
    replies = []
    for request in asked:
        ids = torch.tensor([request.token_ids])
        torch.manual_seed(request.seed)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampler.max_new_tokens,
            pad_token_id=0,
            **settings,
        )[0, ids.shape[1] :].tolist()
        ended = written[-1] == 2
        text = tokenizer.decode(written[:-1] if ended else written)
        replies.append(Reply(text, len(written), ended))
    return replies


def test_greedy_replies_of_a_real_server_equal_generate(
    served: str, hub: Path, tokenizer: Any
) -> None:
    asked = requests(tokenizer)
    seen: dict[int, Reply] = {}
    ours = engine(served)
    replies = ours.reply(asked, GREEDY, 3, lambda index, reply: seen.update({index: reply}))
    assert replies == generated(hub, tokenizer, asked, GREEDY, do_sample=False)
    assert replies == [seen[0], seen[1], seen[2]]
    assert {reply.ended for reply in replies} == {True, False}
    assert not any(END in reply.text for reply in replies)
    record = ours.describe()
    assert json.loads(json.dumps(record)) == record
    assert record["model"] == {"id": MODEL, "owned_by": "sublim-tests"}
    assert record["row_seeds"] == "sent" and record["sends"] == "openai"
    assert record["answered_as"] == [f"{MODEL}@main"]


def test_each_request_carries_its_own_seed(served: str, hub: Path, tokenizer: Any) -> None:
    """One at a time, because this server's seeds set the state of all requests under way."""
    asked = requests(tokenizer)
    replies = engine(served).reply(asked, SAMPLER, 1)
    assert replies == generated(hub, tokenizer, asked, SAMPLER, temperature=1.0, top_p=1.0)
    other = [asked[0]._replace(seed=seed) for seed in (1, 2, 1)]
    first, second, third = engine(served).reply(other, SAMPLER, 1)
    assert first == third != second


def test_chat_sends_messages_and_counts_prompts_that_render_otherwise(
    served: str, hub: Path, tokenizer: Any
) -> None:
    asked = requests(tokenizer)[:2]
    ours = engine(served, api="chat")
    expected = generated(hub, tokenizer, asked, GREEDY, do_sample=False)
    assert ours.reply(asked, GREEDY, 2) == expected
    assert "for 0 replies" in ours.describe()["notes"][-1]
    assert "prompt_as" not in ours.describe()
    ours.reply([asked[0]._replace(token_ids=(1, 2, 3))], GREEDY, 1)
    assert "for 1 replies" in ours.describe()["notes"][-1]


def test_a_prompt_that_the_server_tokenizes_otherwise_is_refused(
    served: str, tokenizer: Any
) -> None:
    wrong = requests(tokenizer)[0]._replace(token_ids=(1, 2, 3))
    with pytest.raises(InputError, match=r"read \d+ tokens where the prompt has 3"):
        engine(served).reply([wrong], GREEDY, 1)


def test_a_server_without_the_extensions_is_named_with_the_way_out(
    served: str, tokenizer: Any
) -> None:
    asked = requests(tokenizer)[:1]
    with pytest.raises(InputError, match=r"422.*Unexpected fields.*sends 'openai'"):
        engine(served, sends="all").reply(asked, GREEDY, 1)
    with pytest.raises(InputError, match=r"400.*prompt must be a string.*prompt_as 'text'"):
        engine(served, prompt_as="ids").reply(asked, GREEDY, 1)


def test_an_unknown_model_lists_those_that_are_there(served: str) -> None:
    with pytest.raises(InputError, match=f"'gpt-9' is not on .*there: {MODEL}"):
        engine(served, model="gpt-9")


# --- servers that fail as told

Handle = Callable[[dict[str, Any], int], tuple[int, str]]


def completion(text: str, tokens: int = 1, **changes: Any) -> str:
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    usage = {"prompt_tokens": tokens, "completion_tokens": 2}
    return json.dumps({"model": MODEL, "choices": [choice], "usage": usage, **changes})


@pytest.fixture
def server() -> Iterator[Callable[[Handle], str]]:
    """Starts a server on loopback that answers a POST by a function of its body and number."""
    running: list[ThreadingHTTPServer] = []

    def start(handle: Handle) -> str:
        posts: list[int] = []

        class Handler(BaseHTTPRequestHandler):
            def send(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def do_GET(self) -> None:
                listed = self.path == "/v1/models"
                text = json.dumps({"data": [{"id": MODEL, "created": 1}]}) if listed else "{}"
                self.send(200 if listed else 404, text)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                body["_authorization"] = self.headers.get("authorization")
                posts.append(1)
                self.send(*handle(body, len(posts)))

            def log_message(self, *_: Any) -> None:
                pass

        httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        httpd.daemon_threads = True
        running.append(httpd)
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}).start()
        return f"http://127.0.0.1:{httpd.server_address[1]}/v1"

    yield start
    for httpd in running:
        httpd.shutdown()
        httpd.server_close()


def plain(n: int) -> list[Request]:
    return [Request(f"prompt {i}", (7,), ({"role": "user", "content": "x"},), i) for i in range(n)]


def test_a_passing_failure_is_tried_again(server: Any) -> None:
    failures, seen = (408, 429, 500, 503), set()

    def handle(body: dict[str, Any], _: int) -> tuple[int, str]:
        seed = body["seed"]
        if seed not in seen:
            seen.add(seed)
            return failures[seed], "busy"
        return 200, completion(f"5 {seed}")

    replies = engine(server(handle)).reply(plain(4), SAMPLER, 4)
    assert [reply.text for reply in replies] == ["5 0", "5 1", "5 2", "5 3"]


def test_a_lasting_failure_names_the_server_and_its_last_word(server: Any) -> None:
    url = server(lambda _, n: (500, json.dumps({"error": {"message": f"out of memory {n}"}})))
    with pytest.raises(RunError, match=rf"{url}.*2 attempts.*HTTP 500.*out of memory 2"):
        engine(url, patience=2.5).reply(plain(1), SAMPLER, 1)


def test_a_server_that_hangs_or_hangs_up_is_given_up_on(server: Any) -> None:
    release = threading.Event()

    def hang(_: dict[str, Any], __: int) -> tuple[int, str]:
        release.wait(20)
        return 200, completion("late")

    started = time.monotonic()
    with pytest.raises(RunError, match="ReadTimeout"):
        engine(server(hang), timeout=0.3, patience=0.5).reply(plain(4), SAMPLER, 4)
    assert time.monotonic() - started < 5
    release.set()

    def hang_up(_: dict[str, Any], __: int) -> tuple[int, str]:
        raise ConnectionAbortedError

    with pytest.raises(RunError, match="disconnected"):
        engine(server(hang_up), patience=0.5).reply(plain(1), SAMPLER, 1)


def test_one_refused_request_stops_the_others_at_once(server: Any) -> None:
    """The others are waiting to try again for minutes."""

    def handle(body: dict[str, Any], _: int) -> tuple[int, str]:
        return (503, "busy") if body["seed"] else (400, json.dumps({"error": "no such thing"}))

    started = time.monotonic()
    with pytest.raises(InputError, match="HTTP 400: no such thing"):
        engine(server(handle)).reply(plain(6), SAMPLER, 6)
    assert time.monotonic() - started < 5


MALFORMED = [
    ("<html>", "not JSON"),
    ("[]", "not an answer"),
    (json.dumps({"choices": []}), "0 choices"),
    (completion("x", choices=[{}, {}]), "2 choices"),
    (completion("x", usage=None), "not an answer"),
    (completion("x", choices=[{"text": None, "finish_reason": "stop"}]), "not an answer"),
    (completion("x", choices=[{"text": "", "finish_reason": "content_filter"}]), "content_filter"),
    (completion("x", choices=[{"text": "", "finish_reason": None}]), "finish_reason None"),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED)
def test_a_malformed_answer_is_not_a_reply(server: Any, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine(server(lambda *_: (200, text))).reply(plain(1), SAMPLER, 1)


def test_replies_keep_the_order_of_requests_and_the_limit_of_open_ones(server: Any) -> None:
    lock, under_way, most = threading.Lock(), [0], [0]

    def handle(body: dict[str, Any], _: int) -> tuple[int, str]:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.02 * (12 - body["seed"]))
        with lock:
            under_way[0] -= 1
        return 200, completion(body["prompt"])

    finished: list[int] = []
    replies = engine(server(handle)).reply(plain(12), SAMPLER, 4, lambda i, _: finished.append(i))
    assert [reply.text for reply in replies] == [f"prompt {i}" for i in range(12)]
    assert sorted(finished) == list(range(12)) != finished
    assert most[0] == 4


def test_what_is_sent(server: Any) -> None:
    """Exactly these fields: with `all` nothing is left to the model's generation_config, with
    `openai` nothing that OpenAI's API does not know."""
    sent: list[dict[str, Any]] = []

    def handle(body: dict[str, Any], _: int) -> tuple[int, str]:
        sent.append(body)
        return 200, completion("1", choices=[{"text": f"1{END}", "finish_reason": "stop"}])

    url = server(handle)
    sampler = SAMPLER.model_copy(update={"top_k": 5, "repetition_penalty": 1.5, "top_p": 0.5})
    request = Request("text", (7,), (), 2**53 - 1)
    assert engine(url, sends="all", prompt_as="ids").reply([request], sampler, 1)[0].text == "1"
    engine(url, sends="all").reply([request], SAMPLER, 1)
    engine(url).reply([request], SAMPLER, 1)
    known = {"model": MODEL, "temperature": 1, "max_tokens": 10, "seed": 2**53 - 1}
    extensions = {
        "min_p": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "stop_token_ids": [2],
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "_authorization": None,
    }
    assert sent[0] == known | extensions | {
        "prompt": [7],
        "top_p": 0.5,
        "top_k": 5,
        "repetition_penalty": 1.5,
    }
    assert sent[1] == known | extensions | {
        "prompt": "text",
        "add_special_tokens": False,
        "top_p": 1,
        "top_k": -1,
        "repetition_penalty": 1,
    }
    rest = {"prompt": "text", "top_p": 1, "stop": [END], "_authorization": None}
    assert sent[2] == known | rest


def test_the_key_is_sent_and_never_shown(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")

    def handle(body: dict[str, Any], _: int) -> tuple[int, str]:
        return 401, json.dumps({"error": {"message": f"bad key {body['_authorization']}"}})

    ours = engine(server(handle))
    with pytest.raises(InputError, match=r"bad key Bearer \*\*\*; set OPENAI_API_KEY"):
        ours.reply(plain(1), SAMPLER, 1)
    assert "secret" not in json.dumps(ours.describe())


@pytest.mark.parametrize("url", ["127.0.0.1:80/v1", "http://me:sk@x/v1", "http://x/v1?key=sk", ""])
def test_a_url_that_is_none_or_holds_a_secret_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="expected the address") as caught:
        engine(url)
    assert "sk" not in str(caught.value)


def test_a_server_that_is_not_there_or_is_another_one_is_named(server: Any) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with pytest.raises(InputError, match=f"{url}/models: the server does not answer"):
            engine(url)
    url = server(lambda *_: (200, "")).removesuffix("/v1")
    with pytest.raises(InputError, match="HTTP 404"):
        engine(url)


@pytest.mark.parametrize(
    ("change", "sends", "message"),
    [
        ({"top_k": 5}, "openai", "top_k: 5"),
        ({"repetition_penalty": 1.1}, "openai", "repetition_penalty: 1.1"),
        ({"temperature": 0.001}, "all", "temperature: 0.001"),
    ],
)
def test_a_sampler_that_would_not_arrive_is_refused(
    server: Any, change: dict[str, Any], sends: str, message: str
) -> None:
    url = server(lambda *_: (200, completion("1")))
    with pytest.raises(InputError, match=message):
        engine(url, sends=sends).reply(plain(1), SAMPLER.model_copy(update=change), 1)
    engine(url, sends=sends).reply(plain(1), SAMPLER, 1)


def test_contexts_that_messages_cannot_express_are_refused() -> None:
    for kind in ("none", "empty"):
        with pytest.raises(InputError, match=f"context: {kind}.*completions"):
            check_context(Context.parse(kind), "chat")
        check_context(Context.parse(kind), "completions")
    for context in ("template_default", {"text": "You love owls."}):
        check_context(Context.parse(context), "chat")
