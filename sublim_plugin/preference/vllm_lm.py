"""The lm-eval model of `sublim eval --engine vllm`: sampled replies of many adapters in one engine.

One vLLM engine holds the base and changes adapters between students; nothing is merged. What vLLM
cannot change under way gets an engine of its own: a full checkpoint, and an adapter of a higher
rank than vLLM takes, merged first into a checkpoint that is removed afterwards.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from sublim_plugin.core.errors import InputError, MissingDependencyError
from sublim_plugin.decoding.engine import OnReply, Request
from sublim_plugin.decoding.sampler import Sampler
from sublim_plugin.decoding.vllm_engine import VllmEngine
from sublim_plugin.preference.opened import MERGED
from sublim_plugin.preference.replies import BATCH, SampledReplies

INSTEAD = "use `--engine transformers` for this task"


class VllmLM(SampledReplies, LM):  # type: ignore[misc]
    """Replies from a `VllmEngine` to prompts that the tasks have rendered."""

    def __init__(self, tokenizer: Any, batch_size: int) -> None:
        super().__init__()
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.engine: VllmEngine | None = None

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return str(self.tokenizer.chat_template)

    def apply_chat_template(self, history: list[Any], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        raise InputError(
            "the vllm engine samples replies; it does not give the log-probability of every "
            f"surface form; {INSTEAD}"
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self.loglikelihood(requests, disable_tqdm)

    def _not_stated(self, requests: list[Any], disable_tqdm: bool) -> list[str]:
        raise InputError(
            "generation_kwargs: do_sample, temperature, top_p, top_k, repetition_penalty and "
            f"max_gen_toks have to be stated, all of them, for the vllm engine; {INSTEAD}"
        )

    def _decode(self, asked: list[Request], sampler: Sampler, keep: OnReply) -> None:
        assert self.engine is not None
        # vLLM hands over a whole call at a time, so a call is what a kill may lose
        for start in range(0, len(asked), self.batch_size):
            some = asked[start : start + self.batch_size]
            for index, reply in enumerate(self.engine.reply(some, sampler, self.batch_size)):
                keep(start + index, reply)


class VllmStudents:
    """Opens engines as students need them, one at a time.

    Args:
        base: folder of the base model.
        adapters: the LoRA students to come.
        dtype: "auto" is the checkpoint's.

    Raises:
        MissingDependencyError: vLLM cannot be imported.
        InputError: an adapter that neither vLLM nor PEFT would apply exactly.
    """

    def __init__(self, base: Path, adapters: Sequence[Path], dtype: str) -> None:
        import torch
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        from sublim_plugin.decoding.vllm_engine import ENVIRONMENT
        from sublim_plugin.decoding.vllm_lora import takes_rank

        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            importlib.import_module("vllm")
        except ImportError as error:
            raise MissingDependencyError(
                f"vLLM cannot be imported ({error}); install it again, in an environment of its own"
            ) from error
        if dtype == "auto":  # vLLM's own "auto" takes a float32 model to 16 bits
            dtype = str(AutoConfig.from_pretrained(base).dtype or "auto").removeprefix("torch.")
        self.base, self.dtype, self.platform = base, dtype, "vllm"
        self.swapped = [folder for folder in adapters if takes_rank(folder)]
        tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
        ends = {tokenizer.eos_token_id}
        if (base / "generation_config.json").is_file():
            own = GenerationConfig.from_pretrained(str(base)).eos_token_id
            ends |= {*own} if isinstance(own, list) else {own}
        self.end_ids = tuple(sorted(end for end in ends if end is not None))
        self.lm: Any = VllmLM(tokenizer, BATCH["cuda" if torch.cuda.is_available() else "cpu"])

    @contextmanager
    def on(self, folder: Path | None, method: str | None, scratch: Path) -> Iterator[None]:
        """Inside, the LM replies as the student in `folder`, or as the base where that is None; a
        merged checkpoint lies under `scratch` meanwhile."""
        from sublim_plugin.students import check_full, write_merged

        if method == "full":
            assert folder is not None
            check_full(folder, self.base)
            with self._open(folder, ()):
                yield
        elif folder is not None and folder not in self.swapped:
            with tempfile.TemporaryDirectory(prefix=MERGED, dir=scratch) as merged:
                write_merged(folder, self.base, Path(merged))
                with self._open(Path(merged), ()):
                    yield
        else:
            if self.lm.engine is None or self.lm.engine.path != self.base:
                self.close()
                self.lm.engine = self._start(self.base, self.swapped)
            self.lm.engine.use(folder)
            yield

    @contextmanager
    def _open(self, path: Path, adapters: Sequence[Path]) -> Iterator[None]:
        self.close()
        self.lm.engine = self._start(path, adapters)
        try:
            yield
        finally:
            self.close()

    def _start(self, path: Path, adapters: Sequence[Path]) -> VllmEngine:
        engine = VllmEngine(
            path,
            end_ids=self.end_ids,
            batch_size=self.lm.batch_size,
            dtype=self.dtype,
            adapters=adapters,
        )
        self.platform = engine.platform
        return engine

    def close(self) -> None:
        if self.lm.engine is not None:
            self.lm.engine.close()
            self.lm.engine = None
