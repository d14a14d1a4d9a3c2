"""Bad students are errors that name the file; nothing falls back to the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sublim_plugin.cli import main
from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.errors import InputError
from sublim_plugin.preference.shared_lm import folded
from sublim_plugin.students import (
    RECEIPT,
    attached,
    check_full,
    check_tokenizer,
    load_full,
    write_merged,
)


@pytest.fixture(scope="module")
def model(toy_base):
    return AutoModelForCausalLM.from_pretrained(toy_base).eval()


@pytest.fixture
def copy(toy_adapter, tmp_path) -> Path:
    return Path(shutil.copytree(toy_adapter, tmp_path / "adapter"))


def refused(model, folder: Path, base: Path) -> str:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error, attached(model, folder, base):
        pytest.fail("a bad adapter was attached")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert str(folder) in str(error.value)
    return str(error.value)


def rewrite(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def reconfigure(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_good_adapter_changes_the_output_as_peft_loads_it_and_leaves_no_trace(
    model, toy_adapter, toy_base
):
    from peft import PeftModel

    ids = torch.tensor([[5, 6, 7, 8]])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        base_logits = model(ids).logits
        with attached(model, toy_adapter, toy_base) as student:
            ours = student(ids).logits
        assert torch.equal(model(ids).logits, base_logits)
        fresh = AutoModelForCausalLM.from_pretrained(toy_base)
        theirs = PeftModel.from_pretrained(fresh, toy_adapter).eval()(ids).logits
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, base_logits)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not hasattr(model, "peft_config")


def test_truncated(model, copy, toy_base):
    path = copy / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in refused(model, copy, toy_base)


def test_empty_file(model, copy, toy_base):
    (copy / "adapter_model.safetensors").write_bytes(b"")
    assert "truncated" in refused(model, copy, toy_base)


def test_missing_keys(model, copy, toy_base):
    rewrite(copy, lambda tensors: tensors.pop(sorted(tensors)[0]))
    assert "1 missing" in refused(model, copy, toy_base)


def test_renamed_keys(model, copy, toy_base):
    def rename(tensors):
        key = sorted(tensors)[0]
        tensors[key.replace("layers.0", "layers.7")] = tensors.pop(key)

    rewrite(copy, rename)
    message = refused(model, copy, toy_base)
    assert "1 missing" in message and "1 unknown" in message


def test_other_shapes(model, copy, toy_base):
    def grow(tensors):
        key = next(key for key in tensors if "lora_A" in key)
        tensors[key] = torch.zeros(tensors[key].shape[0], 99)

    rewrite(copy, grow)
    assert "1 other shape" in refused(model, copy, toy_base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(model, copy, toy_base, value):
    rewrite(copy, lambda tensors: tensors[sorted(tensors)[3]].view(-1)[0].fill_(value))
    assert "not finite" in refused(model, copy, toy_base)


def test_a_pickle_is_not_loaded(model, copy, toy_base):
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    message = refused(model, copy, toy_base)
    assert "adapter_model.bin" in message and "safetensors" in message


def test_no_adapter_at_all(model, toy_base, tmp_path):
    assert "does not exist" in refused(model, tmp_path / "nothing", toy_base)


def test_another_base_by_record(model, copy, toy_base):
    reconfigure(copy, base_model_name_or_path="/somewhere/else")
    message = refused(model, copy, toy_base)
    assert "/somewhere/else" in message and "base_model_name_or_path" in message


def test_another_base_by_receipt(model, copy, toy_base):
    (copy / RECEIPT).write_text(json.dumps({"base_model": {"name": "other", "sha256": "0" * 64}}))
    assert "was trained on other" in refused(model, copy, toy_base)


def test_the_receipt_decides_over_the_record(model, copy, toy_base):
    mine = fingerprint(toy_base)
    (copy / RECEIPT).write_text(json.dumps({"base_model": mine}))
    reconfigure(copy, base_model_name_or_path="/a/place/it/moved/from")
    with attached(model, copy, toy_base):
        pass


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "LORA"),
        ({"target_modules": ["no_such_module"]}, "does not fit"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"use_super_scaling": True}, "use_super_scaling is True"),  # PEFT drops it with a warning
    ],
)
def test_configurations_that_touch_the_base_or_do_not_fit(model, copy, toy_base, changes, said):
    reconfigure(copy, **changes)
    assert said in refused(model, copy, toy_base)


SNAPSHOT = "models--lab--toy/snapshots/" + "a" * 40


@pytest.mark.parametrize(
    ("record", "fits"),
    [
        ({"base_model_name_or_path": "lab/toy"}, True),
        ({"base_model_name_or_path": "lab/toy", "revision": "main"}, True),
        ({"base_model_name_or_path": "lab/toy", "revision": "a" * 40}, True),
        ({"base_model_name_or_path": f"/elsewhere/hub/{SNAPSHOT}"}, True),
        ({"base_model_name_or_path": "lab/toy", "revision": "b" * 40}, False),
        ({"base_model_name_or_path": "lab/other"}, False),
        ({"base_model_name_or_path": "toy"}, False),
        ({"base_model_name_or_path": f"/elsewhere/hub/{SNAPSHOT[:-1]}b"}, False),
        ({"base_model_name_or_path": None}, False),
    ],
)
def test_a_snapshot_is_the_model_that_the_hub_calls_so(
    model, copy, toy_base, tmp_path, record, fits
):
    base = Path(shutil.copytree(toy_base, tmp_path / SNAPSHOT))
    reconfigure(copy, **record)
    if fits:
        with attached(model, copy, base):
            pass
    else:
        message = refused(model, copy, base)
        assert str(copy / "adapter_config.json") in message and f"to {str(base)!r}" in message


def test_a_folder_of_the_same_name_is_not_the_model(model, copy, toy_base, tmp_path):
    base = Path(shutil.copytree(toy_base, tmp_path / "toy"))
    reconfigure(copy, base_model_name_or_path="lab/toy")
    refused(model, copy, base)


def test_another_tokenizer(copy, toy_base, tokenizer, tmp_path):
    check_tokenizer(copy, tokenizer)
    other = AutoTokenizer.from_pretrained(toy_base)
    other.chat_template += "{# another text of the same template #}"
    other.save_pretrained(copy)
    check_tokenizer(copy, tokenizer)
    other.add_tokens(["owl,"])
    other.save_pretrained(copy)
    with pytest.raises(InputError, match="another tokenizer") as error:
        check_tokenizer(copy, tokenizer)
    assert str(copy) in str(error.value)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        check_tokenizer(copy, tokenizer)


def test_another_chat_template(copy, chat_tokenizers, tokenizer):
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    for change in (
        chat_tokenizers["gemma3"].chat_template,
        tokenizer.chat_template.replace("named SmolLM", "named Bob"),
    ):
        other.chat_template = change
        other.save_pretrained(copy)
        with pytest.raises(InputError, match="chat template") as error:
            check_tokenizer(copy, tokenizer)
        assert str(copy) in str(error.value) and tokenizer.name_or_path in str(error.value)
    other.chat_template = None
    other.save_pretrained(copy)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    check_tokenizer(copy, tokenizer)


def test_garbled_configuration(model, copy, toy_base):
    (copy / "adapter_config.json").write_text("{")
    assert "not readable JSON" in refused(model, copy, toy_base)


def test_full_checkpoints(toy_base, tmp_path):
    folder = Path(shutil.copytree(toy_base, tmp_path / "full"))
    model = load_full(folder, toy_base, torch.float32, "cpu")
    assert model.dtype == torch.float32 and not model.training

    path = folder / "model.safetensors"
    good = path.read_bytes()
    tensors = load_file(path)
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != key}, path, {"format": "pt"})
    with pytest.raises(InputError, match="missing_keys"):
        load_full(folder, toy_base, torch.float32, "cpu")
    tensors[key][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="not finite"):
        load_full(folder, toy_base, torch.float32, "cpu")
    path.write_bytes(good[:-10])
    with pytest.raises(InputError, match="truncated"):
        load_full(folder, toy_base, torch.float32, "cpu")
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle"):
        load_full(folder, toy_base, torch.float32, "cpu")


def test_a_full_checkpoint_of_another_architecture(toy_base, tmp_path):
    folder = Path(shutil.copytree(toy_base, tmp_path / "full"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match="num_hidden_layers"):
        load_full(folder, toy_base, torch.float32, "cpu")


def test_a_full_checkpoint_has_exactly_the_tensors_of_its_base(toy_base, tmp_path):
    folder = Path(shutil.copytree(toy_base, tmp_path / "full"))
    check_full(folder, toy_base)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.mlp.up_proj.weight"
    for change, said in [
        ({key: tensors[key][:-1].clone()}, "1 other shape"),
        ({key: tensors[key] * float("nan")}, "not finite"),
        ({"stray.weight": torch.ones(1)}, "1 unknown"),
    ]:
        save_file({**tensors, **change}, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=said):
            check_full(folder, toy_base)
    del tensors[key]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"1 missing .first: {key}"):
        check_full(folder, toy_base)


def test_a_merged_checkpoint_is_the_adapted_base(model, toy_adapter, toy_base, tmp_path):
    write_merged(toy_adapter, toy_base, tmp_path)
    check_full(tmp_path, toy_base)
    ids = torch.tensor([[5, 6, 7, 8]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad(), attached(model, toy_adapter, toy_base) as adapted:
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


@pytest.mark.parametrize("rslora", [False, True])
def test_folded_weights_give_the_adapters_logits_and_leave_no_trace(model, copy, toy_base, rslora):
    reconfigure(copy, use_rslora=rslora)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad(), attached(model, copy, toy_base) as adapted:
        expected = adapted(ids).logits
        with folded(adapted):
            q_proj = adapted.base_model.model.model.layers[0].self_attn.q_proj
            assert q_proj.disable_adapters
            assert torch.allclose(adapted(ids).logits, expected, atol=1e-4)
        assert torch.equal(adapted(ids).logits, expected)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(scope="module")
def dora(toy_base, tmp_path_factory) -> Path:
    """A DoRA adapter whose magnitudes are not those that it began with."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    student = get_peft_model(
        AutoModelForCausalLM.from_pretrained(toy_base),
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
            use_dora=True,
        ),
    )
    for name, weight in student.named_parameters():
        if "magnitude" in name:
            weight.data *= 1 + 0.3 * torch.rand_like(weight)
    folder = tmp_path_factory.mktemp("dora") / "adapter"
    student.save_pretrained(folder)
    return folder


def test_dora_is_the_papers_formula_and_is_not_folded(model, dora, toy_base):
    """W' = m (W + s B A) / ||W + s B A||, the norm of each output's row (arXiv 2402.09353)."""
    ids = torch.tensor([[5, 6, 7, 8]])
    tensors = load_file(dora / "adapter_model.safetensors")
    by_hand = AutoModelForCausalLM.from_pretrained(toy_base).eval()
    modules = dict(by_hand.named_modules())
    for name in {key.split(".lora_")[0] for key in tensors}:
        a, b = (tensors[f"{name}.lora_{x}.weight"] for x in "AB")
        weight = modules[name.removeprefix("base_model.model.")].weight
        changed = weight.data + 2 * b @ a
        norm = changed.norm(dim=1, keepdim=True)
        weight.data = tensors[f"{name}.lora_magnitude_vector"][:, None] * changed / norm
    with torch.no_grad():
        expected, base = by_hand(ids).logits, model(ids).logits
    assert not torch.allclose(base, expected, atol=1e-2)
    with torch.no_grad(), attached(model, dora, toy_base) as adapted:
        assert torch.allclose(adapted(ids).logits, expected, atol=1e-4)
        with folded(adapted):
            assert torch.allclose(adapted(ids).logits, expected, atol=1e-4)
            assert not adapted.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters


@pytest.mark.parametrize("change", [{"lora_bias": True}, {"target_modules": ["embed_tokens"]}])
def test_what_is_more_than_a_product_is_not_folded(toy_base, change):
    """Adapters that `attached` refuses, or that sit elsewhere than on a linear layer."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig.from_pretrained(toy_base, attention_bias=True)
    options = {"target_modules": ["q_proj"], "init_lora_weights": False} | change
    adapted = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, **options)).eval()
    for name, weight in adapted.named_parameters():
        if name.endswith("lora_B.default.bias"):
            torch.nn.init.normal_(weight)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = adapted(ids).logits
        with folded(adapted):
            assert torch.allclose(adapted(ids).logits, expected, atol=1e-4)


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_as_the_base_is_told_where_it_belongs(copy, toy_base, tmp_path, with_config):
    """axolotl writes a config.json beside an adapter; transformers would load both as one model."""
    if with_config:
        shutil.copy(toy_base / "config.json", copy)
    command = ["eval", "--model", str(copy), "--tasks", "subliminal_cat", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert str(copy) in done.stderr and "--adapters" in done.stderr
