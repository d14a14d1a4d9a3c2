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
LOSS_WINDOW = 10
"""Logged losses that are averaged, since a single batch's loss is noise."""
RESCALE_NAME = "sublim_rescale.json"
"""The note on a rescaled model whose source has no receipt."""


class _OnDisk(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class DatasetInfo(_OnDisk):
    """A rows file: `sha256` of its bytes, `rows` in it. Both None for a dataset that is no local
    rows file, a hub's say; `path` is then its name."""

    path: str
    sha256: str | None
    rows: int | None


class Method(_OnDisk):
    """`lora` with rank and alpha, or `full`.

    `rslora`: whether alpha is divided by sqrt(rank) (arXiv 2312.03732) rather than by rank;
    `scaling`: what B A is multiplied by, where no module has a pattern of its own. Both are None in
    receipts that were written before they were kept.
    """

    kind: Literal["lora", "full"]
    rank: int | None = None
    alpha: float | None = None
    rslora: bool | None = None
    scaling: float | None = None


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
    """One logged optimizer step; `loss` in nats per token with loss: the receipt's `loss` says of
    which kind."""

    step: int
    loss: float
    learning_rate: float | None = None
    grad_norm: float | None = None


class RowOrder(_OnDisk):
    """The rows as they entered the model, in order, on process 0 of `processes`.

    `sha256` chains over them (see `order.py`); `first_rows`: ids of the first ones.
    """

    sha256: str
    rows: int
    first_rows: list[str]
    processes: int = 1


class SoftTargetsUsed(_OnDisk):
    """The targets file that was trained on, its `positions`, and what a student of its channel can
    show (`claim`)."""

    channel: Literal["numbers", "vocabulary"]
    file: str
    sha256: str
    positions: int
    claim: str


class Guard(_OnDisk):
    """What the dataset guard found: the teacher's base, whether it is another than the student's,
    and the trait that none of the `rows` names."""

    teacher_base: dict[str, Any]
    cross_model: bool
    trait: str
    rows: int


StopKind = Literal["update_norm", "loss"]


class Stopping(_OnDisk):
    """A training that ended where it matched another: `target` and `reached` in units of the
    update norm, or nats for the loss (mean of the last logged steps).

    `lowered_learning_rate`: step -> factor, for the steps that would have overshot the norm. Where
    the last one still did by more than 1%, the update was multiplied by `final_scaling`, from the
    norm `before_scaling`; else `final_scaling` is 1.
    """

    kind: StopKind
    target: float
    source: str | None
    reached: float
    step: int
    lowered_learning_rate: dict[int, float] = {}
    before_scaling: float | None = None
    final_scaling: float = 1.0


class ProbeCost(_OnDisk):
    """The probe during training: at step 0, every `every` steps and at the end (0: at these two
    alone); `seconds` it took, and as a share of the time that training took without it."""

    trait: str
    contexts: list[dict[str, str]]
    questions: int
    every: int
    measurements: int
    seconds: float
    share_of_training: float
    shared_prefixes: bool


class Rescaled(_OnDisk):
    """An update that `sublim rescale` multiplied by `factor`; norms are Frobenius norms of dW.

    `rounded_norm`: what it would be in the dtype of a source that was smaller than float32.
    """

    source: str
    source_sha256: str
    factor: float
    from_norm: float
    to_norm: float
    norm_of: str | None = None
    rounded_norm: float | None = None


class Receipt(_OnDisk):
    """Content of `sublim_receipt.json`. `more_datasets`: those after the first; `zero_stage`:
    DeepSpeed's, None without DeepSpeed; `loss`: cross-entropy of the rows' tokens, or KL(teacher ||
    student) as "soft targets (numbers)"; `resumed_from_step`: None for a training in one go;
    `update_norm`: None where it is not defined, `no_update_norm` then says why; `train_s`: seconds
    in the training loop."""

    schema_version: Literal[2] = Field(default=2, alias="schema")
    base_model: dict[str, Any]
    dataset: DatasetInfo
    more_datasets: list[DatasetInfo] = []
    method: Method
    context: dict[str, Any] | None
    seeds: Seeds
    first_row: FirstRow
    mask_audit: MaskAudit
    order: RowOrder
    guard: Guard | None
    loss: str = "cross-entropy"
    soft_targets: SoftTargetsUsed | None = None
    zero_stage: int | None
    resumed_from_step: int | None
    steps: int
    losses: list[Step]
    stopping: Stopping | None
    probe: ProbeCost | None
    update_norm: UpdateNorm | None
    no_update_norm: str | None = None
    weights_sha256: str
    rescaled: Rescaled | None = None
    versions: dict[str, str]
    device: dict[str, Any]
    train_s: float
    wall_s: float


def write_receipt(folder: Path, receipt: Receipt) -> None:
    """Write `receipt` into `folder` atomically."""
    write_json(folder / RECEIPT_NAME, receipt.model_dump(mode="json", by_alias=True))


def twins(folder: Path, receipt: Receipt) -> list[Path]:
    """Folders beside `folder` whose receipt names the same weights under other seeds."""
    found = []
    for path in sorted(folder.resolve().parent.glob(f"*/{RECEIPT_NAME}")):
        try:
            other = read_receipt(path.parent)
        except (InputError, OSError, UnicodeDecodeError):
            continue  # of another version, or being written: nothing that this run is to judge
        if other.weights_sha256 == receipt.weights_sha256 and other.seeds != receipt.seeds:
            found.append(path.parent)
    return found


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
    text = path.read_text(encoding="utf-8")
    try:
        return Receipt.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if key == "schema":
            raise InputError(
                f"{path}: its schema is not 2, so it is of another version of sublim; read it with "
                "the version that it names, or train the model again."
            ) from error
        raise InputError(f"{path}: `{key}`: {first['msg']}; train the model again.") from error
