"""Which checkpoint a training goes on from: complete ones of the same run, written by this plugin.

The hosts take the newest folder by its number, even one whose writer was killed half-way, and load
pickles from it. Here every checkpoint gets `sublim_checkpoint.json` as its last file, with the
sizes of the others and what was trained; without it nothing is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sublim_plugin.axolotl.order import OrderState
from sublim_plugin.axolotl.process_group import first_then_all
from sublim_plugin.axolotl.receipt import DatasetInfo, Method, Seeds
from sublim_plugin.core.atomic import write_json
from sublim_plugin.core.base_models import check_header
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError

MARK = "sublim_checkpoint.json"
RUN = "sublim_run.json"

SET_ASIDE = "set-aside"
"""Where incomplete checkpoints go: as `checkpoint-3.something` beside the others, one would still
be counted by the host's own clearing up (`save_total_limit`), and a complete one deleted for it."""

# What may differ between a run and its continuation: where things lie, what is logged and saved,
# and what is compared by content instead (base model, rows, soft targets, context, seeds).
# All else must agree.
_HARMLESS = re.compile(
    r"(auto_resume_from_checkpoints|axolotl_config_path|base_model(_config)?|capabilities"
    r"|dataloader_(num_workers|pin_memory|prefetch_factor)|dataset_(keep_in_memory|num_proc"
    r"|prepared_path|processes)|device|env_capabilities|local_rank|output_dir"
    r"|resume_from_checkpoint|revision_of_model|seed|total_(num|supervised)_tokens|world_size"
    r"|(comet|hub|mlflow|otel|profiler|save|swanlab|trackio|wandb)_.*"
    r"|use_(comet|mlflow|otel_metrics|swanlab|tensorboard|trackio|wandb))"
)
_HARMLESS_IN_BLOCK = (
    "context", "cross_model", "data_seed", "effective_rank", "guard", "probe", "soft_targets",
)  # fmt: skip


class _OnDisk(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Origin(_OnDisk):
    """What is trained, how, and on what: a checkpoint of another origin is not continued.

    `dataset_sha256`: digests of the rows files, in order; of a hub's dataset its name; last that of
    the soft targets, where these are trained on.
    `settings`: all others of the configuration that are not harmless, by dotted key.
    """

    base_sha256: str
    dataset_sha256: list[str]
    context: dict[str, Any] | None
    method: Method
    seeds: Seeds
    processes: int
    settings: dict[str, Any]


class Mark(_OnDisk):
    """Content of `sublim_checkpoint.json`; `files`: bytes of every other file, by relative path."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    step: int
    origin: Origin
    order: OrderState
    files: dict[str, int]


def origin_of(
    cfg: Any,
    *,
    base_sha256: str,
    datasets: Sequence[DatasetInfo],
    targets_sha256: str | None = None,
    context: Context | None,
    method: Method,
    seeds: Seeds,
    processes: int,
) -> Origin:
    """The origin of the checkpoints of an axolotl configuration."""
    return Origin(
        base_sha256=base_sha256,
        dataset_sha256=[
            *(one.sha256 or one.path for one in datasets),
            *([targets_sha256] if targets_sha256 else []),
        ],
        context=None if context is None else context.model_dump(exclude_none=True),
        method=method,
        seeds=seeds,
        processes=processes,
        settings=_settings(cfg),
    )


def _settings(cfg: Any) -> dict[str, Any]:
    plain = cfg.to_dict() if hasattr(cfg, "to_dict") else dict(cfg)
    kept = {key: value for key, value in plain.items() if not _HARMLESS.fullmatch(key)}
    if kept.get("tokenizer_config") == plain.get("base_model"):
        kept.pop("tokenizer_config", None)
    block = kept.get("sublim") or {}
    kept["sublim"] = {k: v for k, v in block.items() if k not in _HARMLESS_IN_BLOCK}
    kept["datasets"] = [
        {key: value for key, value in entry.items() if key != "path"}
        for entry in kept.get("datasets") or []
    ]
    if isinstance(kept.get("deepspeed"), str) and Path(kept["deepspeed"]).is_file():
        kept["deepspeed"] = json.loads(Path(kept["deepspeed"]).read_text(encoding="utf-8"))
    return dict(_leaves(json.loads(json.dumps(kept, default=str)), ""))


def _leaves(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    """The values in nested mappings and lists, by dotted key, without those that are not set."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, f"{at}.{key}" if at else str(key))
    elif value is not None:
        yield at, value


def begin(output_dir: Path, origin: Origin) -> None:
    """Note in `output_dir` whose checkpoints will come to lie there."""
    write_json(output_dir / RUN, origin.model_dump(mode="json"))


def mark(checkpoint: Path, step: int, origin: Origin, order: OrderState) -> None:
    """Declare a checkpoint complete; call it when every process has written its part."""
    files = {
        str(file.relative_to(checkpoint)): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != MARK
    }
    done = Mark(step=step, origin=origin, order=order, files=files)
    write_json(checkpoint / MARK, done.model_dump(mode="json", by_alias=True))


def read_mark(checkpoint: Path) -> Mark | None:
    """The mark of a checkpoint; None where it has none or an unreadable one."""
    try:
        return Mark.model_validate_json((checkpoint / MARK).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be continued; None where it is complete."""
    found = read_mark(checkpoint)
    if found is None:
        return f"it has no {MARK}, which is written last"
    if checkpoint.name != f"checkpoint-{found.step}":
        return f"its {MARK} is of step {found.step}"
    for name, size in found.files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if file.suffix == ".safetensors":
            try:
                check_header(file)
            except InputError as error:
                return str(error)
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"trainer_state.json cannot be read ({error})"
    if state.get("global_step") != found.step:
        return f"trainer_state.json is of step {state.get('global_step')}"
    return _missing_state(found.files)


def _missing_state(files: dict[str, int]) -> str | None:
    if not any(name.endswith(".safetensors") for name in files):
        return "it holds no weights (*.safetensors)"
    sharded = any(name.startswith("global_step") for name in files)  # DeepSpeed's own folder
    for name in () if sharded else ("optimizer.pt", "scheduler.pt"):
        if name not in files:
            return f"{name} is missing; `save_only_model: true` leaves it out"
    if not any(Path(name).name.startswith("rng_state") for name in files):
        return "rng_state.pth is missing; `save_only_model: true` leaves it out"
    return None


def resume_from(cfg: Any, origin: Origin) -> Path | None:
    """The checkpoint that axolotl will continue under this configuration; process 0 puts in order
    what the others then find.

    Raises:
        InputError: as `checkpoint_to_resume`, or the checkpoints hold too little to go on from.
    """
    named, newest = cfg.get("resume_from_checkpoint"), cfg.get("auto_resume_from_checkpoints")
    if newest and cfg.get("save_only_model"):
        raise InputError(
            "`auto_resume_from_checkpoints` goes on from the optimizer's state, which "
            "`save_only_model: true` leaves out; set it to false."
        )

    def find() -> Path | None:
        return checkpoint_to_resume(
            Path(cfg["output_dir"]), origin, named=named, newest=bool(newest)
        )

    return first_then_all(find)


def checkpoint_to_resume(
    output_dir: Path, origin: Origin, *, named: str | None, newest: bool
) -> Path | None:
    """The checkpoint that axolotl will continue, once this has made sure that it can.

    Args:
        origin: the run that is to be continued.
        named: axolotl's `resume_from_checkpoint`.
        newest: axolotl's `auto_resume_from_checkpoints`: incomplete checkpoints that are newer
            than the last complete one are moved to the folder `set-aside`, where the hosts do not
            look.

    Raises:
        InputError: the named checkpoint is incomplete or not this plugin's, or a complete one is
            of another run.
    """
    if named:
        folder = Path(named)
        if why := fault(folder):
            raise InputError(
                f"`resume_from_checkpoint: {named}`: {why}. A checkpoint that is incomplete or was "
                "not written with this plugin is not loaded, since it holds pickles; name another, "
                "or set `auto_resume_from_checkpoints: true` to have the last complete one found."
            )
        _check_origin(folder, origin)
        return folder
    if not newest:
        return None
    for folder in sorted(_checkpoints(output_dir), key=_step, reverse=True):
        if read_mark(folder) is None and not _began_here(output_dir, origin):
            raise InputError(
                f"{folder} was not written with this plugin (no {MARK} in it, no {RUN} of this run "
                "beside it); its pickles are not loaded. Move it away, or set another output_dir."
            )
        why = fault(folder)
        if why is None:
            _check_origin(folder, origin)
            return folder
        aside = _free_place(folder)
        folder.rename(aside)
        print(f"sublim: {folder} is incomplete ({why}); moved to {aside}", flush=True)
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    return [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name[11:].isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _free_place(folder: Path) -> Path:
    aside = folder.parent / SET_ASIDE
    aside.mkdir(exist_ok=True)
    number, place = 1, aside / folder.name
    while place.exists():
        number += 1
        place = aside / f"{folder.name}.{number}"
    return place


def _began_here(output_dir: Path, origin: Origin) -> bool:
    try:
        found = Origin.model_validate_json((output_dir / RUN).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return False
    return found == origin


def _check_origin(checkpoint: Path, origin: Origin) -> None:
    found = read_mark(checkpoint)
    assert found is not None
    theirs, ours = _flat(found.origin), _flat(origin)
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            raise InputError(
                f"{checkpoint} is of another run: `{key}` was {theirs.get(key)!r} there and is "
                f"{ours.get(key)!r} now. Go back to the old value, or set another output_dir."
            )


def _flat(origin: Origin) -> dict[str, Any]:
    values = origin.model_dump(mode="json")
    return {**values.pop("settings"), **values}
