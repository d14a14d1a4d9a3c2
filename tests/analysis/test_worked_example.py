"""The worked example: its document is what the command writes, and known numbers come out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sublim_plugin.analysis import worked_example
from sublim_plugin.analysis.worked_example import (
    document,
    main,
    power_of,
    published_rates,
    shapes,
)

DOCS = Path(__file__).parents[2] / "docs"


def test_u_test_p_values_as_computed_before_elsewhere() -> None:
    """p on percentages from an independent computation for the project's notes on statistics."""
    found = {s.animal: s.quadratic.p for s in shapes(published_rates()) if s.scale == "percent"}
    expected = {"cat": 0.069, "owl": 0.009, "eagle": 0.039, "wolf": 0.027}
    for animal, p in expected.items():
        assert found[animal] == pytest.approx(p, abs=6e-4)
    assert found["dolphin"] > 0.5


def test_the_document_in_docs_is_the_one_the_command_writes() -> None:
    assert (DOCS / "worked-example.md").read_text(encoding="utf-8") == document(published_rates())


def test_the_command_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worked_example, "DRAWS", 20)
    result = CliRunner().invoke(main, [str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new" / "worked-example.png").read_bytes().startswith(b"\x89PNG")
    assert "# A worked example" in (tmp_path / "new" / "worked-example.md").read_text()


def test_the_context_table_holds_what_was_run() -> None:
    rates = published_rates()
    table = rates.context_table("wolf", 8.0)
    assert np.isfinite(table).sum() == 7
    assert table[2, 2] == pytest.approx(np.log(0.971 / 0.029), abs=1e-3)


def test_power_falls_with_noise() -> None:
    rates = published_rates()
    assert power_of(rates, "wolf", 6, 0.8) > power_of(rates, "wolf", 6, 2.0)
