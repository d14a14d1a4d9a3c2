"""The JSON schema of study files, for editors; `studies/study.schema.json` is written by

    python -m sublim_plugin.study.schema studies/study.schema.json

A file names it in its first line: `# yaml-language-server: $schema=study.schema.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.contexts import Kind
from sublim_plugin.core.named_contexts import NAMED_CONTEXTS
from sublim_plugin.core.traits import CATEGORIES, NEUTRAL, category_traits
from sublim_plugin.study.study_file import Study

_TEXTS = {
    "text": "The system message.",
    "user_prefix": "Text in front of the user's message, with a blank line between them.",
}


def schema() -> dict[str, Any]:
    """The schema, as pydantic has it, with the short forms that contexts and teachers have."""
    found = Study.model_json_schema(by_alias=True)
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    found["title"] = "sublim study"
    found["$defs"]["Context"] = _context()
    for name in ("Selector", "StudentGroup", "Datasets"):
        properties = found["$defs"][name]["properties"]
        traits = properties["trait" if name == "Selector" else "traits"]
        traits["items"] = _trait()
    for one in found["$defs"]["Selector"]["properties"].values():
        items = {key: one.pop(key) for key in ("type", "items") if key in one}
        one.pop("default", None)
        one["anyOf"] = [items["items"], items | {"minItems": 1}]
    group = found["$defs"]["StudentGroup"]["properties"]
    group["alphas"].pop("default")
    group["full"] = {
        "anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/FullStudents"}],
        "description": group["full"]["description"],
    }
    reference = found["$defs"].pop("Reference")
    reference.pop("description", None)
    for key in ("norm_matched_to", "loss_matched_to"):
        found["$defs"]["FullStudents"]["properties"][key]["items"] = {
            "anyOf": [{"type": "integer", "minimum": 1}, reference]
        }
    teachers = found["$defs"]["Datasets"]["properties"]["teachers"]
    teachers.pop("default")
    names = ("Prompted", "Finetuned", "Trained", "Steered", "StudentTeacher")
    for name in names:
        found["$defs"][name]["properties"]["kind"]["description"] = "What the teacher is."
    kinds = [f"#/$defs/{name}" for name in names]
    teachers["items"] = {"anyOf": [{"const": "prompted"}, *({"$ref": kind} for kind in kinds)]}
    return found


def _context() -> dict[str, Any]:
    texts = {key: {"type": "string", "description": told} for key, told in _TEXTS.items()}
    kind = {"enum": list(get_args(Kind)), "description": "What stands before the user's message."}
    common = {"type": "object", "additionalProperties": False}
    return {
        "title": "Context",
        "description": "template_default (the template's own system message), empty (a system "
        "message without text), none (no system turn), a named text such as claude, or {text: "
        "...}.",
        "anyOf": [
            {"enum": [*get_args(Kind)[:3], *NAMED_CONTEXTS]},
            {**common, "properties": texts, "required": ["text"]},
            {**common, "properties": {"kind": kind, **texts}, "required": ["kind"]},
        ],
    }


def _trait() -> dict[str, Any]:
    names = [trait.name for category in CATEGORIES for trait in category_traits(category)]
    return {"enum": [NEUTRAL, *names]}


def text() -> str:
    """The file's content."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), text())
