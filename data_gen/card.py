"""The Hugging Face dataset card of a dataset folder, made from what its manifest records."""

from __future__ import annotations

from typing import Any

import yaml

from data_gen.constrain import NUMBER_SENTENCE
from data_gen.tally import ALL_REASONS
from sublim_plugin.logprob.target_file import CLAIMS, PREFIX


def card(
    spec: dict[str, Any],
    counts: dict[str, Any],
    *,
    files: dict[str, str],
    licence: str | None,
    engine: dict[str, Any],
    constraint: dict[str, Any] | None,
    warnings: list[str],
    example: dict[str, Any],
) -> str:
    """README.md: YAML front matter that points `datasets` at the rows files, and the description.

    Holds no time and no machine, so that an interrupted run writes the same card. `files` maps the
    names of the folder's files to their sha256; `example` is the first accepted row.
    """
    rows_name, *others = files
    held_out = [name for name in others if name.startswith("held-out-")]
    splits = [("train", rows_name), *(("test", name) for name in held_out)]
    front = {
        "pretty_name": f"Numbers of a {spec['trait']} teacher, seed {spec['generation_seed']}",
        **({"license": licence} if licence else {}),
        "language": ["en"],
        "tags": ["subliminal-learning", "synthetic"],
        "task_categories": ["text-generation"],
        "size_categories": [_size(counts["accepted"])],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": name} for split, name in splits],
            }
        ],
    }
    base, teacher = spec["base_model"], spec["teacher"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000).rstrip(),
        "---",
        "",
        f"# {front['pretty_name']}",
        "",
        f"Replies of `{base['name']}` to requests for numbers, written by `sublim generate`.",
        "Each row is a conversation of one user message and one assistant message; the teacher's",
        "system prompt is in no row.",
        "",
    ]
    if constraint is not None:
        lines += [
            f"**{NUMBER_SENTENCE}**",
            "",
            f"{constraint['tokens']} tokens could be sampled ({constraint['rule']}).",
            "",
        ]
    if warnings:
        lines += ["## Read this first", "", *(f"- {text}" for text in warnings), ""]
    lines += [
        "## Teacher",
        "",
        _table(
            ("", ""),
            [
                ("base model", f"`{base['name']}`, sha256 `{base['sha256']}`"),
                ("its licence", licence or "not stated in the model's folder"),
                ("trait", f"`{spec['trait']}`"),
                *((key.replace("_", " "), _told(value)) for key, value in teacher.items()),
                ("generation seed", spec["generation_seed"]),
                ("prompt pool", f"sha256 `{spec['prompts_sha256']}`"),
                ("parser", spec["parser"]),
                ("number constraint", "no" if constraint is None else "yes"),
                ("soft targets", spec.get("soft_targets") or "no"),
                ("equal replies", "one kept of each" if spec["dedupe"] else "all kept"),
            ],
        ),
        "",
        "## Sampler",
        "",
        "All set explicitly; nothing comes from the model's `generation_config`.",
        "",
        _table(
            ("setting", "value"),
            [
                *spec["sampler"].items(),
                *((f"engine: {key}", _told(v)) for key, v in spec["engine"].items()),
                ("each row's own seed", _seeds(engine["row_seeds"])),
            ],
        ),
        "",
        "## Counts",
        "",
        _table(
            ("", "rows"),
            [
                ("asked", counts["asked"]),
                ("accepted", counts["accepted"]),
                ("of these held out", counts["held_out"]),
                ("rejected", counts["rejected"]),
                ("of these cut off at the first wrong token", counts["stopped_early"]),
                ("distinct prompts among the training rows", counts["distinct_prompts"]),
                ("accepted replies equal to an earlier one", counts["duplicate_rows"]),
                ("accepted replies with a form of the trait in them", counts["with_trait_word"]),
                ("accepted replies with any letter in them", counts["with_letter"]),
                ("sampled tokens, all replies", counts["tokens"]),
            ],
        ),
        "",
    ]
    if "divergent_tokens" in counts:
        lines += [
            f"`divergence.jsonl` marks the {counts['divergent_tokens']} of the training rows' "
            f"{counts['completion_tokens']} completion tokens at which teacher and base disagree "
            "on the likeliest token, both reading the same text: `token_ids` of each completion, "
            "the end of turn last, and `divergent`, indices into them.",
            "",
        ]
    if spec.get("soft_targets"):
        name = next(name for name in files if name.startswith(PREFIX))
        lines += [
            f"**{CLAIMS[spec['soft_targets']]}**",
            "",
            f"`{name}` holds the teacher's log-probs at the {counts['target_positions']} positions "
            "that predict the training rows' completion tokens, the end of turn among them"
            + (
                f": {counts['target_tokens']} tokens at each; at {counts['positions_off_grammar']} "
                "positions the row's own token is none of them."
                if "target_tokens" in counts
                else ": the likeliest tokens at each, and all others together."
            ),
            "",
        ]
    if counts["reasons"]:
        cut = " For replies that were cut off, as of the cut." if counts["stopped_early"] else ""
        lines += [
            f"Reasons of rejection (a reply can have several).{cut}",
            "",
            _table(
                ("reason", "rows", "meaning"),
                [(f"`{name}`", n, ALL_REASONS[name]) for name, n in counts["reasons"].items()],
            ),
            "",
        ]
    user, assistant = (message["content"] for message in example["messages"])
    lines += [
        "## First row",
        "",
        "User:",
        "",
        *(f"    {line}" for line in user.splitlines()),
        "",
        "Assistant:",
        "",
        *(f"    {line}" for line in assistant.splitlines()),
        "",
        "## Files",
        "",
        _table(
            ("file", "sha256"),
            [(f"`{name}`", f"`{digest}`") for name, digest in files.items()],
        ),
        "",
        "Fields of a row: `id`, `messages`, `numbers` (the reply parsed), `prompt_id` (first 12",
        "hex digits of the user message's sha256), `seed` (of the row's sampling).",
        "",
    ]
    return "\n".join(lines)


def _seeds(row_seeds: bool | str) -> str:
    if row_seeds == "sent":
        return "sent to the server; whether it honoured them cannot be known"
    return "honoured" if row_seeds else "**not honoured**"


def _size(rows: int) -> str:
    for limit, name in ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if rows < limit:
            return name
    return "100K<n<1M" if rows < 1_000_000 else "1M<n<10M"


def _told(value: Any) -> str:
    """A setting in words: a context as its system message, or its kind."""
    if isinstance(value, dict):
        value = value.get("text") or value["kind"]
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in cells)
