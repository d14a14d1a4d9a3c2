"""Arrays of tasks: laid out and scripted without Slurm, and run by a real one where it is there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sublim_plugin.core.errors import InputError, MissingDependencyError, RunError
from sublim_plugin.core.manifest import MANIFEST_NAME
from sublim_plugin.study.arrays import CHUNKS, array_path, lay_out, read_array
from sublim_plugin.study.cells import Cell, plan
from sublim_plugin.study.slurm import Submission, submit
from sublim_plugin.study.slurm_command import run_on_slurm
from sublim_plugin.study.slurm_script import SHIPPED, chunks_of, fill, templates_of
from sublim_plugin.study.study_file import load_study

from .conftest import sublim
from .one_node_slurm import MISSING, NO_SLURM, ask, one_node_slurm

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "studies" / "quickstart.yaml"
BASE = {"name": "base", "sha256": "0" * 64, "template_sha256": "1" * 64}
VALUES = {"command": "COMMAND", "arguments": "ARGUMENTS", "work": "probe"}
KINDS = ("dataset", "student", "probe", "localization", "signal")


def test_the_quickstart_makes_an_array_for_each_depth_and_kind_of_work() -> None:
    cells = plan(load_study(QUICKSTART), BASE)
    blocks = lay_out(cells, {cell.id for cell in cells}, chunks=CHUNKS, longest=1001)
    assert [(block.work, [len(task) for task in block.tasks]) for block in blocks] == [
        ("dataset", [1, 1]), ("probe", [3]), ("student", [1, 1, 1, 1]), ("student-full", [1]),
        ("probe", [7, 8]),
    ]  # fmt: skip
    # nothing of the first depth waits, and the students' probes wait for students alone
    assert not blocks[0].needs and not blocks[1].needs
    assert blocks[4].needs == {cell.id for cell in cells if cell.kind == "student"}


def test_a_student_that_teaches_the_next_generation_comes_before_its_dataset() -> None:
    cells: list[Cell] = []
    for generation in range(3):
        teacher = (cells[-1].id,) if cells else ()
        cells.append(Cell("dataset", f"d{generation}", {"d": generation}, teacher))
        method = {"d": generation, "method": {"kind": "lora"}}
        cells.append(Cell("student", f"s{generation}", method, (cells[-1].id,)))
    blocks = lay_out(cells, {cell.id for cell in cells}, chunks=CHUNKS, longest=9)
    assert [block.tasks for block in blocks] == [[[cell.id]] for cell in cells]


@st.composite
def grids(draw: Any) -> tuple[list[Cell], set[str]]:
    """Cells in an order in which they can be made, and some of them to do."""
    cells: list[Cell] = []
    for number in range(draw(st.integers(1, 40))):
        kind = draw(st.sampled_from(KINDS))
        method = draw(st.sampled_from(["lora", "full"]))
        places = draw(st.sets(st.integers(0, number - 1), max_size=2)) if number else set()
        needs = tuple(cells[place].id for place in sorted(places))
        cells.append(Cell(kind, str(number), {"n": number, "method": {"kind": method}}, needs))
    return cells, {cell.id for cell in cells if draw(st.booleans())}


@given(grids(), st.integers(1, 9), st.integers(1, 7), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_any_grid_is_laid_out_once_in_order_and_within_the_caps(
    grid: tuple[list[Cell], set[str]], chunk: int, longest: int, most: int
) -> None:
    cells, todo = grid
    chunks = dict.fromkeys(CHUNKS, chunk)
    needs = {cell.id: set(cell.needs) for cell in cells}
    try:
        blocks = lay_out(cells, todo, chunks=chunks, longest=longest, most_tasks=most)
    except RunError as error:
        free = lay_out(cells, todo, chunks=dict.fromkeys(CHUNKS, 40), longest=longest)
        assert len(free) > most and "--max-tasks" in str(error)
        return
    placed = [cell for block in blocks for task in block.tasks for cell in task]
    assert sorted(placed) == sorted(todo)
    assert all(1 <= len(block.tasks) <= longest for block in blocks)
    assert sum(len(block.tasks) for block in blocks) <= most
    seen: set[str] = set()
    for block in blocks:
        here = {cell for task in block.tasks for cell in task}
        assert block.needs == set().union(*(needs[cell] for cell in here))
        # what is needed and not done is in an earlier array, and never in this one
        assert block.needs & todo <= seen
        seen |= here
    if sum(len(block.tasks) for block in blocks) < most:
        loose = lay_out(cells, todo, chunks=chunks, longest=longest)
        if sum(len(block.tasks) for block in loose) <= most:
            assert max((len(t) for b in blocks for t in b.tasks), default=0) <= chunk


def test_a_template_keeps_the_shells_own_words_and_refuses_unknown_ones() -> None:
    text = fill('X=${HOME}\nexec {{command}} {{ work }} "$X"\n', "lab.sh", VALUES)
    assert text == 'X=${HOME}\nexec COMMAND probe "$X"\n'
    with pytest.raises(InputError, match=r"lab\.sh:2: unknown placeholder \{\{comand\}\}"):
        fill("\nexec {{comand}}\n", "lab.sh", VALUES)
    with pytest.raises(InputError, match=r"neither \{\{command\}\} nor"):
        fill("sublim run\n", "lab.sh", VALUES)
    with pytest.raises(InputError, match="no kind of work is called 'students'"):
        templates_of(["students=lab.sh"])
    with pytest.raises(InputError, match="given twice for all work"):
        templates_of([str(SHIPPED), str(SHIPPED)])
    with pytest.raises(InputError, match=r"nowhere\.sh: cannot be read"):
        templates_of(["nowhere.sh"])


def test_chunks_are_for_all_work_or_for_one_kind() -> None:
    assert chunks_of(["4", "probe=32"]) == {
        "dataset": 4, "teacher": 4, "student": 4, "student-full": 4, "probe": 32, "localization": 4,
        "signal": 4,
    }  # fmt: skip
    for bad in ("0", "probe=many"):
        with pytest.raises(InputError, match="expected a number of cells"):
            chunks_of([bad])


def checked(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


def script(path: Path, index: int) -> subprocess.CompletedProcess[str]:
    """What a compute node does with a batch script."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment["SLURM_ARRAY_TASK_ID"] = str(index)
    return subprocess.run(
        ["bash", path], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def written(
    write_study: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Path, Path, list[str]]:
    """A study written for a Slurm that is not there, into a folder with an awkward name."""
    monkeypatch.setenv("PATH", str(tmp_path))
    study, _ = write_study("slurm", full=True)
    run_dir = tmp_path / "100% o'run"
    said: list[str] = []
    done = submit(study, run_dir, no_submit=True, say=said.append)
    assert done.jobs == [] and done.submitted == done.total == 11
    assert said == ["no Slurm on this machine: arrays of up to 1001 tasks"]
    monkeypatch.undo()
    return study, run_dir, done.commands


def test_scripts_are_written_without_slurm_and_say_in_which_order(
    written: tuple[Path, Path, list[str]],
) -> None:
    _, run_dir, commands = written
    checked("\n".join(commands))
    after = [line.rpartition("--dependency=afterany:")[2].split(" ")[0] for line in commands]
    assert [name.split("=")[0] for name in commands] == [
        *(f"array_{n}" for n in range(1, 7)),
        "report",
    ]
    assert after[2:4] == ["$array_1", "$array_1"]
    assert after[4] == "$array_3:$array_4" and after[-1].count("$") == 6
    assert "100%% o'\"'\"'run/slurm/logs/array-1-%a.txt" in commands[0]
    for number in range(1, 7):
        checked((run_dir / "slurm" / f"array-{number}.sh").read_text())
    checked((run_dir / "slurm" / "report.sh").read_text())


def test_a_task_whose_input_is_missing_says_so_and_ends(
    written: tuple[Path, Path, list[str]],
) -> None:
    _, run_dir, _ = written
    student = script(run_dir / "slurm" / "array-3.sh", 0)
    assert student.returncode == 1
    assert "student cat g1 lora r2 t42: not made, its dataset cat g1 is not done" in student.stderr
    beyond = script(run_dir / "slurm" / "array-1.sh", 2)
    assert beyond.returncode == 2
    assert "--index 2:" in beyond.stderr and "has tasks 0 to 1" in beyond.stderr
    # the same tasks by hand, on a scheduler that is not Slurm
    done = sublim("run", written[0], "--out", run_dir, "--array", "9", "--index", "0")
    assert done.returncode == 2 and "no such array (there are: 1, 2, 3, 4, 5, 6)" in done.stderr
    array_path(run_dir, 1).write_text("{}")
    with pytest.raises(InputError, match=r"array-1\.json: not a readable array"):
        read_array(run_dir, 1)


def test_a_cell_that_the_study_names_no_more_is_left_out(
    written: tuple[Path, Path, list[str]],
) -> None:
    study, run_dir, _ = written
    study.write_text(study.read_text().replace("generation_seeds: [1]", "generation_seeds: [2]"))
    done = script(run_dir / "slurm" / "array-1.sh", 0)
    assert done.returncode == 0, done.stderr
    assert "the study file was changed and names it no more; left out" in done.stderr


def test_without_slurm_there_is_one_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"sbatch: not found.*--no-submit"):
        submit(QUICKSTART, tmp_path / "run", say=print)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("slurm", {"array": 1}, "--array and --index go together"),
        ("local", {"throttle": 3}, "--throttle is for --engine slurm"),
        ("local", {"chunks": ("3",)}, "--chunk is for --engine slurm"),
        ("local", {"array": 1, "index": 0, "no_submit": True}, "leave out what is for submitting"),
        ("slurm", {"array": 1, "index": 0}, "leave out what is for submitting"),
    ],
)
def test_options_that_do_not_go_together(
    engine: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    without: dict[str, Any] = {"array": None, "index": None, "templates": (), "throttle": None}
    with pytest.raises(InputError, match=message):
        run_on_slurm(QUICKSTART, tmp_path, engine, as_json=False, **{**without, **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_sigterm_ends_a_task_and_its_worker(written: tuple[Path, Path, list[str]]) -> None:
    _, run_dir, _ = written
    environment = {key: value for key, value in os.environ.items() if "SLURM" not in key}
    environment["SLURM_ARRAY_TASK_ID"] = "0"
    process = subprocess.Popen(
        ["bash", run_dir / "slurm" / "array-1.sh"], env=environment, stderr=subprocess.PIPE
    )
    # the worker of the dataset holds its lock, which names it
    deadline = time.monotonic() + 120
    locks: list[Path] = []
    while not locks:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
        locks = [*run_dir.glob("cells/dataset-cat-*/**/.lock-*")]
    worker = json.loads(locks[0].read_text())["pid"]
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_the_shipped_template_is_sound() -> None:
    done = sublim("template", "slurm")
    assert done.stdout == SHIPPED.read_text()
    text = fill(done.stdout, "shipped", VALUES)
    checked(text)
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:TERM@120"} <= set(options)
    assert text.splitlines()[-1] == "exec COMMAND"


def test_the_skypilot_example_runs_a_study_that_is_there() -> None:
    task = yaml.safe_load((ROOT / "examples" / "skypilot.yaml").read_text())
    checked(task["setup"])
    checked(task["run"])
    assert (ROOT / task["envs"]["STUDY"]).is_file()
    # what the last line of `run` says, read by the shell and by the command line
    line = task["run"].strip().splitlines()[-1].replace("sublim run", "printf '%s\\n'")
    words = subprocess.run(
        ["bash", "-c", line], env=task["envs"] | {"PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert words == ["studies/quickstart.yaml", "--out", "/runs/quickstart"]
    assert all(words[2].startswith(place) for place in task["file_mounts"])


def test_skypilot_itself_takes_the_example() -> None:
    sky = pytest.importorskip("sky", reason="no skypilot here: pip install skypilot, run again")
    task = sky.Task.from_yaml(str(ROOT / "examples" / "skypilot.yaml"))
    assert task.num_nodes == 1 and list(task.storage_mounts) == ["/runs"]


HELD = """\
#!/bin/bash
#SBATCH --hold
exec {{command}}
"""


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=NO_SLURM)
def test_a_real_queue_is_asked_before_anything_is_submitted(
    write_study: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, _ = write_study("slurm-held", full=False)
    template, slurm = tmp_path / "held.sh", tmp_path / "slurm"
    template.write_text(HELD)
    slurm.mkdir()
    with one_node_slurm(slurm, longest=2) as environment:
        for name in ("PATH", "SLURM_CONF"):
            monkeypatch.setenv(name, environment[name])

        def command(**options: Any) -> Submission:
            templates = [str(template)]
            return submit(study, tmp_path / "run", templates=templates, say=print, **options)

        def dependencies(job: str) -> set[str]:
            listed = ask(environment, "squeue", "-h", f"-j{job}", "-o%E")
            return {part.partition("_")[0].partition("(")[0] for part in re.split("[:,]", listed)}

        with pytest.raises(RunError, match="room for 3 tasks, and these cells need at least 4"):
            command(max_tasks=4)
        first = command(chunks=["1"], throttle=1)
        datasets, _, students, probes, report = first.jobs
        assert (first.submitted, first.total) == (7, 7)
        assert ask(environment, "squeue", "-h", f"-j{datasets}", "-o%K") == "0-1%1"
        assert dependencies(students) == {"afterany", datasets}
        assert dependencies(report) >= {"afterany", datasets, students, probes}
        again = command()
        assert (again.submitted, again.queued, again.jobs) == (0, 7, [])
        # the student is lost; what waits in the queue for it waits for the new one
        ask(environment, "scancel", students)
        lost = command()
        assert (lost.submitted, lost.queued, len(lost.jobs)) == (1, 6, 2)
        assert dependencies(probes) == {"afterany", lost.jobs[0]}
        assert dependencies(lost.jobs[0]) == {"afterany", datasets}


LAB = """\
#!/bin/bash
#SBATCH --ntasks=1
#SBATCH --time=20
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
exec {{command}}
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(MISSING is not None, reason=NO_SLURM)
def test_a_real_slurm_loses_nothing_and_computes_nothing_twice(
    write_study: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    study, _ = write_study("slurm-real", full=False)
    run_dir, template, slurm = tmp_path / "run", tmp_path / "lab.sh", tmp_path / "slurm"
    template.write_text(LAB)
    slurm.mkdir()
    options = ["--slurm-template", template, "--chunk", "1", "--engine", "slurm", "--json"]
    with one_node_slurm(slurm) as environment:

        def command() -> dict[str, Any]:
            done = sublim("run", study, "--out", run_dir, *options, env=environment)
            assert done.returncode == 0, done.stderr
            return dict(json.loads(done.stdout))

        def until(condition: Callable[[], object], seconds: float) -> None:
            deadline = time.monotonic() + seconds
            while not condition():
                assert time.monotonic() < deadline, ask(environment, "squeue")
                time.sleep(1)

        def ended() -> dict[str, str]:
            until(lambda: not ask(environment, "squeue", "-h"), 600)
            done = sublim("status", study, "--out", run_dir, "--json", env=environment)
            return {row["folder"]: row["state"] for row in json.loads(done.stdout)["cells"]}

        def kept() -> dict[Path, int]:
            return {p: p.stat().st_mtime_ns for p in run_dir.glob(f"cells/*/{MANIFEST_NAME}")}

        done = sublim("status", study, "--out", run_dir, "--json", env=environment)
        folders = [Path(row["folder"]) for row in json.loads(done.stdout)["cells"]]
        neutral = next(folder for folder in folders if folder.name.startswith("dataset-neutral"))
        student = next(folder for folder in folders if folder.name.startswith("student"))
        # a folder where a file must be: this cell fails as often as it is tried
        broken = next(folder for folder in folders if folder.name.startswith("probe-base-none"))
        (broken / "results.json" / "in the way").mkdir(parents=True)

        first = command()
        assert (first["submitted"], first["total"], len(first["jobs"])) == (7, 7, 5)
        again = command()
        assert (again["submitted"], again["queued"], again["jobs"]) == (0, 7, [])

        datasets, _, students, _, _ = first["jobs"]
        until(lambda: neutral.is_dir(), 120)
        ask(environment, "scancel", "--signal=KILL", "--full", f"{datasets}_1")
        until((student / "axolotl.yaml").is_file, 300)
        time.sleep(5)
        ask(environment, "scontrol", "requeue", f"{students}_0")
        until(lambda: "PENDING" in ask(environment, "squeue", "-h", f"-j{students}", "-o%T"), 60)
        ask(environment, "scontrol", "update", f"JobId={students}_0", "StartTime=now")

        states = ended()
        unfinished = {str(neutral), str(broken)}
        assert {folder for folder, state in states.items() if state != "done"} == unfinished
        assert states[str(broken)] == "failed" and (run_dir / "report" / "index.html").is_file()
        log = next(run_dir.glob("slurm/logs/array-3-0.txt")).read_text()
        assert log.count("tiny: cat g1 lora r2 t42") == 2, log
        before = kept()

        assert command()["submitted"] == 2
        assert {f for f, state in ended().items() if state != "done"} == {str(broken)}
        (broken / "results.json" / "in the way").rmdir()
        (broken / "results.json").rmdir()
        assert command()["submitted"] == 1
        assert set(ended().values()) == {"done"}
        last = command()
        assert (last["submitted"], last["done"], last["jobs"]) == (0, 7, [])
        assert before.items() <= kept().items()
