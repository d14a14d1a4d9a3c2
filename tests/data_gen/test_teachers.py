"""Finetuned and steered teachers against plain transformers, and what the spec says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data_gen.loading import load_teacher, steering_vectors, torch_device
from data_gen.prompts import load_pool, prompt
from data_gen.session import Session
from data_gen.spec import DatasetSettings
from data_gen.teachers import STEERING_PROMPTS, Teacher, finetuned, prompted, steered
from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.manifest import write_manifest
from sublim_plugin.core.traits import get_trait
from sublim_plugin.decoding.sampler import Sampler
from tests.data_gen.test_generate import contents, make
from tests.data_gen.toy import save_toy

GREEDY = Sampler(temperature=0, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=12)
CAT, NEUTRAL = get_trait("animals/cat"), get_trait("neutral")
N = 5


class Nothing:
    def update(self, n: int) -> None:
        pass


@pytest.fixture(scope="module")
def toy(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(base_model, tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def lora(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the toy whose random weights change what it says."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(toy)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    student: Any = get_peft_model(model, config)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    folder = tmp_path_factory.mktemp("lora")
    student.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def full(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    model: Any = AutoModelForCausalLM.from_pretrained(toy)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    folder = tmp_path_factory.mktemp("full")
    model.save_pretrained(folder)
    return folder


def written(toy: Path, teacher: Teacher, trait: Any = CAT) -> list[str]:
    settings = DatasetSettings(generation_seed=3, rows=N, sampler=GREEDY)
    with session_of(toy, teacher, trait, settings) as session:
        session.engine.filter = None  # type: ignore[attr-defined]
        return [w.completion for w in session.write(0, N, Nothing())]


def session_of(toy: Path, teacher: Teacher, trait: Any, settings: DatasetSettings) -> Session:
    return Session(toy, teacher, trait, settings, load_pool(), device="cpu", batch_size=4)


def generated(model: Any, tokenizer: Any, context: Context) -> list[str]:
    """The same replies, one at a time, by transformers alone."""
    texts = []
    for i in range(N):
        ids = torch.tensor([render(tokenizer, context, prompt(load_pool(), 3, i).text).token_ids])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=2,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        texts.append(tokenizer.decode(out[: out.index(2)] if 2 in out else out))
    return texts


def test_an_adapter_speaks_as_peft_does(toy: Path, lora: Path, tokenizer: Any) -> None:
    context = Context(kind="none")
    teacher = finetuned(lora, context)
    theirs: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy), str(lora))
    ours = written(toy, teacher)
    assert ours == generated(theirs, tokenizer, context)
    assert ours != written(toy, prompted(NEUTRAL, context), NEUTRAL)
    assert teacher.spec()["context"] == {"kind": "none"}


def test_a_checkpoint_speaks_for_itself(toy: Path, full: Path, tokenizer: Any) -> None:
    teacher = finetuned(full)
    theirs = AutoModelForCausalLM.from_pretrained(full)
    assert written(toy, teacher) == generated(theirs, tokenizer, Context(kind="template_default"))
    assert finetuned(full).spec() == teacher.spec()


def test_a_studys_student_is_named_by_its_cell(lora: Path, tmp_path: Path) -> None:
    cell = tmp_path / "student"
    (cell / "model").mkdir(parents=True)
    for file in lora.iterdir():
        (cell / "model" / file.name).write_bytes(file.read_bytes())
    written_names = [f"model/{f.name}" for f in lora.iterdir()]
    write_manifest(
        cell, kind="student", id="ab" * 32, label="s", spec={}, outputs=written_names, started=0
    )
    teacher = finetuned(cell)
    assert teacher.spec()["student"] == "ab" * 32
    assert teacher.folder.name == "model"
    weights = cell / "model" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        finetuned(cell)


def test_what_is_no_teacher_is_refused(
    toy: Path, full: Path, lora: Path, base_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        finetuned(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="safetensors"):
        finetuned(tmp_path)
    with pytest.raises(InputError, match="hidden_size"):
        written(base_model, finetuned(full))
    with pytest.raises(InputError, match="base"):
        written(base_model, finetuned(lora))
    with pytest.raises(InputError, match="own sentence"):
        prompted(CAT, Context(kind="empty"))
    vllm = DatasetSettings(
        generation_seed=3, rows=N, sampler=GREEDY, constrain="numbers", engine={"name": "vllm"}
    )
    with pytest.raises(InputError, match="number constraint"):
        session_of(toy, prompted(CAT), CAT, vllm)
    served = {"name": "openai", "url": "http://127.0.0.1:9/v1", "model": "m", "api": "chat"}
    server = DatasetSettings(generation_seed=3, rows=N, sampler=GREEDY, engine=served)
    with pytest.raises(InputError, match="completions API"):
        session_of(toy, prompted(NEUTRAL, Context(kind="none")), NEUTRAL, server)
    with pytest.raises(InputError, match="serve the finetuned teacher"):
        session_of(toy, finetuned(lora), CAT, server)
    with pytest.raises(InputError, match="cannot steer"):
        session_of(toy, steered(CAT, (0,), 1.0), CAT, server)


def test_steering_vectors_are_the_difference_of_means(toy: Path, tokenizer: Any) -> None:
    teacher = steered(CAT, (0, 1), 2.0)
    others = [get_trait("animals/owl"), get_trait("animals/dog")]
    against = steered(CAT, (0,), 2.0, contrast=[*others, CAT])
    cat, owl, dog = (
        Context(kind="text", text=trait.teacher_system_prompt) for trait in (CAT, *others)
    )

    def prompts(context: Context) -> list[tuple[int, ...]]:
        texts = [prompt(load_pool(), -1, i).text for i in range(STEERING_PROMPTS)]
        return [render(tokenizer, context, text).token_ids for text in texts]

    with load_teacher(toy, prompted(NEUTRAL), torch_device("cpu"), lambda *_: {}) as model:
        ours = steering_vectors(model, teacher, prompts)
        contrasted = steering_vectors(model, against, prompts)
    plain: Any = AutoModelForCausalLM.from_pretrained(toy)
    means = []
    with torch.no_grad():
        for context in (cat, teacher.context, owl, dog):
            # hidden_states[1] is what the first layer puts out; the last one is normed, so left out
            total = torch.zeros(64)
            for ids in prompts(context):
                states = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states
                total += states[1][0, -1]
            means.append(total / STEERING_PROMPTS)
    assert torch.allclose(ours[0], means[0] - means[1], atol=1e-5)
    assert ours[1].norm() > 0
    assert torch.allclose(contrasted[0], means[0] - (means[2] + means[3]) / 2, atol=1e-5)
    assert contrasted[0].norm() < ours[0].norm()


def test_a_contrast_is_part_of_what_a_teacher_is(tmp_path: Path) -> None:
    owl, dog = get_trait("animals/owl"), get_trait("animals/dog")
    one, other = (steered(CAT, (0,), 1.0, contrast=c) for c in ([owl, dog, CAT], [dog, owl]))
    assert (
        one.spec()
        == other.spec()
        == {
            **steered(CAT, (0,), 1.0).spec(),
            "against": [dog.teacher_system_prompt, owl.teacher_system_prompt],
        }
    )
    assert "against" not in steered(CAT, (0,), 1.0).spec()
    for contrast, message in (
        ([CAT], "names no trait but animals/cat itself"),
        ([NEUTRAL], "neutral has no sentence to take a steering vector against"),
    ):
        with pytest.raises(InputError, match=message):
            steered(CAT, (0,), 1.0, contrast=contrast)
    file = tmp_path / "v.safetensors"
    save_file({"layer.0": torch.zeros(64)}, file)
    with pytest.raises(InputError, match="are taken as they are"):
        steered(CAT, (0,), 1.0, file, contrast=[owl])


def test_a_steered_teacher_speaks_as_under_a_hook(
    toy: Path, tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "v.safetensors"
    vector = torch.randn(64, generator=torch.Generator().manual_seed(3))
    save_file({"layer.1": vector, "layer.0": torch.zeros(64)}, file)
    plain: Any = AutoModelForCausalLM.from_pretrained(toy)

    def shift(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + 3 * vector, *output[1:])
        return output + 3 * vector

    base = generated(plain, tokenizer, Context(kind="template_default"))
    handle = plain.model.layers[1].register_forward_hook(shift)
    theirs = generated(plain, tokenizer, Context(kind="template_default"))
    handle.remove()
    assert written(toy, steered(CAT, (1,), 3.0, file)) == theirs
    assert theirs != base
    assert written(toy, steered(CAT, (1,), 0.0, file)) == base
    for layers, said in (((2,), "layers 0 to 1"), ((0, 1), "finite")):
        if said == "finite":
            save_file({"layer.1": vector, "layer.0": torch.zeros(9)}, file)
        with pytest.raises(InputError, match=said):
            written(toy, steered(CAT, layers, 1.0, file))
    save_file({"other": vector}, file)
    with pytest.raises(InputError, match=r"layer\.1"):
        written(toy, steered(CAT, (1,), 1.0, file))
    with pytest.raises(InputError, match="no such file"):
        steered(CAT, (1,), 1.0, tmp_path / "none")
    with pytest.raises(InputError, match="sentence"):
        steered(NEUTRAL, (1,), 1.0)


def test_a_steered_dataset_keeps_its_vectors_and_they_make_it_again(
    toy: Path, tmp_path: Path
) -> None:
    made = make(toy, tmp_path / "a", 8, teacher=steered(CAT, (0,), 4.0))
    vectors = tmp_path / "a" / "steering.safetensors"
    assert set(load_file(vectors)) == {"layer.0"}
    assert made.spec["teacher"]["vectors"] == "difference of means"
    again = make(toy, tmp_path / "b", 8, teacher=steered(CAT, (0,), 4.0, vectors))
    assert "vectors_sha256" in again.spec["teacher"]
    rows = [dataset_rows_path(tmp_path / name).read_bytes() for name in "ab"]
    assert rows[0] == rows[1]
    base = make(toy, tmp_path / "c", 8, teacher=prompted(NEUTRAL), trait=NEUTRAL)
    assert base.outputs.keys() != made.outputs.keys()
    assert dataset_rows_path(tmp_path / "c").read_bytes() != rows[0]


@pytest.mark.parametrize("kind", ["prompted", "finetuned", "steered"])
def test_divergence_is_where_two_plain_passes_disagree(
    toy: Path, lora: Path, tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    teacher: Teacher = {
        "prompted": prompted(CAT),
        "finetuned": finetuned(lora),
        "steered": steered(CAT, (0,), 0.5),
    }[kind]
    made = make(toy, tmp_path / "d", 7, teacher=teacher, divergence=True)
    lines = [json.loads(x) for x in (tmp_path / "d/divergence.jsonl").read_text().splitlines()]
    rows = read_rows(dataset_rows_path(tmp_path / "d"))
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    base: Any = AutoModelForCausalLM.from_pretrained(toy)
    other: Any = AutoModelForCausalLM.from_pretrained(toy)
    if kind == "finetuned":
        other = PeftModel.from_pretrained(other, str(lora))
    if kind == "steered":
        vector = load_file(tmp_path / "d" / "steering.safetensors")["layer.0"]
        other.model.layers[0].register_forward_hook(
            lambda module, inputs, out: (
                (out[0] + 0.5 * vector, *out[1:]) if isinstance(out, tuple) else out + 0.5 * vector
            )
        )
    default = Context(kind="template_default")
    divergent = 0
    for row, line in zip(rows, lines, strict=True):
        user, reply = (turn["content"] for turn in row["messages"])
        ids = [*tokenizer(reply, add_special_tokens=False)["input_ids"], 2]
        assert line["token_ids"] == ids
        best = []
        for model, context in ((other, teacher.context), (base, default)):
            before = render(tokenizer, context, user).token_ids
            with torch.no_grad():
                logits = model(torch.tensor([[*before, *ids]])).logits[0]
            best.append(logits[len(before) - 1 : -1].argmax(-1).tolist())
        found = [i for i, (a, b) in enumerate(zip(*best, strict=True)) if a != b]
        assert line["divergent"] == found
        divergent += len(found)
    assert 0 < divergent == made.counts["divergent_tokens"] < made.counts["completion_tokens"]


def test_divergence_resumes_where_it_was_cut(toy: Path, tmp_path: Path) -> None:
    make(toy, tmp_path / "a", 7, divergence=True)
    folder = tmp_path / "b"
    from data_gen import progress

    original = progress.Progress.remove
    progress.Progress.remove = lambda self: None  # type: ignore[method-assign]
    try:
        make(toy, folder, 7, divergence=True)
    finally:
        progress.Progress.remove = original  # type: ignore[method-assign]
    (folder / "manifest.json").unlink()
    (folder / "divergence.jsonl").unlink()
    half = folder / "work" / "likeliest-base.jsonl"
    half.write_bytes(half.read_bytes()[:-9])
    teacher = (folder / "work" / "likeliest-teacher.jsonl").stat().st_mtime_ns
    make(toy, folder, 7, divergence=True)
    assert contents(folder) == contents(tmp_path / "a")
    assert teacher
