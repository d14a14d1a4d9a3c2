"""A model that runs, at each position, in each layer and module, its base or a student.

Forward hooks on the modules that the student changes, nothing else: no weight is touched, and the
model's own forward pass, cache and generation stay as they are. Positions are the absolute ones
that the decoder is given (`position_ids`), never guessed from shapes: prompts, cached steps, left
padding and tree attention are all the same to a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sublim_plugin.core.errors import InputError
from sublim_plugin.localize.resolve import Branch, Resolved, constant

PROBE_LENGTHS = (29, 31, 37, 41, 43)
"""Tokens of the probe that finds each module's position axis; one that no other axis has."""


class Part(NamedTuple):
    """A branch and its modules.

    `module` is hooked. Its own output stands where the gate is on and zero where it is off; with
    `student`, the student's own module in its place, `student`'s output stands where the gate is on
    and `module`'s where it is off.
    """

    branch: Branch
    module: Any
    student: Any | None


class Gated:
    """See the module; made by `gating`.

    Attributes:
        model: the transformers causal LM to call, with `position_ids`.
        parts: the branches with their modules; branches: what a gate can turn on and off.
        layers: number of decoder layers.
    """

    def __init__(self, model: Any, parts: Sequence[Part], axes: Sequence[int]) -> None:
        self.model = model
        self.branches = tuple(part.branch for part in parts)
        self.layers = len(model.get_decoder().layers)
        self.parts, self._axes = tuple(parts), axes
        self._codes = torch.empty(0, 0, dtype=torch.long)
        self._tables = torch.empty(0, 0, 0, dtype=torch.bool)
        self._which: list[int] = []
        self._masks: list[Tensor] = []
        self._state: list[bool | None] = []
        self.use([constant(self.branches, on=True)])

    def use(self, rows: Sequence[Resolved]) -> None:
        """Set the gates of the forward passes that follow: one for each row of the batch, or one
        for all rows."""
        codes = torch.full((len(rows), 1 + max(len(row.selected) for row in rows)), 2)
        for i, row in enumerate(rows):
            # 0 is outside, 1 inside, 2 behind the prompt
            codes[i, : len(row.selected)] = torch.tensor(row.selected, dtype=torch.long)
        states = [(row.profile.outside, row.profile.inside, row.at_decode) for row in rows]
        each = torch.tensor(states, dtype=torch.bool).permute(2, 0, 1)  # [branches, rows, 3]
        # most branches share their states with others, so few masks are made per forward pass
        unique, which = torch.unique(each.flatten(1), dim=0, return_inverse=True)
        self._tables = unique.view(-1, len(rows), 3).to(self.model.device)
        self._codes = codes.to(self.model.device)
        self._which = which.tolist()

    def before(self, decoder: Any, args: Any, given: dict[str, Any]) -> None:
        """The decoder's pre-hook: the masks of this forward pass."""
        positions = given.get("position_ids")
        if positions is None:
            raise InputError(
                "a gated model needs the tokens' absolute positions: pass position_ids (generate "
                "does so by itself)"
            )
        inputs: Any = given.get("input_ids", args[0] if args else None)
        came = (given["inputs_embeds"] if inputs is None else inputs).shape[0]
        if len(self._codes) not in (1, came):
            raise InputError(f"gates for {len(self._codes)} rows were set and {came} rows came in")
        rows = max(len(self._codes), positions.shape[0])
        at = positions.clamp(0, self._codes.shape[1] - 1).expand(rows, -1)
        codes = self._codes.expand(rows, -1).gather(1, at)
        tables = self._tables.expand(-1, rows, -1)
        masks = tables.gather(2, codes.expand(len(tables), -1, -1))  # [states, rows, length]
        full, some = masks.flatten(1).all(1).tolist(), masks.flatten(1).any(1).tolist()
        self._masks = list(masks)
        self._state = [True if f else None if s else False for f, s in zip(full, some, strict=True)]

    def hook(self, index: int) -> Callable[..., Any]:
        """The forward hook of a part."""
        student = self.parts[index].student

        def hook(module: Any, args: Any, given: dict[str, Any], output: Tensor) -> Tensor | None:
            on = self._state[self._which[index]]
            if student is None:
                if on is not False:
                    return None if on else torch.where(self._mask(index, output), output, 0.0)
                return torch.zeros_like(output)
            if on is False:
                return None
            other: Tensor = student(*args, **given)
            return other if on else torch.where(self._mask(index, output), other, output)

        return hook

    def _mask(self, index: int, output: Tensor) -> Tensor:
        """The branch's mask, broadcastable to its output."""
        mask, axis = self._masks[self._which[index]], self._axes[index]
        length = output.shape[axis]
        if length != mask.shape[1]:
            if self.branches[index].layer is not None or length > mask.shape[1]:
                raise InputError(
                    f"{self.branches[index].name}: {length} positions came in where the decoder "
                    f"was given {mask.shape[1]}; gates do not cover this architecture"
                )
            mask = mask[:, -length:]  # the output layer sees the last ones (logits_to_keep)
        shape = [1] * output.ndim
        shape[0], shape[axis] = mask.shape[0], length
        return mask.reshape(shape)


@contextmanager
def gating(model: Any, parts: Sequence[Part]) -> Iterator[Gated]:
    """Hook the parts, all on at first; on leaving, the hooks are gone.

    Raises:
        InputError: a module's output has no axis of positions.
    """
    axes = _position_axes(model, [part.module for part in parts], [p.branch.name for p in parts])
    # a module that text never reaches (an image tower's) makes no difference
    used = [(part, axis) for part, axis in zip(parts, axes, strict=True) if axis is not None]
    gated = Gated(model, [part for part, _ in used], [axis for _, axis in used])
    handles = [model.get_decoder().register_forward_pre_hook(gated.before, with_kwargs=True)]
    for index, (part, _) in enumerate(used):
        hook = gated.hook(index)
        handles.append(part.module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield gated
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def probe(model: Any, length: int = PROBE_LENGTHS[0]) -> Tensor:
    """Logits [2, length, V] of a fixed input, for comparing models bit by bit."""
    rows = torch.arange(2 * length, device=model.device).view(2, length)
    logits: Tensor = model(
        input_ids=rows % model.config.get_text_config().vocab_size,
        position_ids=torch.arange(length, device=model.device).expand(2, -1),
        use_cache=False,
    ).logits
    return logits


def _position_axes(model: Any, modules: Sequence[Any], names: Sequence[str]) -> list[int | None]:
    """The axis of positions in each module's output; None for a module that was not run."""
    for length in PROBE_LENGTHS:
        shapes: dict[int, tuple[int, ...]] = {}

        def note(index: int, found: dict[int, tuple[int, ...]] = shapes) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                found[index] = tuple(output.shape) if isinstance(output, Tensor) else ()

            return hook

        handles = [m.register_forward_hook(note(i)) for i, m in enumerate(modules)]
        try:
            probe(model, length)
        finally:
            for handle in handles:
                handle.remove()
        axes = {i: [a for a, n in enumerate(s) if a and n == length] for i, s in shapes.items()}
        for index, found in axes.items():
            if not found or shapes[index][0] != 2:
                raise InputError(
                    f"{names[index]}: its output {list(shapes[index])} of two rows of {length} "
                    "tokens does not keep them apart; gates cover modules that do, in dense "
                    "transformers"
                )
        if all(len(found) == 1 for found in axes.values()):
            return [axes[i][0] if i in axes else None for i in range(len(modules))]
    raise InputError(f"{type(model).__name__}: the axes of its modules could not be told apart")
