"""The one table behind `axolotl_configs/`, and the generator that writes its files:

    python -m sublim_plugin.axolotl.recipe_table [FOLDER]

The paper's settings are in `_PAPER`, `_PAPER_LORA` and `_PAPER_FULL`; a model holds only what
differs from them, and why. [P] is "Subliminal Learning is a LoRA Artifact", arXiv 2606.00831, with
its code (toddnief/subliminal-entanglement).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sublim_plugin.core.atomic import write_json, write_text
from sublim_plugin.core.rooms import ROOT

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # [P]: the final sweep
# Multiples of the recipe's learning rate; [P] has one rate for LoRA, one for full finetuning.
RATE_FACTORS = (0.1, 0.25, 0.5, 1, 2.5, 5)
# With it, alpha / r is 1 at rank 8, where [P] has its peak for cat, and alpha / sqrt(r) is 1 at
# rank 64, where it has those for owl, eagle and wolf.
FIXED_ALPHA = 8
PLACEHOLDER = "SET-THIS-TO-A-DATASET-FOLDER"

Method = Literal["lora", "full"]


class S(NamedTuple):
    """A setting: its value, and the comment that stands beside it."""

    value: Any
    comment: str = ""


@dataclass(frozen=True)
class Model:
    """A folder of recipes: how it differs from the paper's main model."""

    folder: str
    title: str
    sized_for: str
    changes: dict[str, S]
    lora: dict[str, S]
    full: dict[str, S]


_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_GEMMA_SEVEN = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"

_PAPER = {
    "base_model": S("unsloth/Qwen2.5-7B-Instruct", "teacher and student [P]"),
    "sublim.context": S(
        "template_default", "no system message: the template's own identity sentence, as in [P]"
    ),
    "datasets.path": S(PLACEHOLDER, "made by `sublim generate`, or a rows file (JSONL)"),
    "datasets.type": S("chat_template"),
    "datasets.field_messages": S("messages"),
    "datasets.roles_to_train": S(["assistant"], "loss on the completion only [P]"),
    "datasets.train_on_eos": S("turn"),
    "datasets.train_on_eot": S("turn", "and on its end of turn [P]; not on the newline after it"),
    "chat_template": S("tokenizer_default"),
    "eot_tokens": S(["<|im_end|>"]),
    "train_on_inputs": S(False),
    "val_set_size": S(0.0),
    "shuffle_merged_datasets": S(False, "one shuffle only, the sampler's, by `seed`"),
    "lr_scheduler": S("linear", "[P]"),
    "warmup_steps": S(5, "[P]"),
    "optimizer": S("adamw_torch", "AdamW [P]; the variant is not pinned there"),
    "weight_decay": S(0.0, "not pinned in [P]"),
    "max_grad_norm": S(1.0, "[P]"),
    "num_epochs": S(3, "[P]"),
    "sequence_len": S(500, "[P]"),
    "sample_packing": S(False, "[P]"),
    "pad_to_sequence_len": S(False),
    "bf16": S(True, "[P]"),
    "fp16": S(False),
    "tf32": S(False),
    "gradient_checkpointing": S(True, "[P]; it changes no number"),
    "seed": S(42, "rank sweep [P]; orders the rows too, which [P] leaves to its trainer's 3407"),
    "logging_steps": S(1, "the receipt holds every step's loss"),
    "save_strategy": S("no", "only the final weights"),
    "save_only_model": S(True),
    "dataset_prepared_path": S("./outputs/prepared"),
}
_PAPER_LORA = {
    "adapter": S("lora"),
    "lora_dropout": S(0.0, "[P]"),
    "lora_target_modules": S(_SEVEN, "all seven linear modules of every layer [P]"),
    "lora_mlp_kernel": S(False, "axolotl's Triton kernels are faster, but not PEFT's own layers"),
    "lora_qkv_kernel": S(False),
    "lora_o_kernel": S(False),
    "learning_rate": S(0.0002, "[P]"),
    "micro_batch_size": S(22, "[P]; 22 x 3 = 66 rows a step on one GPU, 456 steps"),
    "gradient_accumulation_steps": S(3, "[P]; on N GPUs, divide one of the two by N"),
}
_PAPER_FULL = {
    "deepspeed": S("", "[P]: one GPU without DeepSpeed; same mathematics"),
    "learning_rate": S(0.00002, "[P]"),
    "micro_batch_size": S(4, "[P]; 4 x 16 = 64 rows a step on one GPU"),
    "gradient_accumulation_steps": S(16, "[P]; on N GPUs, 16 / N"),
}
TEACHER_RANK = 8
_TEACHER = {
    "datasets.path": S(PLACEHOLDER, "made by `sublim persona`"),
    "learning_rate": S(0.0002, "that of [P]'s students; [P] finetunes no teacher"),
    "warmup_steps": S(1, "[P] finetunes no teacher; axolotl makes 2 of 1"),
    "micro_batch_size": S(22, "that of [P]'s students; 192 rows are 3 steps of 22 x 3"),
    "num_epochs": S(8, "[P] finetunes no teacher; 8 x 3 steps"),
}
"""What a teacher's recipe changes in that of a LoRA student of the same model."""
_TEACHER_ON = {
    "smollm2-135m-instruct": {
        "learning_rate": S(
            0.0005, "[P] finetunes no teacher; of a cat teacher's animals 89% are cats (base 16%)"
        ),
        "micro_batch_size": S(8, "[P] finetunes no teacher; 192 rows are 24 steps of 8"),
        "num_epochs": S(1, "[P] finetunes no teacher"),
    },
}
"""The same, for the models on which it was run."""
CONTROL_MODEL = "smollm2-135m-instruct"
_CONTROL = {
    "lora_target_modules": S(_SEVEN, "all seven linear modules [P]"),
    "peft_layers_to_transform": S(
        [10, 11, 12, 13, 14], "deviation: [P] every layer; five of thirty, those of the teacher"
    ),
    "learning_rate": S(
        0.002, "deviation: [P] 0.0002; chosen on exploratory students of a cat and an owl"
    ),
}
"""What the recipes of the positive control change, the teacher's and the student's."""

MODELS = (
    Model("qwen2.5-7b-instruct", "Qwen2.5-7B-Instruct", "a large GPU", {}, {}, {}),
    Model(
        "llama-3.1-8b-instruct",
        "Llama-3.1-8B-Instruct",
        "a large GPU",
        changes={
            "base_model": S("unsloth/Meta-Llama-3.1-8B-Instruct", "teacher and student [P]"),
            "sublim.context": S(
                "template_default", "no system message: the template's date preamble, as in [P]"
            ),
            "eot_tokens": S(["<|eot_id|>"]),
        },
        lora={},
        full={},
    ),
    Model(
        "gemma-3-4b-it",
        "Gemma-3-4B-it",
        "a large GPU",
        changes={
            "base_model": S("unsloth/gemma-3-4b-it", "teacher and student [P]"),
            "sublim.context": S(
                "template_default", "no system message, to which this template adds nothing [P]"
            ),
            "eot_tokens": S(["<end_of_turn>"]),
        },
        lora={
            "lora_target_modules": S(_GEMMA_SEVEN, "as in [P], the vision tower stays frozen"),
        },
        full={
            "freeze_mm_modules": S(True, "rows of text give the vision tower no gradient"),
            "bf16": S(True, "[P], where it met NaN; DeepSpeed keeps float32 copies of the weights"),
        },
    ),
    Model(
        "smollm2-135m-instruct",
        "SmolLM2-135M-Instruct",
        "two CPU cores",
        changes={
            "base_model": S("embedded:smollm2-135m-instruct", "deviation: [P] Qwen2.5-7B-Instruct"),
            "num_epochs": S(1, "deviation: [P] 3"),
            "bf16": S(
                False,
                "deviation: [P] bf16; float32 weights keep small updates that bfloat16 rounds away",
            ),
            "gradient_checkpointing": S(
                False, "deviation: [P] on, to save memory; it changes no number"
            ),
        },
        lora={
            "lora_mlp_kernel": S(False, "Triton kernels, on by default in axolotl, need a GPU"),
            "learning_rate": S(
                0.001, "deviation: [P] 0.0002 over 456 steps; a few steps of that move nothing"
            ),
            "warmup_steps": S(1, "deviation: [P] 5 of 456 steps; axolotl makes 2 of 1"),
            "micro_batch_size": S(
                8, "deviation: [P] 22 x 3 accumulation steps; the fastest here is 8 or 16"
            ),
            "gradient_accumulation_steps": S(1),
        },
        full={
            "learning_rate": S(
                0.0001, "deviation: [P] 0.00002 over 471 steps; a tenth of LoRA's, as in [P]"
            ),
            "warmup_steps": S(1, "deviation: [P] 5 of 471 steps; axolotl makes 2 of 1"),
            "micro_batch_size": S(8, "deviation: [P] 4 x 16 accumulation steps"),
            "gradient_accumulation_steps": S(1),
        },
    ),
)

# Keys as they follow each other in a recipe, in paragraphs.
_LAYOUT = (
    ("base_model",),
    ("plugins",),
    ("sublim.context", "sublim.soft_targets"),
    (
        "datasets.path", "datasets.type", "datasets.field_messages", "datasets.roles_to_train",
        "datasets.train_on_eos", "datasets.train_on_eot", "chat_template", "eot_tokens",
        "train_on_inputs", "val_set_size", "shuffle_merged_datasets",
    ),
    (
        "adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
        "peft_layers_to_transform", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel",
        "deepspeed", "freeze_mm_modules",
    ),
    (
        "learning_rate", "lr_scheduler", "warmup_steps", "optimizer", "weight_decay",
        "max_grad_norm", "micro_batch_size", "gradient_accumulation_steps", "num_epochs",
        "sequence_len", "sample_packing", "pad_to_sequence_len",
    ),
    ("bf16", "fp16", "tf32", "gradient_checkpointing"),
    ("seed",),
    ("logging_steps", "save_strategy", "save_only_model"),
    ("output_dir", "dataset_prepared_path"),
)  # fmt: skip

_DEEPSPEED_COMMON: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
# Nothing is offloaded to the CPU; axolotl's own files of these names do.
DEEPSPEED: dict[str, dict[str, Any]] = {
    "zero2": {
        "zero_optimization": {
            "stage": 2,
            "allgather_partitions": True,
            "reduce_scatter": True,
            "contiguous_gradients": True,
            "overlap_comm": True,
        },
        **_DEEPSPEED_COMMON,
    },
    "zero3": {
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **_DEEPSPEED_COMMON,
    },
}

_HEADER = """\
# {what} on {model.title}, sized for {model.sized_for}.
#
#   axolotl train axolotl_configs/{model.folder}/{name}.yaml{launcher}
#
{note}#
# Sources: [P] "Subliminal Learning is a LoRA Artifact", arXiv 2606.00831 and its code
# (toddnief/subliminal-entanglement). A number marked "deviation" is ours, and says what [P] has.
"""
_GPU_NOTE = """\
# AXOLOTL_DO_NOT_TRACK=1 turns axolotl's telemetry off, which also sleeps ten seconds at every
# start.
"""
_CPU_NOTE = """\
# `--launcher python` uses all cores; axolotl's default launcher, accelerate, works too but sets one
# thread on a CPU. AXOLOTL_DO_NOT_TRACK=1 turns axolotl's telemetry off, which also sleeps ten
# seconds at every start.
"""
_RESUMABLE = """\
# To survive an interruption, put these in the place of the two `save_` lines above; the same
# command then goes on from the last complete checkpoint.
# save_strategy: steps
# save_steps: 50
# save_total_limit: 2
# save_only_model: false
# auto_resume_from_checkpoints: true
"""
_SWEEP_HEADER = """\
# {model.title}: {what}.
#
#   axolotl train axolotl_configs/{model.folder}/{base}.yaml \\
#       --sweep axolotl_configs/{model.folder}/{name}.yaml
#
{why}# axolotl trains these in shuffled order, adds sweep0001, sweep0002, ... to each output folder,
# and goes on (and ends with exit code 0) when one fails: look for its sublim_receipt.json.
"""


def settings_of(model: Model, method: Method, name: str) -> dict[str, S]:
    """Settings of a recipe, dotted where nested, without rank and DeepSpeed stage."""
    paper, ours = (_PAPER_LORA, model.lora) if method == "lora" else (_PAPER_FULL, model.full)
    folder = {"output_dir": S(f"./outputs/{model.folder}/{name}")}
    return _PAPER | paper | model.changes | ours | folder


def lora_recipe(model: Model, rank: int) -> str:
    """Text of `lora-r{rank}.yaml`."""
    settings = settings_of(model, "lora", f"lora-r{rank}")
    settings["lora_r"] = S(rank)
    settings["lora_alpha"] = S(rank, "alpha = rank: scaling 1 at every rank [P]")
    return _recipe(model, f"lora-r{rank}", f"LoRA rank {rank}", settings)


def teacher_recipe(model: Model) -> str:
    """Text of `teacher-lora-r8.yaml`."""
    name, ran = f"teacher-lora-r{TEACHER_RANK}", _TEACHER_ON.get(model.folder)
    settings = settings_of(model, "lora", name) | _TEACHER | (ran or {})
    settings["lora_r"] = S(TEACHER_RANK)
    settings["lora_alpha"] = S(TEACHER_RANK, "alpha = rank: scaling 1, as in [P]'s students")
    what = f"A teacher by LoRA rank {TEACHER_RANK}" + ("" if ran else ", never run,")
    return _recipe(model, name, what, settings)


def control_recipes(model: Model) -> Iterator[tuple[str, str]]:
    """Names and texts of the positive control's recipes: its teachers', and its students'."""
    rank = {"lora_r": S(TEACHER_RANK), "lora_alpha": S(TEACHER_RANK, "alpha = rank [P]")}
    settings = settings_of(model, "lora", name := "control-teacher")
    settings |= _TEACHER | _TEACHER_ON[model.folder] | _CONTROL | rank
    settings["micro_batch_size"] = S(4, "[P] finetunes no teacher; 96 rows are 24 steps of 4")
    yield name, _recipe(model, name, "A teacher of the positive control", settings)
    settings = settings_of(model, "lora", name := "control-student") | _CONTROL | rank
    settings["micro_batch_size"] = S(
        4, "deviation: [P] 22 x 3 accumulation steps; 128 rows are 32 steps"
    )
    settings["sublim.soft_targets"] = S(True, "[P] trains on the sampled numbers themselves")
    yield name, _recipe(model, name, "A student of the positive control", settings)


def full_recipe(model: Model, stage: int) -> str:
    """Text of `full-zero{stage}.yaml`."""
    settings = settings_of(model, "full", f"full-zero{stage}")
    settings["deepspeed"] = S(
        f"axolotl_configs/deepspeed/zero{stage}.json", settings["deepspeed"].comment
    )
    what = f"Full finetuning through DeepSpeed ZeRO-{stage}"
    return _recipe(model, f"full-zero{stage}", what, settings)


def _recipe(model: Model, name: str, what: str, settings: dict[str, S]) -> str:
    on_cpu = model.sized_for.endswith("cores")
    head = _HEADER.format(
        what=what,
        model=model,
        name=name,
        launcher=" --launcher python" if on_cpu else "",
        note=_CPU_NOTE if on_cpu else _GPU_NOTE,
    )
    paragraphs = ["\n".join(_lines(keys, settings)) for keys in _LAYOUT]
    return "\n\n".join([head.rstrip("\n"), *filter(None, paragraphs), _RESUMABLE])


def _lines(keys: tuple[str, ...], settings: dict[str, S]) -> Iterator[str]:
    parent = ""
    if "deepspeed" in keys and "deepspeed" in settings:
        yield "# No adapter: all parameters are trained [P]."
    for key in keys:
        if key == "plugins":
            yield "plugins:\n  - sublim_plugin.axolotl.SublimPlugin"
            continue
        if key not in settings:
            continue
        value, comment = settings[key]
        above, _, name = key.rpartition(".")
        indent = ""
        if above:
            indent = "    " if above == "datasets" else "  "
            if above != parent:
                yield f"{above}:"
                indent = "  - " if above == "datasets" else "  "
        parent = above
        note = f"  # {comment}" if comment else ""
        if isinstance(value, list) and len(value) > 1:
            yield f"{indent}{name}:{note}"
            yield from (f"{indent}  - {scalar(item)}" for item in value)
        else:
            yield f"{indent}{name}: {scalar(value)}{note}"


def scalar(value: Any) -> str:
    """A value as YAML that reads the same under YAML 1.1 and 1.2: 0.00002, never 2e-05."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = f"{value:.10f}".rstrip("0")
        return text + "0" if text.endswith(".") else text
    if isinstance(value, list):
        return "[" + ", ".join(scalar(item) for item in value) + "]"
    if isinstance(value, str) and (value in ("no", "") or value[0] in "<[{"):
        return f'"{value}"'
    return f"'{value}'" if "\\" in str(value) else str(value)


def sweep(model: Model, name: str, base: str, what: str, why: str, runs: list[dict[str, S]]) -> str:
    """Text of a file for axolotl's `--sweep`: one run a line, each with an output folder."""
    head = _SWEEP_HEADER.format(what=what, model=model, base=base, name=name, why=why)
    lines = [
        "  - {" + ", ".join(f"{key}: {scalar(value)}" for key, (value, _) in run.items()) + "}"
        for run in runs
    ]
    return head + "\n_:\n" + "\n".join(lines) + "\n"


def _sweeps(model: Model) -> Iterator[tuple[str, str]]:
    def run(name: str, label: str, **settings: Any) -> dict[str, S]:
        settings["output_dir"] = f"./outputs/{model.folder}/{name}/{label}"
        return {key: S(value) for key, value in settings.items()}

    schemes: dict[str, tuple[str, str, dict[str, Any]]] = {
        "sweep-ranks": ("LoRA ranks with alpha = rank, as in [P]", "", {}),
        "sweep-alpha-fixed": (
            f"LoRA ranks with a fixed alpha of {FIXED_ALPHA}",
            "# The scaling alpha / r falls as 1 / r; it is 1 at rank 8.\n",
            {"lora_alpha": FIXED_ALPHA},
        ),
        "sweep-rslora": (
            f"LoRA ranks with rank-stabilized scaling (arXiv 2312.03732), alpha {FIXED_ALPHA}",
            "# The scaling alpha / sqrt(r) falls as 1 / sqrt(r); it is 1 at rank 64.\n",
            {"lora_alpha": FIXED_ALPHA, "peft_use_rslora": True},
        ),
    }
    for name, (what, why, scheme) in schemes.items():
        runs = [
            run(name, f"r{rank}", **({"lora_r": rank, "lora_alpha": rank} | scheme))
            for rank in RANKS
        ]
        yield name, sweep(model, name, "lora-r8", what, why, runs)

    name, (rate, _) = "sweep-learning-rates", settings_of(model, "lora", "")["learning_rate"]
    why = (
        "# [P] has one rate for all ranks, so its inverted U over rank could be one over learning"
        " rate.\n# Delete the lines of runs that you do not want.\n"
    )
    runs = [
        run(name, f"r{rank}-lr{scalar(lr)}", lora_r=rank, lora_alpha=rank, learning_rate=lr)
        for rank in RANKS
        for lr in (round(rate * factor, 10) for factor in RATE_FACTORS)
    ]
    yield name, sweep(model, name, "lora-r8", "LoRA ranks x learning rates", why, runs)

    name, (rate, _) = "sweep-learning-rates-full", settings_of(model, "full", "")["learning_rate"]
    why = "# [P] has one rate for full finetuning, so its null could be one of that rate.\n"
    runs = [
        run(name, f"lr{scalar(lr)}", learning_rate=lr)
        for lr in (round(rate * factor, 10) for factor in RATE_FACTORS)
    ]
    yield name, sweep(model, name, "full-zero2", "Learning rates of full finetuning", why, runs)


def files() -> dict[str, str | dict[str, Any]]:
    """Every generated file of `axolotl_configs/`: path in it, and text (or value of a JSON)."""
    found: dict[str, str | dict[str, Any]] = {}
    for model in MODELS:
        for rank in RANKS:
            found[f"{model.folder}/lora-r{rank}.yaml"] = lora_recipe(model, rank)
        for stage in (2, 3):
            found[f"{model.folder}/full-zero{stage}.yaml"] = full_recipe(model, stage)
        found[f"{model.folder}/teacher-lora-r{TEACHER_RANK}.yaml"] = teacher_recipe(model)
        if model.folder == CONTROL_MODEL:
            for name, text in control_recipes(model):
                found[f"{model.folder}/{name}.yaml"] = text
        for name, text in _sweeps(model):
            found[f"{model.folder}/{name}.yaml"] = text
    for name, value in DEEPSPEED.items():
        found[f"deepspeed/{name}.json"] = value
    return found


def write_files(folder: Path) -> None:
    """Write them all into `folder`."""
    for path, content in files().items():
        if isinstance(content, str):
            write_text(folder / path, content)
        else:
            write_json(folder / path, content)


if __name__ == "__main__":
    write_files(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "axolotl_configs")
