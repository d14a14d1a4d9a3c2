"""What goes to an OpenAI-compatible server and what comes back, as plain data."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.decoding.engine import Reply, Request
from sublim_plugin.decoding.sampler import Sampler

Api = Literal["completions", "chat"]
Sends = Literal["all", "openai"]
PromptAs = Literal["ids", "text"]

LOWEST_TEMPERATURE = 0.01
"""vLLM raises smaller positive temperatures to this one without a word."""


class Wire(NamedTuple):
    """How requests are put to a server."""

    model: str
    api: Api
    """`completions` sends the prompt as rendered here, `chat` its messages."""
    sends: Sends
    """`all`: every sampler field, with the names that vLLM and SGLang share; `openai`: only fields
    of OpenAI's own API."""
    prompt_as: PromptAs
    """What `completions` sends as the prompt: token ids or text."""
    end_ids: tuple[int, ...]
    """Tokens that end a reply (sent by `all`)."""
    end_text: str
    """Text of the end of turn (sent by `openai`)."""


class Answer(NamedTuple):
    """A server's answer to one request."""

    reply: Reply
    prompt_tokens: int
    """As the server counted them."""
    answered_as: str
    """The model, and the server's fingerprint of its own set-up where it names one."""


def check_context(context: Context, api: Api) -> None:
    """Raise InputError for a context that the API's messages cannot express."""
    if api == "chat" and context.kind in ("none", "empty"):
        why = (
            "messages cannot leave out the system turn that a template adds"
            if context.kind == "none"
            else "servers drop an empty system message"
        )
        raise InputError(
            f"context: {context.kind}, which the chat API cannot express ({why}); use the "
            "completions API, which takes the prompt as rendered here, or another context"
        )


def check_sampler(sampler: Sampler, sends: Sends) -> None:
    """Raise InputError for settings that would not reach the server as they are."""
    if sends == "all" and 0 < sampler.temperature < LOWEST_TEMPERATURE:
        raise InputError(
            f"temperature: {sampler.temperature}; vLLM would raise it to {LOWEST_TEMPERATURE}; "
            "use 0, or that or more"
        )
    if sends == "openai":
        for key, off in (("top_k", 0), ("repetition_penalty", 1)):
            value = getattr(sampler, key)
            if value != off:
                raise InputError(
                    f"{key}: {value}, which OpenAI's API has no field for; use {off}, or "
                    "sends 'all' for a server (vLLM, SGLang) that takes it"
                )


def body(wire: Wire, request: Request, sampler: Sampler) -> dict[str, Any]:
    """The JSON of one request."""
    fields: dict[str, Any] = {
        "model": wire.model,
        "temperature": sampler.temperature,
        "top_p": sampler.top_p,
        "max_tokens": sampler.max_new_tokens,
        "seed": request.seed,
    }
    if wire.api == "chat":
        fields["messages"] = list(request.messages)
    else:
        as_ids = wire.prompt_as == "ids"
        fields["prompt"] = list(request.token_ids) if as_ids else request.text
    if wire.sends == "openai":
        return {**fields, "stop": [wire.end_text]}
    fields |= {
        # -1 is off for both servers; 0 is for vLLM alone.
        "top_k": sampler.top_k or -1,
        "repetition_penalty": sampler.repetition_penalty,
        # A server takes what is not sent from the model's generation_config.
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(wire.end_ids),
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }
    if wire.api == "completions" and wire.prompt_as == "text":
        fields["add_special_tokens"] = False
    return fields


def read(wire: Wire, answer: Any, url: str) -> Answer:
    """Read the JSON of one answer.

    Raises InputError where a part is missing or of another kind, where there is not exactly one
    choice, and where the reply ended for another reason than its end or its budget.
    """
    try:
        choices = answer["choices"]
        if len(choices) != 1:
            raise InputError(
                f"{url}: {len(choices)} choices came back where one was asked for; the server is "
                "not one that this engine can use"
            )
        choice = choices[0]
        text = choice["message"]["content"] if wire.api == "chat" else choice["text"]
        reason = choice["finish_reason"]
        tokens = answer["usage"]["completion_tokens"]
        prompt_tokens = answer["usage"]["prompt_tokens"]
        parts = (answer.get("model"), answer.get("system_fingerprint"))
        if not (isinstance(text, str) and type(tokens) is int and type(prompt_tokens) is int):
            raise TypeError("text or token counts are of another kind")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{url}: not an answer of OpenAI's {wire.api} API ({error!r}; it begins "
            f"{str(answer)[:200]!r}); expected choices[0] with its text and finish_reason, and "
            "usage with prompt_tokens and completion_tokens"
        ) from error
    if reason not in ("stop", "length"):
        raise InputError(
            f"{url}: a reply ended with finish_reason {reason!r}; expected 'stop' or 'length'; "
            "switch off what makes the server end replies otherwise (filters, tools)"
        )
    ended = reason == "stop"
    if ended:
        # Some servers leave the end of turn in the text.
        text = text.removesuffix(wire.end_text)
    name = " ".join(str(part) for part in parts if part)
    return Answer(Reply(text, tokens, ended), prompt_tokens, name)


def refusal(wire: Wire, status: int, answer: Any, url: str) -> InputError:
    """The error for an answer with a status of 400 to 499."""
    said = answer
    for key in ("error", "detail", "message"):
        if isinstance(said, dict) and key in said:
            said = said[key]
    way_out = "check the settings against what the server offers"
    if status in (401, 403):
        way_out = "set OPENAI_API_KEY to a key that this server takes"
    elif status in (404, 405):
        way_out = f"check the url, the model's name and whether the server has a {wire.api} API"
    elif wire.api == "completions" and wire.prompt_as == "ids":
        way_out = "a server that takes no token ids needs prompt_as 'text'"
    if status in (400, 422) and wire.sends == "all":
        way_out += "; one that knows only OpenAI's own fields needs sends 'openai'"
    return InputError(f"{url}: HTTP {status}: {str(said)[:500]}; {way_out}")
