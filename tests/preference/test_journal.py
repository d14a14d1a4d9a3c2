"""The journal: one model's, repaired at its end, whole after a full disk, finite."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.preference.journal import Journal
from sublim_plugin.preference.shared_lm import SharedLM


def filled(path: Path) -> bytes:
    journal = Journal(path, {"base": "a"})
    for i in range(3):
        journal.add(f"k{i}", [i, True])
    journal.flush()
    return path.read_bytes()


def test_it_belongs_to_one_model(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    whole = filled(path)
    assert Journal(path, {"base": "a"}).answers == {f"k{i}": [i, True] for i in range(3)}
    header = whole.splitlines(keepends=True)[0]
    for content in (whole, header):
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            Journal(path, {"base": "b"})
        assert str(error.value) == (
            f"{path} holds answers of another model ({{'base': 'a'}}); use another folder"
        )
        assert path.read_bytes() == content


def test_it_is_repaired_at_its_end_alone(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    whole = filled(path)
    path.write_bytes(whole[:-4])
    assert set(Journal(path, {"base": "a"}).answers) == {"k0", "k1"}
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:5] + b"\n" + lines[2])
    with pytest.raises(InputError, match=rf"line 2, byte {len(lines[0])}"):
        Journal(path, {"base": "a"})
    path.write_bytes(lines[0][:4])
    journal = Journal(path, {"base": "a"})
    assert journal.answers == {}
    journal.add("k", [1, False])
    journal.flush()
    assert Journal(path, {"base": "a"}).answers == {"k": [1, False]}


FULL = """
import resource, signal, sys
from pathlib import Path
from sublim_plugin.core.errors import RunError
from sublim_plugin.preference.journal import Journal

path = Path(sys.argv[1])
journal = Journal(path, {"base": "a"})
journal.add("first", [1, True])
journal.flush()
whole = path.stat().st_size
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 20, limits[1]))
journal.add("second", ["x" * 100, True])
for _ in range(2):
    try:
        journal.flush()
    except RunError as error:
        assert str(path) in str(error)
    else:
        raise AssertionError("it was written")
print(path.stat().st_size - whole)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
journal.flush()
"""


def test_a_write_that_fails_half_way_is_not_continued(tmp_path: Path) -> None:
    """The process may write 20 bytes more: a disk that is full in the middle of a line."""
    path = tmp_path / "j.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["20"]  # the torn line was there
    kept = {"first": [1, True], "second": ["x" * 100, True]}
    assert Journal(path, {"base": "a"}).answers == kept
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_no_answer(tmp_path: Path, value: float) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path, {"base": "a"})
    with pytest.raises(ValueError):
        journal.add("k", [value, True])
    journal.flush()
    assert journal.answers == Journal(path, {"base": "a"}).answers == {}


def test_a_model_that_overflows_is_one_error_and_none_of_its_numbers_is_kept(
    toy_base: Path, tmp_path: Path
) -> None:
    lm = SharedLM(pretrained=str(toy_base), device="cpu", dtype="float32", batch_size=1)
    with torch.no_grad():
        lm._model.lm_head.weight[77] = math.nan
    lm.journal = Journal(tmp_path / "toy-123" / "journal.jsonl", {"base": "a"})
    requests = [
        Instance("loglikelihood", {}, ("<|im_start|>Hi", form), 0, metadata=("own", 4, 1))
        for form in (" cat", " owl")
    ]
    with pytest.raises(RunError) as error:
        lm.loglikelihood(requests, disable_tqdm=True)
    for said in ("task own, question 4, model toy-123", "' cat' is nan", "--dtype float32"):
        assert said in str(error.value)
    assert len(lm.journal.path.read_text().splitlines()) == 1
