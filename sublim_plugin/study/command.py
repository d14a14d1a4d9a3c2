"""`sublim run|status|report|gc`. Imports nothing heavy until one of them runs."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from sublim_plugin.study.slurm_command import run_on_slurm, slurm_options

STUDY = click.argument("study", type=click.Path(path_type=Path))
OUT = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Run folder.  [default: runs/NAME-OF-THE-STUDY]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
SETTINGS = {"help_option_names": ["-h", "--help"]}

NOT_HERE = "the base model is not here (or not prepared), so all cells count as missing"
LISTED = 60
"""Cells up to which `status` lists every one instead of counting them."""


def _run_dir(study: Path, out: Path | None) -> Path:
    from sublim_plugin.study.study_file import load_study

    return (out or Path("runs") / load_study(study).name).resolve()


@click.command(context_settings=SETTINGS)
@STUDY
@OUT
@JSON
@click.option("--dry-run", is_flag=True, help="Show cells, hours, disk and power; make nothing.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray", "slurm"]),
    default="local",
    show_default=True,
    help="Where cells are made: in processes on this machine, one a GPU; on a Ray cluster; or by"
    " Slurm, which is given what is missing as job arrays.",
)
@click.option(
    "--address",
    help="Ray: a cluster that exists.  [default: RAY_ADDRESS, else one is started on this machine]",
)
@click.option(
    "--gpus-per-worker",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="GPUs that make one cell; a training on several goes through axolotl's launcher.",
)
@slurm_options
def run(
    study: Path,
    out: Path | None,
    as_json: bool,
    dry_run: bool,
    engine: str,
    address: str | None,
    gpus_per_worker: int,
    **slurm: Any,
) -> None:
    """Run a study file: every missing cell, then the report. Run it again to continue."""
    from sublim_plugin.core.errors import InputError

    run_dir = _run_dir(study, out)
    if dry_run:
        _show_costs(study, run_dir, as_json)
        return
    if address is not None and engine != "ray":
        raise InputError("--address is that of a Ray cluster: add --engine ray")
    if gpus_per_worker > 1 and (engine == "slurm" or slurm["array"] is not None):
        raise InputError(
            "--gpus-per-worker is for the local engine and Ray; a task of an array makes a cell on"
            " each of its GPUs, and a training on several is run outside (docs/clusters.md)"
        )
    code = run_on_slurm(study, run_dir, engine, as_json=as_json, **slurm)
    if code is not None:
        sys.exit(code)
    from sublim_plugin.analysis.collect import collect
    from sublim_plugin.analysis.tables import format_table
    from sublim_plugin.analysis.transmission import transmission_table
    from sublim_plugin.study.run import local_engine, run_study

    def say(text: str) -> None:
        click.echo(text, err=True)

    chosen: Any = partial(local_engine, gpus_per_worker=gpus_per_worker)
    if engine == "ray":
        from sublim_plugin.study.on_ray import ray_engine

        chosen = ray_engine(address, gpus_per_worker=gpus_per_worker)
    outcome = run_study(study, run_dir, say, chosen)
    rows = transmission_table(
        collect(run_dir, [(state.folder, state.state) for state in outcome.states])
    )
    if as_json:
        summary = {
            "run": str(run_dir),
            "report": str(outcome.report),
            "cells": [_state_row(state) for state in outcome.states],
            "transmission": [row.model_dump(mode="json") for row in rows],
        }
        click.echo(json.dumps(summary, ensure_ascii=False))
    else:
        click.echo(format_table(rows))
        click.echo(f"report: {outcome.report}")
    if outcome.exit_code:
        sys.exit(outcome.exit_code)


def _show_costs(study: Path, run_dir: Path, as_json: bool) -> None:
    from sublim_plugin.core.many_objects import many_objects
    from sublim_plugin.study.cost import costs
    from sublim_plugin.study.cost_text import text
    from sublim_plugin.study.run import states_of
    from sublim_plugin.study.study_file import load_study

    settings = load_study(study)
    with many_objects():
        # a request for compute is written where the model is not
        states, known = states_of(study, run_dir)
        found = costs(settings, states)
    if as_json:
        summary = {"run": str(run_dir), "base_model_here": known}
        click.echo(json.dumps(summary | found.model_dump(mode="json")))
        return
    click.echo(text(found))
    if not known:
        click.echo(NOT_HERE)


@click.command(context_settings=SETTINGS)
@STUDY
@OUT
@JSON
@click.option("--why", is_flag=True, help="Say why each unfinished cell is not done.")
@click.option("--cells", is_flag=True, help="List every cell, also in a large study.")
def status(study: Path, out: Path | None, as_json: bool, why: bool, cells: bool) -> None:
    """List a study's cells: done, running, failed or missing. Reads manifests only."""
    from sublim_plugin.core.many_objects import many_objects
    from sublim_plugin.study.overview import counts, failures, summary, table
    from sublim_plugin.study.reasons import Reasons
    from sublim_plugin.study.run import states_of
    from sublim_plugin.study.state import read_manifests_ahead

    run_dir = _run_dir(study, out)
    with many_objects():
        read_manifests_ahead(run_dir)
        states, prepared = states_of(study, run_dir)
        told = {}
        if why:
            reasons = Reasons([state.cell for state in states], run_dir)
            told = {
                state.cell.id: reasons.why(state) if prepared else NOT_HERE
                for state in states
                if state.state != "done"
            }
    if as_json:
        rows = [_state_row(s, told.get(s.cell.id)) for s in states]
        click.echo(json.dumps({"run": str(run_dir), "counts": counts(states), "cells": rows}))
        return
    if not cells and len(states) > LISTED:
        lines = [*table(states), "", *failures(states), *_grouped(states, told)]
    else:
        lines = []
        for state in states:
            lines.append(f"{state.state:<8} {state.cell.kind:<8} {state.cell.label}")
            if state.cell.id in told:
                lines.append(f"{'':<9}{told[state.cell.id]}")
            if state.state == "failed":
                lines += [] if state.cell.id in told else [f"{'':<9}{_first_line(state)}"]
                lines.append(f"{'':<9}{state.log or state.folder}")
    if not prepared:
        click.echo(NOT_HERE, err=True)
    click.echo("\n".join([*lines, summary(states)]))


def _grouped(states: list[Any], told: dict[str, str]) -> list[str]:
    """A line for each reason and kind that unfinished cells share, without the cells' own names."""
    groups: dict[tuple[str, str], list[str]] = {}
    for state in states:
        reason = told.get(state.cell.id)
        if reason is not None and state.state == "missing":
            head, _, change = reason.partition(": ")
            words = head if not change else f"changed: {change}"
            words = "waits for what it needs" if words.startswith("waits for") else words
            groups.setdefault((state.cell.kind, words), []).append(state.cell.label)
    return [
        f"{kind}: {labels[0] if len(labels) == 1 else f'{len(labels)} cells'}: {words}"
        for (kind, words), labels in groups.items()
    ]


def _first_line(state: Any) -> str:
    from sublim_plugin.study.state import first_line

    return first_line(state)


def _state_row(state: Any, why: str | None = None) -> dict[str, Any]:
    row = {
        "kind": state.cell.kind,
        "label": state.cell.label,
        "id": state.cell.id,
        "state": state.state,
        "folder": str(state.folder),
    }
    if state.error:
        row |= {"error": state.error, "log": str(state.log or state.folder)}
    return row | ({"why": why} if why else {})


@click.command(context_settings=SETTINGS)
@click.argument("studies", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--compare", is_flag=True, help="Set two studies, or two run folders, side by side.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Run folder; with --compare the folder to write.  [default: runs/NAME-OF-THE-STUDY, and "
    "beside the first run compare-A-B]",
)
def report(studies: tuple[Path, ...], compare: bool, out: Path | None) -> None:
    """Write a study's report from what is done so far, or compare two: --compare A B."""
    from sublim_plugin.core.errors import InputError

    if len(studies) != (2 if compare else 1):
        expected = "--compare takes two studies" if compare else "report takes one study"
        raise InputError(f"{expected}, found {len(studies)}: sublim report STUDY, or --compare A B")
    if compare:
        from sublim_plugin.study.comparing import compare_studies

        click.echo(f"comparison: {compare_studies(studies[0], studies[1], out)}")
        return
    from sublim_plugin.study.run import states_of, write_report_if_changed
    from sublim_plugin.study.study_file import load_study

    run_dir = _run_dir(studies[0], out)
    states, _ = states_of(studies[0], run_dir)
    index = write_report_if_changed(load_study(studies[0]), studies[0], run_dir, states)
    click.echo(f"report: {index}")


@click.command(context_settings=SETTINGS)
@STUDY
@OUT
@JSON
@click.option("--yes", is_flag=True, help="Remove without asking.")
def gc(study: Path, out: Path | None, as_json: bool, yes: bool) -> None:
    """Show what a run folder holds beyond its results, then remove it.

    Checkpoints and optimizer states of finished students, merged copies, what interrupted work
    left, and cells that the study no longer names. Never a finished cell that it names, and nothing
    that a live process holds. Without --yes it asks on a terminal, and elsewhere only shows.
    """
    from sublim_plugin.study.gc import find, remove, text
    from sublim_plugin.study.run import states_of

    run_dir = _run_dir(study, out)
    states, prepared = states_of(study, run_dir)
    found = find([state.cell for state in states], run_dir, ids_known=prepared)
    removed = False
    if not as_json:
        click.echo(text(found, run_dir))
    if found and (yes or (not as_json and sys.stdin.isatty() and click.confirm("Remove these?"))):
        remove(found, run_dir)
        removed = True
    total = sum(item.bytes for item in found)
    if as_json:
        items = [item.model_dump(mode="json") for item in found]
        click.echo(
            json.dumps({"run": str(run_dir), "removed": removed, "bytes": total} | {"items": items})
        )
    elif found:
        click.echo("removed" if removed else "nothing was removed; add --yes to remove them")
