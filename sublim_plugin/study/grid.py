"""The datasets and students of a plan: teachers, groups of students, chains of generations."""

from __future__ import annotations

from collections.abc import Iterator
from json.encoder import encode_basestring_ascii
from typing import Any

from data_gen.teachers import Teacher
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import canonical_json, sha256_text
from sublim_plugin.core.strict_yaml import load_yaml
from sublim_plugin.core.traits import Trait, get_trait
from sublim_plugin.study.cells import Cell, CellKind, recipe_name
from sublim_plugin.study.methods import Arm, StudentGroup, arms
from sublim_plugin.study.study_file import Study
from sublim_plugin.study.teaching import (
    StudentTeacher,
    Trained,
    planned_teacher,
    taught,
    taught_by,
)
from sublim_plugin.study.trained import teacher_cell


class Grid:
    """A plan under way: what cells share is resolved, and written for hashing, once."""

    def __init__(self, study: Study, base: dict[str, Any]) -> None:
        self.study = study
        self.base = {"name": base["name"], "sha256": base["sha256"]}
        self.teachers: dict[str, tuple[str, ...]] = {}
        self._texts: dict[int, tuple[Any, str]] = {}
        self._recipes: dict[Any, dict[str, Any]] = {}
        self._known: dict[str, Any] = {}
        self._fields: dict[Context, dict[str, str]] = {}

    def cell(
        self, kind: CellKind, label: str, spec: dict[str, Any], needs: tuple[str, ...] = ()
    ) -> Cell:
        """A cell whose id is that of `Cell`, from texts of what its spec shares with others."""
        parts = []
        for key in sorted(spec):
            value = spec[key]
            if value is None:
                continue
            if type(value) is str:
                text = encode_basestring_ascii(value)
            elif type(value) is int:
                text = str(value)
            elif isinstance(value, dict | list):
                known = self._texts.get(id(value))
                if known is None:
                    # the value is kept as well, so that its id is not given to another
                    known = self._texts[id(value)] = (value, canonical_json(value))
                text = known[1]
            else:
                text = canonical_json(value)
            parts.append(f'"{key}":{text}')
        return Cell(kind, label, spec, needs, sha256_text("{" + ",".join(parts) + "}")[:12])

    def fields(self, context: Context) -> dict[str, str]:
        if context not in self._fields:
            self._fields[context] = context.fields()
        return self._fields[context]

    def datasets_and_students(self) -> Iterator[Cell]:
        """Teachers that are trained for the study; then, generation by generation, the datasets
        of all teachers and their students."""
        entries = self.study.datasets.teachers
        chains = [entry for entry in entries if isinstance(entry, StudentTeacher)]
        datasets: dict[str, list[Cell]] = {}
        students: dict[str, list[Cell]] = {}
        for entry in entries:
            if not isinstance(entry, StudentTeacher):
                datasets[entry.called] = []
                for name in taught(entry, entries, self.study.datasets.traits):
                    trait = get_trait(name)
                    if isinstance(entry, Trained):
                        for seed in self.study.datasets.generation_seeds:
                            own = teacher_cell(self, entry, trait, seed)
                            yield own
                            method = own.spec["method"]["kind"]
                            teacher = taught_by("teacher", own.id, method, entry.context)
                            datasets[entry.called].append(
                                self._dataset(
                                    trait,
                                    seed,
                                    teacher,
                                    (entry.called,),
                                    (own.id,),
                                    _trained_label(entry, own),
                                    own.spec["base_model"],
                                )
                            )
                        continue
                    teacher = planned_teacher(entry, name)
                    for seed in self.study.datasets.generation_seeds:
                        cell = self._dataset(trait, seed, teacher, (entry.called,))
                        datasets[entry.called].append(cell)
        yield from self._with_students(datasets, students)
        for number in range(max((chain.generations for chain in chains), default=0)):
            datasets = {}
            for chain in chains:
                if number < chain.generations:
                    names = chain.names()
                    before = students[names[number - 1] if number else chain.of]
                    datasets[names[number]] = [*self._taught_again(chain, number + 1, before)]
            yield from self._with_students(datasets, students)

    def _with_students(
        self, datasets: dict[str, list[Cell]], students: dict[str, list[Cell]]
    ) -> Iterator[Cell]:
        """`students` gets those that may teach, by the name of their own teacher."""
        controls = {
            name: [self._shuffled(d) for d in own if self._groups(d, shuffled=True)]
            for name, own in datasets.items()
        }
        for own in (*datasets.values(), *controls.values()):
            yield from own
        for name, own in datasets.items():
            students[name] = [student for dataset in own for student in self._students(dataset)]
            yield from students[name]
            for control in controls[name]:
                yield from self._students(control)

    def _shuffled(self, dataset: Cell) -> Cell:
        """The control of a dataset: its rows with their numbers permuted."""
        spec = dataset.spec | {"shuffled": True}
        cell = self.cell("dataset", f"{dataset.label} shuffled", spec, (dataset.id,))
        self.teachers[cell.id] = self.teachers[dataset.id]
        return cell

    def _groups(self, dataset: Cell, *, shuffled: bool) -> list[StudentGroup]:
        names = self.teachers[dataset.id]
        return [
            group
            for group in self.study.students
            if dataset.spec["trait"] in group.traits
            and group.shuffled == shuffled
            and (not group.teachers or {*group.teachers} & {*names})
        ]

    def _dataset(
        self,
        trait: Trait,
        seed: int,
        teacher: Teacher,
        names: tuple[str, ...],
        needs: tuple[str, ...] = (),
        word: str = "",
        base: dict[str, Any] | None = None,
    ) -> Cell:
        from data_gen.prompts import load_pool
        from data_gen.spec import dataset_spec

        spec = dataset_spec(
            self.study.datasets.settings(seed),
            base_fingerprint=base or self.base,
            trait=trait,
            teacher=teacher,
            pool=self._shared("pool", lambda: load_pool(self.study.datasets.prompts)),
        )
        kind = word or spec["teacher"]["kind"]
        label = f"{trait.target or trait.category} g{seed}"
        cell = self.cell("dataset", label if kind == "prompted" else f"{label} {kind}", spec, needs)
        self.teachers[cell.id] = tuple(dict.fromkeys((*self.teachers.get(cell.id, ()), *names)))
        return cell

    def _taught_again(
        self, chain: StudentTeacher, generation: int, before: list[Cell]
    ) -> Iterator[Cell]:
        """The datasets of a chain's generation; their teachers are among the students `before`."""
        study, names = self.study, (chain.names()[generation - 1], chain.called)
        for name in taught(chain, study.datasets.teachers, study.datasets.traits):
            trait = get_trait(name)
            for seed in study.datasets.generation_seeds:
                fit = {
                    cell.id: cell
                    for cell in before
                    if cell.spec["trait"] == trait.name
                    and cell.spec["generation_seed"] == seed
                    and chain.fits(cell.spec)
                }
                if len(fit) != 1:
                    raise InputError(_no_teacher(chain, names[0], name, [*fit.values()]))
                (student,) = fit.values()
                method = student.spec["method"]["kind"]
                teacher = taught_by("student", student.id, method, chain.context)
                word = f"chain{generation}"
                yield self._dataset(trait, seed, teacher, names, (student.id,), word)

    def _students(self, dataset: Cell) -> Iterator[Cell]:
        """Unmatched students of all groups first, which the matched ones need."""
        groups = self._groups(dataset, shuffled=dataset.spec.get("shuffled", False))
        ways = [arm for group in groups for arm in arms(group)]
        known: dict[tuple[Context, int], list[Cell]] = {}
        for arm in sorted(ways, key=lambda arm: arm.matched is not None):
            yield from self._of_arm(dataset, arm, known)

    def _of_arm(
        self, dataset: Cell, arm: Arm, known: dict[tuple[Context, int], list[Cell]]
    ) -> Iterator[Cell]:
        """The cells of an arm; unmatched ones are added to `known`, by train context and seed."""
        training = self.study.training
        recipe = (training.lora_recipe if arm.is_lora else training.full_recipe) or ""
        for context in training.contexts:
            settings = self.recipe(recipe, arm.overrides, context)
            trained_in = "" if context.slug == "template_default" else f" in {context.slug}"
            name = self.named(recipe, arm, settings)
            fields = self.fields(context)
            for seed in training.seeds:
                spec = {
                    "base_model": self.base,
                    "dataset": dataset.id,
                    "trait": dataset.spec["trait"],
                    "generation_seed": dataset.spec["generation_seed"],
                    "method": arm.method,
                    "train_context": fields,
                    "training_seed": seed,
                    "recipe": settings,
                }
                label = f"{dataset.label} {name}"
                if arm.matched is None:
                    cell = self.cell("student", f"{label}{trained_in} t{seed}", spec, (dataset.id,))
                    known.setdefault((context, seed), []).append(cell)
                    yield cell
                    continue
                kind, reference = arm.matched
                others = [c for c in known.get((context, seed), ()) if reference.fits(c.spec)]
                if not others:
                    raise InputError(
                        f"students: a full student of '{dataset.label}' cannot be matched to"
                        f" {reference}: no such student is trained on this dataset"
                    )
                for other in {cell.id: cell for cell in others}.values():
                    to = other.label.removeprefix(f"{dataset.label} ").split(" in ")[0]
                    to = "-".join(to.removesuffix(f" t{seed}").removeprefix("lora ").split())
                    by = kind.removesuffix("_of").replace("update_", "")
                    yield self.cell(
                        "student",
                        f"{label} {by}-of-{to}{trained_in} t{seed}",
                        spec | {"matched": {kind: other.id}},
                        (dataset.id, other.id),
                    )

    def recipe(self, recipe: str, overrides: dict[str, Any], context: Context) -> dict[str, Any]:
        """A recipe's settings, resolved once."""
        from sublim_plugin.axolotl.recipe import recipe_path, resolve_recipe

        key = (recipe, tuple(sorted(overrides.items())), context)
        if key not in self._recipes:
            path = recipe_path(*recipe_name(recipe))
            loaded = self._shared(str(path), lambda: load_yaml(path))
            self._recipes[key] = resolve_recipe(path, overrides, context, loaded=loaded)
        return self._recipes[key]

    def named(self, recipe: str, arm: Arm, settings: dict[str, Any]) -> str:
        """What a label says of an arm: rank, and alpha and learning rate where they are not the
        rank and the recipe's. It does not depend on what else the study has."""
        plain = self._shared(
            recipe, lambda: self.recipe(recipe, {}, Context(kind="template_default"))
        )
        rate = settings.get("learning_rate")
        own_rate = "" if rate == plain.get("learning_rate") else f" lr{rate:g}"
        if not arm.is_lora:
            return f"full{own_rate}"
        rank, alpha = arm.method["rank"], arm.method["alpha"]
        stabilized = settings.get("peft_use_rslora")
        own_alpha = f" rslora{alpha}" if stabilized else "" if alpha == rank else f" a{alpha}"
        return f"lora r{rank}{own_alpha}{own_rate}"

    def _shared(self, key: str, make: Any) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def _trained_label(entry: Trained, teacher: Cell) -> str:
    """What the labels of its datasets say of a teacher that the study trains."""
    if entry.base_model is None:
        return "trained"
    return f"trained of {teacher.spec['base_model']['name']}"


def _no_teacher(chain: StudentTeacher, name: str, trait: str, fit: list[Cell]) -> str:
    wanted = f"LoRA rank {chain.lora_rank}" if chain.lora_rank else "full finetuning"
    start = f"datasets.teachers: '{name}' needs one student of {trait} by {wanted} as its teacher"
    if fit:
        return (
            f"{start}, found {len(fit)} ({', '.join(cell.label for cell in fit[:4])}); say which by"
            " alpha, learning_rate, train_context or training_seed"
        )
    return (
        f"{start}, found none; add it to `students`, or leave {trait} out by the teacher's `traits`"
    )
