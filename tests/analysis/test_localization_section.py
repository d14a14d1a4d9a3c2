"""Localizations among a study's cells, as `sublim localize` writes them, in the report."""

from __future__ import annotations

import csv
import re
import time
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import SyntheticRun

from sublim_plugin.analysis.report import write_report
from sublim_plugin.core.atomic import write_json
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.manifest import write_manifest
from sublim_plugin.localize.figures import draw
from sublim_plugin.localize.results import Localization, Measured, MeasureResult, PartResult

TOKENS = ("<|user|>", "\n", "Which", " animal", "?", "<|end|>", "<|assistant|>")


def measured(value: float) -> Measured:
    return Measured(value=value, low=value - 0.1, high=value + 0.1)


def part(kind: Any, name: str, value: float, **fields: Any) -> PartResult:
    given = {"band": None, "module": None, "text": None, "tokens": None, "sum": None} | fields
    return PartResult(
        kind=kind,
        name=name,
        gates={},
        decode={"alone": "off"},
        sufficiency=measured(value),
        necessity=measured(value / 2),
        shares=None,
        **given,
    )


def localization() -> Localization:
    parts = [part("token", str(i), 0.1 * i) for i in (0, 1, 5, 6)]
    parts += [part("span", "question", 0.31), part("layers", "0-1", 0.21)]
    parts += [
        part("cell", f"{module} {band}", 0.05, band=band, module=module)
        for module in ("q_proj", "v_proj")
        for band in ("0-1", "2-3")
    ]
    result = MeasureResult(
        measure="logprob",
        metric="target_logprob",
        unit="nats",
        base=measured(-6.0),
        student=measured(-5.0),
        total=measured(1.0),
        beside={},
        parts=tuple(parts),
    )
    return Localization(
        id="0" * 12,
        spec={},
        student="cat <r8>",
        trait="animals/cat",
        context={"kind": "none"},
        n_questions=3,
        prompt="".join(TOKENS),
        tokens=TOKENS,
        spans={"question": (2, 3, 4)},
        measures=(result,),
        spectra=None,
        patching=None,
        divergence=None,
        notes=(),
        versions={},
    )


def cell(run: SyntheticRun, results: Any) -> Path:
    spec = {"student": "s", "trait": "animals/cat"}
    folder = run.root / "cells" / f"localization-cat-{sha256_json(spec)[:12]}"
    folder.mkdir(parents=True)
    write_json(folder / "results.json", results)
    draw(localization(), folder)
    write_manifest(
        folder,
        kind="localization",
        id=sha256_json(spec),
        label="localization",
        spec=spec,
        outputs=[path.name for path in folder.iterdir()],
        started=time.time(),
    )
    run.cells.append((folder, "done"))
    return folder


def test_strips_and_parts_are_shown_with_their_files(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    found = localization()
    folder = cell(run, found.model_dump(mode="json"))
    path = write_report(run.root, study_name="s", cells=run.cells)
    page = path.read_text(encoding="utf-8")
    section = page[page.index('id="localization"') : page.index('id="training"')]
    assert section.count("<img ") == 2  # the strip and the map
    assert "cat &lt;r8&gt;" in section and "<r8>" not in section
    links = re.findall(r'href="(localization/[^"]+)"', section)
    assert {Path(link).suffix for link in links} == {".svg", ".png", ".csv"}
    for link in links:
        copied = path.parent / link
        assert copied.read_bytes() == (folder / link.split("-", 1)[1]).read_bytes()
    with (path.parent / "localization.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 1 + len(found.measures[0].parts)
    for line in lines:
        # tokens are in the strip; the table has the larger parts
        shown = f'<th scope="row" >{line["part"]}</th>' in section
        assert shown == (line["kind"] != "token")
        assert not shown or f"{float(line['sufficiency']):+.4f}" in section
    # a later report without the cell leaves nothing of it
    write_report(run.root, study_name="s", cells=[])
    assert not (path.parent / "localization").exists()
    assert not (path.parent / "localization.csv").exists()
    assert 'id="localization"' not in path.read_text()


def test_a_garbled_localization_stops_with_its_path(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    folder = cell(run, {"student": "s"})
    message = rf"{folder.name}/results\.json: no context, measures, n_questions, trait"
    with pytest.raises(InputError, match=message):
        write_report(run.root, study_name="s", cells=run.cells)
