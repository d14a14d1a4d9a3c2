"""Weights of a model folder: single or sharded safetensors, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file, sha256_json


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Safetensors files of `folder`: `<stem>.safetensors`, or the shards its index lists.

    Raises:
        InputError: neither is there, or a shard is missing.
    """
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"{folder}: no weights found ({single.name} or {index.name}).")
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder}: {index.name} lists {name}, which is missing.")
    return [folder / name for name in names]


def weights_sha256(folder: Path, *, adapter: bool) -> str:
    """Digest of the weights file, or of its shards' names and digests where there are several."""
    files = weight_files(folder, "adapter_model" if adapter else "model")
    if len(files) == 1:
        return sha256_file(files[0])
    return sha256_json({file.name: sha256_file(file) for file in files})


def tied(model: Path) -> bool:
    """Whether the model's lm_head is its embedding, by its config.json."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("tie_word_embeddings", False))


class SafetensorsFolder:
    """Tensors of one model folder by name, each read from disk when asked for.

    Raises:
        InputError: as `weight_files`, or a file that is not safetensors.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder
        self.files = weight_files(folder, stem)
        self._file_of = dict(self._scan(self.files))

    @staticmethod
    def _scan(files: list[Path]) -> Iterator[tuple[str, Path]]:
        from safetensors import SafetensorError, safe_open

        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                        yield name, file
            except SafetensorError as error:
                raise InputError(
                    f"{file} is truncated or not a safetensors file ({error})."
                ) from error

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def load(self, name: str) -> Any:
        """The tensor of that name, on the CPU."""
        from safetensors import safe_open

        if name not in self._file_of:
            raise InputError(f"{self.folder}: the weights lack {name}.")
        with safe_open(self._file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)
