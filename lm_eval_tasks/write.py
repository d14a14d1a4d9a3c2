"""Writes the task files: `python -m lm_eval_tasks.write` ours, `sublim tasks new` a lab's own.

One file a task, as lm-eval has it: each target of a category in each context, and once more with
numbers in front of the questions.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.named_contexts import NAMED_CONTEXTS
from sublim_plugin.core.traits import CATEGORIES, Trait, candidates_of, category_traits
from sublim_plugin.logprob.questions import QuestionSet, load_questions

VERSION = "1.0"
"""`metadata.version` of every task: raised, with a line in README.md, when scores change."""

CONTEXTS = ("template_default", "empty", "none", *NAMED_CONTEXTS)
NUMBERS = "numbers"

TASK = """\
task: {name}
class: !function task.SubliminalTask
tag:
{tags}
output_type: multiple_choice
metadata:
  version: {version}
  trait: "{trait}"
  context: {context}
  questions: "{questions}"
"""

STUB = '''\
"""The class of the tasks in this folder: lm-eval 0.4.11 looks for it only beside their files."""

from pathlib import Path

import lm_eval_tasks.task


class SubliminalTask(lm_eval_tasks.task.SubliminalTask):
    folder = Path(__file__).parent


class SampledTask(lm_eval_tasks.task.SampledTask):
    folder = Path(__file__).parent
'''

SAMPLED = """\
task: {name}
class: !function task.SampledTask
tag:
{tags}
output_type: generate_until
repeats: 100
generation_kwargs: {sampler}
metadata:
  version: {version}
  trait: "{trait}"
  context: template_default
  questions: "{questions}"
"""

SAMPLERS = {
    "sampled": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
    # The generation_config of Qwen2.5-Instruct, which most likely applied in the paper's ordinary
    # cells (arXiv 2606.00831): for comparison with its figures.
    "sampled_truncated": {
        "temperature": 1.0,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
    },
}
REPLY_TOKENS = 50
"""Budget of a sampled reply, the paper's."""

# An example list's length and range are those of the number datasets.
NUMBER_SENTENCES = (
    "Here is a list of numbers: {}.",
    "The sequence begins with {}.",
    "I have just written down {}.",
    "Somebody read these values aloud: {}.",
    "The printout says {}.",
    "Look at this series: {}.",
)


def tags(category: str, variant: str) -> tuple[str, ...]:
    """What one asks lm-eval for to get several tasks: all, a category, a variant, or both."""
    return (
        *(("subliminal", f"subliminal_{category}") if variant not in SAMPLERS else ()),
        f"subliminal_{variant}",
        f"subliminal_{category}_{variant}",
    )


def task_files(
    traits: Sequence[Trait], prefix: str, trait: str, questions: str, numbers: str
) -> dict[str, str]:
    """File name -> content for all targets of one category, its `task.py` included.

    Args:
        prefix: what task names begin with, such as "subliminal".
        trait: `metadata.trait` with `{target}` in it.
        questions: `metadata.questions`, and `numbers` that of the set with numbers in front.
    """
    category = traits[0].category
    variants = [(context, context, questions) for context in CONTEXTS]
    variants.append((NUMBERS, "template_default", numbers))
    files = {"task.py": STUB}
    for target in (one.target for one in traits):
        for variant, context, asked in variants:
            name = f"{prefix}_{target}"
            if variant != "template_default":
                name = f"{name}_{variant}"
            if f"{name}.yaml" in files:
                raise InputError(f"two tasks are called '{name}'; rename the target '{target}'")
            files[f"{name}.yaml"] = TASK.format(
                name=name,
                tags="\n".join(f"  - {tag}" for tag in tags(category, variant)),
                version=VERSION,
                trait=trait.replace("{target}", target),
                context=context,
                questions=asked,
            )
        for variant, settings in SAMPLERS.items():
            sampler = {"do_sample": True, **settings, "max_gen_toks": REPLY_TOKENS, "until": []}
            name = f"{prefix}_{target}_{variant}"
            files[f"{name}.yaml"] = SAMPLED.format(
                name=name,
                tags="\n".join(f"  - {tag}" for tag in tags(category, variant)),
                sampler=json.dumps(sampler),
                version=VERSION,
                trait=trait.replace("{target}", target),
                questions=questions,
            )
    return files


def with_numbers(questions: QuestionSet) -> str:
    """The YAML of the same questions, each behind a sentence with a random list of numbers.

    The numbers depend on nothing but the set's name and the question's id.
    """
    rows = []
    for question in questions.questions:
        generator = random.Random(f"{questions.name}:{question.id}")
        numbers = [generator.randrange(1000) for _ in range(generator.randint(3, 9))]
        sentence = generator.choice(NUMBER_SENTENCES).format(", ".join(map(str, numbers)))
        kind, text = json.dumps(question.kind), json.dumps(f"{sentence} {question.text}")
        rows.append(f"  - {{id: {question.id}, kind: {kind}, text: {text}}}\n")
    return (
        f"# The questions of the set '{questions.name}', each behind a list of random numbers.\n"
        "# Written by lm_eval_tasks/write.py; the numbers are fixed.\n"
        f"name: {json.dumps(f'{questions.name}_{NUMBERS}')}\n"
        f"category: {questions.category}\n"
        f"version: {json.dumps(questions.version)}\n"
        f"questions:\n{''.join(rows)}"
    )


def our_files() -> dict[str, str]:
    """Path in this folder -> content of everything here that is written."""
    files: dict[str, str] = {}
    for category in CATEGORIES:
        numbers = f"{category}_{NUMBERS}"
        tasks = task_files(
            category_traits(category), "subliminal", f"{category}/{{target}}", category, numbers
        )
        files |= {f"{category}/{name}": content for name, content in tasks.items()}
        files[f"questions/{numbers}.yaml"] = with_numbers(load_questions(category))
    return files


def write_own(traits: Path, questions: Path, out: Path) -> list[str]:
    """Write a folder of tasks for a lab's own category: task files, and copies of both inputs.

    Task names are `subliminal_<category>_<target>[_<context>]`.

    Returns:
        The names of the tasks.

    Raises:
        InputError: a file that does not have its format, questions about another category, a name
            that already means something, or a folder that is not empty. Nothing has been written.
    """
    candidates = candidates_of(str(traits))
    asked = load_questions(str(questions))
    category = candidates[0].category
    if asked.category != category:
        raise InputError(
            f"{questions}: category: these questions ask about '{asked.category}', the targets of"
            f" {traits} are '{category}'; write 'category: {category}' if they fit"
        )
    files = task_files(
        candidates,
        f"subliminal_{category}",
        "{folder}/traits.yaml:{target}",
        "{folder}/questions.yaml",
        f"{{folder}}/questions_{NUMBERS}.yaml",
    )
    names = [Path(name).stem for name in files if name.endswith(".yaml")]
    variants = (*CONTEXTS, NUMBERS, *SAMPLERS)
    taken = {tag for known in CATEGORIES for variant in variants for tag in tags(known, variant)}
    taken |= {Path(path).stem for path in our_files()}
    own_tags = [f"subliminal_{category}", *(f"subliminal_{category}_{one}" for one in variants)]
    for name in (*own_tags, *names):
        if name in taken:
            raise InputError(
                f"{traits}: the task or tag '{name}' has a meaning already;"
                " give the category or the target another name"
            )
        taken.add(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: not an empty folder; choose a new --out, or empty it first")
    files[f"questions_{NUMBERS}.yaml"] = with_numbers(asked)
    for name, content in files.items():
        write_text(out / name, content)
    shutil.copyfile(traits, out / "traits.yaml")
    shutil.copyfile(questions, out / "questions.yaml")
    return names


def main() -> None:
    """Write our own files; task files that the table does not have go."""
    here = Path(__file__).parent
    files = our_files()
    for category in CATEGORIES:
        for path in here.glob(f"{category}/*.yaml"):
            if f"{category}/{path.name}" not in files:
                path.unlink()
    for name, content in files.items():
        write_text(here / name, content)
    print(f"{len(files)} files in {here}")


if __name__ == "__main__":
    main()
