"""From a recipe in `axolotl_configs/` to a trained model: write a run's YAML, run axolotl on it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sublim_plugin.axolotl.checkpoints import RUN, SET_ASIDE
from sublim_plugin.axolotl.forked import Forked
from sublim_plugin.axolotl.prepared import HOST_CACHE, give, take
from sublim_plugin.axolotl.receipt import RECEIPT_NAME, Receipt, read_receipt
from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.processes import die_with_parent
from sublim_plugin.core.rooms import ROOT
from sublim_plugin.core.strict_yaml import load_yaml, nearest

# What a study may change in a recipe; everything else is the recipe's identity.
OVERRIDES = (
    "bf16",
    "gradient_accumulation_steps",
    "learning_rate",
    "lora_alpha",
    "lora_r",
    "lr_scheduler",
    "max_grad_norm",
    "max_steps",
    "micro_batch_size",
    "num_epochs",
    "optimizer",
    "peft_use_rslora",
    "sequence_len",
    "warmup_steps",
    "weight_decay",
)
# Keys of a run, not of a recipe: they do not describe how the model is trained.
_OF_THE_RUN = ("base_model", "datasets", "dataset_prepared_path", "output_dir", "seed")

_LAST_LINES = 25
_FULL = 65_536
"""Bytes free, below which a failed training is put down to a full disk."""
# The trainer's bar has no text before its percentage; those of data preparation do.
_TRAINER_BAR = re.compile(r"^\s*\d+%\|[^|]*\|\s*(\d+)/(\d+) \[")
_ANY_BAR = re.compile(r"\d+%\|[^|]*\|")
_PLUGIN_ERROR = "sublim: error: "


def recipes_root() -> Path:
    """Folder of the `axolotl_configs` that are installed beside this package.

    Raises:
        InputError: it is not there.
    """
    root = ROOT / "axolotl_configs"
    if not root.is_dir():
        raise InputError(f"{root}: missing from the installation; reinstall sublim.")
    return root


def recipe_path(model: str, name: str) -> Path:
    """Path of a shipped recipe, say `recipe_path("smollm2-135m-instruct", "lora-r8")`.

    Raises:
        InputError: there is no such model or recipe; those there are are named.
    """
    path = recipes_root() / model / f"{name}.yaml"
    if path.is_file():
        return path
    models = sorted({p.parent.name for p in recipes_root().glob("*/*.yaml")})
    if model not in models:
        raise InputError(f"no recipes for the model '{model}'{nearest(model, models)}")
    there = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
    raise InputError(f"no recipe '{name}' for {model}; there are: {there}")


def resolve_recipe(
    recipe: Path,
    overrides: Mapping[str, Any],
    context: Context | None = None,
    *,
    loaded: Any = None,
) -> dict[str, Any]:
    """The recipe's settings with `overrides`, without what belongs to a run (paths, seeds).

    `lora_alpha` follows an overridden `lora_r` unless it is overridden too: the paper's
    alpha = rank (arXiv 2606.00831). `context` takes the place of the recipe's train context;
    `loaded` is the file's content, where it was read before.

    Raises:
        InputError: the recipe does not load, or an override is not allowed.
    """
    settings = _with_overrides(recipe, overrides, context, loaded)
    kept = {key: value for key, value in settings.items() if key not in _OF_THE_RUN}
    if isinstance(kept.get("sublim"), dict):
        kept["sublim"] = {k: v for k, v in kept["sublim"].items() if k != "data_seed"}
    kept["dataset"] = {k: v for k, v in settings["datasets"][0].items() if k != "path"}
    return kept


def _with_overrides(
    recipe: Path, overrides: Mapping[str, Any], context: Context | None, loaded: Any = None
) -> dict[str, Any]:
    settings = load_yaml(recipe) if loaded is None else loaded
    if not isinstance(settings, dict) or not settings.get("datasets"):
        raise InputError(f"{recipe}: expected a mapping of axolotl settings with `datasets`.")
    for key in overrides:
        if key not in OVERRIDES:
            hint = nearest(key, list(OVERRIDES))
            raise InputError(f"override '{key}' of {recipe}: no setting to override{hint}")
        if key.startswith("lora_") and settings.get("adapter") != "lora":
            raise InputError(f"override '{key}' of {recipe}: the recipe trains no LoRA adapter.")
    changed = dict(overrides)
    if "lora_r" in changed:
        changed.setdefault("lora_alpha", changed["lora_r"])
    block = settings.get("sublim") or {}
    # the recipe's own way of writing an equal context stays, and with it the settings' hash
    if context is not None and (
        "context" not in block or Context.parse(block["context"]) != context
    ):
        changed["sublim"] = block | {"context": context.fields()}
    return settings | changed


def write_axolotl_yaml(
    recipe_path: Path,
    out_path: Path,
    *,
    base_model: str,
    dataset_path: Path,
    output_dir: Path,
    seed: int,
    overrides: Mapping[str, Any],
    context: Context | None = None,
    block: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the YAML of one run to `out_path` and return what `resolve_recipe` does.

    `seed` sets LoRA's initialization and the order of the rows; `block` holds keys of the `sublim:`
    block that belong to the run and not to the recipe, such as the model whose norm is matched.

    Raises:
        InputError: the recipe does not load, or an override is not allowed.
    """
    import yaml

    settings = _with_overrides(recipe_path, overrides, context)
    settings["base_model"] = base_model
    settings["datasets"] = [settings["datasets"][0] | {"path": str(Path(dataset_path).resolve())}]
    settings["output_dir"] = str(Path(output_dir).resolve())
    settings["dataset_prepared_path"] = str(_prepared(Path(output_dir).resolve()))
    settings["seed"] = seed
    settings["sublim"] = (settings.get("sublim") or {}) | {"data_seed": seed, **(block or {})}
    head = f"# Written by sublim from the recipe {recipe_path.parent.name}/{recipe_path.name}.\n"
    write_text(out_path, head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return resolve_recipe(recipe_path, overrides, context)


def _prepared(output_dir: Path) -> Path:
    return output_dir.parent / f".{output_dir.name}.prepared"


def _partial(output_dir: Path) -> Path:
    return output_dir.parent / f".{output_dir.name}.partial"


def run_training(
    yaml_path: Path,
    log_path: Path,
    *,
    env: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    launcher: str = "python",
    forked: bool = False,
    shared_rows: Path | None = None,
) -> Receipt:
    """Run `axolotl train` on `yaml_path` and return the receipt of the finished model.

    axolotl works in a hidden folder beside the YAML's `output_dir`, which is renamed into place
    once the receipt is in it: a killed run leaves no `output_dir`. Where the YAML has
    `auto_resume_from_checkpoints: true`, the hidden folder is kept as long as it holds checkpoints,
    and the next call goes on from the last complete one; they go when the model is finished. Else
    what an earlier, killed run left is removed. Everything that axolotl prints goes to `log_path`;
    `progress(step, steps)` is called at every step. The child is killed when this process dies.

    `launcher`: axolotl's; its default, `accelerate`, sets one thread per process on a CPU.
    `forked`: without axolotl's imports, from a process that has done them (see `axolotl.forked`;
    where there are many trainings, on a CPU, with the launcher `python`).
    `shared_rows`: a folder that trainings of the same rows, context and template name, so that
    axolotl tokenizes them once; it may not be there yet, and goes where a training on it fails.

    Raises:
        InputError: the plugin refused the YAML, the model or the dataset (axolotl exited with 2).
        RunError: axolotl failed, or wrote no receipt; the message ends with the log's last lines.
    """
    settings = load_yaml(yaml_path)
    output_dir = Path(settings["output_dir"])
    partial, prepared = _partial(output_dir), _prepared(output_dir)
    resumable = bool(settings.get("auto_resume_from_checkpoints"))
    _clear(partial, prepared, keep_checkpoints=resumable)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / RECEIPT_NAME).unlink(missing_ok=True)
    taken = shared_rows is not None and take(shared_rows, prepared)
    command = ["train", str(yaml_path.resolve()), "--launcher", launcher]
    command += ["--output-dir", str(partial)]
    try:
        environment = _environment(prepared, env)
        code = _run(command, log_path, environment, partial.parent, progress, forked)
        if code == 0 and (partial / RECEIPT_NAME).is_file():
            receipt = read_receipt(partial)
            _install(partial, output_dir)
            if shared_rows is not None:
                give(prepared, shared_rows)
            return receipt
        # before what axolotl left is cleared away; its log may have had no room for the reason
        full = shutil.disk_usage(partial.parent).free < _FULL
    finally:
        _clear(partial, prepared, keep_checkpoints=resumable)
    if taken and shared_rows is not None:
        shutil.rmtree(shared_rows, ignore_errors=True)
    lines = _log_lines(log_path)
    refused = [line for line in lines if line.startswith(_PLUGIN_ERROR)]
    if code == InputError.exit_code and refused:
        at = lines.index(refused[-1])
        raise InputError("\n".join(lines[at:]).removeprefix(_PLUGIN_ERROR))
    reason = f"exited with {code}" if code else "ended without a receipt (plugin not imported?)"
    if full or any(os.strerror(errno.ENOSPC) in line for line in lines):
        reason += f" as the disk is full; free some space under {partial.parent}"
    last = "\n".join(lines[-_LAST_LINES:])
    raise RunError(f"axolotl train {yaml_path} {reason}; {log_path} ends with:\n{last}")


def _clear(partial: Path, prepared: Path, *, keep_checkpoints: bool) -> None:
    shutil.rmtree(prepared, ignore_errors=True)
    if not (keep_checkpoints and any(partial.glob("checkpoint-*"))):
        shutil.rmtree(partial, ignore_errors=True)


def _environment(prepared: Path, env: Mapping[str, str] | None) -> dict[str, str]:
    ours = dict(os.environ)
    # Telemetry sleeps ten seconds at the start of every run.
    ours["AXOLOTL_DO_NOT_TRACK"] = "1"
    ours["HF_DATASETS_CACHE"] = str(prepared / HOST_CACHE)
    ours["PYTHONUNBUFFERED"] = "1"
    ours.pop("TQDM_DISABLE", None)  # progress is read off the trainer's bar
    # Threads that wait without spinning: beside another busy process, spinning costs many times
    # the work.
    ours.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # `accelerate`, if chosen as the launcher, must be found beside this interpreter.
    ours["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), ours.get("PATH", "")])
    ours.update(env or {})
    return ours


def _run(
    command: list[str],
    log_path: Path,
    env: dict[str, str],
    cwd: Path,
    progress: Callable[[int, int], None] | None,
    forked: bool,
) -> int:
    log_path.write_bytes(b"")
    child = (Forked if forked else _started)(command, log_path, env, cwd)
    try:
        with log_path.open("rb") as log:
            line = b""
            while True:
                code = child.poll()
                new = log.read()
                *complete, line = re.split(rb"[\r\n]", line + new)
                for text in (*complete, line) if new else ():
                    found = _TRAINER_BAR.match(text.decode("utf-8", "replace"))
                    if found and progress is not None:
                        progress(int(found[1]), int(found[2]))
                if code is not None:
                    return code
                time.sleep(0.1)
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it leads no group yet
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            child.wait()


def _started(
    command: list[str], log_path: Path, env: dict[str, str], cwd: Path
) -> subprocess.Popen[bytes]:
    with log_path.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "axolotl.cli.main", *command],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )


def _install(partial: Path, output_dir: Path) -> None:
    """Move the finished model into place, without the checkpoints on its way there; one without a
    manifest that is there already goes."""
    for left in (*partial.glob("checkpoint-*"), partial / SET_ASIDE):
        shutil.rmtree(left, ignore_errors=True)
    (partial / RUN).unlink(missing_ok=True)
    _forget_partial_name(partial, output_dir)
    if output_dir.exists():
        shutil.rmtree(output_dir)
    partial.rename(output_dir)


def _forget_partial_name(partial: Path, output_dir: Path) -> None:
    """Name the final folder in the small text files that axolotl wrote (model card, log)."""
    for name in ("README.md", "debug.log"):
        path = partial / name
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            path.write_text(text.replace(str(partial), str(output_dir)), encoding="utf-8")


def _log_lines(log_path: Path) -> list[str]:
    text = log_path.read_text(encoding="utf-8", errors="replace")
    lines = (line.rstrip() for line in re.split(r"[\r\n]", text))
    return [line for line in lines if line and not _ANY_BAR.search(line)]
