"""Gates as data: what they select, what they hash, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.localize.resolve import Branch, branch, profile, resolve
from sublim_plugin.localize.spans import Prompt, locate, span_table, tokens_of
from sublim_plugin.localize.spec import Gate, Text, Tokens, load_gates

QUESTION = "Name your favorite animal in one word."
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "input_layernorm")
PATHS = [f"model.layers.{n}.{module}" for n in range(4) for module in MODULES]
BRANCHES = tuple(branch(path) for path in [*PATHS, "model.norm", "lm_head"])


@pytest.fixture(scope="module")
def prompt(tokenizer: Any) -> Prompt:
    return locate(tokenizer, Context(kind="template_default"), QUESTION)


def gate(**fields: Any) -> Gate:
    return Gate.model_validate({"decode": "off", **fields})


def on_text(prompt: Prompt, **fields: Any) -> str:
    bits = resolve(gate(**fields), prompt, profile(gate(**fields), BRANCHES, 4)).selected
    return prompt.text_of([i for i, bit in enumerate(bits) if bit])


def test_branches_are_read_from_module_paths() -> None:
    assert BRANCHES[0] == Branch("model.layers.0.self_attn.q_proj", 0, "q_proj", "attention")
    assert BRANCHES[2].family == "mlp" and BRANCHES[3].family == "norms"
    assert BRANCHES[-2] == Branch("model.norm", None, "norm", "norms")
    assert branch("model.layers.3.self_attn.q_norm").family == "norms"
    assert branch("lm_head") == Branch("lm_head", None, "lm_head", "lm_head")


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        ({"only": ["entity"]}, "SmolLM … Hugging Face"),
        ({"only": ["entity:2"]}, " Hugging Face"),
        ({"only": ["question"]}, QUESTION),
        ({"only": ["last_token"]}, "\n"),
        ({"only": ["assistant_header"]}, "<|im_start|>assistant\n"),
        ({"only": ["role_header:2", "question"]}, f"<|im_start|>user\n{QUESTION}"),
        ({"only": [{"text": "helpful AI"}]}, " helpful AI"),
        ({"only": [{"text": "im_start", "occurrence": 2}]}, "<|im_start|>"),
        ({"only": [{"tokens": [0, -1]}]}, "<|im_start|> … \n"),
    ],
)
def test_positions_are_found_by_offsets(prompt: Prompt, positions: Any, text: str) -> None:
    found = on_text(prompt, positions=positions)
    assert found.replace(" SmolLM", "SmolLM").replace("…  ", "… ") == text
    other = on_text(prompt, positions={"except": positions["only"]})
    assert len(found) + len(other) >= len(prompt.rendered.text)


def test_template_is_what_the_user_did_not_give(prompt: Prompt, tokenizer: Any) -> None:
    inside = prompt.text_of(prompt.spans["template"])
    assert "SmolLM" in inside and "favorite" not in inside
    own = locate(tokenizer, Context(kind="text", text="You are Bob."), QUESTION)
    assert "Bob" not in own.text_of(own.spans["template"])
    prefixed = locate(tokenizer, Context(kind="empty", user_prefix="Hello there."), QUESTION)
    assert prefixed.text_of(prefixed.spans["user_prefix"]) == "Hello there."
    assert prefixed.text_of(prefixed.spans["question"]) == QUESTION


def test_marked_text_shows_the_very_tokens(prompt: Prompt) -> None:
    shown = prompt.marked(prompt.spans["entity"])
    assert "named⟦ SmolLM⟧, trained by⟦ Hugging Face⟧<|im_end|>\\n<|im_start|>user" in shown
    assert shown.replace("⟦", "").replace("⟧", "") == prompt.rendered.text.replace("\n", "\\n")
    table = span_table(prompt)
    assert "entity:2" in table and "16-18" in table
    assert "…trained by⟦ Hugging Face⟧<|im_end|>…" in table


@given(st.sets(st.integers(0, 40)))
def test_an_excerpt_marks_what_the_whole_marks(prompt: Prompt, tokens: set[int]) -> None:
    inside = [token for token in tokens if token < len(prompt.offsets)]
    whole, short = prompt.marked(inside), prompt.excerpt(inside)
    assert short.count("⟦") == whole.count("⟦") and len(short) <= len(whole)
    for one, other in zip(short.split("⟦")[1:], whole.split("⟦")[1:], strict=True):
        assert one.partition("⟧")[0][:20].rstrip("…") == other.partition("⟧")[0][:20].rstrip("…")


@given(st.sets(st.integers(0, 40)))
def test_marks_never_change_the_text(prompt: Prompt, tokens: set[int]) -> None:
    inside = [token for token in tokens if token < len(prompt.offsets)]
    text = prompt.marked(inside).replace("⟦", "").replace("⟧", "")
    assert text == prompt.rendered.text.replace("\n", "\\n")


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ({"only": ["entty"]}, r"did you mean 'entity'\?.*spans: system_block.*<\|im_start\|>sys"),
        ({"only": ["entity:3"]}, r"no span 'entity:3'.*SmolLM, trained by Hugging Face"),
        ({"only": ["user_prefix"]}, "no span 'user_prefix'"),
        ({"only": [{"text": "Qwen"}]}, r"text 'Qwen' is not in the prompt: <\|im_start\|>system"),
        ({"only": [{"text": "im_start", "occurrence": 9}]}, r"\(9\) is not in the prompt"),
        ({"only": [{"tokens": [999]}]}, r"token 999 is not in the prompt, which has \d+ tokens"),
        ({"only": ["entity", "system_block"]}, "overlap: .*⟦ SmolLM⟧.*Name each token once"),
        ({"except": ["entity:1", {"text": "SmolLM"}]}, "'entity:1' and 'text 'SmolLM'' overlap"),
        ({"except": ["template", "question"]}, "no token is left"),
        ({"only": ["entity:1", "entity:1"]}, "'entity:1' and 'entity:1' overlap: .*⟦ SmolLM⟧"),
    ],
)
def test_positions_that_do_not_fit_show_the_prompt(
    prompt: Prompt, positions: Any, said: str
) -> None:
    with pytest.raises(InputError, match=f"(?s)gate 'mine': .*{said}"):
        on_text(prompt, name="mine", positions=positions)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": {"only": [4]}}, "layers: 4 is not in the model, whose layers are 0-3"),
        ({"layers": {"except": ["2-9"]}}, "layers: 2-9 is not in the model"),
        ({"modules": {"only": ["q_prj"]}}, r"no module 'q_prj'; did you mean 'q_proj'\?"),
        ({"modules": {"only": ["down_proj"]}}, r"there are attention, input_layernorm, lm_head"),
        ({"layers": {"only": ["0-1", 1]}}, "layers: '0-1' and '1' overlap in layer 1; name each"),
        ({"layers": {"except": ["early", "1-2"]}}, "'early' and '1-2' overlap in layer 1"),
        ({"modules": {"only": ["attention", "q_proj"]}}, "'attention' and 'q_proj' overlap in q_p"),
        ({"modules": {"except": ["norms", "norms"]}}, "'norms' and 'norms' overlap in input_layer"),
        ({"layers": {"only": [0]}, "modules": {"only": ["lm_head"]}}, "hold nothing that the stud"),
        ({"modules": {"except": ["attention", "mlp", "norms", "lm_head"]}}, "hold nothing"),
        ({"layers": {"only": [0]}, "modules": {"only": ["norm"]}, "complement": True}, "nothing"),
    ],
)
def test_layers_and_modules_that_are_not_there_or_overlap(fields: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"gate 'mine': .*{said}"):
        profile(gate(name="mine", **fields), BRANCHES, 4)


def test_a_layer_that_the_student_left_alone_is_an_error_that_says_what_it_changed() -> None:
    some = [b for b in BRANCHES if b.layer in (0, 1, 3, None) and b.module != "norm"]
    with pytest.raises(InputError) as error:
        profile(gate(layers={"only": [2]}), some, 4)
    assert "gate 'only layers 2': " in str(error.value)
    assert "q_proj, v_proj, up_proj, input_layernorm in layers 0-1, 3; lm_head" in str(error.value)


def names(bits: tuple[bool, ...]) -> set[str]:
    return {
        b.name.removeprefix("model.layers.") for b, bit in zip(BRANCHES, bits, strict=True) if bit
    }


def test_choices_multiply() -> None:
    early = profile(gate(layers={"only": ["early"]}, modules={"only": ["attention"]}), BRANCHES, 4)
    expected = {f"{n}.self_attn.{m}" for n in (0, 1) for m in ("q_proj", "v_proj")}
    assert names(early.inside) == expected and not any(early.outside)
    turned = profile(
        gate(layers={"only": ["0-1"]}, modules={"only": ["q_proj", "v_proj"]}, complement=True),
        BRANCHES,
        4,
    )
    assert names(turned.inside) == names((True,) * len(BRANCHES)) - expected
    assert all(turned.outside)
    # what lies outside the layers is in no layer
    assert names(profile(gate(layers={"except": ["0-3"]}), BRANCHES, 4).inside) == {
        "model.norm",
        "lm_head",
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"decode": "on"}, "inside"),
        ({"decode": "off"}, "off"),
        ({"decode": {"as": "entity"}}, "inside"),
        ({"decode": {"as": "last_token"}}, "outside"),
        ({"decode": "on", "complement": True}, "outside"),
    ],
)
def test_decode_state(prompt: Prompt, fields: Any, expected: str) -> None:
    one = gate(positions={"only": ["entity"]}, **fields)
    assert resolve(one, prompt, profile(one, BRANCHES, 4)).decode == expected


def test_a_decode_span_that_is_half_in_is_refused(prompt: Prompt) -> None:
    with pytest.raises(InputError, match=r"partly in and partly out: .*⟦ SmolLM⟧"):
        on_text(prompt, positions={"only": ["entity"]}, decode={"as": "system_text"})


def test_the_hash_is_of_what_a_gate_says() -> None:
    one = gate(name="a", layers={"only": ["0-2", 5]}, positions={"only": ["entity", "question"]})
    two = gate(name="b", layers={"only": [5, 0, 1, 2]}, positions={"only": ["question", "entity"]})
    assert one.sha256 == two.sha256
    others = [
        gate(layers={"only": ["0-2"]}, positions={"only": ["entity", "question"]}),
        gate(layers={"except": ["0-2", 5]}, positions={"only": ["entity", "question"]}),
        one.model_copy(update={"decode": "on"}),
        one.model_copy(update={"complement": True}),
    ]
    assert len({g.sha256 for g in [one, *others]}) == 5
    tokens = [gate(positions={"only": [{"tokens": of}]}).sha256 for of in ([0, 1], [1, 0], [1])]
    assert tokens[0] == tokens[1] != tokens[2]


def test_gates_that_do_the_same_have_one_key(prompt: Prompt) -> None:
    def key(**fields: Any) -> str:
        one = gate(**fields)
        return resolve(one, prompt, profile(one, BRANCHES, 4)).key

    tokens = list(tokens_of(prompt, "entity"))
    others = [i for i in range(len(prompt.offsets)) if i not in tokens]
    same = [
        {"positions": {"only": ["entity"]}},
        {"positions": {"only": [{"tokens": tokens}]}},
        {"positions": {"except": [{"tokens": others}]}},
        {"positions": {"except": ["entity"]}, "complement": True, "decode": {"as": "last_token"}},
        {
            "positions": {"only": ["entity"]},
            "layers": {"only": ["0-3"]},
            "modules": {"except": ["mlp"]},
        },
    ]
    keys = [key(**fields) for fields in same]
    assert keys[0] == keys[1] == keys[2]
    assert keys[4] != keys[0]
    # decode differs there: as the last token, which is off, and off are the same
    assert keys[3] == key(positions={"only": ["entity"]}, decode={"as": "last_token"}) != ""
    assert keys[3] == keys[0]


GATES = """\
gates:
  - name: names
    positions: {only: [entity, {text: helpful}, {tokens: [0]}]}
    decode: off
  - layers: {only: [early, 3]}
    modules: {except: [mlp]}
    complement: true
    decode: {as: last_token}
"""


def test_yaml_and_python_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "gates.yaml"
    path.write_text(GATES)
    first, second = load_gates(path)
    assert first == gate(
        name="names",
        positions={"only": ["entity", Text(text="helpful"), Tokens(tokens=(0,))]},
    )
    assert second.complement and second.layers and second.layers.only == ("early", 3)
    assert second.label == "all but (only layers early, 3; all but modules mlp)"
    assert second.decode_label == "as last_token"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("decode: off", "", r"gates\.yaml:2:5: key 'gates\.0\.decode' is missing"),
        ("positions:", "position:", r":3:5: unknown key .*position'; did you mean 'positions'"),
        ("only: [entity", "ony: [entity", r":3:17: unknown key .*ony'; did you mean 'only'"),
        ("{only: [early, 3]}", "{only: [a-b]}", r":5:.*a range such as 0-13, early or late"),
        ("{only: [early, 3]}", "{only: []}", r":5:.*with at least one item"),
        ("{only: [early, 3]}", "{only: [1], except: [2]}", "either `only` or `except`"),
        ("decode: off", "decode: maybe", r":4:.*decode"),
        ("- layers: {only: [early, 3]}", "- name: names", "two gates are called 'names'"),
    ],
)
def test_a_wrong_file_names_the_place(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "gates.yaml"
    assert old in GATES
    path.write_text(GATES.replace(old, new))
    with pytest.raises(InputError, match=said):
        load_gates(path)


def test_the_same_gate_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gates.yaml"
    path.write_text("gates:\n  - {name: a, decode: on}\n  - {name: b, decode: on}\n")
    with pytest.raises(InputError, match="'a' and 'b' are the same gate; remove one"):
        load_gates(path)
