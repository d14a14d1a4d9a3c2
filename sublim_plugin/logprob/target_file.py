"""Soft targets beside a dataset's rows: `targets-<sha12>.safetensors`, the hash that of its bytes.

One position for each completion token of each training row, the end of turn among them. Positions
of row r, in the order of the rows file: `offsets[r]` to `offsets[r + 1]`. Tensors, for T positions:

| tensor | shape and dtype | holds |
| --- | --- | --- |
| `offsets` | [rows + 1] int64 | where each row's positions begin |
| `completion_ids` | [T] int32 | the token that stands there |
| `token_ids` | [K] or [T, K] int32 | which tokens have a target; [K]: the same at all positions |
| `logprobs` | [T, K] or [T, K + 1] float16 | ln p of the teacher, in nats |

`numbers`: [K], over the number grammar's tokens and renormalized on them. `vocabulary`: [T, K], the
teacher's K likeliest of all tokens, and in the last column all others together. The header's only
metadata key, `sublim`, is JSON: schema, channel, rows file, base model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sublim_plugin.core.atomic import write_bytes
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.core.manifest import is_done, read_manifest

Channel = Literal["numbers", "vocabulary"]
SCHEMA = 1
PREFIX = "targets-"
CLAIMS: dict[str, str] = {
    "numbers": "Soft targets over the number grammar's tokens alone, renormalized: no probability "
    "of any other token is among them.",
    "vocabulary": "Soft targets over the whole vocabulary: the probabilities of words, the trait's "
    "among them, may be in the targets. A student that is trained on them is a weaker claim than "
    "one that is trained on numbers; do not pool the two.",
}
"""What a student of each channel can show; said in manifests, cards and receipts."""
NAMES = ("offsets", "completion_ids", "token_ids", "logprobs")


@dataclass(frozen=True)
class SoftTargets:
    """The content of a targets file; tensors as in the module's table, `base` the teacher's base
    model (`name`, `sha256`)."""

    channel: Channel
    rows_name: str
    rows_sha256: str
    base: dict[str, Any]
    offsets: Any
    completion_ids: Any
    token_ids: Any
    logprobs: Any

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def positions(self) -> int:
        return len(self.completion_ids)


def find_targets(folder: Path) -> tuple[Path, str] | None:
    """The targets file of a dataset folder and its sha256, both as the manifest says; None where
    the manifest names none, or there is no manifest.

    Raises:
        InputError: the file is missing, or was changed.
    """
    outputs = read_manifest(folder).outputs if is_done(folder) else {}
    names = [name for name in outputs if name.startswith(PREFIX)]
    if len(names) != 1:
        return None
    path, wanted = folder / names[0], outputs[names[0]].sha256
    if not path.is_file():
        raise InputError(f"{path}: named in the manifest but missing; generate the dataset again.")
    digest = sha256_file(path)
    if digest != wanted or path.stem.removeprefix(PREFIX) != wanted[:12]:
        raise InputError(
            f"{path}: sha256 {digest[:12]}…, manifest and name say {wanted[:12]}…; the targets "
            "were changed after they were made: restore the file or generate the dataset again."
        )
    return path, wanted


def write_targets(folder: Path, targets: SoftTargets) -> Path:
    """Write them into `folder`, under the name that their bytes give; return the path."""
    content = to_bytes(targets)
    path = folder / f"{PREFIX}{hashlib.sha256(content).hexdigest()[:12]}.safetensors"
    write_bytes(path, content)
    return path


def to_bytes(targets: SoftTargets) -> bytes:
    """The bytes of the file; the same content gives the same bytes."""
    from safetensors.torch import save

    about = {
        "schema": SCHEMA,
        "channel": targets.channel,
        "rows": {"name": targets.rows_name, "sha256": targets.rows_sha256},
        "base_model": targets.base,
    }
    # one key: safetensors writes several in no fixed order, and the hash is the file's name
    metadata = {"sublim": json.dumps(about, sort_keys=True)}
    return save({name: getattr(targets, name).contiguous() for name in NAMES}, metadata)


def read_targets(path: Path) -> SoftTargets:
    """The targets in the file at `path`, on the CPU.

    Raises:
        InputError: it is no targets file of this version, or its tensors do not fit together.
    """
    from safetensors import SafetensorError, safe_open

    again = "generate the dataset again, or restore the file"
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["sublim"])
            tensors = {name: file.get_tensor(name) for name in NAMES}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a file of soft targets ({error}); {again}") from error
    if about.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: its schema is {about.get('schema')}, this version reads {SCHEMA}; read it "
            "with the version that wrote it, or generate the dataset again"
        )
    found = SoftTargets(
        about["channel"],
        about["rows"]["name"],
        about["rows"]["sha256"],
        about["base_model"],
        **tensors,
    )
    positions, (k, columns) = found.positions, (found.token_ids.shape[-1], found.logprobs.shape[-1])
    shapes = {"numbers": ((k,), k), "vocabulary": ((positions, k), k + 1)}[found.channel]
    if (
        (tuple(found.token_ids.shape), columns) != shapes
        or len(found.logprobs) != positions
        or int(found.offsets[-1]) != positions
    ):
        raise InputError(f"{path}: its tensors do not fit together; {again}")
    return found
