"""Canonical JSON and its sha256: what cell ids and content-addressed names are made of."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
)
_PLAIN = frozenset((str, int, bool))


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; `None` entries of mappings are left out.

    Leaving them out makes an absent field and its explicit null hash alike; other defaults
    are made equal by dumping the validated model, where they are always present. A float
    with an integral value is written as that integer, so `1` and `1.0` hash alike.

    Raises:
        ValueError: a NaN or infinity, a non-string key, or a type that JSON does not have.
    """
    return _ENCODER.encode(_canonical(value))


def _canonical(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:  # most values: a study of 20,000 cells hashes a million
        return value
    if kind is dict or isinstance(value, dict):
        found = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"canonical JSON needs string keys, got {key!r}")
            if item is not None:
                found[key] = item if type(item) in _PLAIN else _canonical(item)
        return found
    if isinstance(value, list | tuple):
        return [item if type(item) in _PLAIN else _canonical(item) for item in value]
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"canonical JSON cannot hold a {kind.__name__}: {value!r}")


def sha256_text(text: str) -> str:
    """Hex sha256 of the UTF-8 bytes of `text`."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of `canonical_json(value)`."""
    return sha256_text(canonical_json(value))


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, in constant memory."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
