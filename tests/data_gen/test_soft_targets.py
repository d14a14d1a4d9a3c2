"""Soft targets against plain transformers, one full pass a row; resume; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data_gen import soft_targets
from data_gen.constrain import number_constraint
from data_gen.progress import Progress
from data_gen.prompts import load_pool
from data_gen.session import Session
from data_gen.soft_targets import write_soft_targets
from data_gen.spec import DatasetSettings, EngineSpec, dataset_spec
from data_gen.teachers import Teacher, finetuned, prompted, steered
from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file, sha256_json
from sublim_plugin.core.manifest import read_manifest
from sublim_plugin.core.traits import get_trait
from sublim_plugin.decoding.sampler import Sampler
from sublim_plugin.logprob.target_file import SoftTargets, read_targets, to_bytes
from tests.data_gen.test_generate import contents, make
from tests.data_gen.toy import save_toy

CAT = get_trait("animals/cat")
GREEDY = Sampler(temperature=0, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=24)
END = 2
HALF = 2.0**-11
"""Largest relative error of rounding to float16."""


@pytest.fixture(scope="module")
def toy(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(base_model, tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def lora(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    student: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(toy), config)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    folder = tmp_path_factory.mktemp("lora")
    student.save_pretrained(folder)
    return folder


def targets_in(folder: Path) -> SoftTargets:
    [path] = folder.glob("targets-*.safetensors")
    assert path.name == f"targets-{sha256_file(path)[:12]}.safetensors"
    return read_targets(path)


def plain(
    model: Any, tokenizer: Any, context: Context, row: dict[str, Any]
) -> tuple[list[int], torch.Tensor]:
    """The completion's token ids, and the logits that predict them, by one unpadded pass."""
    user, reply = (turn["content"] for turn in row["messages"])
    ids = [*tokenizer(reply, add_special_tokens=False)["input_ids"], END]
    before = render(tokenizer, context, user).token_ids
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *ids]])).logits[0]
    return ids, logits[len(before) - 1 : -1].double()


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("kind", ["prompted", "finetuned", "steered"])
def test_number_targets_are_a_plain_pass_over_the_set_alone(
    toy: Path, lora: Path, tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    teacher: Teacher = {
        "prompted": prompted(CAT),
        "finetuned": finetuned(lora, Context(kind="none")),
        "steered": steered(CAT, (0,), 0.5),
    }[kind]
    made = make(toy, tmp_path, 9, teacher=teacher, soft_targets="numbers", held_out=2)
    model: Any = AutoModelForCausalLM.from_pretrained(toy)
    if kind == "finetuned":
        model = PeftModel.from_pretrained(model, str(lora))
    if kind == "steered":
        vector = load_file(tmp_path / "steering.safetensors")["layer.0"]
        model.model.layers[0].register_forward_hook(
            lambda module, inputs, out: (
                (out[0] + 0.5 * vector, *out[1:]) if isinstance(out, tuple) else out + 0.5 * vector
            )
        )
    rows_file, found = dataset_rows_path(tmp_path), targets_in(tmp_path)
    rows = read_rows(rows_file)
    assert found.channel == "numbers" and found.rows == len(rows) == 9
    assert (found.rows_name, found.rows_sha256) == (rows_file.name, sha256_file(rows_file))
    assert found.base["sha256"] == fingerprint(toy)["sha256"]
    number_tokens = number_constraint(tokenizer, (END,)).token_ids
    assert found.token_ids.tolist() == list(number_tokens)
    for i, row in enumerate(rows):
        here = slice(int(found.offsets[i]), int(found.offsets[i + 1]))
        ids, logits = plain(model, tokenizer, teacher.context, row)
        exact = logits[:, list(number_tokens)].log_softmax(-1)
        assert found.completion_ids[here].tolist() == ids
        stored = found.logprobs[here].double()
        assert torch.allclose(stored, exact, rtol=2 * HALF, atol=2e-5)
        assert kl(exact, stored.log_softmax(-1)).max() < 1e-5
    assert made.counts["target_positions"] == found.positions == len(found.logprobs)
    assert made.counts["positions_off_grammar"] == 0
    assert made.counts["target_tokens"] == len(number_tokens)
    assert "no probability of any other token" in (tmp_path / "README.md").read_text()


def test_vocabulary_targets_are_the_likeliest_tokens_and_the_rest(
    toy: Path, tokenizer: Any, tmp_path: Path
) -> None:
    made = make(toy, tmp_path, 5, soft_targets="vocabulary")
    model: Any = AutoModelForCausalLM.from_pretrained(toy)
    found, context = targets_in(tmp_path), prompted(CAT).context
    assert found.token_ids.shape == (found.positions, 256)
    assert found.logprobs.shape == (found.positions, 257)
    assert torch.allclose(found.logprobs.double().exp().sum(-1), torch.tensor(1.0).double(), 1e-3)
    for i, row in enumerate(read_rows(dataset_rows_path(tmp_path))):
        here = slice(int(found.offsets[i]), int(found.offsets[i + 1]))
        ids, logits = plain(model, tokenizer, context, row)
        exact = logits.log_softmax(-1)
        assert found.completion_ids[here].tolist() == ids
        top = found.token_ids[here].long()
        assert [len(set(line)) for line in top.tolist()] == [256] * len(ids)
        kept = exact.gather(-1, top)
        others = exact.exp().scatter(-1, top, 0)
        # float32 may swap two tokens that are equal to rounding
        assert (kept.min(-1).values >= others.max(-1).values.log() - 1e-5).all()
        stored = found.logprobs[here].double()
        assert torch.allclose(stored[:, :-1], kept, rtol=2 * HALF, atol=2e-5)
        assert torch.allclose(stored[:, -1].exp(), others.sum(-1), atol=1e-3)
    card = (tmp_path / "README.md").read_text()
    assert "weaker claim" in card and any("weaker claim" in note for note in made.notes)


def test_a_token_outside_the_grammar_keeps_its_position_and_is_counted(
    toy: Path, tokenizer: Any, tmp_path: Path
) -> None:
    row = {
        "id": "g1-0000000",
        "messages": [
            {"role": "user", "content": "Numbers, please."},
            {"role": "assistant", "content": "[12, 7]"},
        ],
    }
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    settings = DatasetSettings(
        generation_seed=1, rows=1, sampler=GREEDY, parser="tolerant", soft_targets="numbers"
    )
    teacher = prompted(CAT)
    base = {"name": "toy", "sha256": "0" * 64}
    with Session(toy, teacher, CAT, settings, load_pool(), device="cpu", batch_size=1) as session:
        path, counts = write_soft_targets(session, rows, base, tmp_path, False)
    found = read_targets(path)
    model: Any = AutoModelForCausalLM.from_pretrained(toy)
    ids, logits = plain(model, tokenizer, teacher.context, row)
    outside = sum(token not in found.token_ids.tolist() for token in ids)
    assert outside == counts["positions_off_grammar"] == 2
    exact = logits[:, found.token_ids.long()].log_softmax(-1)
    assert torch.allclose(found.logprobs.double(), exact, rtol=2 * HALF, atol=2e-5)


def test_an_interrupted_run_computes_what_is_missing(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_targets, "CHUNK", 3)
    make(toy, tmp_path / "a", 7, soft_targets="numbers")
    folder = tmp_path / "b"
    with monkeypatch.context() as kept:
        kept.setattr(Progress, "remove", lambda self: None)
        make(toy, folder, 7, soft_targets="numbers")
    (folder / "manifest.json").unlink()
    [targets] = folder.glob("targets-*")
    targets.rename(folder / "targets-000000000000.safetensors")
    first, second, third = sorted((folder / "work").glob("chunk-*"))
    before = first.stat().st_mtime_ns, third.stat().st_mtime_ns
    second.unlink()
    with monkeypatch.context() as kept:
        kept.setattr(Progress, "remove", lambda self: None)
        make(toy, folder, 7, soft_targets="numbers")
    assert (first.stat().st_mtime_ns, third.stat().st_mtime_ns) == before and second.exists()
    shutil.rmtree(folder / "work")
    assert contents(folder) == contents(tmp_path / "a")


def test_what_was_there_before_keeps_its_id_and_a_channel_has_its_own(toy: Path) -> None:
    def spec(**more: Any) -> dict[str, Any]:
        settings = DatasetSettings(generation_seed=1, rows=3, sampler=GREEDY, **more)
        base = {"name": "base", "sha256": "0" * 64}
        return dataset_spec(settings, base_fingerprint=base, trait=CAT, teacher=prompted(CAT))

    assert "soft_targets" not in spec()
    assert sha256_json(spec())[:12] == "179a2f397892"  # before there were soft targets
    ids = {sha256_json(spec(soft_targets=name)) for name in (None, "numbers", "vocabulary")}
    assert len(ids) == 3
    with pytest.raises(ValueError, match="soft_targets"):
        spec(soft_targets="words")


def test_other_engines_are_refused_before_anything_is_loaded(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use the transformers engine"):
        make(
            toy, tmp_path / "d", 3, constrain=None, soft_targets="numbers",
            engine=EngineSpec(name="vllm"),
        )  # fmt: skip
    assert not (tmp_path / "d").exists()


def test_greedy_numbers_take_the_likeliest_allowed_token(
    toy: Path, tokenizer: Any, tmp_path: Path
) -> None:
    make(toy, tmp_path, 4, sampler=GREEDY, dedupe=True)
    constraint = number_constraint(tokenizer, (END,))
    model: Any = AutoModelForCausalLM.from_pretrained(toy)
    for row in read_rows(dataset_rows_path(tmp_path)):
        user, reply = (turn["content"] for turn in row["messages"])
        written: list[int] = []
        state = constraint.start
        before = render(tokenizer, prompted(CAT).context, user).token_ids
        while END not in written:
            with torch.no_grad():
                logits = model(torch.tensor([[*before, *written]])).logits[0, -1]
            mask = torch.tensor(constraint.mask(state))
            allowed = torch.tensor(constraint.token_ids)[mask]
            written.append(int(allowed[logits[allowed].argmax()]))
            if written[-1] != END:
                state = constraint.step(state, written[-1])
        assert tokenizer.decode(written[:-1]) == reply
    assert read_manifest(tmp_path).spec["sampler"]["temperature"] == 0


def test_a_file_that_is_none_is_refused(toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "targets-x.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="not a file of soft targets"):
        read_targets(path)
    whole = SoftTargets(
        "numbers", "rows.jsonl", "0" * 64, {}, torch.tensor([0, 2]), torch.tensor([3, 4]).int(),
        torch.tensor([3, 4, 5]).int(), torch.zeros(2, 3).half(),
    )  # fmt: skip
    path.write_bytes(to_bytes(whole))
    assert torch.equal(read_targets(path).logprobs, whole.logprobs)
    torn = SoftTargets(**{**whole.__dict__, "logprobs": torch.zeros(2, 2).half()})
    path.write_bytes(to_bytes(torn))
    with pytest.raises(InputError, match="do not fit together"):
        read_targets(path)
