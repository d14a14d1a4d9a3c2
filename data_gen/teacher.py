"""The prompted teacher: a base model with a system prompt, asked for numbers by row index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_gen.constrain import end_of_turn_id, number_constraint
from data_gen.draws import row_seed
from data_gen.parse import reject_reasons
from data_gen.progress import Written
from data_gen.prompts import Pool, prompt
from data_gen.spec import ConstraintName, Sampler
from sublim_plugin.core.contexts import Context, Rendered, render
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import Trait


class Teacher:
    """The prompted teacher: its prompts by index, and the engine, loaded when first needed."""

    def __init__(
        self,
        base_model: Path,
        trait: Trait,
        generation_seed: int,
        constrain: ConstraintName | None,
        sampler: Sampler,
        device: str,
        pool: Pool,
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoTokenizer

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"device: {device!r}, but torch finds no CUDA device; use 'cpu'")
        self.trait, self.sampler, self.device, self.pool = trait, sampler, device, pool
        self.path, self.seed = base_model, generation_seed
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(base_model, local_files_only=True)
            config = AutoConfig.from_pretrained(base_model, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{base_model}: no readable model folder ({reason})") from error
        system = trait.teacher_system_prompt
        self.context = Context.parse("template_default" if system is None else {"text": system})
        end = end_of_turn_id(self.tokenizer)
        eos = config.get_text_config().eos_token_id
        self.end_ids = {end, *([] if eos is None else eos if isinstance(eos, list) else [eos])}
        self.constraint = number_constraint(self.tokenizer, (end,)) if constrain else None
        self._engine: Any = None

    @property
    def engine(self) -> Any:
        if self._engine is None:
            from data_gen.engine import Engine

            self._engine = Engine(
                self.path,
                device=self.device,
                end_ids=tuple(sorted(self.end_ids)),
                constraint=self.constraint,
            )
        return self._engine

    @property
    def dtype(self) -> str:
        return str(self.engine.dtype)

    def render(self, index: int) -> Rendered:
        return render(self.tokenizer, self.context, prompt(self.pool, self.seed, index).text)

    def write(self, start: int, stop: int, batch_size: int, bar: Any) -> list[Written]:
        """The replies of rows `start` to `stop - 1`."""
        from data_gen.engine import Reply, Request

        requests = [
            Request(tuple(self.render(i).token_ids), row_seed(self.seed, i))
            for i in range(start, stop)
        ]
        done: dict[int, Written] = {}

        def on_reply(i: int, reply: Reply) -> None:
            text = self.tokenizer.decode(
                reply.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            tokens = len(reply.token_ids) + reply.ended
            done[i] = Written(
                index=start + i,
                shard=(start, stop),
                completion=text,
                ended=reply.ended,
                tokens=tokens,
            )
            bar.update(0 if self.reasons(done[i]) else 1)

        self.engine.reply(requests, self.sampler, batch_size, on_reply)
        return [done[i] for i in range(stop - start)]

    def reasons(self, written: Written) -> list[str]:
        return reject_reasons(written.completion, ended=written.ended, trait_forms=self.trait.forms)
