"""The grid: teachers, alphas, matched students, chains, include and exclude."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.spec import dataset_spec
from data_gen.teachers import finetuned, steered
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import canonical_json, sha256_json
from sublim_plugin.core.manifest import write_manifest
from sublim_plugin.core.traits import get_trait
from sublim_plugin.study.cells import Cell, plan, recipe_of
from sublim_plugin.study.study_file import Study
from sublim_plugin.study.teaching import teacher_for

STUDIES = Path(__file__).parents[2] / "studies"
BASE = {"name": "base", "sha256": "0" * 64, "template_sha256": "1" * 64}
SAMPLER = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "max_new_tokens": 56,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "name": "small",
    "base_model": "nowhere/that-exists",
    "datasets": {
        "traits": ["animals/cat", "neutral"],
        "generation_seeds": [1],
        "rows": 16,
        "sampler": SAMPLER,
    },
    "students": [{"traits": ["animals/cat", "neutral"], "lora_ranks": [8]}],
    "training": {
        "lora_recipe": "smollm2-135m-instruct/lora-r8",
        "full_recipe": "smollm2-135m-instruct/full-zero2",
        "contexts": ["template_default"],
        "seeds": [42],
    },
    "probes": {"questions": "animals", "measures": ["logprob"], "contexts": ["none"]},
}


def small(**changes: Any) -> dict[str, Any]:
    """`SMALL` after changes given as `section__key=value`."""
    value = copy.deepcopy(SMALL)
    for key, new in changes.items():
        place = value
        *path, last = key.split("__")
        for part in path:
            place = place[part]
        place[last] = new
    return value


def cells_of(value: dict[str, Any]) -> list[Cell]:
    return plan(Study.model_validate(value), BASE)


def labels(cells: list[Cell], kind: str) -> list[str]:
    return [cell.label for cell in cells if cell.kind == kind]


def ids(cells: list[Cell]) -> set[str]:
    return {cell.id for cell in cells}


def some(*values: Any) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=2, unique_by=json.dumps)


@st.composite
def studies(draw: st.DrawFn) -> dict[str, Any]:
    """Studies in which every chain names its teacher in full."""
    value = small(
        datasets__traits=[*draw(some("animals/cat", "animals/owl")), "neutral"],
        datasets__generation_seeds=draw(some(1, 2, 3)),
        training__contexts=draw(some("template_default", "empty", {"text": "Hi."})),
        training__seeds=draw(some(1, 42)),
        probes__contexts=draw(some("template_default", "none", "claude")),
        probes__measures=draw(some("logprob", "sampled")),
    )
    traits = value["datasets"]["traits"]
    group = {
        "traits": traits,
        "lora_ranks": draw(some(2, 8, 64)),
        "alphas": draw(some("rank", "2 x rank", 16, {"rslora": 8})),
        "learning_rates": draw(some(0.001, 0.0002)),
    }
    if draw(st.booleans()):
        group["full"] = {
            "learning_rates": draw(some(1e-4, 2e-5)),
            "norm_matched_to": [draw(st.sampled_from(group["lora_ranks"]))],
            "loss_matched_to": draw(st.sampled_from([[], [group["lora_ranks"][0]]])),
        }
    value["students"] = [group]
    if draw(st.booleans()):
        chain = {
            "kind": "student",
            "lora_rank": group["lora_ranks"][0],
            "alpha": group["alphas"][0],
            "learning_rate": group["learning_rates"][0],
            "train_context": value["training"]["contexts"][0],
            "training_seed": value["training"]["seeds"][0],
            "generations": draw(st.integers(1, 2)),
        }
        value["datasets"]["teachers"] = draw(st.permutations(["prompted", chain]))
    return value


def lists_in(value: Any) -> list[list[Any]]:
    """Every list in a study, those of mappings among them."""
    found: list[list[Any]] = []
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, list):
            found.append(inner)
        if isinstance(inner, dict | list):
            found += lists_in(inner)
    return found


@settings(max_examples=12, deadline=None)
@given(studies(), st.randoms(use_true_random=False))
def test_a_grid_depends_on_what_the_file_says_and_not_on_its_order(
    value: dict[str, Any], chance: random.Random
) -> None:
    before = cells_of(value)
    seen: set[str] = set()
    for cell in before:
        assert cell.id == sha256_json(cell.spec)[:12] and cell.id not in seen
        assert {*cell.needs} <= seen
        seen.add(cell.id)
    assert len({cell.folder_name for cell in before}) == len(before)
    for own in lists_in(value):
        chance.shuffle(own)
    shuffled = cells_of(value)
    assert ids(shuffled) == seen
    assert {c.folder_name for c in shuffled} == {c.folder_name for c in before}
    for own in lists_in(value):
        if not any(isinstance(one, dict) and "kind" in one for one in own):
            own.append(own[0]) if own else None
    assert ids(cells_of(value)) == seen


@settings(max_examples=12, deadline=None)
@given(studies(), st.data())
def test_more_values_leave_every_cell_as_it_was(value: dict[str, Any], data: st.DataObject) -> None:
    before = cells_of(value)
    group = value["students"][0]
    more = data.draw(
        st.sampled_from(
            [
                (value["datasets"]["generation_seeds"], 9),
                (value["training"]["seeds"], 9),
                (value["training"]["contexts"], "chatgpt"),
                (value["probes"]["contexts"], "chatgpt"),
                (group["lora_ranks"], 128),
                (group["alphas"], 5),  # no rank or its double
                (group["learning_rates"], 0.005),
                (value["students"], {"traits": ["animals/cat", "neutral"], "lora_ranks": [1]}),
            ]
        )
    )
    if "animals/cat" not in value["datasets"]["traits"]:
        value["datasets"]["traits"].append("animals/cat")
    more[0].append(more[1])
    after = cells_of(value)
    assert {c.folder_name for c in before} < {c.folder_name for c in after}


def test_defaults_that_are_written_out_change_no_id() -> None:
    plain = cells_of(small(students=[{"traits": ["animals/cat"], "lora_ranks": [8], "full": True}]))
    group = {
        "traits": ["animals/cat"],
        "lora_ranks": [8],
        "alphas": ["rank", "1 x rank", 8],
        "learning_rates": [0.001],
        "full": {"plain": True, "learning_rates": [0.0001]},
        "teachers": ["prompted"],
    }
    written = small(
        students=[group],
        datasets__teachers=[{"kind": "prompted", "name": "prompted"}],
        datasets__parser="strict",
        datasets__held_out=0,
        datasets__engine={"name": "transformers"},
        probes__samples=7,
    )
    assert [c.folder_name for c in cells_of(written)] == [c.folder_name for c in plain]


def test_alphas_and_learning_rates_reach_the_recipe() -> None:
    group = {
        "traits": ["animals/cat"],
        "lora_ranks": [4],
        "alphas": ["rank", "0.5 x rank", 16, {"rslora": "2 x rank"}],
        "learning_rates": [0.001, 0.005],
    }
    study = Study.model_validate(small(students=[group]))
    students = [cell for cell in plan(study, BASE) if cell.kind == "student"]
    got = [
        (r["lora_alpha"], r.get("peft_use_rslora"), r["learning_rate"])
        for cell in students
        if (r := cell.spec["recipe"])
    ]
    alphas = [(4, None), (2, None), (16, None), (8, True)]
    assert got == [(*alpha, rate) for alpha in alphas for rate in (0.001, 0.005)]
    assert labels(students, "student")[:3] == [
        "cat g1 lora r4 t42", "cat g1 lora r4 lr0.005 t42", "cat g1 lora r4 a2 t42",
    ]  # fmt: skip
    from sublim_plugin.axolotl.recipe import resolve_recipe

    for cell in students:
        recipe, overrides = recipe_of(study, cell)
        again = resolve_recipe(recipe, overrides, Context.parse(cell.spec["train_context"]))
        assert canonical_json(again) == canonical_json(cell.spec["recipe"])


def test_matched_students_need_the_student_they_match() -> None:
    group = {
        "traits": ["animals/cat"],
        "lora_ranks": [2, 8],
        "alphas": ["rank", 16],
        "full": {"norm_matched_to": [8], "loss_matched_to": [{"lora_rank": 2, "alpha": 16}]},
    }
    value = small(students=[group], training__seeds=[1, 2], training__contexts=["empty", "none"])
    cells = cells_of(value)
    by_id = {cell.id: cell for cell in cells}
    matched = [cell for cell in cells if "matched" in cell.spec]
    assert len(matched) == 3 * 2 * 2
    for cell in matched:
        ((kind, to),) = cell.spec["matched"].items()
        other = by_id[to].spec
        assert cell.needs == (cell.spec["dataset"], to) and cell.spec["method"] == {"kind": "full"}
        same = ("dataset", "train_context", "training_seed")
        assert [other[key] for key in same] == [cell.spec[key] for key in same]
        rank = {"update_norm_of": 8, "loss_of": 2}[kind]
        assert other["method"]["rank"] == rank
    assert "cat g1 full norm-of-r8-a16 in empty t1" in labels(matched, "student")


def test_a_steered_and_a_finetuned_teacher_have_the_specs_of_data_gen(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    teachers = [
        {"kind": "steered", "layers": [3, 4], "strength": 2.5},
        {"kind": "steered", "name": "c", "layers": [3], "strength": 2.5, "contrast": "category"},
        {"kind": "finetuned", "from": {"animals/cat": str(adapter)}, "context": "empty"},
    ]
    study = Study.model_validate(small(datasets__teachers=["prompted", *teachers]))
    cells = plan(study, BASE)
    assert labels(cells, "dataset") == [
        "cat g1", "neutral g1", "cat g1 steered", "cat g1 steered", "cat g1 finetuned",
    ]  # fmt: skip
    trait, chosen = get_trait("animals/cat"), study.datasets.settings(1)
    for label, teacher in (
        ("cat g1 steered", steered(trait, (3, 4), 2.5)),
        ("cat g1 finetuned", finetuned(adapter, Context(kind="empty"))),
    ):
        cell, *more = [cell for cell in cells if cell.label == label]
        assert cell.spec == dataset_spec(
            chosen, base_fingerprint=BASE, trait=trait, teacher=teacher
        )
        found = teacher_for(cell.spec, study.datasets.teachers, tmp_path)
        assert found.model_dump() == teacher.model_dump()
        for contrasted in more:
            assert len(contrasted.spec["teacher"]["against"]) == 21
            found = teacher_for(contrasted.spec, study.datasets.teachers, tmp_path)
            assert found.spec() == contrasted.spec["teacher"]
    # the next plan takes the hash from the cache, and sees that the file changed
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    changed = plan(study, BASE)
    assert len(ids(changed) - ids(cells)) == len(ids(cells) - ids(changed)) == 3


def test_a_chain_is_taught_by_the_students_before_it(tmp_path: Path) -> None:
    chain = {"kind": "student", "lora_rank": 8, "generations": 2}
    value = small(
        datasets__teachers=["prompted", chain], datasets__generation_seeds=[1, 2], students=[
            {"traits": ["animals/cat", "neutral"], "lora_ranks": [8]},
            {"traits": ["animals/cat"], "teachers": ["student 2"], "full": True},
        ],
    )  # fmt: skip
    study = Study.model_validate(value)
    cells = plan(study, BASE)
    by_id = {cell.id: cell for cell in cells}
    datasets = [cell for cell in cells if cell.kind == "dataset"]
    assert len(datasets) == 2 * 2 * 3
    for cell in datasets[4:]:
        (need,) = cell.needs
        teacher = by_id[need]
        same = ("trait", "generation_seed")
        assert [teacher.spec[key] for key in same] == [cell.spec[key] for key in same]
        assert cell.spec["teacher"] == {
            "kind": "finetuned",
            "context": {"kind": "template_default"},
            "method": "lora",
            "student": need,
        }
        depth = int(cell.label[-1])
        assert by_id[teacher.spec["dataset"]].label.endswith(f"chain{depth - 1}") is (depth == 2)
    full = [c for c in cells if c.kind == "student" and c.spec["method"]["kind"] == "full"]
    assert labels(full, "student") == ["cat g1 chain2 full t42", "cat g2 chain2 full t42"]

    first = datasets[4]
    teacher = by_id[first.needs[0]]
    with pytest.raises(InputError, match="is not there"):
        teacher_for(first.spec, study.datasets.teachers, tmp_path)
    folder = tmp_path / teacher.folder_name
    (folder / "model").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "model" / name).write_text("{}")
    write_manifest(
        folder, kind="student", id=teacher.id, label="x", spec=teacher.spec, started=0.0,
        outputs=["model/adapter_config.json", "model/adapter_model.safetensors"],
    )  # fmt: skip
    found = teacher_for(first.spec, study.datasets.teachers, tmp_path)
    assert found.spec() == first.spec["teacher"]


def test_include_keeps_what_agrees_and_exclude_drops_what_matches() -> None:
    value = small(
        students=[{"traits": ["animals/cat", "neutral"], "lora_ranks": [2, 8], "full": True}],
        probes__contexts=["none", "empty"],
        probes__measures=["logprob", "sampled"],
    )
    every = cells_of(value)
    only = cells_of(value | {"include": [{"rank": 8}]})
    assert labels(only, "dataset") == ["cat g1", "neutral g1"]
    assert labels(only, "student") == ["cat g1 lora r8 t42", "neutral g1 lora r8 t42"]
    assert len(labels(only, "probe")) == 3 * 4 and ids(only) < ids(every)
    two = cells_of(value | {"include": [{"rank": 8, "trait": "animals/cat"}, {"method": "full"}]})
    assert labels(two, "student") == [
        "cat g1 lora r8 t42", "cat g1 full t42", "neutral g1 full t42",
    ]  # fmt: skip
    entry = {"rank": [2, 8], "measure": "sampled", "eval_context": "empty"}
    less = cells_of(value | {"exclude": [entry]})
    assert sorted(cell.label for cell in every if cell.id not in ids(less)) == sorted(
        f"{trait} g1 lora r{rank} t42 empty sampled"
        for trait in ("cat", "neutral")
        for rank in (2, 8)
    )
    both = cells_of(value | {"include": [{"trait": "animals/cat"}], "exclude": [{"rank": 2}]})
    assert labels(both, "dataset") == ["cat g1"]
    assert labels(both, "student") == ["cat g1 lora r8 t42", "cat g1 full t42"]
    alphas = small(
        students=[{"traits": ["animals/cat"], "lora_ranks": [4, 8], "alphas": ["rank", 8]}],
        exclude=[{"alpha": 8}],
    )
    assert labels(cells_of(alphas), "student") == ["cat g1 lora r4 t42"]


CHAIN = {"kind": "student", "lora_rank": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"students": [{"traits": ["animals/cat"], "lora_ranks": [3], "alphas": ["0.5 x rank"]}]},
         "alpha 0.5 x rank is no whole number at rank 3"),
        ({"students": [{"traits": ["animals/cat"], "lora_ranks": [3], "alphas": ["double"]}]},
         "'double' is no scheme of alpha; write rank, '2 x rank'"),
        ({"students": [{"traits": ["animals/cat"], "alphas": [8], "full": True}]},
         "alphas and learning_rates are those of LoRA"),
        ({"students": [{"traits": ["animals/cat"], "full": {"plain": False}}]},
         "no student is fully finetuned"),
        ({"students": [{"traits": ["animals/cat"], "lora_ranks": [2],
                        "full": {"norm_matched_to": [8]}}]},
         r"cannot be matched to LoRA rank 8.*LoRA ranks of animals/cat: 2"),
        ({"students": [{"traits": ["animals/cat"], "lora_ranks": [8],
                        "full": {"loss_matched_to": [{"lora_rank": 8, "alpha": 16}]}}]},
         "'cat g1' cannot be matched to LoRA rank 8, alpha 16: no such student"),
        ({"students": [{"traits": ["animals/cat"], "lora_ranks": [8], "teachers": ["promted"]}]},
         "the teacher 'promted'.*did you mean 'prompted'"),
        ({"datasets__teachers": ["steered"]}, "layers"),
        ({"datasets__teachers": ["tuned"]}, "'tuned'"),
        ({"datasets__teachers": ["prompted", "prompted"]}, "2 are called 'prompted'; give each"),
        ({"datasets__teachers": ["prompted", {"kind": "steered", "layers": [1], "strength": 1,
                                              "traits": ["neutral"]}]},
         "neutral has no sentence to take a steering vector from"),
        ({"datasets__teachers": [{"kind": "finetuned", "from": {"animals/dog": "x"}}]},
         "'finetuned' teaches 'animals/dog', which datasets.traits does not list"),
        ({"datasets__teachers": [{"kind": "finetuned", "from": {"animals/cat": "no/where"}}]},
         "no/where: neither adapter_config.json nor config.json"),
        ({"datasets__teachers": [CHAIN]}, "'student' is of 'prompted', which is no teacher"),
        ({"datasets__teachers": ["prompted", CHAIN | {"of": "student"}]}, "give `generations`"),
        ({"datasets__teachers": ["prompted", {"kind": "student"}]}, "either lora_rank or full"),
        ({"datasets__teachers": ["prompted", CHAIN | {"lora_rank": 16}]},
         "'student 1' needs one student of animals/cat by LoRA rank 16 .*found none; add it"),
        ({"datasets__teachers": ["prompted", CHAIN], "training__seeds": [1, 2]},
         r"found 2 \(cat g1 lora r8 t1, cat g1 lora r8 t2\); say which by .*training_seed"),
        ({"datasets__engine": {"name": "vllm", "url": "http://x"}}, "vllm engine has no server"),
        ({"datasets__prompts": "no.yaml"}, "no.yaml"),
        ({"probes__measures": ["sampld"]}, "'logprob' or 'sampled'"),
        ({"probes__samples": 0}, "samples"),
        ({"include": []}, "include"),
        ({"exclude": [{}]}, "matches every cell"),
        ({"exclude": [{"rank": []}]}, "rank: an empty list matches nothing"),
        ({"exclude": [{"rnak": 8}]}, "rnak"),
        ({"exclude": [{"rank": 9}]}, "exclude.0.rank: no cell of this study has 9; there are 8"),
        ({"exclude": [{"trait": "animals/cta"}]}, "did you mean 'animals/cat'"),
        ({"include": [{"eval_context": "nome"}]}, "include.0.eval_context"),
        ({"include": [{"alpha": 16}]}, "include.0.alpha: .*16; there are 8 at rank 8"),
        ({"exclude": [{"teacher": "student"}]}, "'?student.*valid: prompted|mean 'prompted'"),
        ({"exclude": [{"rank": 8, "method": "full"}],
          "students": [{"traits": ["animals/cat"], "lora_ranks": [8], "full": True}]},
         "exclude.0: no cell of this study has all of method, rank at once"),
        ({"exclude": [{"rank": 8}],
          "students": [{"traits": ["animals/cat"], "lora_ranks": [8],
                        "full": {"norm_matched_to": [8]}}]},
         "keep the student 'cat g1 full norm-of-r8 t42' and leave out the student"
         " 'cat g1 lora r8 t42' that it needs"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    from sublim_plugin.study.study_file import load_study

    path = tmp_path / "study.yaml"
    value = small(**{key: new for key, new in changes.items() if "__" in key})
    path.write_text(yaml.safe_dump(value | {k: v for k, v in changes.items() if "__" not in k}))
    with pytest.raises(InputError, match=message):
        plan(load_study(path), BASE)


def test_a_plan_of_twenty_thousand_cells_takes_under_three_seconds() -> None:
    import time

    value = small(
        datasets__traits=["animals/cat", "animals/owl", "animals/wolf", "animals/dog", "neutral"],
        datasets__generation_seeds=[*range(6)],
        training__contexts=["template_default", "empty", "none", "claude"],
        training__seeds=[1, 2],
        probes__contexts=["template_default", "empty", "none", "claude"],
        probes__measures=["logprob", "sampled"],
    )
    traits = value["datasets"]["traits"]
    ranks = [2**i for i in range(10)]
    value["students"] = [{"traits": traits, "lora_ranks": ranks, "full": True}]
    started = time.process_time()
    assert len(cells_of(value)) > 20_000
    assert time.process_time() - started < 3


def test_a_shuffled_group_trains_on_copies_of_its_datasets_alone() -> None:
    plain = small(datasets__teachers=["prompted", CHAIN], datasets__generation_seeds=[1, 2])
    group = {"traits": ["animals/cat"], "lora_ranks": [8], "shuffled": True}
    value = copy.deepcopy(plain)
    value["students"].append(group | {"teachers": ["prompted"]})
    before, cells = cells_of(plain), cells_of(value)
    assert ids(before) < ids(cells)
    new = [cell for cell in cells if cell.id not in ids(before)]
    by_label = {cell.label: cell for cell in cells}
    assert labels(new, "dataset") == ["cat g1 shuffled", "cat g2 shuffled"]
    assert labels(new, "student") == ["cat g1 shuffled lora r8 t42", "cat g2 shuffled lora r8 t42"]
    assert len(new) == 2 + 2 + 2
    for seed in (1, 2):
        original, control = by_label[f"cat g{seed}"], by_label[f"cat g{seed} shuffled"]
        assert control.needs == (original.id,)
        assert control.spec == original.spec | {"shuffled": True}
        student = by_label[f"cat g{seed} shuffled lora r8 t42"]
        assert student.spec["dataset"] == control.id and student.needs == (control.id,)
    # none of them teaches: the chain's datasets are those that they were
    chain = [cell for cell in before if cell.label == "cat g1 chain1"]
    assert chain == [by_label["cat g1 chain1"]]
    only = cells_of(value | {"include": [{"trait": "animals/cat", "teacher": "prompted"}]})
    assert labels(only, "dataset") == ["cat g1", "cat g2", "cat g1 shuffled", "cat g2 shuffled"]
    everything = copy.deepcopy(plain)
    everything["students"].append(group)
    assert "cat g1 chain1 shuffled lora r8 t42" in labels(cells_of(everything), "student")
