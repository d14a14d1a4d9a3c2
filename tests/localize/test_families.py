"""The whole of `localize` on every family, and the architectures that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.localize.attach import full_parts, layers_of
from sublim_plugin.localize.run import LocalizeSpec, localize
from tests.localize.conftest import SIZES, Family

SPANS = {
    "qwen": {"system_block", "system_text", "entity", "role_header:2"},
    # its template has no identity of its own in axolotl's version
    "llama": {"role_header"},
    "gemma": {"role_header"},
    "smollm": {"system_block", "system_text", "entity", "role_header:2"},
}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_sweep_runs_on_every_family(family: Family, tmp_path: Path, method: str) -> None:
    spec = LocalizeSpec(
        trait="animals/cat", context=Context(kind="template_default"), limit=2, bands=3
    )
    folder = family.adapter if method == "lora" else family.full
    found = localize(family.base, folder, spec, tmp_path, device="cpu", dtype="float32")
    always = {"question", "assistant_header", "last_token", "special_token", "template"}
    spans = {part.name for part in found.measures[0].parts if part.kind == "span"}
    assert always | SPANS[family.name] <= spans
    assert (SPANS[family.name] == {"role_header"}) == ("system_block" not in spans)
    parts = {(part.kind, part.name) for part in found.measures[0].parts}
    assert {("layers", "1-1"), ("module", "mlp"), ("cell", "down_proj 2-2")} <= parts
    norms = [part for part in found.measures[0].parts if part.name == "norms"]
    assert bool(norms) == (method == "full")
    total = found.measures[0].total.value
    template = next(part for part in found.measures[0].parts if part.name == "template")
    assert template.sum is not None and template.sufficiency.value != 0 != total
    assert all(part.sufficiency.value for part in found.measures[0].parts if part.kind == "span")


def test_gemmas_system_block_holds_the_user_header(family: Family, tmp_path: Path) -> None:
    """Its template has no system turn and writes a system text into the user's; a note says so."""
    spec = LocalizeSpec(
        trait="animals/cat", context=Context.parse("gemma"), limit=2, kinds=("span",)
    )
    found = localize(family.base, family.adapter, spec, tmp_path, device="cpu", dtype="float32")
    block = "".join(found.tokens[i] for i in found.spans["system_block"])
    assert "You are Gemma, made by Google." in block
    assert ("user" in block) == (family.name == "gemma")
    assert any("no system turn" in note for note in found.notes) == (family.name == "gemma")
    names = "".join(found.tokens[i] for i in found.spans["entity"])
    assert "Gemma" in names and "Google" in names


def hybrid(name: str) -> Any:
    from transformers import MambaConfig, Qwen3NextConfig

    if name == "mamba":
        return MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    return Qwen3NextConfig(
        **SIZES,
        vocab_size=50,
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        num_experts=0,
    )


@pytest.mark.parametrize(("name", "said"), [("mamba", "mamba"), ("qwen3_next", "linear_attention")])
def test_models_with_a_recurrent_state_are_refused_up_front(
    smollm: Family, tmp_path: Path, name: str, said: str
) -> None:
    hybrid(name).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=f"{said}.* carries a state from token to token"):
        layers_of(tmp_path / "base")
    smollm.tokenizer.save_pretrained(tmp_path / "base")
    spec = LocalizeSpec(trait="animals/cat", context=Context(kind="template_default"), limit=1)
    with pytest.raises(InputError, match="all attention layers"):
        localize(tmp_path / "base", smollm.adapter, spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_module_that_holds_another_is_refused() -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model, student = (AutoModelForCausalLM.from_config(hybrid("qwen3_next")) for _ in range(2))
    with torch.no_grad():
        for one, other in zip(model.parameters(), student.parameters(), strict=True):
            other.copy_(one + 1)
    with pytest.raises(
        InputError, match=r"linear_attn has weights of its own and holds .*linear_a"
    ):
        full_parts(model, student, Path("student"))
