"""A dataset's teacher in torch, as its manifest records it, beside the untouched base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_gen.generate import STEERING_FILE
from data_gen.loading import load_base, steering, steering_vectors
from data_gen.teachers import FinetunedTeacher, SteeredTeacher, finetuned
from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.manifest import Manifest
from sublim_plugin.students import attached, load_full


@dataclass(frozen=True)
class Teacher:
    """The teacher's model, loaded, and the context in which it wrote.

    `on` is entered around its forward passes; `trained` says that its weights are not the base's.
    """

    model: Any
    context: Context
    on: Callable[[], Any]
    trained: bool


class NotAtHand(Exception):
    """Why a dataset's teacher cannot be scored."""


def check_base(manifest: Manifest, base: Path) -> None:
    """Refuse a base that the dataset was not made from.

    Raises:
        InputError: their hashes differ.
    """
    recorded = manifest.spec["base_model"]
    found = fingerprint(base)
    if recorded["sha256"] != found["sha256"]:
        raise InputError(
            f"the dataset was made from {recorded['name']} (sha256 {recorded['sha256'][:12]}), "
            f"{base} has {found['sha256'][:12]}; give that model's folder with --model"
        )


def float32_base(path: Path, device: torch.device) -> Any:
    """The base in float32, whatever its own dtype, with an attention that has every derivative."""
    model = load_base(path, device).float()
    model.set_attn_implementation("eager")
    return model


@contextmanager
def teacher_of(
    folder: Path, manifest: Manifest, base: Any, path: Path, given: Path | None
) -> Iterator[Teacher]:
    """The teacher that wrote the dataset in `folder`.

    Args:
        base: the base as `float32_base` loads it from `path`; prompted and steered teachers are it.
        given: folder of a finetuned teacher in place of the recorded one.

    Raises:
        NotAtHand: a server wrote the dataset, or the recorded folder or vectors are not there.
        InputError: `given` is for another kind of teacher, or is not the teacher of the manifest.
    """
    spec = manifest.spec["teacher"]
    kind = spec["kind"]
    if given is not None and kind != "finetuned":
        raise InputError(f"--teacher-from is for finetuned teachers; this dataset's is {kind}")
    engine = manifest.spec["engine"]
    if engine["name"] == "openai":
        raise NotAtHand(f"a server wrote the rows ({engine['model']}); its model is not at hand")
    context = Context.parse(spec["context"])
    if kind == "prompted":
        yield Teacher(base, context, nullcontext, trained=False)
    elif kind == "steered":
        if not (folder / STEERING_FILE).is_file():
            raise NotAtHand(f"{folder / STEERING_FILE}, the teacher's vectors, is not there")
        steered = SteeredTeacher(
            context=context,
            layers=spec["layers"],
            strength=spec["strength"],
            vectors=folder / STEERING_FILE,
        )
        vectors = steering_vectors(base, steered, lambda context: [])
        yield Teacher(
            base, context, lambda: steering(base, vectors, steered.strength), trained=False
        )
    elif kind == "finetuned":
        found = _finetuned(manifest, context, given)
        if found.method == "full":
            model = load_full(found.folder, path, torch.float32, base.device)
        else:
            model = load_base(path, base.device).float()
            with attached(model, found.folder, path) as adapter:
                model = adapter.merge_and_unload(safe_merge=True)
        model.set_attn_implementation("eager")
        yield Teacher(model, context, nullcontext, trained=True)
    else:
        raise NotAtHand(f"teachers of kind {kind} cannot be scored here")


def _finetuned(manifest: Manifest, context: Context, given: Path | None) -> FinetunedTeacher:
    """The finetuned teacher, its files checked against what the manifest records of them."""
    recorded = manifest.inputs["teacher"]
    folder = given or Path(recorded["folder"])
    if not folder.is_dir():
        if given is not None:
            raise InputError(f"--teacher-from {given}: no such folder")
        raise NotAtHand(f"the teacher's folder {folder} is not there; give it with --teacher-from")
    found = finetuned(folder, context)
    hashes = found.hashes()
    if hashes != recorded["sha256"]:
        other = sorted(
            name
            for name in {*hashes, *recorded["sha256"]}
            if hashes.get(name) != recorded["sha256"].get(name)
        )
        raise InputError(
            f"{folder}: {other[0]} is not the file of the teacher that wrote this dataset; give "
            "the teacher's own folder with --teacher-from"
        )
    return found
