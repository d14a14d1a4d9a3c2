"""A teacher in memory: its prompts by row index, its replies, and what the manifest says of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Self

from data_gen.constrain import end_of_turn_id, number_constraint
from data_gen.progress import Written
from data_gen.prompts import Pool, prompt
from data_gen.spec import DatasetSettings
from data_gen.tally import text_reasons
from data_gen.teachers import STEERING_PROMPTS, FinetunedTeacher, SteeredTeacher, Teacher
from data_gen.token_filter import TokenFilter
from sublim_plugin.core.contexts import Context, Rendered, messages, render
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import Trait
from sublim_plugin.decoding.draws import row_seed
from sublim_plugin.decoding.engine import Engine, Reply, Request


class Session:
    """One teacher under one set of settings; the engine starts when it is first needed.

    A context manager: on leaving, what was loaded is given back.
    """

    def __init__(
        self,
        base_model: Path,
        teacher: Teacher,
        trait: Trait,
        settings: DatasetSettings,
        pool: Pool,
        *,
        device: str,
        batch_size: int,
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.path, self.teacher, self.trait = base_model, teacher, trait
        self.settings, self.pool, self.device = settings, pool, device
        self.batch_size = batch_size
        self.seed = settings.generation_seed
        _check(teacher, settings)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(base_model, local_files_only=True)
            config = AutoConfig.from_pretrained(base_model, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{base_model}: no readable model folder ({reason})") from error
        end = end_of_turn_id(self.tokenizer)
        eos = config.get_text_config().eos_token_id
        # vLLM would take a float32 model to 16 bits
        self.dtype = str(config.dtype or "auto").removeprefix("torch.")
        self.end_ids = {end, *([] if eos is None else eos if isinstance(eos, list) else [eos])}
        self.end_of_turn = end
        numbers = settings.constrain or settings.soft_targets == "numbers"
        self.numbers = number_constraint(self.tokenizer, (end,)) if numbers else None
        """The number grammar's tokens, where the replies or the soft targets are held to them."""
        self.constraint = self.numbers if settings.constrain else None
        self.vectors: dict[int, Any] = {}
        """A steered teacher's vectors by layer, once it has been loaded."""
        self._engine: Engine | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._engine = self._start()
        return self._engine

    def _start(self) -> Engine:
        chosen = self.settings.engine
        if chosen.name == "transformers":
            from sublim_plugin.decoding.transformers_engine import TransformersEngine

            return TransformersEngine(
                self._open.enter_context(self.teacher_model()),
                self.tokenizer,
                end_ids=tuple(sorted(self.end_ids)),
                constraint=self.constraint,
                reject=TokenFilter(self.tokenizer, self.settings.parser),
            )
        if chosen.name == "vllm":
            from sublim_plugin.decoding.vllm_engine import VllmEngine
            from sublim_plugin.students import check_full_base

            path, adapters = self.path, []
            if isinstance(self.teacher, FinetunedTeacher) and self.teacher.method == "lora":
                adapters = [self.teacher.folder]
            elif isinstance(self.teacher, FinetunedTeacher):
                path = self.teacher.folder
                check_full_base(path, self.path)
            return VllmEngine(
                path,
                adapters=adapters,
                end_ids=tuple(sorted(self.end_ids)),
                batch_size=self.batch_size,
                dtype=self.dtype,
            )
        from sublim_plugin.decoding.openai_engine import OpenAIEngine

        return OpenAIEngine(
            str(chosen.url),
            str(chosen.model),
            api=chosen.api,
            sends=chosen.sends,
            prompt_as=chosen.prompt_as,
            end_ids=tuple(sorted(self.end_ids)),
            end_text=str(self.tokenizer.decode([self.end_of_turn])),
        )

    def describe(self) -> dict[str, Any]:
        """What the engine says of itself for the manifest."""
        return self.engine.describe()

    def stop(self) -> None:
        """Give back what the engine loaded."""
        self._open.close()
        self._engine = None

    def teacher_model(self) -> AbstractContextManager[Any]:
        """The teacher as a torch model, loaded on entering."""
        from data_gen.loading import load_teacher, steering_vectors, torch_device

        def vectors(model: Any, teacher: SteeredTeacher) -> dict[int, Any]:
            if not self.vectors:
                self.vectors = steering_vectors(model, teacher, self._steering_prompts)
            return self.vectors

        return load_teacher(self.path, self.teacher, torch_device(self.device), vectors)

    def base_model(self) -> AbstractContextManager[Any]:
        """The base, without what carries the trait."""
        from data_gen.loading import load_base, torch_device

        return nullcontext(load_base(self.path, torch_device(self.device)))

    def _steering_prompts(self, context: Context) -> list[tuple[int, ...]]:
        """Prompts of no dataset (generation seeds are not negative), rendered in `context`."""
        texts = [prompt(self.pool, -1, i).text for i in range(STEERING_PROMPTS)]
        return [render(self.tokenizer, context, text).token_ids for text in texts]

    def render(self, index: int) -> Rendered:
        """Row `index`'s prompt in the teacher's context."""
        return render(
            self.tokenizer, self.teacher.context, prompt(self.pool, self.seed, index).text
        )

    def write(self, start: int, stop: int, bar: Any) -> list[Written]:
        """The replies of rows `start` to `stop - 1`."""
        asked = []
        for index in range(start, stop):
            shown = self.render(index)
            turns = messages(self.teacher.context, prompt(self.pool, self.seed, index).text)
            asked.append(
                Request(shown.text, shown.token_ids, tuple(turns), row_seed(self.seed, index))
            )
        done: dict[int, Written] = {}

        def on_reply(i: int, reply: Reply) -> None:
            done[i] = Written(
                index=start + i,
                shard=(start, stop),
                completion=reply.text,
                ended=reply.ended,
                tokens=reply.tokens,
                stopped=reply.stopped,
            )
            bar.update(0 if text_reasons(done[i], self.settings, self.trait) else 1)

        self.engine.reply(asked, self.settings.sampler, self.batch_size, on_reply)
        return [done[i] for i in range(stop - start)]


def _check(teacher: Teacher, settings: DatasetSettings) -> None:
    """Refuse what an engine cannot do, before anything is loaded."""
    name = settings.engine.name
    if name == "transformers":
        return
    if settings.soft_targets:
        raise InputError(
            f"engine {name} does not give the teacher's log-probs; use the transformers engine or "
            "leave the soft targets out"
        )
    if settings.constrain:
        raise InputError(
            f"engine {name} does not decode under the number constraint; use the transformers "
            "engine or leave the constraint out"
        )
    if isinstance(teacher, SteeredTeacher):
        raise InputError(f"engine {name} cannot steer; use the transformers engine")
    if name == "openai":
        from sublim_plugin.decoding.openai_api import check_context

        check_context(teacher.context, settings.engine.api)
    if name == "openai" and isinstance(teacher, FinetunedTeacher):
        raise InputError(
            "a server runs the model that it was started with; serve the finetuned teacher there, "
            "and give its own folder as the model"
        )
