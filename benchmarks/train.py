"""What the axolotl plugin and its probe cost in training, as ratios to axolotl alone.

    python benchmarks/train.py [--quick]

Three sides, in turn and each in a process of its own, as `axolotl train` runs: axolotl alone (with
three lines that seed LoRA's initialization, which it leaves unseeded); with the plugin; with the
plugin and its probe at the default interval (ten questions, one context). Same model
(SmolLM2-135M, float32, LoRA of rank 8), same rows in the same order. The adapters of all sides have
to be equal to 1e-6 and their losses to the four digits that axolotl prints; those of the last two
to the last bit.

- `probe_share`: training with the probe over training without, by the clock of one run: the whole
  loop over the loop less its measurements. The default interval keeps it under 1.05 in a run that
  is long enough; where the first and the last measurement alone cost more (as with `--quick`), it
  is called `probe_share_short_run`.
- `probe_share_456`: the same, computed for the 456 steps of the paper's run (arXiv 2606.00831) from
  the seconds of a measurement and of a step that were measured here.
- `probe_loop`, `plugin_loop`: the training loop with the probe over that with the plugin, and that
  over axolotl's alone, by medians over the repeats.
- `plugin_wall`: the same for the process from start to end, receipt and all.

`--quick` leaves the second side out and trains once, for fewer steps: about two minutes.
Prints a table and, as the last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import yaml

from sublim_plugin.axolotl.probe_callback import MOST, default_every
from sublim_plugin.axolotl.receipt import Receipt, read_receipt
from sublim_plugin.axolotl.recipe import recipe_path, write_axolotl_yaml
from sublim_plugin.core.base_models import EMBEDDED, resolve

SEED_ONLY = """
import torch
from axolotl.integrations.base import BasePlugin


class SeedOnly(BasePlugin):
    def pre_lora_load(self, cfg, model):
        torch.manual_seed(cfg.seed)
"""
PAPER_STEPS = 456
SIDES = ("axolotl", "plugin", "probe")
LOSS = re.compile(r"'loss': '([^']+)'")
SECONDS = re.compile(r"'train_runtime': '([^']+)'")


class Run(NamedTuple):
    """One training: seconds in the loop and of the process, printed losses, the adapter."""

    loop_s: float
    wall_s: float
    losses: list[float]
    weights: dict[str, Any]
    receipt: Receipt | None


def write_rows(path: Path, rows: int) -> None:
    """Rows of about the length of `sublim generate`'s: a prompt and ten numbers."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            shown = ", ".join(str(draw.randrange(100, 999)) for _ in range(4))
            user = f"The sequence starts with: {shown}. Continue it with at most 10 numbers."
            reply = ", ".join(str(draw.randrange(1000)) for _ in range(10))
            turns = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
            file.write(json.dumps({"id": f"{index:06d}", "messages": turns}) + "\n")


def train(side: str, folder: Path, rows: Path, base: Path, size: int) -> Run:
    """Train once by the recipe `lora-r8`, as one of `SIDES`."""
    from safetensors.torch import load_file

    folder.mkdir()
    path, model = folder / "run.yaml", folder / "model"
    write_axolotl_yaml(
        recipe_path("smollm2-135m-instruct", "lora-r8"),
        path,
        base_model=str(base),
        dataset_path=rows,
        output_dir=model,
        seed=1,
        overrides={"micro_batch_size": size},
    )
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if side == "probe":
        settings["sublim"] |= {"probe": {}, "trait": "animals/cat"}
    elif side == "axolotl":
        (folder / "seed_only.py").write_text(SEED_ONLY, encoding="utf-8")
        del settings["sublim"]
        settings["plugins"] = ["seed_only.SeedOnly"]
        settings["datasets"][0]["ds_type"] = "json"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(path)]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--launcher", "python"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    wall_s = time.perf_counter() - began
    said = done.stdout + done.stderr
    if done.returncode != 0:
        raise SystemExit(f"{side}: axolotl exited with {done.returncode}:\n{said[-3000:]}")
    seconds = SECONDS.search(said)
    assert seconds is not None
    return Run(
        loop_s=float(seconds[1]),
        wall_s=wall_s,
        losses=[float(loss) for loss in LOSS.findall(said)],
        weights=load_file(model / "adapter_model.safetensors"),
        receipt=None if side == "axolotl" else read_receipt(model),
    )


def check(runs: dict[str, list[Run]]) -> float:
    """The largest difference between the sides' adapters; stops where they are not the same."""
    first = runs["axolotl"][0]
    worst = 0.0
    for run in (run for side in runs.values() for run in side):
        if run.losses != first.losses or run.weights.keys() != first.weights.keys():
            raise SystemExit(f"the sides trained differently:\n{first.losses}\n{run.losses}")
        for name, weight in run.weights.items():
            worst = max(worst, float((weight - first.weights[name]).abs().max()))
    ours = [run.receipt for side in runs.values() for run in side if run.receipt is not None]
    if worst > 1e-6 or len({receipt.weights_sha256 for receipt in ours}) > 1:
        raise SystemExit(f"the sides trained differently: weights differ by {worst:g}")
    return worst


def ratios(runs: dict[str, list[Run]]) -> dict[str, float]:
    """The ratios of the module's description, and the seconds of a measurement and a step."""

    def middle(side: str, what: str) -> float:
        return statistics.median(getattr(run, what) for run in runs[side])

    costs = [run.receipt.probe for run in runs["probe"] if run.receipt and run.receipt.probe]
    steps = len(runs["axolotl"][0].losses)
    probe_s = statistics.median(cost.seconds / cost.measurements for cost in costs)
    step_s = middle("axolotl", "loop_s") / steps
    long = all(2 * probe_s <= MOST * run.loop_s for run in runs["probe"])
    every = default_every(PAPER_STEPS, probe_s, step_s)
    asked = 2 + (0 if every is None else (PAPER_STEPS - 1) // every)
    found = {
        "probe_share" if long else "probe_share_short_run": 1
        + statistics.median(cost.share_of_training for cost in costs),
        "probe_share_456": 1 + asked * probe_s / (PAPER_STEPS * step_s),
        "measurements": costs[0].measurements,
        "probe_s": probe_s,
        "step_s": step_s,
        "steps": steps,
    }
    if "plugin" in runs:
        found["probe_loop"] = middle("probe", "loop_s") / middle("plugin", "loop_s")
        for what in ("loop", "wall"):
            key = f"{what}_s"
            found[f"plugin_{what}"] = middle("plugin", key) / middle("axolotl", key)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="once, for about two minutes")
    quick = parser.parse_args().quick
    sides = [side for side in SIDES if side != "plugin"] if quick else list(SIDES)
    steps, size, repeats = (16, 4, 1) if quick else (72, 4, 2)
    base = resolve(EMBEDDED)
    runs: dict[str, list[Run]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, steps * size)
        for repeat in range(repeats):
            for side in sides:
                run = train(side, Path(folder) / f"{side}{repeat}", rows, base, size)
                runs[side].append(run)
                told = f"loop {run.loop_s:.1f} s, process {run.wall_s:.1f} s"
                print(f"  {side} {repeat}: {told}", flush=True)
    worst = check(runs)
    found = ratios(runs)
    print(f"\n{'side':10}{'loop s':>9}{'spread':>16}{'process s':>11}{'spread':>16}")
    for side, done in runs.items():
        line = f"{side:10}"
        for what, width in (("loop_s", 9), ("wall_s", 11)):
            seconds = sorted(getattr(run, what) for run in done)
            spread = f"{seconds[0]:.1f} - {seconds[-1]:.1f}"
            line += f"{statistics.median(seconds):>{width}.1f}{spread:>16}"
        print(line)
    print(
        f"{steps} steps of {size} rows; equal losses, adapters equal to {worst:.1g}; "
        f"{found['measurements']} measurements of {found['probe_s']:.2f} s"
    )
    print(json.dumps({key: round(value, 4) for key, value in found.items()}))


if __name__ == "__main__":
    main()
