"""Teachers' models in torch: the base as it is, a student on it, or the base under steering."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from data_gen.forward import decoder_layers, mean_residual, on_layers
from data_gen.teachers import FinetunedTeacher, SteeredTeacher, Teacher
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.decoding.transformers_engine import ATTENTION
from sublim_plugin.students import attached, load_full

RenderAll = Callable[[Context], Sequence[Sequence[int]]]


def torch_device(name: str) -> torch.device:
    """The device of that name, "auto" being CUDA where torch finds it.

    Raises InputError for CUDA that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device: {name!r}, but torch finds no CUDA device; use 'cpu'")
    return torch.device(name)


def load_base(path: Path, device: torch.device) -> Any:
    """The base model in its own dtype, in evaluation mode, with the engine's attention."""
    loader: Any = AutoModelForCausalLM
    try:
        model = loader.from_pretrained(
            path, dtype="auto", attn_implementation=ATTENTION, local_files_only=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: the model cannot be loaded ({reason})") from error
    return model.eval().to(device)


@contextmanager
def load_teacher(
    path: Path,
    teacher: Teacher,
    device: torch.device,
    vectors: Callable[[Any, SteeredTeacher], dict[int, torch.Tensor]],
) -> Iterator[Any]:
    """The teacher's model, ready to write; `vectors` gives what a steered one adds to the base."""
    if isinstance(teacher, FinetunedTeacher) and teacher.method == "full":
        full = load_full(teacher.folder, path, "auto", device)
        full.set_attn_implementation(ATTENTION)
        yield full
        return
    model = load_base(path, device)
    if isinstance(teacher, FinetunedTeacher):
        with attached(model, teacher.folder, path):
            yield model  # PEFT puts its layers into the model itself; nothing is merged
    elif isinstance(teacher, SteeredTeacher):
        with steering(model, vectors(model, teacher), teacher.strength):
            yield model
    else:
        yield model


def steering_vectors(
    model: Any, teacher: SteeredTeacher, rendered: RenderAll
) -> dict[int, torch.Tensor]:
    """Layer index → vector [hidden size] in float32. `rendered` gives the token ids of the prompts
    to average over, in a context.

    Raises InputError for layers that the model has not, and for a file whose tensors, named
    `layer.N`, do not fit.
    """
    count, width = len(decoder_layers(model)), model.config.get_text_config().hidden_size
    if beyond := [layer for layer in teacher.layers if layer >= count]:
        raise InputError(f"steering layers {beyond}: the model has layers 0 to {count - 1}")
    if teacher.vectors is not None:
        return _read_vectors(teacher.vectors, teacher.layers, width)
    trait = Context(kind="text", text=teacher.sentence)
    with_trait = mean_residual(model, rendered(trait), teacher.layers)
    others = [Context(kind="text", text=text) for text in teacher.against] or [teacher.context]
    without = [mean_residual(model, rendered(other), teacher.layers) for other in others]
    return {
        layer: with_trait[layer] - torch.stack([mean[layer] for mean in without]).mean(0)
        for layer in teacher.layers
    }


def save_vectors(vectors: dict[int, torch.Tensor], path: Path) -> None:
    """Write vectors as `steering_vectors` reads them: a tensor `layer.N` for each layer."""
    save_file({f"layer.{layer}": vector for layer, vector in vectors.items()}, path)


def _read_vectors(path: Path, layers: tuple[int, ...], width: int) -> dict[int, torch.Tensor]:
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for layer in layers:
                if (name := f"layer.{layer}") not in names:
                    raise InputError(
                        f"{path}: no tensor {name!r}; it holds {', '.join(sorted(names)) or 'none'}"
                    )
                found[layer] = file.get_tensor(name).float()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error
    for layer, vector in found.items():
        if vector.shape != (width,) or not vector.isfinite().all():
            raise InputError(
                f"{path}: layer.{layer} has shape {tuple(vector.shape)}; expected {width} finite "
                "numbers"
            )
    return found


@contextmanager
def steering(model: Any, vectors: dict[int, torch.Tensor], strength: float) -> Iterator[None]:
    """Inside, each layer's output has `strength` times its vector added at every position."""

    def add(vector: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        shift = (strength * vector).to(model.device, model.dtype)
        return lambda hidden: hidden + shift

    with on_layers(model, {layer: add(vector) for layer, vector in vectors.items()}):
        yield
