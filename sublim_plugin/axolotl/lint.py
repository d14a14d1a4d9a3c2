"""Lint any axolotl YAML: what axolotl 0.19 lets through, with line, key and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sublim_plugin.axolotl.lint_document import Document, Finding, read_document
from sublim_plugin.axolotl.lint_files import check_files
from sublim_plugin.axolotl.lint_rules import check_rules
from sublim_plugin.axolotl.lint_schema import (
    check_as_axolotl_does,
    check_keys_and_types,
    config_model,
)
from sublim_plugin.axolotl.lint_sweep import check_sweep, is_sweep


def lint(paths: Sequence[Path]) -> list[Finding]:
    """Findings in these configs and sweeps, by file and line. Nothing is trained or downloaded.

    The plugins that a config lists are imported, as axolotl does.

    Raises:
        InputError: a file cannot be read.
        MissingDependencyError: axolotl is not installed.
    """
    documents = [_checked(path) for path in paths]
    _check_output_folders(documents)
    findings = []
    for document in documents:
        findings += sorted(dict.fromkeys(document.findings), key=lambda finding: finding.line)
    return findings


def _checked(path: Path) -> Document:
    document = read_document(path)
    if not isinstance(document.data, dict):
        return document
    model = config_model(document)
    if is_sweep(document.data):
        check_sweep(document, model)
    else:
        check_keys_and_types(document, model)
        check_rules(document)
        check_files(document)
        check_as_axolotl_does(document, model)
    return document


def _check_output_folders(documents: Sequence[Document]) -> None:
    """Two configs that write to one folder overwrite each other."""
    first: dict[Path, Document] = {}
    for document in documents:
        data = document.data
        if not isinstance(data, dict) or is_sweep(data) or not data.get("output_dir"):
            continue
        folder = Path(str(data["output_dir"]))
        if folder in first:
            other = first[folder]
            what = f"{folder} is also the folder of {other.path}:{other.line(('output_dir',))}"
            document.add("error", ("output_dir",), what, "give each config a folder of its own")
        first.setdefault(folder, document)
