"""The order digest, computed again from the rows file and the seed alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from sublim_plugin.axolotl.order import FIRST, OrderRecorder, OrderState, extend, row_digest
from sublim_plugin.axolotl.receipt import Seeds
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.errors import RunError
from tests.axolotl_plugin.conftest import OTHER_ORDER
from tests.axolotl_plugin.toy import load, save_base, trainer


def chain(rows: list[list[int]]) -> str:
    state = ""
    for ids in rows:
        text = ",".join(str(token) for token in ids)
        digest = hashlib.sha256(text.encode()).hexdigest()
        state = hashlib.sha256(f"{state}{digest}".encode()).hexdigest()
    return state


def test_the_receipt_proves_the_order_of_the_data_seed(
    lora: Any, full: Any, dataset: Path, tokenizer: Any
) -> None:
    rows = read_rows(dataset_rows_path(dataset))
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for receipt, data_seed in ((lora.receipt, 7), (full.receipt, OTHER_ORDER)):
        assert receipt.seeds == Seeds(seed=7, data_seed=data_seed)
        found, order = receipt.order, []
        for epoch in range(2):
            generator = torch.Generator().manual_seed(data_seed + epoch)
            order += torch.randperm(len(rows), generator=generator).tolist()
        order = order[: found.rows]
        assert found.rows == receipt.steps * (4 if receipt.method.kind == "lora" else 2)
        assert found.processes == 1
        assert found.first_rows == [rows[index]["id"] for index in order]
        assert found.sha256 == chain([ids[index] for index in order])
        assert found.sha256 != chain([ids[index] for index in reversed(order)])


def test_rows_that_do_not_fit_the_steps_are_an_error() -> None:
    recorder = OrderRecorder(None)
    with pytest.raises(RunError, match=r"step 1: 0 rows.*instead of 1 to 4 a step"):
        recorder.check(1, 4)
    for rows, steps, fits in ((4, 1, True), (5, 1, False), (5, 2, True), (1, 2, False)):
        recorder.state = OrderState(rows=rows)
        if fits:
            recorder.check(steps, 4)
        else:
            with pytest.raises(RunError, match="order cannot be recorded"):
                recorder.check(steps, 4)


def test_another_seed_gives_another_digest_and_evaluation_none(
    tokenizer: Any, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", tokenizer)
    found = []
    for seed in (6, 6, 7):
        model = load(base)
        host = trainer(model, tmp_path / "out", num_train_epochs=1)
        host.args.data_seed = host.accelerator.dataloader_config.data_seed = seed
        recorder = OrderRecorder(None)
        recorder.watch(model)
        host.evaluate(host.train_dataset)
        assert recorder.state == OrderState()
        host.train()
        assert recorder.state.rows == 12
        found.append(recorder.state.sha256)
    assert found[0] == found[1] != found[2]


def test_a_chain_can_be_taken_up_again() -> None:
    whole = OrderState()
    for number in range(20):
        whole = extend(whole, row_digest([number, 7]), str(number))
    half = OrderState()
    for number in range(10):
        half = extend(half, row_digest([number, 7]), str(number))
    again = OrderState.model_validate_json(half.model_dump_json())
    for number in range(10, 20):
        again = extend(again, row_digest([number, 7]), str(number))
    assert again == whole
    assert whole.sha256 == chain([[number, 7] for number in range(20)])
    assert len(whole.first_rows) == FIRST
