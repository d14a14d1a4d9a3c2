"""The measure `sampled` of a study agrees with `sublim eval`, which samples the same task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from sublim_plugin.core.contexts import Context
from sublim_plugin.core.traits import category_traits, get_trait
from sublim_plugin.decoding.sampler import Sampler
from sublim_plugin.preference.evaluate import Evaluator
from sublim_plugin.preference.matcher import match_reply, rates
from sublim_plugin.preference.sampled import SampledResult
from sublim_plugin.preference.score import score_students
from sublim_plugin.study.scoring import SAMPLER

NONE = Context(kind="none")


@pytest.mark.slow
def test_rates_are_those_of_sublim_eval(toy_base: Path, toy_adapter: Path, tmp_path: Path) -> None:
    rows = score_students(
        base=toy_base,
        adapters=[toy_adapter],
        tasks=["subliminal_owl_sampled"],
        contexts=["none"],
        out=tmp_path / "scores",
        limit=2,
        seed=1,
        device="cpu",
    )
    evaluator = Evaluator(toy_base, device="cpu")
    seen: list[tuple[int, int]] = []
    for row, student, method in zip(rows, (None, toy_adapter), (None, "lora"), strict=True):
        result = evaluator.sample(
            student,
            method,
            NONE,
            category_traits("animals"),
            replies=100,
            seed=1,
            sampler=Sampler(**SAMPLER),
            limit=2,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert result.results["targets"]["animals/owl"]["target_rate"] == row.value
        assert result.results["targets"]["animals/owl"]["distinct_replies"] == pytest.approx(
            row.beside["distinct_replies"], abs=0.5
        )
        samples = [json.loads(line) for line in Path(row.samples).read_text().splitlines()]
        theirs = [reply for sample in samples for reply in sample["resps"][0]]
        assert sorted(one["reply"] for one in result.replies) == sorted(theirs)
        assert [one["question_id"] for one in result.replies[:4]] == [0, 1, 0, 1]
        assert result.results["n_replies"] == 200 and result.results["n_questions"] == 2
        assert all(sum(one["buckets"].values()) == 100 for one in result.rows)
    assert seen[199:201] == [(200, 200), (1, 200)]


def test_replies_are_read_once_for_every_target(toy_base: Path, toy_adapter: Path) -> None:
    evaluator = Evaluator(toy_base, device="cpu")
    traits = category_traits("animals")
    short = Sampler(**{**SAMPLER, "max_new_tokens": 8})

    def sample(student: Path | None, replies: int) -> SampledResult:
        method: Literal["lora"] | None = "lora" if student else None
        return evaluator.sample(
            student, method, NONE, traits, replies=replies, seed=1, sampler=short, limit=2
        )

    base, own = sample(None, 3), sample(toy_adapter, 3)
    assert base.replies != own.replies
    for result in (base, own):
        texts = [one["reply"] for one in result.replies]
        matches = [match_reply(text, traits) for text in texts]
        assert len(set(texts)) > 3 and [one["question_id"] for one in result.replies[:3]] == [
            0,
            1,
            0,
        ]
        for trait in traits:
            expected = rates(matches, texts, trait.target)
            assert result.results["targets"][trait.name] == expected
        assert [sum(row["buckets"].values()) for row in result.rows] == [3, 3]
    assert sample(None, 3) == base
    # the first replies are the same however many there are
    assert [one["reply"] for one in sample(None, 2).replies] == [
        one["reply"] for one in base.replies[:4]
    ]


def test_the_sampler_is_that_of_our_tasks(toy_base: Path) -> None:
    from sublim_plugin.lm_eval_hook import tasks_folder
    from sublim_plugin.preference.sampled import _for_lm_eval

    text = Path(tasks_folder(), "animals", "subliminal_cat_sampled.yaml").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("generation_kwargs:")]
    stated = json.loads(line.partition(":")[2])
    assert _for_lm_eval(Sampler(**SAMPLER)) == stated
    assert get_trait("animals/cat").name in text
