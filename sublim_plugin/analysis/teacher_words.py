"""Teachers in words, and what datasets of different students as teachers have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sublim_plugin.analysis.collect import StudentRecord

STUDENT = "dataset.teacher.student"
TRAINED = "dataset.teacher.teacher"


def carries(teacher: Mapping[str, Any], known: Mapping[str, StudentRecord]) -> str:
    """What a teacher carries its trait in, as "The teacher had …" goes on; no system prompt, which
    is shown as it is."""
    kind = teacher.get("kind", "prompted")
    if kind == "steered":
        layers = ", ".join(str(layer) for layer in teacher.get("layers", []))
        return f"a steering vector behind layer {layers}, strength {teacher.get('strength')}"
    if kind == "finetuned":
        student = known.get(str(teacher.get("student"))[:12])
        if student is not None:
            return f"the weights of this study's student {student.id} ({method_of(student)})"
        if own := teacher.get("teacher"):
            return f"weights finetuned on answers in words (this study's teacher {own[:12]})"
        return f"finetuned weights ({teacher.get('student') or teacher.get('weights_sha256')})"
    return "no trait"


def method_of(student: StudentRecord) -> str:
    """A student's method with what sets the size of its steps."""
    method, recipe = student.spec.method, student.spec.recipe
    words = [method.name]
    if method.alpha is not None:
        stabilized = " (rsLoRA)" if recipe.get("peft_use_rslora") else ""
        words.append(f"alpha {method.alpha:g}{stabilized}")
    if isinstance(rate := recipe.get("learning_rate"), int | float):
        words.append(f"learning rate {rate:g}")
    return ", ".join(words)


def trained_by(spec: Mapping[str, Any]) -> str:
    """What sets how far a teacher that the study trains is from the base, from its spec."""
    method = spec["method"]
    words = [f"LoRA r={method['rank']}" if method["kind"] == "lora" else "full finetuning"]
    if isinstance(rate := spec["recipe"].get("learning_rate"), int | float):
        words.append(f"learning rate {rate:g}")
    return ", ".join([*words, f"{spec['persona']['rows']} rows"])


def in_words(fields: Mapping[str, Any]) -> str:
    """The teacher in a student's flat fields (see `student_settings`), short."""
    kind = fields.get("dataset.teacher.kind", "prompted")
    if STUDENT in fields and "dataset.generation" in fields:
        return f"teacher {fields[STUDENT]}, generation {fields['dataset.generation']}"
    if TRAINED in fields:
        return f"teacher trained by {fields[TRAINED]}"
    if kind == "steered":
        layers, strength = (fields.get(f"dataset.teacher.{k}") for k in ("layers", "strength"))
        return f"steered teacher, layers {layers}, strength {strength}"
    return f"{kind} teacher"
