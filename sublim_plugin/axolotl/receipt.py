"""The receipt: what a training run really did, written beside its weights.

axolotl logs a plugin that cannot be imported and trains on without it, so a missing receipt is
how the rest of `sublim` notices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sublim_plugin.axolotl.norms import UpdateNorm
from sublim_plugin.core.atomic import write_json
from sublim_plugin.core.errors import InputError

RECEIPT_NAME = "sublim_receipt.json"


class _OnDisk(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class DatasetInfo(_OnDisk):
    """The rows file: `sha256` of its bytes, `rows` in it. Empty for a dataset of a hub."""

    path: str
    sha256: str | None
    rows: int | None


class Method(_OnDisk):
    """`lora` with rank and alpha, or `full`."""

    kind: Literal["lora", "full"]
    rank: int | None = None
    alpha: float | None = None


class Seeds(_OnDisk):
    """`seed`: LoRA initialization and dropout; `data_seed`: order of the rows (None: `seed`)."""

    seed: int
    data_seed: int | None


class FirstRow(_OnDisk):
    """First row as tokenized for training; `loss_text` decodes the tokens with loss.

    `sha256` is that of `text`.
    """

    text: str
    token_ids: list[int]
    loss_text: str
    sha256: str


class MaskAudit(_OnDisk):
    """Counts over the rows trained on; `loss_share` is loss_tokens / tokens.

    `compared_rows`: rows whose tokens and mask were checked one by one against a rendering of
    the rows file; 0 where the dataset is not such a file.
    """

    rows: int
    tokens: int
    loss_tokens: int
    loss_share: float
    compared_rows: int


class Step(_OnDisk):
    """One logged optimizer step; `loss` in nats per token with loss."""

    step: int
    loss: float
    learning_rate: float | None = None
    grad_norm: float | None = None


class Receipt(_OnDisk):
    """Content of `sublim_receipt.json`. `zero_stage`: DeepSpeed's, None without DeepSpeed."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    base_model: dict[str, Any]
    dataset: DatasetInfo
    method: Method
    context: dict[str, Any] | None
    seeds: Seeds
    first_row: FirstRow
    mask_audit: MaskAudit
    zero_stage: int | None
    steps: int
    losses: list[Step]
    update_norm: UpdateNorm
    weights_sha256: str
    versions: dict[str, str]
    device: dict[str, Any]
    wall_s: float


def write_receipt(folder: Path, receipt: Receipt) -> None:
    """Write `receipt` into `folder` atomically."""
    write_json(folder / RECEIPT_NAME, receipt.model_dump(mode="json", by_alias=True))


def read_receipt(folder: Path) -> Receipt:
    """Receipt of the model in `folder`.

    Raises:
        InputError: it is missing or not a receipt of this version.
    """
    path = folder / RECEIPT_NAME
    if not path.is_file():
        raise InputError(
            f"{path} is missing: the model was not trained with "
            "`plugins: [sublim_plugin.axolotl.SublimPlugin]`, or the plugin could not be imported."
        )
    try:
        return Receipt.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: `{key}`: {first['msg']}; train the model again.") from error
