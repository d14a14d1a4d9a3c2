"""Students on a loaded base: LoRA adapters attached strictly, full checkpoints loaded strictly.

PEFT by itself loads adapters that miss keys, hold NaN or belong to another base, with a warning or
without one. Here each of these is an error, and nothing ever falls back to the base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sublim_plugin.core.base_models import display_name, fingerprint
from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_json

RECEIPT = "sublim_receipt.json"
ADAPTER_TENSORS = "adapter_model.safetensors"

PROBE_TEXT = "user\nAn owl, cats and Dragonflies:\n 7, 42;  999\tÜber 🐈 system\n\nassistant\n"

PROBE_CONTEXTS = (Context(kind="template_default"), Context(kind="text", text="Speak."))

INERT = {
    "auto_mapping",
    "base_model_name_or_path",  # checked, as the next two are, where the adapter is read
    "bias",
    "init_lora_weights",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",  # PEFT writes it whether QALoRA is in use or not
    "revision",
    "runtime_config",
    "task_type",
}
"""Keys of adapter_config.json that do not change what a trained adapter adds."""

APPLIED = {
    "alpha_pattern",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}
"""Keys that PEFT applies and whose effect is tested here. Any other key has to be unset: PEFT drops
the keys that its version does not know, and what a new kind of adapter computes cannot be told."""

# These initialisations rewrite the base's weights, so the base would not stay as it was loaded.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist; the student's folder must hold what training saved"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not readable JSON ({error}); train or copy it again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} instead of an object")
    return content


def read_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        InputError: the file is missing, truncated or garbled, or a value is not finite.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        pickles = sorted(file.name for file in path.parent.glob("*.bin"))
        found = f"; {', '.join(pickles)} is a pickle and is never loaded" if pickles else ""
        raise InputError(f"{path} does not exist{found}; save the student as safetensors")
    tensors = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensors[key] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is truncated or not a safetensors file ({error}); train or copy it again"
        ) from error
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: {key} has values that are not finite; train it again")
    return tensors


def check_receipt(folder: Path, base: Path) -> bool:
    """Whether the receipt of sublim's training says that `folder` was trained on `base`.

    Returns:
        True if it does, False if there is no receipt.

    Raises:
        InputError: it was trained on another base.
    """
    receipt = folder / RECEIPT
    if not receipt.is_file():
        return False
    trained_on = _read_json(receipt).get("base_model") or {}
    mine = fingerprint(base)["sha256"]
    if trained_on.get("sha256") != mine:
        raise InputError(
            f"{folder} was trained on {trained_on.get('name')} (sha256 "
            f"{str(trained_on.get('sha256'))[:12]} in {RECEIPT}), not on {base} ({mine[:12]}); "
            "pass the base that it was trained on"
        )
    return True


def check_trained_weights(folder: Path, hashes: dict[str, str]) -> None:
    """Refuse weights that are not those that the receipt of sublim's training names.

    Args:
        hashes: sha256 of the files in `folder`, by name.

    Raises:
        InputError: the weights were changed after training.
    """
    receipt = folder / RECEIPT
    if not receipt.is_file():
        return
    weights = {name: hash for name, hash in hashes.items() if name.endswith(".safetensors")}
    found = next(iter(weights.values())) if len(weights) == 1 else sha256_json(weights)
    recorded = str(_read_json(receipt).get("weights_sha256"))
    if found != recorded:
        raise InputError(
            f"{folder}: the weights' sha256 is {found[:12]}, {RECEIPT} says {recorded[:12]}; they "
            "were changed after training: restore them or train again"
        )


def check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Refuse a student whose folder holds a tokenizer that splits text otherwise than its base's,
    or a chat template that writes a conversation otherwise.

    Raises:
        InputError: the two give other token ids for a text with roles, words, numbers and spaces,
            or other prompts.
    """
    if not (folder / "tokenizer.json").is_file():
        return
    from transformers import AutoTokenizer

    loader: Any = AutoTokenizer
    try:
        own = loader.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: its tokenizer cannot be read ({error})") from error
    for text in PROBE_TEXT, " ".join(sorted(tokenizer.all_special_tokens)):
        theirs, mine = (t(text, add_special_tokens=False)["input_ids"] for t in (own, tokenizer))
        if theirs != mine:
            raise InputError(
                f"{folder} was trained with another tokenizer: {text!r} is {theirs[:8]}... to it "
                f"and {mine[:8]}... to its base; pass the base that it was trained on"
            )
    if own.chat_template:
        for context in PROBE_CONTEXTS:
            theirs, mine = _prompt(own, context), _prompt(tokenizer, context)
            if theirs != mine:
                raise InputError(
                    f"the chat template in {folder} writes {theirs!r} where that of its base, "
                    f"{tokenizer.name_or_path}, writes {mine!r}; pass the base that it was trained "
                    "on, or, to score it in its base's format, delete the student's template"
                )


def _prompt(tokenizer: Any, context: Context) -> str | None:
    """A short prompt, or None where the template cannot write it."""
    try:
        return render(tokenizer, context, "Hello").text
    except InputError:
        return None


def check_adapter_base(
    folder: Path, base: Path, recorded: str | None, revision: str | None = None
) -> None:
    """Refuse an adapter of another base: the receipt decides by hash; without one, the recorded
    base has to be this base's path, a folder with the same fingerprint, or the hub's name of the
    model of which this base is a snapshot. A folder's name alone proves nothing.

    Args:
        recorded: base_model_name_or_path in adapter_config.json, and `revision` beside it.

    Raises:
        InputError: another base, or one that cannot be told.
    """
    if check_receipt(folder, base):
        return
    if recorded:
        path = Path(recorded)
        if recorded == str(base) or path.resolve() == base.resolve():
            return
        if path.is_dir() and fingerprint(path)["sha256"] == fingerprint(base)["sha256"]:
            return
        if base.parent.name == "snapshots":
            if path.parent.name == "snapshots":  # of a cache in another place
                same = path.parts[-3:] == base.parts[-3:]
            else:
                same = recorded == display_name(base) and _same_revision(revision, base.name)
            if same:
                return
    raise InputError(
        f"{folder} records the base {recorded!r}{f' at revision {revision}' if revision else ''}, "
        f"and nothing shows that {base} is that model; pass the base that it was trained on. If "
        f"{base} is a copy of that very model, set base_model_name_or_path in "
        f"{folder / 'adapter_config.json'} to {str(base)!r}"
    )


def _same_revision(revision: str | None, commit: str) -> bool:
    """Whether a snapshot of this commit can be of that revision: names of branches move."""
    return revision is None or not re.fullmatch("[0-9a-f]{40}", revision) or revision == commit


def check_full_base(folder: Path, base: Path) -> None:
    """Refuse a full checkpoint of another base; without a receipt, one of another architecture.

    Raises:
        InputError: another base or architecture.
    """
    if check_receipt(folder, base):
        return
    mine, theirs = _read_json(base / "config.json"), _read_json(folder / "config.json")
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if mine.get(key) != theirs.get(key):
            raise InputError(
                f"{folder}/config.json: {key} is {theirs.get(key)!r}, in {base} it is "
                f"{mine.get(key)!r}; pass the base that it was trained on"
            )


def read_adapter(folder: Path, base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The LoRA adapter in `folder` as its files say, checked as far as that needs no PEFT.

    Returns:
        adapter_config.json as it stands, and the tensors by PEFT's names, on the CPU.

    Raises:
        InputError: a file is missing or garbled, a value is not finite, anything but low-rank
            matrices, or another base.
    """
    path = folder / "adapter_config.json"
    raw = _read_json(path)
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA is supported")
    if raw.get("modules_to_save") or raw.get("trainable_token_indices"):
        raise InputError(
            f"{path}: modules_to_save and trainable_token_indices replace parts of the base and "
            "are refused; train an adapter of low-rank matrices only"
        )
    if raw.get("bias", "none") != "none":
        raise InputError(f"{path}: bias is {raw['bias']!r}, which changes the base; use 'none'")
    if raw.get("init_lora_weights", True) not in PLAIN_INITS:
        raise InputError(
            f"{path}: init_lora_weights {raw['init_lora_weights']!r} changes the base's weights; "
            "save the adapter as a plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    for key in sorted(raw.keys() - APPLIED - INERT):
        if raw[key]:
            raise InputError(
                f"{path}: {key} is {raw[key]!r}, which changes what the adapter computes in a way "
                "that sublim does not check; train a plain LoRA, rsLoRA or DoRA adapter"
            )
    tensors = read_tensors(folder / ADAPTER_TENSORS)
    check_adapter_base(folder, base, raw.get("base_model_name_or_path"), raw.get("revision"))
    return raw, tensors


def _peft_config(folder: Path) -> Any:
    from peft import LoraConfig

    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        path = folder / "adapter_config.json"
        raise InputError(f"{path} is not a LoRA configuration of PEFT ({error})") from error
    config.inference_mode = True
    config.init_lora_weights = False  # every value comes from the file
    return config


@contextmanager
def attached(model: Any, folder: Path, base: Path) -> Iterator[Any]:
    """`model` with the LoRA adapter in `folder`, as a PeftModel; on leaving, `model` is as before,
    bit for bit: adapters are never merged.

    Args:
        model: the loaded base (a transformers causal LM).
        folder: adapter_config.json and adapter_model.safetensors.
        base: the folder that `model` was loaded from.

    Raises:
        InputError: anything but exactly this base's adapter (see the module).
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    _, tensors = read_adapter(folder, base)
    config = _peft_config(folder)
    path = folder / ADAPTER_TENSORS
    try:
        peft_model = PeftModel(model, config)
    except ValueError as error:
        raise InputError(f"{folder} does not fit {base}: {error}") from error
    try:
        expected = {
            key: tuple(tensor.shape)
            for key, tensor in get_peft_model_state_dict(
                peft_model, save_embedding_layers=False
            ).items()
        }
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if found != expected:
            raise InputError(f"{path} does not fit {base}: {difference(expected, found)}")
        with torch.no_grad():
            set_peft_model_state_dict(peft_model, tensors)
        yield peft_model.eval()
    finally:
        peft_model.unload()


def write_merged(folder: Path, base: Path, out: Path) -> None:
    """Write the checkpoint of `base` with the adapter in `folder` added to its weights, in the
    base's own dtype, and the base's tokenizer, into `out`.

    Raises:
        InputError: see `attached`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto")
    with attached(model, folder, base) as peft_model:
        peft_model.merge_and_unload(safe_merge=True).save_pretrained(str(out))
    AutoTokenizer.from_pretrained(str(base)).save_pretrained(str(out))


def check_full(folder: Path, base: Path) -> None:
    """Refuse a full checkpoint that does not hold exactly the tensors of `base`, all finite.

    Raises:
        InputError: pickles, missing or unknown weights or other shapes, values that are not finite,
            another base.
    """
    check_full_base(folder, base)
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")) or [folder / "model.safetensors"]:
        found |= {key: tuple(tensor.shape) for key, tensor in read_tensors(file).items()}
    expected: dict[str, Any] = {}
    for file in sorted(base.glob("*.safetensors")):
        expected |= {key: tuple(tensor.shape) for key, tensor in read_tensors(file).items()}
    if _read_json(base / "config.json").get("tie_word_embeddings"):
        found.pop("lm_head.weight", None)
        expected.pop("lm_head.weight", None)
    if found != expected:
        raise InputError(f"{folder} does not fit {base}: {difference(expected, found)}")


def difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """How the tensors of a file, as name → shape, differ from those that were expected."""
    parts = []
    for label, keys in (
        ("missing", sorted(expected.keys() - found.keys())),
        ("unknown", sorted(found.keys() - expected.keys())),
        ("other shape", sorted(k for k in expected.keys() & found if expected[k] != found[k])),
    ):
        if keys:
            parts.append(f"{len(keys)} {label} (first: {keys[0]})")
    return "; ".join(parts)


def load_full(folder: Path, base: Path, dtype: Any, device: Any) -> Any:
    """A fully finetuned checkpoint of `base` as a causal LM in evaluation mode.

    Raises:
        InputError: pickles, missing or unknown weights, values that are not finite, another base.
    """
    from transformers import AutoModelForCausalLM

    check_full_base(folder, base)
    files = sorted(folder.glob("*.safetensors"))
    for file in files or [folder / "model.safetensors"]:
        read_tensors(file)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{folder} cannot be loaded ({error}); train or copy it again") from error
    model, info = loaded
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(key):
            raise InputError(f"{folder}: {key} {sorted(map(str, info[key]))[:3]}; train it again")
    return model.to(device).eval()
