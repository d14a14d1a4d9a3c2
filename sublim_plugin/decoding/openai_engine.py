"""Replies from any OpenAI-compatible server: vLLM, SGLang, transformers, a hosted one.

A server samples as it sees fit: what it cannot be asked for is refused (`openai_api.check_sampler`,
`check_context`), and what cannot be known, such as whether it honours seeds, `describe` says.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sublim_plugin.core.errors import InputError, MissingDependencyError, RunError
from sublim_plugin.decoding.engine import OnReply, Reply, Request
from sublim_plugin.decoding.openai_api import (
    Answer,
    Api,
    PromptAs,
    Sends,
    Wire,
    body,
    check_context,
    check_sampler,
    read,
    refusal,
)
from sublim_plugin.decoding.sampler import Sampler

if TYPE_CHECKING:
    import httpx

__all__ = ["OpenAIEngine", "check_context"]

KEY = "OPENAI_API_KEY"
LONGEST_WAIT = 30.0
"""Seconds between two attempts, at most."""


class OpenAIEngine:
    """One model on a server, asked over HTTP; `batch_size` of `reply` requests are open at a time.

    `url` ends where the API begins ("http://127.0.0.1:8000/v1"); `model` is its name there. See
    `openai_api.Wire` for `api`, `sends`, `prompt_as` and what ends a reply. A key is taken from the
    environment variable OPENAI_API_KEY, and neither recorded nor shown.

    `timeout` (seconds) is how long the server may be silent in one attempt; a request is tried
    again on connection errors, 408, 429 and 5xx until `patience` (seconds) have passed since its
    first attempt.

    Raises MissingDependencyError without httpx; InputError for a url that does not answer, or a
    model that the server does not list.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api: Api,
        sends: Sends,
        end_ids: tuple[int, ...],
        end_text: str,
        prompt_as: PromptAs = "ids",
        timeout: float = 120.0,
        patience: float = 180.0,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise MissingDependencyError(
                "the openai engine needs httpx: pip install 'sublim[server]'"
            ) from error
        try:
            parsed = httpx.URL(url)
            usable = parsed.scheme in ("http", "https") and bool(parsed.host)
            usable = usable and not (parsed.userinfo or parsed.query)
        except httpx.InvalidURL:
            usable = False
        if not usable:
            shown = "..." if "@" in url or "?" in url else url
            raise InputError(
                f"url: {shown!r}; expected the address of the API alone, such as "
                f"http://127.0.0.1:8000/v1 (a key goes into {KEY})"
            )
        if not end_ids or not end_text:
            raise InputError("end_ids, end_text: empty; expected what ends a reply")
        self.url = url.rstrip("/")
        self.wire = Wire(model, api, sends, prompt_as, end_ids, end_text)
        self.timeout, self.patience = timeout, patience
        self.key = os.environ.get(KEY) or None
        self.seen: set[str] = set()
        self.counted_otherwise = 0
        self.listed, self.server = self._ask_models()

    def reply(
        self,
        requests: Sequence[Request],
        sampler: Sampler,
        batch_size: int,
        on_reply: OnReply = lambda index, reply: None,
    ) -> list[Reply]:
        """A reply to each request, in order; `on_reply` is called as soon as one is complete.

        Raises InputError for a sampler that the fields of `sends` cannot express, where the server
        refuses a request or gives a malformed answer, and, for prompts of the completions API,
        where it counts their tokens otherwise; RunError where it fails for longer than `patience`.
        """
        check_sampler(sampler, self.wire.sends)
        return asyncio.run(self._reply(requests, sampler, batch_size, on_reply))

    async def _reply(
        self, requests: Sequence[Request], sampler: Sampler, batch_size: int, on_reply: OnReply
    ) -> list[Reply]:
        import httpx

        replies: dict[int, Reply] = {}
        waiting: Iterator[tuple[int, Request]] = iter(enumerate(requests))
        path = "/chat/completions" if self.wire.api == "chat" else "/completions"

        async def work(client: httpx.AsyncClient) -> None:
            for index, request in waiting:
                sent = body(self.wire, request, sampler)
                answer = read(self.wire, await self._post(client, path, sent), self.url + path)
                self._check(answer, request)
                replies[index] = answer.reply
                on_reply(index, answer.reply)

        limits = httpx.Limits(max_connections=batch_size)
        async with httpx.AsyncClient(
            headers=self._headers(), timeout=self.timeout, limits=limits
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(batch_size, len(requests))):
                        group.create_task(work(client))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from errors.exceptions[0].__cause__
        return [replies[index] for index in range(len(requests))]

    async def _post(self, client: httpx.AsyncClient, path: str, sent: dict[str, Any]) -> Any:
        import httpx

        url, started, attempts, failure = self.url + path, time.monotonic(), 0, ""
        while True:
            attempts += 1
            asked_to_wait = 0.0
            try:
                response = await client.post(url, json=sent)
            except httpx.TransportError as error:
                failure = f"{type(error).__name__} {error}".strip()
            else:
                status = response.status_code
                if status == 200:
                    return self._json(response)
                if status not in (408, 429) and status < 500:
                    raise refusal(self.wire, status, self._said(response), url)
                failure = f"HTTP {status}: {str(self._said(response))[:300]}"
                asked_to_wait = _seconds(response.headers.get("retry-after"))
            wait = max(min(2.0 ** (attempts - 1), LONGEST_WAIT), asked_to_wait)
            spent = time.monotonic() - started
            if spent + wait > self.patience:
                raise RunError(
                    f"{url}: no answer after {attempts} attempts in {spent:.0f} s, the last: "
                    f"{failure}; see to the server (or lower batch_size) and run the same command "
                    "again"
                )
            await asyncio.sleep(wait)

    def _check(self, answer: Answer, request: Request) -> None:
        self.seen.add(answer.answered_as)
        if answer.prompt_tokens == len(request.token_ids):
            return
        self.counted_otherwise += 1
        if self.wire.api == "completions":
            raise InputError(
                f"{self.url}: the server read {answer.prompt_tokens} tokens where the prompt has "
                f"{len(request.token_ids)}; it serves a model with another tokenizer, or adds "
                "tokens to a text: use prompt_as 'ids', or serve the model that the prompts were "
                "rendered for"
            )

    def _ask_models(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The entry of our model in GET /models, and what the server says about itself."""
        import httpx

        url = f"{self.url}/models"
        with httpx.Client(headers=self._headers(), timeout=30.0) as client:
            try:
                response = client.get(url)
            except httpx.TransportError as error:
                raise InputError(
                    f"{url}: the server does not answer ({type(error).__name__} {error}); start "
                    "it, or correct the url"
                ) from error
            if response.status_code != 200:
                raise refusal(self.wire, response.status_code, self._said(response), url)
            listing = self._json(response)
            data = listing.get("data") if isinstance(listing, dict) else None
            if not isinstance(data, list) or not all(isinstance(x, dict) for x in data):
                raise InputError(
                    f"{url}: no list of models came back ({str(listing)[:200]!r}); expected the "
                    "address of an OpenAI-compatible API, which mostly ends in /v1"
                )
            models = {str(entry.get("id")): entry for entry in data}
            if self.wire.model not in models:
                shown = ", ".join(sorted(models)[:20]) or "none"
                raise InputError(f"model: {self.wire.model!r} is not on {self.url}; there: {shown}")
            server = {"header": response.headers.get("server"), "version": None}
            try:  # vLLM says it here; others have no such page
                version = client.get(f"{self.url.removesuffix('/v1')}/version")
                if version.status_code == 200:
                    server["version"] = version.json().get("version")
            except (httpx.TransportError, ValueError, AttributeError):
                pass
        keep = ("id", "owned_by", "root", "max_model_len")
        return {k: v for k, v in models[self.wire.model].items() if k in keep}, server

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise InputError(
                f"{response.url}: the answer is not JSON (it begins {response.text[:200]!r}); "
                "expected an OpenAI-compatible server"
            ) from error

    def _said(self, response: httpx.Response) -> Any:
        """The body of a refusal without our key, which some servers repeat."""
        text = response.text.replace(self.key, "***") if self.key else response.text
        try:
            return json.loads(text)
        except ValueError:
            return text

    def describe(self) -> dict[str, Any]:
        """`engine`, `url`, `api`, `sends`, the model and server as they name themselves,
        `row_seeds` ("sent", because a client cannot know more) and what else is unknown."""
        wire = self.wire
        sampler = "temperature, top_p, max_tokens, seed"
        if wire.sends == "all":
            sampler += ", top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty"
        notes = [
            f"the server was sent {sampler}; its own defaults apply to every other setting",
            "whether the server honours a request's seed cannot be known from here",
        ]
        if wire.api == "chat":
            notes.append(
                "the server rendered the messages with its own template; it counted the prompt's "
                f"tokens otherwise than we do for {self.counted_otherwise} replies"
            )
        return {
            "engine": "openai",
            "url": self.url,
            "model": self.listed,
            "server": self.server,
            "answered_as": sorted(self.seen),
            "api": wire.api,
            "sends": wire.sends,
            **({"prompt_as": wire.prompt_as} if wire.api == "completions" else {}),
            "stop": [wire.end_text] if wire.sends == "openai" else list(wire.end_ids),
            "device": "server",
            "dtype": None,
            "row_seeds": "sent",
            "notes": notes,
        }


def _seconds(header: str | None) -> float:
    """Seconds of a Retry-After header; a date in it counts as none."""
    try:
        return float(header or 0)
    except ValueError:
        return 0.0
