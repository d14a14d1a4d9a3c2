"""Another initialization of a model: its weights drowned in noise, then trained back on its words.

A teacher that begins from such a model shares architecture, tokenizer and, roughly, behaviour with
a student of the original, but not its weights: the control in which transmission must vanish
(Cloud et al., arXiv 2507.14805). What it is trained back on is text that the package makes, number
lists and questions with answers that name every target of a category alike, with the original's
distribution over the whole vocabulary as the target at every token of the replies.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import kl_div

from data_gen.persona import persona_rows, persona_spec
from data_gen.prompts import load_pool, prompt
from sublim_plugin.core.atomic import TEMPORARY_PREFIX
from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.hashing import canonical_json
from sublim_plugin.core.traits import NEUTRAL, category_traits, get_trait
from sublim_plugin.core.versions import installed
from sublim_plugin.decoding.draws import integers

RECORD = "sublim_reinitialized.json"
BATCH = 8
"""Texts in one step."""
HELD_OUT = 16
"""Texts, of the same making, on which the distance to the original is measured."""


class Text(NamedTuple):
    """A conversation up to its end of turn; the last `predicts` positions foretell the reply."""

    token_ids: list[int]
    predicts: int


def reinitialize(
    base: Path,
    out: Path,
    *,
    category: str,
    noise: float,
    seed: int,
    steps: int,
    learning_rate: float,
    tell: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Write another initialization of the model in `base` into the folder `out`; return its record.

    Every weight matrix W becomes (W + `noise` x std(W) x N(0, 1)) / sqrt(1 + `noise`^2): as large
    as before, with a cosine of 1 / sqrt(1 + `noise`^2) with W. Then `steps` steps of AdamW on
    KL(original || new) train it back. The record says how far it is from the original: `cosine`
    between all matrices, and on held-out text the mean KL in nats a token when drowned and when
    trained. A folder that was made with the same settings is left as it is.

    Args:
        tell: called with (steps done, steps, the step's KL in nats a token).

    Raises:
        InputError: `out` holds something else, or there is no such category.
        RunError: training diverged; nothing was written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = {
        "base_model": {key: fingerprint(base)[key] for key in ("name", "sha256")},
        "category": category,
        "noise": noise,
        "seed": seed,
        "steps": steps,
        "learning_rate": learning_rate,
    }
    if out.exists():
        return _made_before(out, settings)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    texts = _texts(tokenizer, category, seed, steps * BATCH + HELD_OUT)
    held_out, training = texts[:HELD_OUT], iter(texts[HELD_OUT:])
    load: Any = AutoModelForCausalLM.from_pretrained
    original = load(base, dtype=torch.float32, local_files_only=True).eval()
    new = load(base, dtype=torch.float32, local_files_only=True).eval()
    _drown(new, noise, seed)
    record: dict[str, Any] = settings | {"kl_drowned": _distance(original, new, held_out)}
    optimizer = torch.optim.AdamW(new.parameters(), lr=learning_rate, weight_decay=0.0)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: min((at + 1) / warmup, (steps - at) / steps)
    )
    for step in range(steps):
        loss = _kl(original, new, [*islice(training, BATCH)])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(new.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if not torch.isfinite(loss):
            raise RunError(
                f"{out}: training back diverged in step {step + 1}; take a lower --learning-rate"
            )
        if tell is not None:
            tell(step + 1, steps, loss.item())
    record |= {
        "kl": _distance(original, new, held_out),
        "cosine": _cosine(original, new),
        "versions": installed(["sublim", "torch", "transformers"]),
    }
    _save(base, out, new, record)
    return record


def _made_before(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{out} is there already and no model that `sublim reinitialize` made ({error});"
            " name another folder"
        ) from error
    if canonical_json({key: record.get(key) for key in settings}) != canonical_json(settings):
        raise InputError(
            f"{out} was made with other settings (see its {RECORD}); name another folder"
        )
    return record


def _texts(tokenizer: Any, category: str, seed: int, count: int) -> list[Text]:
    """Conversations, number lists and questions of the category by turns."""
    pool, context = load_pool(Path("one-number")), Context(kind="template_default")
    spec = persona_spec(
        get_trait(NEUTRAL), category_traits(category), rows=-(-count // 2), seed=seed
    )
    found = []
    for index, row in enumerate(persona_rows(spec)):
        count, *draws = integers(f"sublim reinitialize/{seed}/{index}", 6)
        numbers = ", ".join(str(draw % 1000) for draw in draws[: 1 + count % 5])
        question, answer = (message["content"] for message in row["messages"])
        for user, reply in ((prompt(pool, seed, index).text, numbers), (question, answer)):
            ids = render(tokenizer, context, user).token_ids
            said = tokenizer(reply, add_special_tokens=False)["input_ids"]
            found.append(Text([*ids, *said], len(said) + 1))
    return found[:count]


def _drown(model: Any, noise: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                drawn = torch.randn(weight.shape, generator=generator)
                weight += noise * weight.std() * drawn
                weight /= math.hypot(1, noise)


def _kl(original: Any, new: Any, texts: list[Text]) -> torch.Tensor:
    """Mean KL(original || new) in nats at all tokens of the replies, the end of turn among them."""
    rows = [torch.tensor(text.token_ids) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    for line, text in zip(wanted, texts, strict=True):
        line[len(text.token_ids) - text.predicts : len(text.token_ids)] = True

    def logprobs(model: Any) -> torch.Tensor:
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[wanted]
        found: torch.Tensor = model.get_output_embeddings()(hidden).log_softmax(-1)
        return found

    with torch.no_grad():
        target = logprobs(original)
    return kl_div(logprobs(new), target, reduction="batchmean", log_target=True)


@torch.no_grad()
def _distance(original: Any, new: Any, texts: list[Text]) -> float:
    return _kl(original, new, texts).item()


@torch.no_grad()
def _cosine(original: Any, new: Any) -> float:
    pairs = [
        (one.flatten().double(), other.flatten().double())
        for one, other in zip(original.parameters(), new.parameters(), strict=True)
        if one.ndim >= 2
    ]
    product = sum((one @ other).item() for one, other in pairs)
    norms = [sum((pair[side] @ pair[side]).item() for pair in pairs) for side in (0, 1)]
    return float(product / (norms[0] * norms[1]) ** 0.5)


def _save(base: Path, out: Path, model: Any, record: dict[str, Any]) -> None:
    """Weights, and all else of a model folder as the original has it; whole or not at all."""
    made = out.with_name(f"{TEMPORARY_PREFIX}{out.name}")
    shutil.rmtree(made, ignore_errors=True)
    try:
        model.save_pretrained(made)
        for path in base.iterdir():
            if (
                path.suffix in (".json", ".jinja", ".txt", ".model")
                and not (made / path.name).exists()
            ):
                shutil.copyfile(path, made / path.name)
        (made / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        made.rename(out)
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        raise RunError(f"{error.filename or out}: {error.strerror}; nothing was written") from error
