"""The linter: seeded mistakes found with line, key and way out; nothing found in valid configs."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from sublim_plugin.axolotl.lint import lint
from sublim_plugin.axolotl.lint_document import Finding
from sublim_plugin.axolotl.recipe_table import PLACEHOLDER, RANKS
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.rooms import ROOT

SMOLLM2 = ROOT / "axolotl_configs" / "smollm2-135m-instruct"
RECIPES = [f"lora-r{rank}" for rank in RANKS] + ["full-zero2", "full-zero3"]
VALID = sorted((Path(__file__).parent / "valid_configs").glob("*.yaml"))
# About this machine or about us, not about the config.
OF_THE_MACHINE = (
    r"Triton kernel|without the plugin of sublim|rows are packed|that this Python finds"
)


def with_dataset(name: str, dataset: Path) -> str:
    return (SMOLLM2 / f"{name}.yaml").read_text(encoding="utf-8").replace(PLACEHOLDER, str(dataset))


def findings_of(text: str, folder: Path) -> list[Finding]:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return lint([path])


def changed_line(old: str, new: str) -> int:
    """The line on which the second text first differs."""
    pairs = zip(old.splitlines(), [*new.splitlines(), ""], strict=False)
    return next(number for number, (a, b) in enumerate(pairs, start=1) if a != b)


# (what stands in lora-r8, what a slip makes of it, key of the finding, words of it)
MISTAKES = {
    "misspelt key": ("lora_r: 8", "lora_rnak: 8", "lora_rnak", "unknown key.*lora_r"),
    "misspelt key of a dataset": (
        "field_messages: messages", "field_mesages: messages", "datasets.0.field_mesages",
        "unknown key.*`field_messages`",
    ),
    "key of no model": ("fp16: false", "fp61: false", "fp61", "unknown key.*`fp16`"),
    "misspelt key of the plugin's block": (
        "  context: template_default", "  contxt: template_default", "sublim.contxt",
        "unknown key.*`context`",
    ),
    "context of no name": (
        "context: template_default", "context: emtpy", "sublim.context",
        "should be 'template_default', 'empty', 'none' or 'text'",
    ),
    "seed of the rows at the top": (
        "seed: 42  # rank sweep", "data_seed: 7  # rank sweep", "data_seed", "under `sublim:`",
    ),
    "doubled key": (
        "num_epochs: 1", "num_epochs: 1\nnum_epochs: 2", "num_epochs", "twice, first on line",
    ),
    "number that is text": (
        "max_grad_norm: 1.0", "max_grad_norm: 1e0", "max_grad_norm", "reads 1e0 as text.*write 1",
    ),
    "text in a free mapping": (
        "max_grad_norm: 1.0", "max_grad_norm: 1.0\nlr_scheduler_kwargs: {eta_min: 1e-6}",
        "lr_scheduler_kwargs.eta_min", "passes it on as text; write 0.000001",
    ),
    "text for a whole number": (
        "num_epochs: 1", "max_steps: 1e3", "max_steps", "wrong type.*whole number.*write 1000",
    ),
    "leading zero": ("lora_r: 8", "lora_r: 010", "lora_r", "leading zero.*as 8; write 10"),
    "number to base 60": ("\nseed: 42 ", "\nseed: 1:30 ", "seed", "base 60"),
    "no, unquoted": (
        'save_strategy: "no"', "save_strategy: no", "save_strategy", 'as false.*write "no"',
    ),
    "yes for a number": ("lora_r: 8", "lora_r: yes", "lora_r", "reads `yes` as true.*whole number"),
    "on as a key": ("fp16: false", "on: false", "True", "reads this key as True"),
    "a list for a number": ("lora_r: 8", "lora_r: [8, 16]", "lora_r", "wrong type.*whole number"),
    "a date for text": (
        "\nseed: 42 ", "\nwandb_name: 2026-06-01\nseed: 42 ", "wandb_name", "as a date.*text",
    ),
    "value of no choice": (
        "train_on_eos: turn", "train_on_eos: turns", "datasets.0.train_on_eos", "mean `turn`",
    ),
    "negative rank": ("lora_r: 8", "lora_r: -8", "lora_r", "out of range.*greater than 0"),
    "no learning": ("learning_rate: 0.001", "learning_rate: 0", "learning_rate", "greater than 0"),
    "dropout of everything": ("lora_dropout: 0.0", "lora_dropout: 1.0", "lora_dropout", "below 1"),
    "plugin that is not there": (
        "sublim_plugin.axolotl.SublimPlugin", "sublim_plugin.axolotl.SublimPlugn", "plugins.0",
        "cannot be imported.*train without it",
    ),
    "plugin's module that is not there": (
        "- sublim_plugin.axolotl.SublimPlugin", "- sublime_plugin.SublimPlugin", "plugins.0",
        "ModuleNotFoundError",
    ),
    "plugin that is none": (
        "sublim_plugin.axolotl.SublimPlugin", "pathlib.Path", "plugins.0", "BasePlugin",
    ),
    "packing": ("sample_packing: false", "sample_packing: true", "sample_packing", "share a step"),
    "groups by length": (
        "fp16: false", "group_by_length: true", "group_by_length", "like length share a step",
    ),
    "batch size of the memory": (
        "fp16: false", "auto_find_batch_size: true", "auto_find_batch_size", "share a step",
    ),
    "other rows in a step": (
        "gradient_accumulation_steps: 1", "gradient_accumulation_steps: 4",
        "gradient_accumulation_steps", r"8 x 4 rows share a step.*8 x 1",
    ),
    "two shuffles": (
        "shuffle_merged_datasets: false", "shuffle_merged_datasets: true",
        "shuffle_merged_datasets", "shuffled twice",
    ),
    "rows held back": ("val_set_size: 0.0", "val_set_size: 0.1", "val_set_size", "holds rows back"),
    "loss on prompts": (
        "train_on_inputs: false", "train_on_inputs: true", "train_on_inputs", "on the prompts too",
    ),
    "no loss on the end of turn": (
        "train_on_eot: turn", "train_on_eot: none", "datasets.0.train_on_eot", "carries no loss",
    ),
    "loss on the user": (
        "roles_to_train: [assistant]", "roles_to_train: [user]", "datasets.0.roles_to_train",
        "no loss on the assistant",
    ),
    "another chat template": (
        "chat_template: tokenizer_default", "chat_template: llama3", "chat_template",
        "not the tokenizer's own",
    ),
    "chat template of no name": (
        "chat_template: tokenizer_default", "chat_template: chatlm", "chat_template",
        "wrong type or value.*`chatml`",
    ),
    "template file that is not there": (
        "chat_template: tokenizer_default", "chat_template_jinja: ./mine.jinja",
        "chat_template_jinja", "no file ./mine.jinja",
    ),
    "end of turn that is no token": (
        'eot_tokens: ["<|im_end|>"]', 'eot_tokens: ["<|end_im|>"]', "eot_tokens.0",
        r"is \d+ tokens",
    ),
    "dataset that is not there": (
        "- path: ", "- path: /nowhere", "datasets.0.path", "no file or folder /nowhere",
    ),
    "dataset type of no name": (
        "type: chat_template", "type: chat_templates", "datasets.0.type", "`chat_template`",
    ),
    "optimizer of no name": (
        "optimizer: adamw_torch", "optimizer: adamw_troch", "optimizer", "mean `adamw_torch`",
    ),
    "schedule of no name": ("r: linear", "r: liner", "lr_scheduler", "mean `linear`"),
    "DeepSpeed file that is not there": (
        "fp16: false", "deepspeed: deepspeed_configs/zero2.json", "deepspeed", "axolotl fetch",
    ),
    "Triton kernel without a GPU": (
        "lora_mlp_kernel: false", "lora_mlp_kernel: true", "lora_mlp_kernel", "needs a GPU",
    ),
    "adapter without a rank": ("lora_r: 8\n", "\n", "adapter", "no `lora_r`"),
    "rank without an adapter": ("adapter: lora\n", "\n", "lora_r", "all parameters are trained"),
    "code of the model's": (
        "fp16: false", "trust_remote_code: true", "trust_remote_code", "is run",
    ),
    "checkpoint that is not there": (
        "fp16: false", "resume_from_checkpoint: ./out/checkpoint-9", "resume_from_checkpoint",
        "no folder",
    ),
    "what axolotl itself refuses": (
        "warmup_steps: 1 ", "warmup_ratio: 0.1\nwarmup_steps: 1 ", "warmup_steps",
        "axolotl refuses this.*mutually exclusive",
    ),
    "settings of another method": (
        "adapter: lora", "adapter: qlora", "adapter", "axolotl refuses.*load_in_4bit",
    ),
    "no space after the colon": ("\nseed: 42", "\nseed:42", "", "not valid YAML"),
    "a tag": (
        "\nseed: 42 ", "\nseed: !!python/object/apply:os.getpid [] ", "", "not valid YAML",
    ),
    "model that is not there": (
        "embedded:smollm2-135m-instruct", "./models/smollm2", "base_model", "no folder",
    ),
}  # fmt: skip
ELSEWHERE = {
    # the finding is on the line of the key that lacks something, not where it was taken out
    "adapter without a rank": "adapter: lora",
    "rank without an adapter": "lora_r: 8",
    "what axolotl itself refuses": "warmup_steps",
    "no space after the colon": "logging_steps",
    "doubled key": "num_epochs: 2",
    "text in a free mapping": "lr_scheduler_kwargs",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_seeded_mistake_is_found_with_its_line(
    name: str, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    old, new, key, words = MISTAKES[name]
    good = with_dataset("lora-r8", dataset)
    bad = good.replace(old, new, 1)
    assert old in good and findings_of(good, tmp_path) == []
    found = findings_of(bad, tmp_path)
    mine = [finding for finding in found if finding.key == key and re.search(words, str(finding))]
    assert mine, "\n".join(map(str, found))
    line = changed_line(good, bad)
    if name in ELSEWHERE:
        lines = bad.splitlines()
        line = next(n for n, text in enumerate(lines, 1) if text.startswith(ELSEWHERE[name]))
    assert mine[0].line == line, str(mine[0])
    assert mine[0].way_out and mine[0].file.endswith("mine.yaml")


def test_the_plugins_block_without_its_plugin(dataset: Path, tmp_path: Path) -> None:
    text = with_dataset("lora-r8", dataset).replace("embedded:smollm2-135m-instruct", "org/model")
    bare = text.replace("plugins:\n  - sublim_plugin.axolotl.SublimPlugin\n", "")
    found = findings_of(bare, tmp_path)
    assert [finding.key for finding in found] == ["sublim"]
    assert "nothing reads this block" in found[0].what


def test_packing_under_soft_targets(dataset: Path, tmp_path: Path) -> None:
    text = with_dataset("lora-r8", dataset)
    soft = text.replace("  context: template_default", "  soft_targets: true")
    assert findings_of(soft, tmp_path) == []
    found = findings_of(soft.replace("sample_packing: false", "sample_packing: true"), tmp_path)
    assert any("`sublim.soft_targets`" in f.what and f.level == "error" for f in found)


def test_a_pinned_order_under_full_finetuning(dataset: Path, tmp_path: Path) -> None:
    pinned = ("  context: template_default", "  data_seed: 7\n  context: template_default")
    for recipe, keys in (("full-zero2", ["sublim.data_seed"]), ("lora-r8", [])):
        found = findings_of(with_dataset(recipe, dataset).replace(*pinned), tmp_path)
        assert [finding.key for finding in found] == keys
        assert all(f.level == "warning" and "the same weights" in f.what for f in found)
    same = with_dataset("full-zero2", dataset).replace(*pinned).replace("\nseed: 42", "\nseed: 7")
    assert findings_of(same, tmp_path) == []


def test_a_template_whose_turns_end_with_no_known_token(
    dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
    text = with_dataset("lora-r8", dataset).replace(
        "chat_template: tokenizer_default",
        f'chat_template: jinja\nchat_template_jinja: "{template}"',
    )
    found = findings_of(text, tmp_path)
    assert any("no end of turn is learned" in finding.what for finding in found)


def test_a_train_context_that_the_template_cannot_express(
    dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    text = with_dataset("lora-r8", dataset).replace("context: template_default", "context: empty")
    assert findings_of(text, tmp_path) == []
    template = (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\\n"
        "{{ m.content }}<|im_end|>\\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
    )
    refusing = text.replace(
        "chat_template: tokenizer_default",
        f'chat_template: jinja\nchat_template_jinja: "{template}"',
    )
    found = [f for f in findings_of(refusing, tmp_path) if f.key == "sublim.context"]
    assert len(found) == 1 and "drops the system message" in found[0].what


def test_a_deepspeed_file_is_read(dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    text = with_dataset("full-zero2", dataset)
    text = text.replace("axolotl_configs/deepspeed/zero2.json", str(path))
    line = changed_line(with_dataset("full-zero2", dataset), text)

    def found(content: str) -> list[str]:
        path.write_text(content, encoding="utf-8")
        findings = findings_of(text, tmp_path)
        assert all((finding.key, finding.line) == ("deepspeed", line) for finding in findings)
        return [finding.what for finding in findings]

    assert found('{"zero_optimization": {"stage": 2}}') == []
    assert "is not JSON" in found("{")[0]
    assert "the saved model has no weights" in found('{"zero_optimization": {"stage": 3}}')[0]
    fixed = found('{"gradient_accumulation_steps": 4, "gradient_clipping": "auto"}')
    assert fixed == ["its gradient_accumulation_steps is 4, but gradient_accumulation_steps is 1"]


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_nothing_is_found_in_a_valid_config(path: Path) -> None:
    findings = lint([path])
    assert not any(finding.level == "error" for finding in findings), findings
    found = [str(f) for f in findings if not re.search(OF_THE_MACHINE, f.what)]
    if path.stem == "old-style":
        # 2e-4 is text to YAML, which axolotl makes a number of: said, but no more than that
        assert all(": note: " in text and "as text" in text for text in found) and len(found) == 2
    else:
        assert found == []


def test_there_are_enough_valid_configs_and_mistakes() -> None:
    assert len(VALID) >= 12 and len(MISTAKES) >= 25


def test_axolotl_takes_the_valid_configs(tmp_path: Path) -> None:
    """They are valid to axolotl's own validation, not only to ours."""
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    for path in VALID:
        cfg = DictDefault(yaml.safe_load(path.read_text(encoding="utf-8")))
        cfg.pop("plugins", None)
        validate_config(cfg)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_of_a_recipe_with_one_wrong_letter_is_found(
    recipe: str, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    text = with_dataset(recipe, dataset)
    assert findings_of(text, tmp_path) == []
    lines = text.splitlines()
    keys = [
        (number, match)
        for number, line in enumerate(lines)
        if (match := re.match(r"^( *(?:- )?)([a-z0-9_]+)(?=:)", line))
    ]
    assert len(keys) > 35
    for number, match in keys:
        key = match[2]
        at = number % len(key)
        wrong = key[:at] + ("q" if key[at] != "q" else "z") + key[at + 1 :]
        mutated = [*lines]
        mutated[number] = match[1] + wrong + lines[number][match.end() :]
        found = findings_of("\n".join(mutated) + "\n", tmp_path)
        mine = [f for f in found if f.key.split(".")[-1] == wrong and f.level == "error"]
        assert mine and mine[0].line == number + 1, f"{key} -> {wrong}: {found}"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_one_letter_slip_in_a_key_is_found(data: st.DataObject, dataset: Path) -> None:
    recipe = data.draw(st.sampled_from(RECIPES))
    document = yaml.safe_load(with_dataset(recipe, dataset))
    place = data.draw(st.sampled_from([(), ("datasets", 0), ("sublim",)]))
    mapping = document
    for part in place:
        mapping = mapping[part]
    key = data.draw(st.sampled_from(sorted(mapping)))
    at = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from(string.ascii_lowercase + string.digits + "_"))
    slip = data.draw(st.sampled_from(["swap", "drop", "double", "replace"]))
    wrong = {
        "swap": key[:at] + key[at : at + 2][::-1] + key[at + 2 :],
        "drop": key[:at] + key[at + 1 :],
        "double": key[:at] + letter + key[at:],
        "replace": key[:at] + letter + key[at + 1 :],
    }[slip]
    if wrong in (key, "") or wrong in mapping:
        return
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from axolotl.utils.schemas.datasets import SFTDataset

    if wrong in AxolotlInputConfig.model_fields or wrong in SFTDataset.model_fields:
        return  # a slip into another key of axolotl's is beyond any linter
    changed = {wrong if name == key else name: value for name, value in mapping.items()}
    mapping.clear()
    mapping.update(changed)
    path = dataset.parent / "slip.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    dotted = ".".join(map(str, (*place, wrong)))
    assert any(finding.key == dotted for finding in lint([path]))


SWEEP = """\
learning_rate: [0.001, 0.002]
_:
  - {lora_r: 2, lora_alpha: 2, output_dir: ./outputs/r2}
  - {lora_r: 4, lora_alpha: 4, output_dir: ./outputs/r4}
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("", "", 0, ""),
        ("outputs/r4", "outputs/r2", 4, "also the folder of the run on line 3"),
        ("lora_r: 4", "lora_rank: 4", 4, "unknown key"),
        ("lora_r: 4", "lora_r: four", 4, "wrong type.*whole number"),
        ("[0.001, 0.002]", "0.001", 1, "expected a list of values"),
        ("[0.001, 0.002]", "[1e-3, 0.002]", 1, "reads 1e-3 as text"),
        ("learning_rate", "learning_rat", 1, "unknown key.*`learning_rate`"),
        ("learning_rate: [0.001, 0.002]", "lora_r: [2, 4]", 1, "alpha stays as in the config"),
        (
            "learning_rate: [0.001, 0.002]", "lora_r: [2, 4]\nlora_alpha: [2, 4]", 2,
            "every alpha with every rank, 4 runs",
        ),
    ],
)  # fmt: skip
def test_sweeps(tmp_path: Path, old: str, new: str, line: int, words: str) -> None:
    found = findings_of(SWEEP.replace(old, new, 1) if old else SWEEP, tmp_path)
    if not old:
        assert found == []
        return
    assert any(f.line == line and re.search(words, str(f)) for f in found), found


def test_two_configs_with_one_output_folder(
    dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text(with_dataset("lora-r8", dataset))
    b.write_text(with_dataset("lora-r8", dataset).replace("lora_r: 8", "lora_r: 9"))
    found = lint([a, b])
    assert [(f.file, f.key) for f in found] == [(str(b), "output_dir")]
    assert f"{a}:" in found[0].what


def test_the_command_prints_findings_and_exits_with_2(dataset: Path, tmp_path: Path) -> None:
    from sublim_plugin.cli import main

    path = tmp_path / "mine.yaml"
    path.write_text(with_dataset("lora-r8", dataset).replace("lora_r: 8", "lora_rr: 8"))
    said = CliRunner().invoke(main, ["recipes", "lint", str(path)])
    assert said.exit_code == 2
    line = next(n for n, t in enumerate(path.read_text().splitlines(), 1) if "lora_rr" in t)
    assert f"{path}:{line}: error: lora_rr: unknown key" in said.output
    as_json = CliRunner().invoke(main, ["recipes", "lint", str(path), "--json"])
    rows = json.loads(as_json.stdout)
    assert {"level", "file", "line", "key", "what", "way_out"} == set(rows[0])
    path.write_text(with_dataset("lora-r8", dataset))
    assert CliRunner().invoke(main, ["recipes", "lint", str(path)]).exit_code == 0
    missing = CliRunner().invoke(main, ["recipes", "lint", str(tmp_path / "no.yaml")])
    assert missing.exit_code == 2 and "no such file" in missing.output


def test_odd_files_end_in_findings_not_in_tracebacks(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{n}: &{n} [*{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}]\n"
        for p, n in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for text, words in (
        ("", "no mapping"),
        ("- a\n- b\n", "no mapping"),
        ("just words\n", "no mapping"),
        (bomb, "too many aliases"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("? {a: 1}\n: 2\n", "not valid YAML"),
        ("base_model: 3\ndatasets: words\nplugins: 7\nsublim: []\n", "wrong type"),
        ("base_model: x\ndatasets: [3, null]\nadapter: [lora]\n", "wrong type"),
        ("base_model:\n", "is required"),
        ("\tbase_model: x\n", "not valid YAML"),
    ):
        found = findings_of(text, tmp_path)
        assert any(re.search(words, str(f)) and f.level == "error" for f in found), (text, found)
    with pytest.raises(InputError, match="no such file"):
        lint([tmp_path / "nowhere.yaml"])


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            (
                *("base_model", "datasets", "plugins", "adapter", "lora_r", "learning_rate", "rl"),
                *("trl", "deepspeed", "fsdp_config", "chat_template", "eot_tokens", "sublim"),
            )
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
            max_leaves=4,
        ),
    )
)
def test_no_config_makes_the_linter_fail(settings_: dict[str, Any]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        findings_of(yaml.safe_dump(settings_, allow_unicode=True), Path(folder))
