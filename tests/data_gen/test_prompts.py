"""Prompt pools: the size of ours, prompts as pure functions, bad pools."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from data_gen.prompts import PARTS, load_pool, prompt
from sublim_plugin.core.errors import InputError
from sublim_plugin.decoding.draws import integers, row_seed, uniforms


def test_pools_have_names_and_another_one_is_a_file() -> None:
    assert load_pool(Path("numbers")) == load_pool()
    short = load_pool(Path("one-number"))
    assert short.surface_forms == 11_520
    assert max(len(prompt(short, 1, i).text) for i in range(200)) < 80
    with pytest.raises(InputError, match="called 'two-numbers'; there are numbers, one-number"):
        load_pool(Path("two-numbers"))


def test_our_pool_has_five_million_forms() -> None:
    assert load_pool().surface_forms >= 5_000_000


def test_a_form_is_read_back_from_its_text_in_one_way_only() -> None:
    """No two choices of parts give the same text: each sentence is found at its place."""
    pool = load_pool()
    for part in ("format", "closing"):
        texts = getattr(pool, part)
        assert not any(a != b and a.endswith(" " + b) for a in texts for b in texts)
    requests = {
        r.format(count=c, digits=d) for r in pool.request for c in pool.count for d in pool.digits
    }
    assert len(requests) == len(pool.request) * len(pool.count) * len(pool.digits)
    assert not any(o.split("{examples}")[1].strip(". ") for o in pool.opening)
    assert len({o.split("{examples}")[0] for o in pool.opening}) == len(pool.opening)


def test_prompts_are_pure_and_follow_the_structure() -> None:
    pool = load_pool()
    first = [prompt(pool, 3, i) for i in range(500)]
    assert first == [prompt(load_pool(), 3, i) for i in range(500)]
    assert len({p.text for p in first}) == 500
    assert first != [prompt(pool, 4, i) for i in range(500)]
    counts = set()
    for p in first:
        shown = re.search(r"\d{3}(?:, \d{3})+", p.text)
        assert shown is not None
        numbers = [int(x) for x in shown[0].split(", ")]
        counts.add(len(numbers))
        assert all(100 <= n <= 999 for n in numbers)
    assert counts == {3, 4, 5, 6, 7, 8}


def test_streams_are_frozen() -> None:
    """A changed value here changes every dataset: bump the pool version and say so."""
    assert integers("k", 2) == integers("k", 5)[:2]
    assert all(0 <= u < 1 for u in uniforms("k", 1000))
    assert abs(sum(uniforms("k", 20_000)) / 20_000 - 0.5) < 0.01
    assert len({row_seed(g, i) for g in range(20) for i in range(1000)}) == 20_000
    assert all(0 <= row_seed(1, i) < 2**53 for i in range(100))
    assert row_seed(1, 0) == 1665598230713666
    assert prompt(load_pool(), 1, 0).id == "ac29e385bdff"


def edited(tmp_path: Path, **changes: object) -> Path:
    pool = load_pool().model_dump(mode="json")
    path = tmp_path / "pool.yaml"
    path.write_text(yaml.safe_dump({**pool, **changes}))
    return path


def test_an_own_pool_replaces_ours(tmp_path: Path) -> None:
    pool = load_pool(edited(tmp_path, closing=["Braces: {{ and }}."]))
    assert prompt(pool, 0, 0).text.endswith("Braces: { and }.")
    assert pool.sha256 != load_pool().sha256
    assert load_pool(edited(tmp_path, name="other")).sha256 == load_pool().sha256


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"opening": ["no examples"]}, "examples"),
        ({"request": ["{count} only"]}, "digits"),
        ({"closing": ["Stray {brace}"]}, "brace"),
        ({"closing": ["Stray {"]}, "closing"),
        ({"closing": ["twice", "twice"]}, "more than once"),
        ({"closing": []}, "closing"),
        ({"examples": {"count": [5, 3], "value": [100, 999]}}, "count"),
        ({"closings": ["x"]}, "closing"),
    ],
)
def test_a_bad_pool_names_its_file_and_entry(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    path = edited(tmp_path, **changes)
    with pytest.raises(InputError, match=said) as caught:
        load_pool(path)
    assert "pool.yaml" in str(caught.value)


def test_every_part_of_our_pool_is_used() -> None:
    pool = load_pool()
    assert set(PARTS) <= set(type(pool).model_fields)
