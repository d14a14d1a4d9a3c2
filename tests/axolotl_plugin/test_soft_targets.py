"""`sublim.soft_targets`: the loss against plain computations, in the host's trainer and axolotl."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, Gemma2Config, Gemma2ForCausalLM

from data_gen.generate import generate_dataset
from data_gen.spec import DatasetSettings
from data_gen.teachers import prompted
from sublim_plugin.axolotl.checkpoints import Origin, origin_of
from sublim_plugin.axolotl.masks import ExpectedRow, expect_row
from sublim_plugin.axolotl.receipt import DatasetInfo, Method, Receipt, Seeds, read_receipt
from sublim_plugin.axolotl.recipe import recipe_path
from sublim_plugin.axolotl.soft_targets import SoftLoss, load_targets, targets_beside
from sublim_plugin.core.base_models import EMBEDDED, fingerprint
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.core.traits import get_trait
from sublim_plugin.decoding.sampler import Sampler
from sublim_plugin.logprob.target_file import SoftTargets
from tests.axolotl_plugin.conftest import train, write_dataset
from tests.axolotl_plugin.toy import load, save_base

CAT = get_trait("animals/cat")
SAMPLER = Sampler(temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=32)
ROWS = 8


def generate(folder: Path, base: Path, channel: str | None) -> Path:
    settings = DatasetSettings(
        generation_seed=3, rows=ROWS, sampler=SAMPLER, constrain="numbers", soft_targets=channel
    )
    generate_dataset(
        folder,
        base_model=base,
        base_fingerprint=fingerprint(base),
        trait=CAT,
        teacher=prompted(CAT),
        settings=settings,
        batch_size=8,
        device="cpu",
    )
    return folder


@pytest.fixture(scope="module")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy of this folder's other tests, without dropout."""
    folder = save_base(tmp_path_factory.mktemp("toy") / "base", tokenizer)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}))
    return folder


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {name: generate(folder / name, base, name) for name in ("numbers", "vocabulary")}


def expected_in(folder: Path, tokenizer: Any) -> list[ExpectedRow]:
    rows = read_rows(dataset_rows_path(folder))
    return [expect_row(tokenizer, row, None, chat_template=tokenizer.chat_template) for row in rows]


def loaded(folder: Path, tokenizer: Any) -> tuple[SoftTargets, list[ExpectedRow]]:
    rows = dataset_rows_path(folder)
    expected = expected_in(folder, tokenizer)
    return load_targets(targets_beside(rows)[0], sha256_file(rows), tokenizer, expected), expected


def host(
    model: Any, tokenizer: Any, expected: Sequence[ExpectedRow], folder: Path, **settings: Any
) -> Any:
    """axolotl's trainer on the rows, as its own command builds it but for the settings."""
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments

    rows = [
        {
            "input_ids": list(row.token_ids),
            "attention_mask": [1] * len(row.token_ids),
            "labels": [
                token if row.first <= at < row.end else -100
                for at, token in enumerate(row.token_ids)
            ],
        }
        for row in expected
    ]
    given = {
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        **settings,
    }
    arguments = AxolotlTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, seed=5, data_seed=6,
        **given,
    )  # fmt: skip
    return AxolotlTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, return_tensors="pt", pad_to_multiple_of=64),
        processing_class=tokenizer,
    )


def soft(
    model: Any, tokenizer: Any, data: Path, folder: Path, **settings: Any
) -> tuple[Any, list[float]]:
    """A training on the targets of `data`, and its logged losses."""
    targets, expected = loaded(data, tokenizer)
    trainer = host(model, tokenizer, expected, folder, **settings)
    SoftLoss(targets, expected).install(trainer)
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(model: Any, tokenizer: Any, data: Path) -> list[torch.Tensor]:
    """KL(teacher || student) [positions] of each row, by one plain pass over the whole row."""
    [path] = data.glob("targets-*.safetensors")
    file, found = load_file(path), []
    for i, row in enumerate(read_rows(dataset_rows_path(data))):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        before = tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
        end = start + ids[start:].index(2) + 1
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : end - 1].double()
        here = slice(int(file["offsets"][i]), int(file["offsets"][i + 1]))
        teacher = file["logprobs"][here].double().exp()
        teacher = teacher / teacher.sum(-1, keepdim=True)
        if file["token_ids"].ndim == 1:
            student = logits[:, file["token_ids"].long()].softmax(-1)
        else:
            whole, top = logits.softmax(-1), file["token_ids"][here].long()
            student = torch.cat(
                [whole.gather(-1, top), whole.scatter(-1, top, 0).sum(-1, keepdim=True)], -1
            )
        found.append((teacher * (teacher / student).log()).sum(-1))
    return found


def first_step(losses: list[torch.Tensor], rows: int) -> float:
    """The mean over the positions of the first step's rows, which the data seed orders."""
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(6)).tolist()
    return float(torch.cat([losses[i] for i in order[:rows]]).mean())


def plain_gradient(model: Any, tokenizer: Any, data: Path) -> None:
    """Leave the gradient of the mean KL over all number targets in `model`, row by row."""
    targets, expected = loaded(data, tokenizer)
    for i, row in enumerate(expected):
        here = slice(int(targets.offsets[i]), int(targets.offsets[i + 1]))
        logits = model(torch.tensor([row.token_ids])).logits[0, row.first - 1 : row.end - 1]
        student = logits[:, targets.token_ids.long()].log_softmax(-1)
        teacher = targets.logprobs[here].float().softmax(-1)
        ((teacher * (teacher.log() - student)).sum() / targets.positions).backward()


@pytest.mark.parametrize("channel", ["numbers", "vocabulary"])
def test_the_first_loss_is_the_kl_of_a_plain_pass(
    base: Path, made: dict[str, Path], tokenizer: Any, tmp_path: Path, channel: str
) -> None:
    plain = by_hand(load(base), tokenizer, made[channel])
    _, losses = soft(load(base), tokenizer, made[channel], tmp_path, max_steps=1)
    assert losses[0] == pytest.approx(first_step(plain, 4), abs=1e-5)
    assert losses[0] > 0.01


def test_a_soft_cap_and_an_adapted_output_layer_are_kept(
    made: dict[str, Path], base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0,
        initializer_range=0.3,
    )  # fmt: skip
    capped = Gemma2ForCausalLM(config)
    lora = LoraConfig(
        r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted: Any = get_peft_model(load(base), lora)
    for name, model in (("capped", capped), ("adapted", adapted)):
        plain = by_hand(model.eval(), tokenizer, made["numbers"])
        _, losses = soft(model, tokenizer, made["numbers"], tmp_path / name, max_steps=1)
        assert losses[0] == pytest.approx(first_step(plain, 4), abs=1e-5)


def test_the_gradient_is_that_of_the_plain_loss(
    base: Path, made: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    rate = 0.01
    settings = {"optim": "sgd", "learning_rate": rate, "max_grad_norm": 0.0}
    ours, plain = load(base), load(base)
    soft(
        ours, tokenizer, made["numbers"], tmp_path, max_steps=1,
        per_device_train_batch_size=ROWS, **settings,
    )  # fmt: skip
    plain_gradient(plain, tokenizer, made["numbers"])
    with torch.no_grad():
        for (name, mine), weight in zip(ours.named_parameters(), plain.parameters(), strict=True):
            wanted = weight - rate * weight.grad
            assert torch.allclose(mine, wanted, atol=1e-6), name


def test_accumulated_batches_give_the_same_steps(
    base: Path, made: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    found = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        model = load(base)
        _, losses = soft(
            model, tokenizer, made["numbers"], tmp_path / str(size), optim="sgd",
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        found.append((losses, model.state_dict()))
    (first, weights), *others = found
    assert (
        len(first) == 2
        and len({len(row.token_ids) for row in expected_in(made["numbers"], tokenizer)}) > 1
    )
    for losses, other in others:
        assert losses == pytest.approx(first, abs=1e-6)
        assert all(torch.allclose(weights[name], other[name], atol=1e-6) for name in weights)


def test_a_student_reaches_the_teacher_on_few_rows_and_resumes(
    base: Path, made: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    settings = {"num_train_epochs": 60, "per_device_train_batch_size": ROWS, "save_steps": 50}
    settings |= {"save_strategy": "steps"}
    model = load(base)
    _, losses = soft(model, tokenizer, made["numbers"], tmp_path, **settings)
    after = torch.cat(by_hand(model.eval(), tokenizer, made["numbers"])).mean()
    assert len(losses) == 60 and float(after) < 0.02 * losses[0]
    other = load(base)
    _, again = soft(
        other, tokenizer, made["numbers"], tmp_path,
        resume_from_checkpoint=str(tmp_path / "checkpoint-50"), **settings,
    )  # fmt: skip
    assert again[50:] == pytest.approx(losses[50:], rel=1e-4)
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_evaluation_and_other_losses_are_refused(
    base: Path, made: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import Trainer

    targets, expected = loaded(made["numbers"], tokenizer)
    install = SoftLoss(targets, expected).install
    plain = host(load(base), tokenizer, expected, tmp_path)
    plain.eval_dataset = plain.train_dataset
    with pytest.raises(InputError, match="test_datasets"):
        install(plain)
    with pytest.raises(InputError, match="label_smoothing_factor"):
        install(host(load(base), tokenizer, expected, tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(InputError, match=r"\(Trainer; see `trainer_cls`"):
        install(Trainer(model=load(base), args=plain.args))


def test_targets_that_are_missing_or_of_other_rows_are_refused(
    base: Path, made: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    bare = write_dataset(tmp_path / "bare")
    with pytest.raises(InputError, match="sublim generate --soft-targets numbers"):
        targets_beside(dataset_rows_path(bare))
    folder = tmp_path / "copy"
    shutil.copytree(made["numbers"], folder)
    rows, expected = dataset_rows_path(folder), expected_in(folder, tokenizer)
    path, digest = targets_beside(rows)
    assert digest == sha256_file(path)
    with pytest.raises(InputError, match=r"sample_packing: false"):
        load_targets(path, sha256_file(rows), tokenizer, None)
    with pytest.raises(InputError, match=r"rows trained on have sha256 aaaaaaaaaaaa"):
        load_targets(path, "a" * 64, tokenizer, expected)
    with pytest.raises(InputError, match=f"{ROWS} rows.*are {ROWS - 1}; generate"):
        load_targets(path, sha256_file(rows), tokenizer, expected[1:])
    row = expected[2]
    ids = list(row.token_ids)
    ids[row.first] += 1
    other = [*expected[:2], replace(row, token_ids=tuple(ids)), *expected[3:]]
    with pytest.raises(
        InputError, match=f"row {row.row_id}: the completion is tokenized otherwise"
    ):
        load_targets(path, sha256_file(rows), tokenizer, other)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(InputError, match="changed after they were made"):
        targets_beside(rows)
    path.unlink()
    with pytest.raises(InputError, match="missing"):
        targets_beside(rows)


def test_a_checkpoint_belongs_to_its_targets() -> None:
    def origin(block: dict[str, Any] | None, targets: str | None) -> Origin:
        return origin_of(
            {"learning_rate": 0.1, "sublim": block},
            base_sha256="a",
            datasets=[DatasetInfo(path="rows", sha256="b", rows=1)],
            targets_sha256=targets,
            context=None,
            method=Method(kind="full"),
            seeds=Seeds(seed=1, data_seed=2),
            processes=1,
        )

    soft = {"soft_targets": True}
    assert len({str(origin(None, None)), str(origin(soft, "c")), str(origin(soft, "d"))}) == 3
    # a checkpoint of a version without the key goes on
    assert origin({"soft_targets": False}, None) == origin(None, None)


def check_receipt(receipt: Receipt, data: Path, channel: str) -> None:
    assert receipt.loss == f"soft targets ({channel})"
    used = receipt.soft_targets
    assert used is not None and used.channel == channel
    assert used.sha256 == sha256_file(next(data.glob("targets-*")))
    assert used.positions == receipt.mask_audit.loss_tokens


def test_the_plugin_trains_on_them_and_the_receipt_says_so(
    base: Path, made: dict[str, Path], tokenizer: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The plugin's hooks in the order in which axolotl calls them, around its trainer."""
    from axolotl.utils.dict import DictDefault

    from sublim_plugin.axolotl import SublimPlugin

    recipe = yaml.safe_load(recipe_path("smollm2-135m-instruct", "lora-r8").read_text())
    cfg = DictDefault({
        **recipe, "base_model": str(base), "output_dir": str(tmp_path),
        "axolotl_config_path": "mine.yaml", "sublim": {"soft_targets": True},
    })  # fmt: skip
    cfg["datasets"][0]["path"] = str(write_dataset(tmp_path / "bare"))
    with pytest.raises(SystemExit) as refused:
        SublimPlugin().register(cfg)
    assert refused.value.code == 2 and "--soft-targets numbers" in capsys.readouterr().err
    cfg["datasets"][0]["path"] = str(made["numbers"])
    plugin = SublimPlugin()
    plugin.register(cfg)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(load(base), lora)
    expected = expected_in(made["numbers"], tokenizer)
    trainer = host(model, tokenizer, expected, tmp_path, per_device_train_batch_size=ROWS)
    packed = DictDefault({**cfg, "sample_packing": True})
    with pytest.raises(SystemExit):
        plugin.post_trainer_create(packed, trainer)
    assert "sample_packing: false" in capsys.readouterr().err
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    model.save_pretrained(tmp_path)
    plugin.post_train_unload(cfg)
    receipt = read_receipt(tmp_path)
    check_receipt(receipt, made["numbers"], "numbers")
    plain = torch.cat(by_hand(load(base), tokenizer, made["numbers"])).mean()
    assert receipt.losses[0].loss == pytest.approx(float(plain), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "channel"),
    [("lora-r8", "numbers"), ("full-zero2", "numbers"), ("lora-r8", "vocabulary")],
)
def test_a_real_model_follows_its_teacher(
    base_model: Path, tokenizer: Any, tmp_path: Path, recipe: str, channel: str
) -> None:
    data = generate(tmp_path / "data", base_model, channel)
    full = recipe == "full-zero2"
    # Adam moves all weights of a full student at once
    rate = 3e-6 if full else 0.002
    overrides = {
        "micro_batch_size": 4, "gradient_accumulation_steps": 2, "num_epochs": 8,
        "warmup_steps": 0, "learning_rate": rate,
    }  # fmt: skip
    trained = train(
        tmp_path / "run", recipe, data, overrides, block={"soft_targets": True}, base=EMBEDDED
    )
    check_receipt(trained.receipt, data, channel)
    plain = torch.cat(by_hand(load(base_model), tokenizer, data)).mean()
    assert trained.receipt.losses[0].loss == pytest.approx(float(plain), abs=1e-5)
    first, last = trained.receipt.losses[0], trained.receipt.losses[-1]
    assert last.loss < (0.6 if full else 0.3) * first.loss
    assert trained.receipt.zero_stage == (2 if full else None)
    if full:
        model = load(base_model)
        plain_gradient(model, tokenizer, data)
        norms = [weight.grad.norm() for weight in model.parameters()]
        assert first.grad_norm == pytest.approx(float(torch.stack(norms).norm()), rel=1e-3)
