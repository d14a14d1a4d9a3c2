"""The report's methods text: one statement for each thing done, from the manifests.

Every statement is a line of methods.csv, in words that can go into a paper's appendix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis import page
from sublim_plugin.analysis.collect import DatasetRecord, ProbeRecord, RunRecords, StudentRecord
from sublim_plugin.analysis.page import Html
from sublim_plugin.analysis.record_tables import merged
from sublim_plugin.analysis.replication import MIN_DATASETS
from sublim_plugin.analysis.signals import KIND as SIGNAL
from sublim_plugin.analysis.student_settings import APART, settings_of
from sublim_plugin.analysis.teacher_words import carries
from sublim_plugin.core.hashing import sha256_text

NAMED_KEYS = {key.removeprefix("recipe.") for key in APART}
"""Keys of a recipe that are named by themselves: ranks, seeds, contexts, traits."""

CHANNEL = "Channel"
SOFT = "Soft targets"
"""How the note of a dataset's manifest begins that says what a student of it can show."""

SHUFFLED = (
    "The numbers of these replies were then permuted among the rows of each dataset, as a control."
)
PERMUTED = (
    "The teacher's distributions were then permuted among positions of one kind in each dataset, "
    "as a control."
)
CONSTRAINED = (
    "These numbers were decoded under the number constraint: while the teacher wrote, only digits, "
    "separators and the end of turn could be sampled. The teacher left alone may not answer in "
    "numbers."
)


class Statement(BaseModel):
    """One statement of the methods text.

    `cells` are the ids of the cells whose manifests say so (empty: all, or none); `cites` are keys
    of references.bib.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = ""
    topic: str
    text: str
    cites: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()


def references() -> str:
    """The BibTeX entries of what the methods text cites."""
    path = resources.files("sublim_plugin.analysis") / "references.bib"
    return path.read_text(encoding="utf-8")


def statements(
    run: RunRecords, margin: float | None, study_text: str | None
) -> tuple[Statement, ...]:
    """All statements, in the order of the text: M1, M2, ...

    Args:
        margin: the study file's equivalence margin in nats.
        study_text: the study file as run.
    """
    if not run.manifests:
        return ()
    found = [
        Statement(
            topic="Design",
            text="A teacher with a trait writes number sequences, a student is finetuned on the "
            "numbers alone, and the student's preference is measured.",
            cites=("nief2026", "cloud2025"),
        ),
        *_models(run),
        *_channels(run),
        *_datasets(run),
        *_students(run),
        *_scoring(run),
        *_statistics(margin),
        *_signals(run),
        *_versions(run, study_text),
    ]
    return tuple(s.model_copy(update={"id": f"M{i}"}) for i, s in enumerate(found, start=1))


def methods_section(told: Iterable[Statement]) -> Html:
    """The statements under their topics, and the BibTeX of what they cite."""
    own = list(told)
    if not own:
        return page.paragraph("Nothing was run, so there are no methods to describe.")
    parts = []
    for topic in dict.fromkeys(statement.topic for statement in own):
        parts.append(page.heading(topic))
        for one in own:
            if one.topic == topic:
                cites = f" [{', '.join(one.cites)}]" if one.cites else ""
                parts.append(page.said(f"{one.text}{cites}", "methods.csv", [one.id]))
    parts.append(page.heading("BibTeX"))
    link = 'The same as a file: <a href="references.bib">references.bib</a>.'
    parts += [page.pre(references(), "BibTeX entries"), page.paragraph(Html(link))]
    return page.join(parts)


def _models(run: RunRecords) -> Iterable[Statement]:
    specs = [d.spec.base_model for d in run.datasets] + [s.spec.base_model for s in run.students]
    specs += [probe.spec.base_model for probe in run.probes]
    models = dict.fromkeys((spec.name, spec.sha256) for spec in specs)
    for name, sha256 in models:
        yield Statement(topic="Models", text=f"Base model: {name}, sha256 {sha256}.")


def _channels(run: RunRecords) -> Iterable[Statement]:
    """What students were trained on, where that is not the sampled tokens."""
    claims: dict[str, list[DatasetRecord]] = {}
    for dataset in run.datasets:
        for note in dataset.manifest.notes:
            if note.startswith(SOFT):
                claims.setdefault(note, []).append(dataset)
    for claim, own in claims.items():
        all_of_them = len(own) == len(run.datasets)
        who = "Students" if all_of_them else f"Students of {len(own)} of the datasets"
        yield Statement(
            topic=CHANNEL,
            text=f"{who} match the teacher's distribution at every token of the replies, "
            f"by KL(teacher || student), and see no sampled token. {claim}",
            cells=_ids(own),
        )


def _datasets(run: RunRecords) -> Iterable[Statement]:
    known = {student.id: student for student in run.students}
    for own in _alike(run.datasets, lambda d: f"{d.condition} {d.spec.trait} {d.spec.teacher}"):
        spec = own[0].spec
        teacher = spec.teacher.get("kind", "prompted")
        system = spec.teacher.get("context", {}).get("text")
        prompt = (
            f"the system prompt “{page.short(system, 1000)}”"
            if system and teacher == "prompted"
            else carries(spec.teacher, known)
        )
        seeds = _listed(record.spec.generation_seed for record in own)
        sampler = f"sampler {page.pairs(spec.sampler)}; " if spec.sampler else ""
        permuted = PERMUTED if own[0].manifest.spec.get("soft_targets") else SHUFFLED
        yield Statement(
            topic="Datasets",
            text=f"Numbers for {spec.trait}: {spec.rows} rows in each of {len(own)} datasets "
            f"(generation seeds {seeds}) from {spec.base_model.name} as a {teacher} teacher with "
            f"{prompt}; {sampler}prompt pool sha256 {spec.prompts_sha256}; parser {spec.parser}."
            + (f" {CONSTRAINED}" if spec.constrain == "numbers" else "")
            + (f" {permuted}" if spec.shuffled else ""),
            cells=_ids(own),
        )
    if run.datasets:
        yield Statement(
            topic="Datasets",
            text="The sha256 of every dataset's rows is in datasets.csv.",
            cells=_ids(run.datasets),
        )


def _students(run: RunRecords) -> Iterable[Statement]:
    settings = settings_of(run)
    for own in _alike(run.students, lambda s: f"{settings[s.id].family} {s.spec.method.kind}"):
        recipe = {k: v for k, v in _flat(own[0].spec.recipe).items() if k not in NAMED_KEYS}
        ranks = sorted({s.spec.method.rank for s in own if s.spec.method.rank is not None})
        rules = dict.fromkeys(rule for s in own for rule in settings[s.id].scalings)
        method = (
            f"LoRA of rank {_listed(ranks)} ({'; '.join(rules)})"
            if ranks
            else "full finetuning of every parameter"
        )
        text = (
            f"{len(own)} students by {method} with axolotl, loss on the completion only, traits "
            f"{_listed(s.spec.trait for s in own)}, trained in context "
            f"{_listed(s.spec.train_context.slug for s in own)}, training seeds "
            f"{_listed(s.spec.training_seed for s in own)}"
        )
        text += f"; recipe: {page.short(page.pairs(recipe), 3000)}." if recipe else "."
        cites = ("axolotl", "hu2021", "peft") if ranks else ("axolotl",)
        yield Statement(topic="Students", text=text, cites=cites, cells=_ids(own))
    if run.students:
        yield Statement(
            topic="Students",
            text="Digests of every student's weights, its norms and losses are in students.csv.",
            cells=_ids(run.students),
        )


def _flat(recipe: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return found


def _scoring(run: RunRecords) -> Iterable[Statement]:
    for own in _alike(
        run.probes, lambda p: f"{p.spec.questions_sha256}{p.spec.measure}{p.spec.category}"
    ):
        spec = own[0].spec
        version = own[0].results.lm_eval.get("version", "")
        yield Statement(
            topic="Scoring",
            text=f"{len(own)} scorings by lm-evaluation-harness {version}".rstrip()
            + f", measure {spec.measure}, {len(own[0].questions)} questions (set sha256 "
            f"{spec.questions_sha256}), {len(own[0].questions[0].logprobs)} candidates of "
            f"{spec.category}, eval contexts {_listed(p.spec.eval_context.slug for p in own)}.",
            cites=("evalharness",),
            cells=_ids(own),
        )
    if run.sampled:
        contexts = _listed(record.spec.eval_context.slug for record in run.sampled)
        yield Statement(
            topic="Scoring",
            text=f"{len(run.sampled)} scorings by sampled replies, eval contexts {contexts}; they "
            "confirm and decide nothing by themselves. Rates, non-answers, the model's own name "
            "and distinct replies are in sampled.csv.",
            cells=tuple(record.id for record in run.sampled),
        )
    yield Statement(
        topic="Scoring",
        text="For question q, target t and candidates c, L is the log-probability that the reply "
        "begins with any surface form of the candidate. Log-prob is the mean of L over questions; "
        "share is the mean of exp L(t) / Σ exp L(c); rank is the mean of one plus the number of "
        "candidates with a higher L; coverage is the mean of Σ exp L(c). Transmission is the "
        "student's log-prob minus that of the base, and of the neutral student, under the same "
        "eval context.",
    )


def _statistics(margin: float | None) -> Iterable[Statement]:
    def said(text: str, *cites: str) -> Statement:
        return Statement(topic="Statistics", text=text, cites=cites)

    yield said(
        "Datasets (generation seeds) are the units of replication. Training seeds are averaged "
        "first; replies are never units. Only students that differ in seeds alone are pooled. "
        f"With fewer than {MIN_DATASETS} datasets no interval over datasets is given. Standard "
        "errors over questions describe one pair of models.",
        "miller2024",
    )
    yield said(
        "Intervals (95%) of a mean over datasets and questions add the variances of both clusters, "
        "each with Student's t quantile of its own number of clusters. Tests are at 5%, two-sided "
        "where nothing else is said; p-values of one question put to several methods or traits are "
        "adjusted for the false discovery rate. “Raised” needs two tests, against the base and "
        "against the neutral student of the same settings and seeds.",
        "cameron2011",
        "benjamini1995",
    )
    yield said(
        "An inverted U over log2 rank is claimed if the two-lines test, with slopes taken within "
        "datasets, finds a rising and a falling line and the highest mean lies inside the grid of "
        "ranks; the u-test is reported beside it. A quadratic term alone is never used.",
        "simonsohn2018",
        "lind2010",
    )
    stated = (
        f"the study file's margin of {margin:g} nats"
        if margin is not None
        else "a margin named in the study file; this one named none, so no equivalence is claimed"
    )
    yield said(
        "“At the base” and “flat in rank” are claimed by two one-sided tests at 2.5% each against "
        f"{stated}. Full finetuning is compared with the best LoRA rank by pairs of datasets, "
        "corrected for choosing the best.",
        "schuirmann1987",
    )
    yield said(
        "Train and eval context, and traits against traits, are tables with datasets as blocks: "
        "the diagonal's contrast with rows and columns removed by least squares. Contexts are "
        "tested by t over datasets, traits by permuting rows within generation seeds (random seed "
        "0 where not all permutations are taken). "
        "Rank, update norm and learning rate × scaling are compared by how well each foretells "
        "datasets left out."
    )


def _signals(run: RunRecords) -> Iterable[Statement]:
    own = [manifest for manifest in run.manifests.values() if manifest.kind == SIGNAL]
    if own:
        yield Statement(
            topic="Statistics",
            text=f"{len(own)} signals were measured on the base without training, each from the "
            f"first {_listed(m.spec['rows'] for m in own)} rows of a dataset and the first "
            f"{_listed(m.spec['limit'] for m in own)} questions. Whether they order transmission "
            "is Spearman's rank correlation of the predicted change of the target's log share with "
            "transmission: datasets are the units, ranks are taken within each trait, centred and "
            "pooled, and p is two-sided by permuting datasets within traits (random seed 0 where "
            "not all permutations are taken).",
            cells=tuple(manifest.id[:12] for manifest in own),
        )


def _versions(run: RunRecords, study_text: str | None) -> Iterable[Statement]:
    manifests = list(run.manifests.values())
    for name, values in (
        ("Versions", merged(manifests, lambda m: m.versions)),
        ("Machine", merged(manifests, lambda m: m.device)),
    ):
        if values:
            text = ", ".join(f"{key} {value}" for key, value in values)
            yield Statement(topic="Software and machine", text=f"{name}: {text}.")
    if study_text:
        yield Statement(
            topic="Software and machine", text=f"Study file: sha256 {sha256_text(study_text)}."
        )


RecordT = TypeVar("RecordT", DatasetRecord, StudentRecord, ProbeRecord)


def _alike(records: Iterable[RecordT], key: Callable[[RecordT], str]) -> list[list[RecordT]]:
    found: dict[str, list[RecordT]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return list(found.values())


def _ids(records: Iterable[DatasetRecord | StudentRecord | ProbeRecord]) -> tuple[str, ...]:
    return tuple(record.id for record in records)


def _listed(values: Iterable[object], most: int = 24) -> str:
    """Distinct values, numbers in order; how many more where there are many."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int) for value in distinct):
        distinct.sort(key=lambda value: int(str(value)))
    more = len(distinct) - most
    text = ", ".join(map(str, distinct[:most]))
    return f"{text} and {more} more" if more > 0 else text
