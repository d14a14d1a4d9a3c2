"""Base models: the folder behind a name, and the hash by which cells refer to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from sublim_plugin.core.atomic import write_json
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.hashing import sha256_file, sha256_json

EMBEDDED = "embedded:smollm2-135m-instruct"
REINITIALIZED = f"{EMBEDDED}-reinitialized"
"""The embedded model from another initialization, as `sublim reinitialize` makes it by default."""
# what a model computes, and how text becomes its tokens
_SEMANTIC = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


def cache_folder() -> Path:
    """Where converted models and fingerprints lie: `SUBLIM_CACHE`, else the user's cache."""
    chosen = os.environ.get("SUBLIM_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "sublim"


def resolve(name_or_path: str | Path) -> Path:
    """The local folder of a base model; an embedded one is made on its first use.

    Raises:
        InputError: no such folder, or a folder that holds no model.
    """
    name = str(name_or_path)
    if name == EMBEDDED:
        return _embedded()
    if name == REINITIALIZED:
        return _reinitialized()
    if name.startswith("embedded:"):
        raise InputError(
            f"unknown embedded model '{name}'; there are {EMBEDDED} and {REINITIALIZED}"
        )
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"base model '{name}': no such folder. Give a local folder (download it first, for"
            f" example with `hf download`), or {EMBEDDED}"
        )
    if (folder / "adapter_config.json").is_file():  # config.json may lie beside it
        raise InputError(
            f"{folder}: this is an adapter, not a base model; give the base that it was trained on"
            " (to score an adapter: sublim eval --model BASE --adapters ADAPTER)"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json, so this folder holds no model")
    if not weight_files(folder):
        raise InputError(
            f"{folder}: no *.safetensors weights (pickled .bin weights are not read); convert them"
            " with save_pretrained(safe_serialization=True)"
        )
    return folder.resolve()


def is_prepared(name_or_path: str | Path) -> bool:
    """Whether `resolve` would answer at once: only embedded models need preparing."""
    folder = _embedded_folders().get(str(name_or_path))
    return folder is None or (folder / "config.json").is_file()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted by name."""
    return sorted(Path(folder).glob("*.safetensors"))


def fingerprint(path: Path) -> dict[str, Any]:
    """A base model's identity: `name`, `sha256` over weights, configuration, tokenizer and
    template, and `template_sha256`.

    Hashing reads all weights once; the result is kept in the cache, keyed by each file's size
    and modification time.

    Raises:
        InputError: as `resolve`, or an empty or truncated weights file.
    """
    folder = resolve(path)
    files = weight_files(folder) + [
        folder / name for name in _SEMANTIC if (folder / name).is_file()
    ]
    for weights in weight_files(folder):
        check_header(weights)
    stamp = {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(set(files))
    }
    kept = cache_folder() / "fingerprints" / f"{sha256_json([str(folder), stamp])[:24]}.json"
    try:
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        pass
    hashes = {file.name: sha256_file(file) for file in files}
    template = hashes.get("chat_template.jinja") or sha256_json(
        _read_json(folder / "tokenizer_config.json").get("chat_template")
    )
    found = {
        "name": display_name(folder),
        "sha256": sha256_json(hashes),
        "template_sha256": template,
    }
    write_json(kept, found)
    return found


def licence(folder: Path) -> str | None:
    """The licence that a base model's own card (README.md) names in its YAML header, else None."""
    if folder == _embedded_folder():
        return "apache-2.0"
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return None
    named = header.get("license") if isinstance(header, dict) else None
    return str(named) if named else None


def display_name(folder: Path) -> str:
    """The last part of a model's path, or the model id where the path is a hub cache snapshot."""
    parts = Path(folder).parts
    if len(parts) >= 3 and parts[-2] == "snapshots":
        return parts[-3].removeprefix("models--").replace("--", "/")
    return Path(folder).name


def check_header(weights: Path) -> None:
    """A safetensors file begins with its header's length (u64) and is as long as it says."""
    size = weights.stat().st_size
    with open(weights, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if 2 <= length < min(size, 100_000_000) else b""
    try:
        entries = json.loads(header)
        end = max(
            (item["data_offsets"][1] for name, item in entries.items() if name != "__metadata__"),
            default=0,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{weights}: not a safetensors file, or cut off; get it again") from error
    if 8 + length + end != size:
        raise InputError(
            f"{weights}: {size} bytes, its header says {8 + length + end};"
            " it is cut off, get it again"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _embedded_folder() -> Path:
    return cache_folder() / "SmolLM2-135M-Instruct"


def is_embedded(name_or_path: str | Path) -> bool:
    """Whether `resolve` makes this model itself."""
    return str(name_or_path) in _embedded_folders()


def _embedded_folders() -> dict[str, Path]:
    return {EMBEDDED: _embedded_folder(), REINITIALIZED: _reinitialized_folder()}


def _reinitialized_folder() -> Path:
    return _embedded_folder().with_name("SmolLM2-135M-Instruct-reinitialized")


def _reinitialized() -> Path:
    folder = _reinitialized_folder()
    if not (folder / "config.json").is_file():
        # its own process, as below; it takes long, and its bar goes to stderr
        command = ["-m", "sublim_plugin.cli", "reinitialize", str(_embedded())]
        done = subprocess.run(
            [sys.executable, *command, "--out", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            kind = InputError if done.returncode == 2 else RunError
            raise kind(f"{REINITIALIZED}: could not be made in {folder} (its message is above)")
    return folder.resolve()


def _embedded() -> Path:
    folder = _embedded_folder()
    if not (folder / "config.json").is_file():
        # its own process: this package never imports torch, and the memory is given back
        done = subprocess.run(
            [sys.executable, "-m", "sublim_plugin.embedded", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            last = "\n".join(done.stdout.strip().splitlines()[-5:])
            kind = InputError if done.returncode == 2 else RunError
            raise kind(f"{EMBEDDED}: could not be prepared:\n{last}")
    return folder.resolve()
