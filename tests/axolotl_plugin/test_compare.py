"""`sublim norms` and `sublim rescale`, as a user types them, on toy students."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from sublim_plugin.axolotl.compare import bands
from sublim_plugin.axolotl.norms import update_norm
from sublim_plugin.axolotl.receipt import (
    RECEIPT_NAME,
    RESCALE_NAME,
    Seeds,
    read_receipt,
    twins,
    write_receipt,
)
from sublim_plugin.axolotl.weights import weights_sha256
from sublim_plugin.cli import main
from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.students import attached, load_full
from tests.axolotl_plugin.toy import load, save_base, save_full, save_lora, with_lora


@pytest.fixture(scope="module")
def toy(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("toy") / "base", tokenizer)


@pytest.fixture(scope="module")
def students(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    return {
        "lora": save_lora(folder / "lora", toy),
        "full": save_full(folder / "full", toy),
        "other": save_full(folder / "other", toy, seed=3),
    }


def sublim(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_norms_stand_side_by_side(toy: Path, students: dict[str, Path]) -> None:
    told = sublim("norms", *students.values(), "--base", toy)
    assert told.exit_code == 0 and told.stderr == ""
    lines = told.stdout.splitlines()
    assert lines[0].split()[:4] == ["student", "method", "scaling", "steps"]
    total = update_norm(students["full"], toy).total
    assert str(students["full"]) in lines[2] and f"{total:.5g}" in lines[2]
    assert any(line.startswith("||dW|| by thirds") for line in lines)
    as_json = json.loads(sublim("norms", students["lora"], "--base", toy, "--json").stdout)
    wanted = update_norm(students["lora"], toy).model_dump(mode="json")
    assert as_json[0]["update_norm"] == wanted
    assert as_json[0]["method"] == "lora r4" and as_json[0]["steps"] is None
    assert as_json[0]["scaling"] == 2
    full = json.loads(sublim("norms", students["full"], "--base", toy, "--json").stdout)
    assert full[0]["method"] == "full" and full[0]["scaling"] is None


def test_the_scale_scheme_is_told(toy: Path, students: dict[str, Path], tmp_path: Path) -> None:
    with_lora(toy, use_rslora=True).save_pretrained(tmp_path / "rs")
    told = sublim("norms", students["lora"], tmp_path / "rs", "--base", toy)
    plain, rslora = (line.split()[1:4] for line in told.stdout.splitlines()[1:3])
    assert plain == ["lora", "r4", "2"] and rslora == ["rslora", "r4", "4"]


def test_equal_weights_are_told(toy: Path, students: dict[str, Path], tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(students["full"], twin)
    told = sublim("norms", students["full"], students["other"], twin, "--base", toy)
    assert told.exit_code == 0
    assert "same to the last bit" in told.stderr
    assert str(twin) in told.stderr and str(students["other"]) not in told.stderr


def test_a_seed_that_changed_nothing_is_noticed_beside_its_twin(lora: Any, tmp_path: Path) -> None:
    for name, changed in (
        ("seed-7", {}),
        ("seed-8", {"seeds": Seeds(seed=8, data_seed=7)}),
        ("again", {}),
        ("other", {"seeds": Seeds(seed=9, data_seed=7), "weights_sha256": "0" * 64}),
    ):
        (tmp_path / name).mkdir()
        write_receipt(tmp_path / name, lora.receipt.model_copy(update=changed))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / RECEIPT_NAME).write_text("{", encoding="utf-8")
    assert twins(tmp_path / "seed-7", lora.receipt) == [tmp_path / "seed-8"]


def test_a_student_without_a_norm_says_why(lora: Any, tmp_path: Path) -> None:
    shutil.copytree(lora.model, tmp_path / "dora")
    without = {"update_norm": None, "no_update_norm": "it has DoRA magnitudes"}
    write_receipt(tmp_path / "dora", lora.receipt.model_copy(update=without))
    told = sublim("norms", tmp_path / "dora")
    assert told.exit_code == 2 and "no update norm: it has DoRA magnitudes" in told.stderr


def test_bands_are_thirds_of_the_layers() -> None:
    norms = {str(layer): 1.0 for layer in range(7)} | {"embed_tokens": 3.0}
    assert bands(norms) == pytest.approx(
        {"early": 3**0.5, "middle": 2**0.5, "late": 2**0.5, "embed_tokens": 3.0}
    )


def test_a_lora_update_is_scaled_in_b_alone(
    toy: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "scaled"
    target = 3.25
    told = sublim(
        "rescale", students["lora"], "--to-norm", target, "--out", out, "--base", toy, "--json"
    )
    assert told.exit_code == 0, told.stderr
    note = json.loads(told.stdout)
    assert update_norm(out, toy).total == pytest.approx(target, rel=1e-5)
    assert json.loads((out / RESCALE_NAME).read_text(encoding="utf-8")) == note
    before, after = (load_file(f / "adapter_model.safetensors") for f in (students["lora"], out))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        factor = note["factor"] if ".lora_B." in name else 1.0
        torch.testing.assert_close(after[name], factor * weight)
    with attached(load(toy), out, toy) as model:  # a normal adapter, loaded strictly
        assert model.peft_config["default"].r == 4


def test_a_full_update_takes_the_norm_of_another_student(
    toy: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "scaled"
    told = sublim(
        "rescale", students["full"], "--to-norm-of", students["lora"], "--out", out, "--base", toy
    )
    assert told.exit_code == 0, told.stderr
    target = update_norm(students["lora"], toy).total
    assert update_norm(out, toy).total == pytest.approx(target, rel=1e-5)
    assert "update norm" in told.stdout and "float32" not in told.stdout
    note = json.loads((out / RESCALE_NAME).read_text(encoding="utf-8"))
    assert note["norm_of"] == str(students["lora"]) and note["rounded_norm"] is None
    base, before, after = (load_file(f / "model.safetensors") for f in (toy, students["full"], out))
    for name, weight in before.items():
        wanted = base[name] + note["factor"] * (weight - base[name])
        torch.testing.assert_close(after[name], wanted)
    load_full(out, toy, torch.float32, "cpu")
    assert (out / "tokenizer.json").is_file()


def test_a_bfloat16_update_is_written_in_float32_and_the_rounding_told(
    tokenizer: Any, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", tokenizer, torch.bfloat16)
    student = save_full(tmp_path / "student", base, size=0.002)
    target = 0.3 * update_norm(student, base).total
    out = tmp_path / "scaled"
    told = sublim("rescale", student, "--to-norm", target, "--out", out, "--base", base)
    assert told.exit_code == 0, told.stderr
    assert update_norm(out, base).total == pytest.approx(target, rel=1e-5)
    assert {w.dtype for w in load_file(out / "model.safetensors").values()} == {torch.float32}
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
    note = json.loads((out / RESCALE_NAME).read_text(encoding="utf-8"))
    assert abs(note["rounded_norm"] / target - 1) > 0.01
    assert f"{note['rounded_norm']:.6g}" in told.stdout


def test_a_receipt_is_carried_over_and_guards_its_weights(
    lora: Any, base_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scaled"
    half = lora.receipt.update_norm.total / 2
    told = sublim("rescale", lora.model, "--to-norm", half, "--out", out)
    assert told.exit_code == 0, told.stderr
    receipt = read_receipt(out)
    assert receipt.update_norm.total == pytest.approx(half, rel=1e-5)
    assert receipt.rescaled is not None and receipt.rescaled.factor == pytest.approx(0.5)
    assert receipt.order == lora.receipt.order
    table = sublim("norms", lora.model, out)  # the receipts name the base
    assert table.exit_code == 0 and "lora r8" in table.stdout
    tensors = load_file(out / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, out / "adapter_model.safetensors")
    told = sublim("norms", out)
    assert told.exit_code == 2 and "changed after training" in told.stderr
    assert RECEIPT_NAME in told.stderr


def test_wrong_requests_name_what_is_wrong(
    toy: Path, students: dict[str, Path], lora: Any, tmp_path: Path
) -> None:
    # a student whose receipt names another base, which is that of its weights
    stranger = tmp_path / "stranger"
    shutil.copytree(students["full"], stranger)
    names = {"name": str(toy), "sha256": fingerprint(toy)["sha256"]}
    weights = weights_sha256(stranger, adapter=False)
    changed = {"base_model": names, "weights_sha256": weights}
    write_receipt(stranger, lora.receipt.model_copy(update=changed))
    full, out = students["full"], tmp_path / "out"
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    broken = tmp_path / "broken"
    shutil.copytree(students["lora"], broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    name = next(name for name in tensors if ".lora_B." in name)
    nan = {**tensors, name: tensors[name] * float("nan")}
    save_file(nan, broken / "adapter_model.safetensors")
    for arguments, said in (
        (("norms",), "FOLDERS"),
        (("norms", tmp_path), "neither adapter_config.json nor config.json"),
        (("norms", full), "--base"),
        (("rescale", full, "--out", out), "one of --to-norm and --to-norm-of"),
        (("rescale", full, "--to-norm", 1, "--out", out), "--base"),
        (("rescale", full, "--to-norm", -1, "--out", out, "--base", toy), "positive"),
        (("rescale", full, "--to-norm", 1, "--out", taken, "--base", toy), str(taken)),
        (("rescale", toy, "--to-norm", 1, "--out", out, "--base", toy), "no update to scale"),
        (("rescale", broken, "--to-norm", 1, "--out", out, "--base", toy), name),
        (("rescale", lora.model, "--to-norm-of", stranger, "--out", out), "do not match anything"),
    ):
        told = sublim(*arguments)
        assert told.exit_code == 2, arguments
        assert said in told.stderr, told.stderr
    assert not out.exists() and not (tmp_path / ".out.partial").exists()
