"""How long a study of 20,000 cells takes to plan, to look at and to tabulate; what a study's own
machinery costs beside its work.

    python benchmarks/study.py [--quick] [--run RUN_DIR | --quickstart] [--folder DIR]

**20,000 cells.** A run folder is written as a study leaves it (`study_folder.py`: real manifests,
real sizes, about 2 GB), with one cell in a hundred failed or missing. Three things are timed, each
in a fresh process on one core, from the first import to the end, and with the peak of its memory:

- `plan`: the study file to all cells with their ids;
- `status`: plan, and the state of every cell from the folders, as `sublim status` prints it;
- `table`: every finished cell's manifest and numbers to the rows of the results table.

Warm is the median of the repeats; cold is the first run after the folder's files were dropped from
the page cache (`posix_fadvise`; entries of directories and inodes stay in memory, as only root can
drop these). `table_without_cache` is the table where `RUN/.cache` is missing, which is what the
first look at a folder of another machine costs; `sublim run` and `sublim report` leave one.
`status_20k_s` is the slowest of plan, status and table, warm or cold.

Checked: the states are those of a naive recount by globs, and those that the folder was written
with; the table with the cache equals that without, and two hundred of its differences equal those
computed from questions.jsonl with `json` and a sum.

**Overhead.** `overhead_share` is the share of a study's wall time that is not generation, training
or scoring, of one finished run folder that was made in one go. Wall time is from the first cell's
start to the last one's end, by the manifests: `finished`, and `wall_s` before it. Work is the time
in which at least one cell was worked on; of a student only the last `train_s` seconds (the
trainer's loop, by its receipt) before its end count, so that starting axolotl and preparing its
data are overhead, as are loading a base for generation or scoring, and gaps. `between_cells_share`
leaves the students' start-up out. `finished` is in whole seconds, so a gap is known to 1 s; what
comes before the first cell and after the last one (planning, the report) is not in it.
`--quickstart` runs the quickstart first, into a temporary folder (about ten minutes).

`--quick`: 1,259 cells, once; under a minute. Prints tables and, as the last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

PARTS = ("plan", "status", "table")
QUICKSTART = Path(__file__).parents[1] / "studies" / "quickstart.yaml"

# In the measured process: as little as the command itself needs, and no other import before.
MEASURED = """
import json, os, resource, sys, time
began = time.perf_counter()
part, study, run = sys.argv[1:]
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
from pathlib import Path
study, run = Path(study), Path(run)
found = {}
if part == "plan":
    from sublim_plugin.core.base_models import fingerprint, resolve
    from sublim_plugin.core.many_objects import many_objects
    from sublim_plugin.study.cells import plan
    from sublim_plugin.study.study_file import load_study
    with many_objects():
        settings = load_study(study)
        found["cells"] = len(plan(settings, fingerprint(resolve(settings.base_model))))
elif part == "status":
    import click
    from sublim_plugin.study.command import status
    status.main([str(study), "--out", str(run)], standalone_mode=False)
else:
    from sublim_plugin.analysis.collect import collect
    from sublim_plugin.analysis.transmission import transmission_table
    rows = transmission_table(collect(run))
found["seconds"] = time.perf_counter() - began
found["mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
if part == "table":
    import hashlib
    text = json.dumps([row.model_dump(mode="json") for row in rows])
    found |= {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    found["sample"] = [
        [row.probe, row.base_probe, row.target, row.vs_base_logprob]
        for row in rows[:: max(1, len(rows) // 200)] if row.base_probe
    ]
print("\\n" + json.dumps(found))
"""


def measure(part: str, study: Path, run_dir: Path) -> tuple[dict[str, Any], str]:
    """One part in a process of its own: what it found, and what it printed before."""
    command = [sys.executable, "-c", MEASURED, part, str(study), str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{part}: {done.stderr[-2000:]}")
    printed, last = done.stdout.rstrip().rsplit("\n", 1)
    return json.loads(last), printed.rstrip()


def drop_from_page_cache(folder: Path) -> None:
    """Let the kernel forget the content of every file below a folder."""
    os.sync()
    for root, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def check_status(printed: str, run_dir: Path, written: dict[str, int], cells: int) -> None:
    """The last line of `status` is what globs count, and what was written."""
    done = len(list(run_dir.glob("cells/*/manifest.json")))
    failed = len(list(run_dir.glob("cells/*/error.txt")))
    naive = {"done": done, "failed": failed, "missing": cells - done - failed}
    told = {
        name: int(n) for n, name in (one.split() for one in printed.splitlines()[-1].split(", "))
    }
    if not told == naive == written:
        raise SystemExit(f"status says {told}, globs count {naive}, written were {written}")


def check_table(found: dict[str, Any], run_dir: Path) -> None:
    """Differences of the table equal those that a few plain lines compute from the files."""
    folders = {path.name.rsplit("-", 1)[-1]: path for path in run_dir.glob("cells/probe-*")}

    def scores(probe: str, target: str) -> list[float]:
        lines = (folders[probe] / "questions.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["logprobs"][target.split("/")[1]] for line in lines]

    for probe, base, target, told in found["sample"]:
        pairs = list(zip(scores(probe, target), scores(base, target), strict=True))
        plain = sum(ours - theirs for ours, theirs in pairs) / len(pairs)
        if abs(plain - told) > 1e-9:
            raise SystemExit(f"{probe} against {base}: the table says {told}, the files {plain}")


def many_cells(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Time the three parts over a synthetic run folder; raises SystemExit where a check fails."""
    sys.path.insert(0, str(Path(__file__).parent))
    from study_folder import write_run, write_study

    study, run_dir = folder / "many.yaml", folder / "run"
    kept = folder / "written.json"
    if not kept.is_file():
        written = write_run(write_study(folder, quick=quick), run_dir)
        kept.write_text(json.dumps(written))
    written = json.loads(kept.read_text())
    cells = sum(written.values())
    without, _ = measure("table", study, run_dir)  # writes the cache
    check_table(without, run_dir)
    found: dict[str, Any] = {"cells": cells, "table_without_cache_s": without["seconds"]}
    found["table_without_cache_mb"] = without["mb"]
    for part in PARTS:
        drop_from_page_cache(folder)
        cold, printed = measure(part, study, run_dir)
        warm = [measure(part, study, run_dir)[0] for _ in range(1 if quick else 5)]
        found[f"{part}_cold_s"] = cold["seconds"]
        found[f"{part}_warm_s"] = statistics.median(one["seconds"] for one in warm)
        found[f"{part}_spread_s"] = [
            min(w["seconds"] for w in warm),
            max(w["seconds"] for w in warm),
        ]
        found[f"{part}_mb"] = max(one["mb"] for one in [cold, *warm])
        if part == "plan" and cold["cells"] != cells:
            raise SystemExit(f"planned {cold['cells']} cells, {cells} were written")
        if part == "status":
            check_status(printed, run_dir, written, cells)
        if part == "table" and {one["sha256"] for one in [cold, *warm]} != {without["sha256"]}:
            raise SystemExit("the table with the cache is not the one without")
    found["rows"] = without["rows"]
    return found


def overhead(run_dir: Path) -> dict[str, Any]:
    """The share of a finished run's wall time that is not work, as the module defines it.

    Raises:
        SystemExit: the folder holds no finished cell.
    """
    spans, shorter, kinds = [], [], Counter[str]()
    for path in sorted(run_dir.glob("cells/*/manifest.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        ended = datetime.fromisoformat(manifest["finished"]).timestamp()
        seconds = manifest["wall_s"]
        spans.append((ended - seconds, ended))
        kinds[manifest["kind"]] += seconds
        if manifest["kind"] == "student":
            receipt = json.loads((path.parent / "model" / "sublim_receipt.json").read_text())
            seconds = min(seconds, receipt["train_s"])
        shorter.append((ended - seconds, ended))
    if not spans:
        raise SystemExit(f"{run_dir}: no finished cell")
    wall = max(ended for _, ended in spans) - min(began for began, _ in spans)
    return {
        "run_wall_s": wall,
        "run_by_kind_s": {kind: round(seconds, 1) for kind, seconds in kinds.items()},
        "overhead_share": 1 - covered(shorter) / wall if wall else 0.0,
        "between_cells_share": 1 - covered(spans) / wall if wall else 0.0,
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """Seconds that at least one of the spans covers."""
    total, until = 0.0, float("-inf")
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def run_quickstart(run_dir: Path) -> None:
    """Run the quickstart as a user would."""
    command = [sys.executable, "-m", "sublim_plugin.cli", "run", str(QUICKSTART), "--out"]
    subprocess.run([*command, str(run_dir)], check=True, stdout=subprocess.DEVNULL)


def show(found: dict[str, Any]) -> None:
    if "cells" in found:
        print(f"{found['cells']:,} cells, {found['rows']:,} rows; one core, fresh processes")
        print(f"{'':<22}{'warm':>8}{'spread':>16}{'cold':>8}{'peak':>10}")
        for part in PARTS:
            low, high = found[f"{part}_spread_s"]
            print(
                f"{part:<22}{found[f'{part}_warm_s']:>6.2f} s{low:>7.2f}-{high:.2f} s"
                f"{found[f'{part}_cold_s']:>6.2f} s{found[f'{part}_mb']:>7.0f} MB"
            )
        print(
            f"{'table without cache':<22}{found['table_without_cache_s']:>6.2f} s"
            f"{found['table_without_cache_mb']:>41.0f} MB"
        )
    if "run_wall_s" in found:
        kinds = ", ".join(f"{kind} {n:.0f} s" for kind, n in found["run_by_kind_s"].items())
        print(f"\nrun of {found['run_wall_s']:.0f} s: {kinds}")
        print(
            f"overhead {found['overhead_share']:.1%}, between cells"
            f" {found['between_cells_share']:.1%}"
        )


def main() -> None:
    random.seed(0)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1,259 cells, once")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--run", type=Path, help="also the overhead of this finished run folder")
    group.add_argument("--quickstart", action="store_true", help="also run the quickstart for it")
    parser.add_argument("--folder", type=Path, help="where the cells lie or are written, and stay")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary) / "many"
        found = many_cells(folder, quick=given.quick)
        name = "status_20k_s" if not given.quick else "status_quick_s"
        found[name] = max(found[f"{part}_{how}_s"] for part in PARTS for how in ("warm", "cold"))
        run_dir = given.run
        if given.quickstart:
            run_dir = Path(temporary) / "quickstart"
            run_quickstart(run_dir)
        if run_dir is not None:
            found |= overhead(run_dir)
    show(found)
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
