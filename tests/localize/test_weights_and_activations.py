"""Spectra of weights, patched activations, and divergence tokens, each against a plain
computation."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from sublim_plugin.cli import main
from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.core.traits import get_trait
from sublim_plugin.localize.attach import gated_student, load_base
from sublim_plugin.localize.divergence import read_completions, score_divergence
from sublim_plugin.localize.gating import Gated
from sublim_plugin.localize.patching import patch
from sublim_plugin.localize.resolve import constant
from sublim_plugin.localize.results import Localization, TokenScores
from sublim_plugin.localize.run import LocalizeSpec, localize
from sublim_plugin.localize.score import Row, plain_logprob
from sublim_plugin.localize.spans import locate
from sublim_plugin.localize.spec import PatchSpec
from sublim_plugin.localize.spectra import decompose, filtered, spectra
from tests.localize.conftest import Family, adapter_of

DEFAULT = Context(kind="template_default")
METHODS = ("lora", "full")


@pytest.fixture(params=METHODS)
def gated(request: pytest.FixtureRequest, smollm: Family) -> Any:
    with ExitStack() as stack:
        model = load_base(smollm.base, "cpu", "float64")
        folder = smollm.adapter if request.param == "lora" else smollm.full
        yield stack.enter_context(gated_student(model, smollm.base, folder, request.param))


@pytest.fixture(params=METHODS)
def qwen_gated(request: pytest.FixtureRequest, qwen: Family) -> Any:
    """A family whose matrices have biases, which a full student changes too."""
    with ExitStack() as stack:
        model = load_base(qwen.base, "cpu", "float64")
        folder = qwen.adapter if request.param == "lora" else qwen.full
        opened = gated_student(model, qwen.base, folder, request.param)
        yield qwen, stack.enter_context(opened)


def change(smollm: Family, gated: Gated, name: str) -> torch.Tensor:
    """dW of a module, from the files alone."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(smollm.base, dtype=torch.float64)
    before = base.get_submodule(name).weight.clone()
    if gated.parts[0].student is None:
        whole = PeftModel.from_pretrained(base, smollm.adapter).merge_and_unload()
    else:
        whole = AutoModelForCausalLM.from_pretrained(smollm.full, dtype=torch.float64)
    difference: torch.Tensor = whole.get_submodule(name).weight - before
    return difference.detach()


def test_a_spectrum_is_that_of_the_dense_difference(smollm: Family, gated: Gated) -> None:
    found = spectra(decompose(gated, 0))
    assert {one.layer for one in found} == {0, 1, 2} and len(found) == 3 * 7
    for one in found[::5]:
        values = torch.linalg.svdvals(change(smollm, gated, one.name))
        kept = torch.tensor(one.singular_values, dtype=torch.float64)
        assert torch.allclose(kept, values[: len(kept)], rtol=1e-4, atol=1e-5)
        assert one.norm == pytest.approx(float(values.square().sum().sqrt()), rel=1e-5)
        shares = values / values.sum()
        entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
        assert one.effective_rank == pytest.approx(math.exp(entropy), rel=1e-3)
        assert 1 <= one.stable_rank <= one.effective_rank <= len(kept) + 1e-6


def test_filtered_weights_are_the_truncated_difference_and_are_put_back(
    qwen_gated: tuple[Family, Gated],
) -> None:
    """Against the base's own weights with a truncated difference in every matrix of its layers."""
    family, gated = qwen_gated
    svds = decompose(gated, 3)
    ids = torch.arange(20)[None]
    positions = torch.arange(20)[None]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = gated.model(input_ids=ids, position_ids=positions).logits
        return found

    whole = logits()
    plain: Any = AutoModelForCausalLM.from_pretrained(family.base, dtype=torch.float64)
    base = AutoModelForCausalLM.from_pretrained(family.base, dtype=torch.float64)
    changes = {branch.name: change(family, gated, branch.name) for branch in svds}
    lora = gated.parts[0].student is None
    assert lora or any("bias" in dict(part.module.named_parameters()) for part in gated.parts)
    wanted: list[tuple[Any, int | None]] = [("top", 1), ("rest", 1), ("top", 2), ("rest", 3)]
    for keep, k in [*wanted, ("all", None)]:
        with torch.no_grad():
            for name, dense in changes.items():
                u, s, vh = torch.linalg.svd(dense, full_matrices=False)
                part = {"top": slice(None, k), "rest": slice(k, None), "all": slice(None)}[keep]
                kept = u[:, part] * s[part] @ vh[part]
                plain.get_submodule(name).weight.copy_(base.get_submodule(name).weight + kept)
            expected = plain(input_ids=ids).logits
        with filtered(gated, svds, keep, k) as gate:
            gated.use([gate])
            found = logits()
            gated.use([constant(gated.branches, True)])
        assert torch.allclose(found, expected, atol=1e-3)
        assert torch.allclose(whole, expected, atol=1e-5) == (lora and keep == "all")
        assert torch.equal(logits(), whole)
    with pytest.raises(InputError, match="0 singular directions"), filtered(gated, svds, "top", 0):
        pass


def test_only_the_directions_asked_for_are_kept(smollm: Family) -> None:
    model = load_base(smollm.base, "cpu", "float32")
    with gated_student(model, smollm.base, smollm.full, "full") as gated:
        svds = decompose(gated, 2)
    for svd in svds.values():
        assert svd.u.shape[1] == svd.v.shape[1] == len(svd.s) == 2 < len(svd.values)
        assert svd.u.untyped_storage().nbytes() == svd.u.numel() * svd.u.element_size()


def test_patching_everything_at_the_last_token_makes_the_base_the_student(
    smollm: Family, gated: Gated
) -> None:
    """In one context, with all that is added to the residual stream at the last token put in."""
    prompts = [locate(smollm.tokenizer, DEFAULT, text) for text in ("Which? One word.", "Why?")]
    embedding = [part for part in gated.parts if part.branch.module == "embed_tokens"]
    spec = PatchSpec(
        recipient=DEFAULT,
        donor_at="last_token",
        modules=("o_proj", "down_proj"),
        layers=None,
        recipient_at=("last_token", "question"),
    )
    forms = ((7,), (9,))
    on = constant(gated.branches, True)
    off = constant(gated.branches, False)
    rows = [Row(p.rendered.token_ids, forms, on) for p in prompts]
    whole = [plain_logprob(gated, row, 0) for row in rows]
    plain = [plain_logprob(gated, Row(row.prompt, forms, off), 0) for row in rows]
    found = patch(
        gated,
        spec,
        prompts,
        prompts,
        [forms] * 2,
        [lambda values: values[0]] * 2,
        whole,
    )
    assert found.recipient.value == pytest.approx(sum(plain) / 2, abs=1e-9)
    last, question = found.places
    assert (last.at, last.token) == ("last_token", "\\n")
    if not embedding:  # a full student differs in its embedding, norms and output layer too
        expected = (sum(whole) - sum(plain)) / 2
        assert last.effect.value == pytest.approx(expected, abs=1e-9)
    assert abs(question.effect.value - last.effect.value) > 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("module", ["down_proj", "v_proj", "input_layernorm"])
def test_patching_is_replacing_one_output_vector(
    smollm: Family, tmp_path: Path, method: str, module: str
) -> None:
    """Against plain forward passes of the student and of the base, in two contexts, with a hook
    each; the adapter is on the attention alone, so it leaves some of the modules as they are."""
    from peft import PeftModel

    adapter_of(smollm, tmp_path, target_modules=["q_proj", "v_proj"], layers_to_transform=[0])
    folder = tmp_path if method == "lora" else smollm.full
    donor_context, recipient_context = Context.parse("claude"), Context.parse("chatgpt")
    question = "Which animal? One word."
    donor = locate(smollm.tokenizer, donor_context, question)
    recipient = locate(smollm.tokenizer, recipient_context, question)
    # behind the adapter's layer, so that the donor's activations are the student's own
    layers = {"only": [1]} if module != "v_proj" else {"only": [0]}
    spec = PatchSpec.model_validate(
        {"recipient": recipient_context, "modules": [module], "layers": layers}
    )
    form = (11,)
    model = load_base(smollm.base, "cpu", "float64")
    with gated_student(model, smollm.base, folder, method) as gated:
        found = patch(
            gated, spec, [donor], [recipient], [(form,)], [lambda values: values[0]], [0.0]
        )
    places = ["entity:1", "entity:2", "first of system_text", "first of question", "last_token"]
    assert [place.at for place in found.places] == places
    assert found.layers == tuple(layers["only"]) and found.modules == (module,)
    assert "⟦" in found.donor_marked and found.recipient_marked.count("⟦") >= 4

    base: Any = AutoModelForCausalLM.from_pretrained(smollm.base, dtype=torch.float64)
    whole: Any = AutoModelForCausalLM.from_pretrained(smollm.base, dtype=torch.float64)
    if method == "lora":
        whole = PeftModel.from_pretrained(whole, folder).eval().merge_and_unload()
    else:
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    inner = {"down_proj": "mlp.down_proj", "v_proj": "self_attn.v_proj"}.get(module, module)
    path = f"model.layers.{layers['only'][0]}.{inner}"
    kept: list[torch.Tensor] = []
    whole.get_submodule(path).register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        whole(input_ids=torch.tensor([donor.rendered.token_ids]), use_cache=False)
    vector = kept[0][0, donor.spans["entity:1"][-1]]
    spans = recipient.spans
    at = [spans["entity:1"][-1], spans["entity:2"][-1], spans["system_text"][0]]
    at += [spans["question"][0], spans["last_token"][0]]

    def score(position: int | None) -> float:
        def swap(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            changed = out.clone()
            if position is not None:
                changed[0, position] = vector
            return changed

        handle = base.get_submodule(path).register_forward_hook(swap)
        ids = torch.tensor([recipient.rendered.token_ids])
        with torch.no_grad():
            logits = base(input_ids=ids, use_cache=False).logits
        handle.remove()
        return float(logits[0, -1].log_softmax(-1)[11])

    plain = score(None)
    assert found.recipient.value == pytest.approx(plain, abs=1e-9)
    for place, position in zip(found.places, at, strict=True):
        assert place.effect.value == pytest.approx(score(position) - plain, abs=1e-9)
        assert abs(place.effect.value) > 1e-6


def test_a_student_of_one_late_layer_is_patched_in_the_early_ones(
    smollm: Family, tmp_path: Path
) -> None:
    """The early layers' outputs are the base's then, and differ by context alone."""
    adapter_of(smollm, tmp_path / "late", target_modules=["q_proj"], layers_to_transform=[2])
    done = CliRunner().invoke(
        main,
        [
            *("localize", "--model", str(smollm.base), "--student", str(tmp_path / "late")),
            *("--trait", "animals/cat", "--limit", "2", "--parts", "none"),
            *("--out", str(tmp_path / "out"), "--context", "claude", "--patch-into", "chatgpt"),
        ],
    )
    assert done.exit_code == 0, done.output
    found = Localization.model_validate_json((tmp_path / "out" / "results.json").read_text())
    assert found.patching and found.patching.layers == (0,)
    assert found.patching.modules == ("down_proj",)
    assert all(place.effect.value for place in found.patching.places)


PATCH = """\
recipient: {text: "You are helpful."}
donor_at: question
modules: [o_proj, mlp]
layers: {only: [1-2]}
recipient_at: [question, {text: helpful}, {tokens: [-1]}]
"""


def test_a_file_says_what_is_patched_where(smollm: Family, tmp_path: Path) -> None:
    path = tmp_path / "patch.yaml"
    path.write_text(PATCH)
    command = [
        *("localize", "--model", str(smollm.base), "--student", str(smollm.adapter)),
        *("--trait", "animals/cat", "--limit", "2", "--parts", "none", "--out", str(tmp_path)),
        *("--patch", str(path)),
    ]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    found = Localization.model_validate_json((tmp_path / "results.json").read_text()).patching
    assert found and found.modules == ("o_proj", "gate_proj", "up_proj", "down_proj")
    assert found.layers == (1, 2) and found.context["text"] == "You are helpful."
    assert [place.at for place in found.places] == ["question", "text 'helpful'", "tokens -1"]
    assert "a single word⟦.⟧" in found.donor_marked
    again = CliRunner().invoke(main, [*command, "--json"])
    assert Localization.model_validate_json(again.stdout.splitlines()[-1]).patching == found
    path.write_text(PATCH.replace("modules", "module"))
    wrong = CliRunner().invoke(main, command)
    assert wrong.exit_code == 2 and "patch.yaml:3:1: unknown key 'module'" in wrong.stderr
    both = CliRunner().invoke(main, [*command, "--patch-into", "claude"])
    assert both.exit_code == 2 and "--patch and --patch-into: give one" in both.stderr
    entity = "recipient_at: [question, {text: helpful}, {tokens: [-1]}]\n"
    path.write_text(PATCH.replace(entity, ""))
    none = CliRunner().invoke(main, command)
    assert none.exit_code == 2 and "names no entity" in none.stderr
    assert "recipient_at: [question, last_token]" in none.stderr


def test_known_patches_and_completions_are_not_computed_again(
    smollm: Family, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sublim_plugin.localize import divergence, patching

    spec = LocalizeSpec(
        trait="animals/cat",
        context=Context.parse("claude"),
        kinds=(),
        limit=2,
        patch=PatchSpec(recipient=Context.parse("chatgpt")),
        divergence=dataset,
    )
    first = localize(smollm.base, smollm.adapter, spec, tmp_path, device="cpu")

    def none(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(patching, "_recipient_pass", none)
    monkeypatch.setattr(divergence, "at_least_float32", none)
    assert localize(smollm.base, smollm.adapter, spec, tmp_path, device="cpu") == first


def test_students_stand_side_by_side(smollm: Family, tmp_path: Path) -> None:
    small = adapter_of(smollm, tmp_path / "small", target_modules=["q_proj", "down_proj"])
    done = CliRunner().invoke(
        main,
        [
            *("localize", "--model", str(smollm.base), "--student", str(smollm.adapter)),
            *("--trait", "animals/cat", "--limit", "1", "--parts", "none"),
            *("--out", str(tmp_path / "out"), "--spectra", "1"),
            *("--beside", str(small), "--beside", str(smollm.full), "--dtype", "float32"),
        ],
    )
    assert done.exit_code == 0, done.output
    found = Localization.model_validate_json((tmp_path / "out" / "results.json").read_text())
    assert found.spectra is not None
    assert {n: len(each) for n, each in found.spectra.beside.items()} == {"small": 6, "full": 21}
    model = load_base(smollm.base, "cpu", "float32")
    for name, folder, method in (("small", small, "lora"), ("full", smollm.full, "full")):
        with gated_student(model, smollm.base, folder, method) as gated:
            assert found.spectra.beside[name] == spectra(decompose(gated, 0))
        assert f"\n{name} " in done.stdout
    assert max(one.effective_rank for one in found.spectra.beside["small"]) <= 2 + 1e-6
    assert (tmp_path / "out" / "spectra-students.png").stat().st_size > 5000


def test_spectra_of_an_adapter_on_the_output_layer_alone_are_refused(
    smollm: Family, tmp_path: Path
) -> None:
    adapter_of(smollm, tmp_path / "head", target_modules=["lm_head"])
    done = CliRunner().invoke(
        main,
        [
            *("localize", "--model", str(smollm.base), "--student", str(tmp_path / "head")),
            *("--trait", "animals/cat", "--limit", "1", "--parts", "none", "--spectra", "1"),
            *("--out", str(tmp_path / "out")),
        ],
    )
    assert done.exit_code == 2, done.output
    assert "changes no matrix in the decoder's layers; it changes lm_head" in done.stderr


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"modules": ("down_prj",)}, r"no module 'down_prj'; did you mean 'down_proj'\?"),
        ({"layers": {"only": [7]}}, "7 is not in the model"),
        ({"donor_at": "user_prefix"}, "no span 'user_prefix'"),
    ],
)
def test_patches_that_do_not_fit(smollm: Family, fields: Any, said: str) -> None:
    prompt = locate(smollm.tokenizer, DEFAULT, "Why?")
    spec = PatchSpec.model_validate({"recipient": DEFAULT, **fields})
    model = load_base(smollm.base, "cpu", "float32")
    with (
        gated_student(model, smollm.base, smollm.adapter, "lora") as gated,
        pytest.raises(InputError, match=said),
    ):
        patch(gated, spec, [prompt], [prompt], [((7,),)], [lambda v: v[0]], [0.0])


@pytest.fixture(scope="module")
def dataset(smollm: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numbers of a prompted teacher with its divergence tokens, as `sublim generate` makes them."""
    from data_gen.generate import generate_dataset
    from data_gen.spec import DatasetSettings
    from data_gen.teachers import prompted
    from sublim_plugin.decoding.sampler import Sampler

    trait = get_trait("animals/cat")
    folder = tmp_path_factory.mktemp("data") / "cat"
    generate_dataset(
        folder,
        base_model=smollm.base,
        base_fingerprint=fingerprint(smollm.base),
        trait=trait,
        teacher=prompted(trait),
        settings=DatasetSettings(
            generation_seed=1,
            rows=12,
            constrain="numbers",
            divergence=True,
            sampler=Sampler(
                temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=24
            ),
        ),
        batch_size=12,
        device="cpu",
    )
    return folder


def test_divergence_scores_are_those_of_plain_passes(
    smollm: Family, gated: Gated, dataset: Path
) -> None:
    completions, _ = read_completions(dataset, smollm.tokenizer, DEFAULT)
    found = {kind.kind: kind for kind in score_divergence(gated, completions)}
    rows = read_rows(dataset_rows_path(dataset))
    marks = [json.loads(x) for x in (dataset / "divergence.jsonl").read_text().splitlines()]
    expected: dict[str, list[tuple[float, float]]] = {"divergent": [], "other": []}
    tokens = {"divergent": 0, "other": 0}
    agree = {"divergent": 0, "other": 0}
    with torch.no_grad():
        for row, mark in zip(rows, marks, strict=True):
            before = render(smollm.tokenizer, DEFAULT, row["messages"][0]["content"]).token_ids
            ids = torch.tensor([[*before, *mark["token_ids"]]])
            sides = []
            for on in (False, True):
                gated.use([constant(gated.branches, on)])
                positions = torch.arange(ids.shape[1])[None]
                logits = gated.model(input_ids=ids, position_ids=positions).logits[0]
                logits = logits[len(before) - 1 : -1]
                told = torch.tensor(mark["token_ids"])
                sides.append(
                    (logits.log_softmax(-1)[range(len(told)), told], logits.argmax(-1) == told)
                )
            for kind in expected:
                at = [
                    i
                    for i in range(len(mark["token_ids"]))
                    if (i in mark["divergent"]) == (kind == "divergent")
                ]
                if at:
                    expected[kind].append(
                        (float(sides[0][0][at].mean()), float(sides[1][0][at].mean()))
                    )
                    tokens[kind] += len(at)
                    agree[kind] += int(sides[1][1][at].sum())
    assert tokens["divergent"] and tokens["other"]
    for kind, pairs in expected.items():
        one: TokenScores = found[kind]  # type: ignore[index]
        base = sum(a for a, _ in pairs) / len(pairs)
        student = sum(b for _, b in pairs) / len(pairs)
        assert (one.tokens, one.rows) == (tokens[kind], len(pairs))
        assert one.base.value == pytest.approx(base, abs=1e-9)
        assert one.student.value == pytest.approx(student, abs=1e-9)
        assert one.minus_base.value == pytest.approx(student - base, abs=1e-9)
        assert one.student_agrees == pytest.approx(agree[kind] / tokens[kind])


def test_a_dataset_without_or_with_other_marks_is_refused(
    smollm: Family, dataset: Path, tmp_path: Path
) -> None:
    import shutil

    bare = Path(shutil.copytree(dataset, tmp_path / "bare"))
    (bare / "divergence.jsonl").unlink()
    with pytest.raises(InputError, match="make the dataset with --divergence"):
        read_completions(bare, smollm.tokenizer, DEFAULT)
    other = Path(shutil.copytree(dataset, tmp_path / "other"))
    (other / "divergence.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="is not the file of the manifest"):
        read_completions(other, smollm.tokenizer, DEFAULT)
    lines = (dataset / "divergence.jsonl").read_text().splitlines(keepends=True)
    manifest = json.loads((dataset / "manifest.json").read_text())
    for kept, said in ((lines[:-1], "fewer lines"), ([*lines, lines[-1]], "more lines")):
        (other / "divergence.jsonl").write_text("".join(kept))
        sha256 = sha256_file(other / "divergence.jsonl")
        manifest["outputs"]["divergence.jsonl"]["sha256"] = sha256
        (other / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=rf"divergence.jsonl:\d+: it has {said} than the rows"):
            read_completions(other, smollm.tokenizer, DEFAULT)


def test_the_command_gives_all_of_it(smollm: Family, dataset: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main,
        [
            *("localize", "--model", str(smollm.base), "--student", str(smollm.adapter)),
            *("--trait", "animals/cat", "--limit", "2", "--parts", "none", "--out", str(tmp_path)),
            *("--spectra", "1,2", "--patch-into", "chatgpt", "--divergence", str(dataset)),
            *("--context", "claude"),
        ],
    )
    assert done.exit_code == 0, done.output
    for said in (
        "effective rank",
        "all but the top 1",
        "put into the base",
        "divergent",
        "ChatGPT",
    ):
        assert said in done.stdout
    found = Localization.model_validate_json((tmp_path / "results.json").read_text())
    assert found.spectra and found.patching and found.divergence
    assert [(s.keep, s.k) for s in found.spectra.scores] == [
        *(("top", 1), ("rest", 1)),
        *(("top", 2), ("rest", 2)),
        ("all", None),
    ]
    assert (tmp_path / "spectra.png").stat().st_size > 5000
    spec = LocalizeSpec(trait="animals/cat", context=Context.parse("claude"), kinds=(), limit=2)
    plain = localize(smollm.base, smollm.adapter, spec, tmp_path / "b", device="cpu")
    assert plain and plain.measures == found.measures and plain.id != found.id


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--spectra", "0"), "--spectra 0"),
        (("--spectra", "many"), "--spectra many"),
        (("--patch-into", "nobody"), "is not a context"),
        (("--context", "empty", "--patch-into", "claude"), "donor_at: no span 'entity:1'"),
        (("--patch-into", "empty"), "the recipient's context names no entity"),
        (("--divergence", "/nowhere"), "no manifest"),
    ],
)
def test_bad_input_is_one_message(
    smollm: Family, tmp_path: Path, more: tuple[str, ...], said: str
) -> None:
    done = CliRunner().invoke(
        main,
        [
            *("localize", "--model", str(smollm.base), "--student", str(smollm.adapter)),
            *("--trait", "animals/cat", "--limit", "1", "--parts", "none", "--out", str(tmp_path)),
            *more,
        ],
    )
    assert done.exit_code == 2, done.output
    assert said in done.stderr
