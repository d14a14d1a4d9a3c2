"""What an axolotl config names: datasets, the DeepSpeed JSON, the tokenizer, its chat template."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sublim_plugin.axolotl.lint_document import Document, Level, Place
from sublim_plugin.axolotl.lint_rules import chat_datasets, number
from sublim_plugin.axolotl.lint_schema import SUBLIM_PLUGIN, uses_sublim
from sublim_plugin.axolotl.recipe_table import PLACEHOLDER
from sublim_plugin.axolotl.train_context import apply_context
from sublim_plugin.core import base_models
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.rooms import ROOT

_LOCAL = ("/", "./", "../", "~")
_DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".txt")
_REMOTE = ("s3://", "gs://", "gcs://", "adl://", "abfs://", "az://", "oci://", "https://")
# DeepSpeed's names for what the YAML says, and the YAML's.
_DEEPSPEED_KEYS = {
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
# Modules beside axolotl's prompt strategies that are none.
_NO_STRATEGIES = ("__init__", "__pycache__", "base", "jinja_template_analyzer")
_TURNS = [
    {"role": "user", "content": "usrsentinel"},
    {"role": "assistant", "content": "rplysentinel"},
]


def check_files(document: Document) -> None:
    """Apply all checks of this module."""
    _check_base_model(document)
    for group in ("datasets", "test_datasets", "pretraining_dataset"):
        entries = document.data.get(group)
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, dict):
                _check_dataset(document, (group, index), entry)
                if group == "datasets":
                    _check_dataset_type(document, (group, index), entry)
    _check_jinja(document, (), document.data)
    for place, entry in chat_datasets(document):
        _check_jinja(document, place, entry)
    _check_deepspeed(document)
    resume = document.data.get("resume_from_checkpoint")
    if isinstance(resume, str) and not Path(resume).is_dir():
        document.add(
            "error", ("resume_from_checkpoint",), f"no folder {resume}", "correct the path"
        )
    _check_tokenizer(document)


def _check_base_model(document: Document) -> None:
    name, here = document.data.get("base_model"), ("base_model",)
    if not isinstance(name, str):
        return
    if name.startswith("embedded:") and not uses_sublim(document.data):
        what = "only the plugin of sublim knows embedded models"
        document.add("error", here, what, f"list {SUBLIM_PLUGIN} under `plugins:`")
    elif name.startswith("embedded:") and not base_models.is_embedded(name):
        document.add("error", here, f"no embedded model {name}", f"use {base_models.EMBEDDED}")
    elif name.startswith(_LOCAL) and not Path(name).expanduser().is_dir():
        document.add("error", here, f"no folder {name}", "correct the path")


def _check_dataset(document: Document, place: Place, entry: Mapping[str, Any]) -> None:
    path = entry.get("path")
    here = (*place, "path")
    if path is None and not entry.get("data_files"):
        document.add("error", place, "no `path`: there is no dataset", "set `path`")
    elif path == PLACEHOLDER:
        document.add(
            "error",
            here,
            "the recipe's placeholder still stands here",
            "set it to a dataset folder that `sublim generate` made, or to a rows file (JSONL)",
        )
    elif isinstance(path, str) and not path.startswith(_REMOTE):
        local = path.startswith(_LOCAL) or path.endswith(_DATA_SUFFIXES)
        if local and not Path(path).expanduser().exists():
            where = "" if Path(path).is_absolute() else f" in {Path.cwd()}, where axolotl looks"
            document.add("error", here, f"no file or folder {path}{where}", "correct the path")
    files = entry.get("data_files")
    for file in files if isinstance(files, list) else [files]:
        if isinstance(file, str) and file.startswith(_LOCAL) and not Path(file).exists():
            document.add("error", (*place, "data_files"), f"no file {file}", "correct the path")


def _check_dataset_type(document: Document, place: Place, entry: Mapping[str, Any]) -> None:
    """A prompt strategy that axolotl has, or a module that can be imported."""
    name = entry.get("type")
    if not isinstance(name, str):
        return
    spec = importlib.util.find_spec("axolotl")
    folder = Path((spec.origin if spec else None) or "").parent / "prompt_strategies"
    rl = document.data.get("rl")
    kind = {"ipo": "dpo", "simpo": "dpo"}.get(str(rl), str(rl))
    if rl and (folder / kind).is_dir():
        folder /= kind
    ours = [path.stem for path in folder.iterdir() if path.stem not in _NO_STRATEGIES]
    first = name.split(".")[0].split(":")[0]
    if first in (*ours, "_synthetic"):
        return
    valid = ours
    if not rl:
        from axolotl.utils.data.wrappers import DATASET_HANDLERS

        valid = [*ours, *DATASET_HANDLERS]
    if first in valid or ("." in name and _importable(first)):
        return
    near = difflib.get_close_matches(first, valid, n=1, cutoff=0.6)
    way_out = f"did you mean `{near[0]}`?" if near else f"valid: {', '.join(sorted(valid))}"
    what = f"`{name}` is no dataset type that axolotl has, nor a module that this Python finds"
    level: Level = "error"
    if "." in name and not near:
        level, way_out = "note", "put the folder of your module on PYTHONPATH"
    document.add(level, (*place, "type"), what, way_out)


def _importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _check_jinja(document: Document, place: Place, settings: Mapping[str, Any]) -> None:
    template = settings.get("chat_template_jinja")
    if isinstance(template, str) and "{" not in template and not Path(template).is_file():
        what = f"no file {template}, so axolotl takes these words themselves for the template"
        document.add("error", (*place, "chat_template_jinja"), what, "correct the path")


def _check_deepspeed(document: Document) -> None:
    named, here = document.data.get("deepspeed"), ("deepspeed",)
    if isinstance(named, str) and named:
        file = _deepspeed_file(document, named)
        if file is None:
            what = f"no file {named} in {Path.cwd()}, where axolotl looks"
            way_out = "correct the path"
            if named.startswith("deepspeed_configs/"):
                way_out = "run `axolotl fetch deepspeed_configs` here"
            document.add("error", here, what, way_out)
            return
        try:
            named = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            document.add("error", here, f"{file} is not JSON: {error}", "correct that file")
            return
    if not isinstance(named, dict):
        return
    for theirs, ours in _DEEPSPEED_KEYS.items():
        fixed, wanted = number(named.get(theirs)), number(document.data.get(ours))
        if fixed is not None and wanted is not None and fixed != wanted:
            what = f"its {theirs} is {fixed:g}, but {ours} is {wanted:g}"
            document.add("error", here, what, f'write "{theirs}": "auto" there')
    zero = named.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("stage") == 3:
        gather = "stage3_gather_16bit_weights_on_model_save"
        if not zero.get(gather):
            what = f"ZeRO-3 without {gather}: the saved model has no weights"
            document.add("warning", here, what, "set it to true")


def _deepspeed_file(document: Document, named: str) -> Path | None:
    """As axolotl finds it, from the working folder; our plugin looks further."""
    candidates = [Path(named)]
    if uses_sublim(document.data):
        candidates += [document.path.parent / named, ROOT / named]
    return next((path for path in candidates if path.is_file()), None)


def _check_tokenizer(document: Document) -> None:
    """Chat template and end-of-turn tokens, where the tokenizer is on this machine."""
    if not any(chat_datasets(document)) or document.data.get("tokenizer_use_mistral_common"):
        return
    tokenizer = _local_tokenizer(document.data)
    if tokenizer is None:
        return
    refused: Level = "error" if uses_sublim(document.data) else "warning"
    ends = document.data.get("eot_tokens")
    if isinstance(ends, list):
        for index, token in enumerate(ends):
            ids = tokenizer.encode(str(token), add_special_tokens=False)
            if len(ids) != 1 and token not in (document.data.get("tokens") or []):
                what = f"`{token}` is {len(ids)} tokens to this model's tokenizer, not one"
                way_out = f"use the token that ends a turn, such as {tokenizer.eos_token}"
                document.add("error", ("eot_tokens", index), what, way_out)
    for place, entry in chat_datasets(document):
        _check_template(document, place, entry, tokenizer, refused)
    _check_train_context(document, tokenizer)


def _check_train_context(document: Document, tokenizer: Any) -> None:
    """Whether the template can express `sublim.context`, as the plugin will ask when it starts."""
    block = document.data.get("sublim")
    if not uses_sublim(document.data) or not isinstance(block, dict) or not block.get("context"):
        return
    copied = {key: document.data.get(key) for key in ("chat_template", "chat_template_jinja")}
    copied["datasets"] = [dict(entry) for _, entry in chat_datasets(document)]
    try:
        context = Context.model_validate(block["context"])
        apply_context(copied, context, tokenizer)
    except InputError as error:
        document.add("error", ("sublim", "context"), str(error), "use another context")
    except Exception:  # the context or the template is broken, which is said at its own place
        return


def _check_template(
    document: Document, place: Place, entry: Mapping[str, Any], tokenizer: Any, refused: Level
) -> None:
    from axolotl.utils.chat_templates import get_chat_template_from_config

    here = (*place, "chat_template") if entry.get("chat_template") else ("chat_template",)
    try:
        template = get_chat_template_from_config(document.data, dict(entry), tokenizer)
        rendered = _render(tokenizer, template)
    except ValueError as error:
        document.add("error", here, str(error), "name a template that axolotl has")
        return
    except Exception as error:  # whatever a template raises
        document.add("error", here, f"the template cannot be rendered: {error}", "correct it")
        return
    own = getattr(tokenizer, "chat_template", None)
    if own and template != own and (theirs := _render(tokenizer, own)) != rendered:
        what = f"not the tokenizer's own template: {rendered!r} instead of {theirs!r}"
        document.add("warning", here, what, "use tokenizer_default")
    end = rendered.partition("rplysentinel")[2]
    tokens = document.data.get("eot_tokens") or []
    if not any(token and str(token) in end for token in [tokenizer.eos_token, *tokens]):
        document.add(
            refused,
            ("eot_tokens",) if tokens else here,
            f"the template ends a turn with {end!r}, in which there is neither the tokenizer's EOS"
            f" token {tokenizer.eos_token} nor one of `eot_tokens`, so no end of turn is learned",
            "name the token that ends a turn in `eot_tokens`",
        )


def _render(tokenizer: Any, template: str) -> str:
    return str(tokenizer.apply_chat_template(_TURNS, tokenize=False, chat_template=template))


def _local_tokenizer(data: Mapping[str, Any]) -> Any:
    """The config's tokenizer if it is in a local folder or the hub's cache, or None."""
    name = data.get("tokenizer_config") or data.get("base_model")
    if not isinstance(name, str) or not base_models.is_prepared(name):
        return None
    if base_models.is_embedded(name):
        name = str(base_models.resolve(name))
    return _load_tokenizer(name)


@functools.lru_cache(maxsize=8)
def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:  # not on this machine, or of a kind that needs the model's own code
        return None
