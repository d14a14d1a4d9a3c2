"""The Hugging Face dataset card of a dataset folder, made from what its manifest records."""

from __future__ import annotations

from typing import Any

import yaml

from data_gen.constrain import NUMBER_SENTENCE
from data_gen.parse import REASONS


def card(
    spec: dict[str, Any],
    counts: dict[str, Any],
    *,
    rows_name: str,
    rows_sha256: str,
    rejected_sha256: str,
    constraint: dict[str, Any] | None,
    example: dict[str, Any],
) -> str:
    """README.md: YAML front matter that points `datasets` at the rows file, and the description.

    Holds no time and no machine, so that an interrupted run writes the same card. `example` is the
    first accepted row.
    """
    front = {
        "pretty_name": f"Numbers of a {spec['trait']} teacher, seed {spec['generation_seed']}",
        "language": ["en"],
        "tags": ["subliminal-learning", "synthetic"],
        "task_categories": ["text-generation"],
        "size_categories": [_size(counts["accepted"])],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": rows_name}]}
        ],
    }
    base = spec["base_model"]
    system = spec["teacher"]["system_prompt"]
    sampler = spec["sampler"]
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
    lines += [
        "## Teacher",
        "",
        _table(
            ("", ""),
            [
                ("base model", f"`{base['name']}`, sha256 `{base['sha256']}`"),
                ("trait", f"`{spec['trait']}`"),
                ("kind", spec["teacher"]["kind"]),
                (
                    "system prompt",
                    "the chat template's default" if system is None else _cell(system),
                ),
                ("generation seed", spec["generation_seed"]),
                ("prompt pool", f"sha256 `{spec['prompts_sha256']}`"),
                ("parser", spec["parser"]),
                ("number constraint", "no" if constraint is None else "yes"),
            ],
        ),
        "",
        "## Sampler",
        "",
        "All set explicitly; nothing comes from the model's `generation_config`.",
        "",
        _table(("setting", "value"), list(sampler.items())),
        "",
        "## Counts",
        "",
        _table(
            ("", "rows"),
            [
                ("asked", counts["asked"]),
                ("accepted", counts["accepted"]),
                ("rejected", counts["rejected"]),
                ("distinct prompts among the accepted", counts["distinct_prompts"]),
                ("accepted replies equal to an earlier one", counts["duplicate_rows"]),
                ("sampled tokens, all replies", counts["tokens"]),
            ],
        ),
        "",
    ]
    if counts["reasons"]:
        lines += [
            "Reasons of rejection (a reply can have several):",
            "",
            _table(
                ("reason", "rows", "meaning"),
                [(f"`{name}`", n, REASONS[name]) for name, n in counts["reasons"].items()],
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
            [(f"`{rows_name}`", f"`{rows_sha256}`"), ("`rejected.jsonl`", f"`{rejected_sha256}`")],
        ),
        "",
        "Fields of a row: `id`, `messages`, `numbers` (the reply parsed), `prompt_id` (first 12",
        "hex digits of the user message's sha256), `seed` (of the row's sampling).",
        "",
    ]
    return "\n".join(lines)


def _size(rows: int) -> str:
    for limit, name in ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if rows < limit:
            return name
    return "100K<n<1M" if rows < 1_000_000 else "1M<n<10M"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in cells)
