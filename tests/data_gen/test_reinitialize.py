"""Another initialization: how far it is from the original, and that it is made once or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_gen.reinitialize import RECORD, reinitialize
from data_gen.reinitialize_command import reinitialize as command
from sublim_plugin.core.base_models import (
    REINITIALIZED,
    fingerprint,
    is_embedded,
    is_prepared,
    resolve,
)
from sublim_plugin.core.errors import InputError, RunError
from tests.data_gen.toy import save_toy

SETTINGS: dict[str, Any] = {"category": "animals", "noise": 1.0, "seed": 1, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def toy(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(base_model, tmp_path_factory.mktemp("toy"))


def test_it_is_far_from_the_original_in_weights_and_nearer_in_words(
    toy: Path, tmp_path: Path
) -> None:
    out, told = tmp_path / "other", []
    made = reinitialize(
        toy, out, steps=6, tell=lambda at, of, kl: told.append((at, of)), **SETTINGS
    )
    assert told == [(at, 6) for at in range(1, 7)]
    assert made == json.loads((out / RECORD).read_text())
    one, other = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (toy, out)
    )
    flat = [
        torch.cat(
            [w.flatten() for name, w in weights.items() if w.ndim >= 2 and "lm_head" not in name]
        )
        for weights in (one, other)
    ]
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0).item()
    assert made["cosine"] == pytest.approx(cosine, abs=1e-4)
    assert 0.6 < cosine < 0.8  # noise as large as the weights: 1 / sqrt(2), and what training adds
    sizes = [weights.std().item() for weights in flat]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)  # and the noise made them no larger
    assert 0 < made["kl"] < made["kl_drowned"]
    names = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (toy, out)]
    assert names[0] == names[1]
    assert fingerprint(out)["sha256"] != fingerprint(toy)["sha256"]
    assert fingerprint(out)["template_sha256"] == fingerprint(toy)["template_sha256"]

    before = (out / RECORD).stat().st_mtime_ns
    assert reinitialize(toy, out, steps=6, **SETTINGS) == made
    assert (out / RECORD).stat().st_mtime_ns == before
    with pytest.raises(InputError, match="other settings"):
        reinitialize(toy, out, steps=7, **SETTINGS)


def test_the_seed_decides_and_a_command_says_what_was_made(toy: Path, tmp_path: Path) -> None:
    made = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(number)
        options = ["--out", str(out), "--seed", str(seed), "--steps", "1"]
        done = CliRunner().invoke(command, [str(toy), *options])
        assert done.exit_code == 0 and "cosine of the weights 0.3" in done.output
        made.append(fingerprint(out)["sha256"])
    assert made[0] == made[1] != made[2]


def test_what_is_there_already_or_diverges_is_left_alone(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept.txt").write_text("mine")
    with pytest.raises(InputError, match="name another folder"):
        reinitialize(toy, tmp_path / "mine", steps=1, **SETTINGS)
    with pytest.raises(RunError, match="diverged"):
        reinitialize(toy, tmp_path / "new", steps=2, **SETTINGS | {"noise": 1e60})
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_embedded_one_is_known_and_not_made_by_being_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBLIM_CACHE", str(tmp_path))
    assert is_embedded(REINITIALIZED) and not is_prepared(REINITIALIZED)
    with pytest.raises(InputError, match=REINITIALIZED):
        resolve("embedded:smollm2-135m-instruct-reinitialised")
