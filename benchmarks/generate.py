"""How fast `data_gen` makes datasets, as ratios within one run.

    python benchmarks/generate.py [--quick] [--with-vllm PYTHON] [--million]

The other side is the straightforward way: transformers' `generate` with its default attention on
left-padded batches, at the batch size that is best for it on this machine, with the same sampler,
the same prompts and the same filter; under the number constraint both sides decode under it, there
as a logits processor. Both sides accept the same share of replies (a permutation test over replies
compares what they wrote), so accepted rows per second are in the ratio of asked rows per second,
which does not suffer from the luck of a few accepted rows.

Prints a table and, as the last line, JSON.
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from data_gen import parse_numbers, reject_reasons
from data_gen.generate import assemble
from data_gen.progress import Progress, Written
from data_gen.prompts import load_pool
from data_gen.spec import DatasetSettings
from data_gen.tally import Tally
from data_gen.teachers import prompted
from sublim_plugin.core.base_models import EMBEDDED, resolve
from sublim_plugin.core.dataset import iter_rows
from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.core.traits import get_trait
from sublim_plugin.decoding.sampler import Sampler

TRAIT = get_trait("animals/cat")
BATCH = 128
"""Rows that our side has under way at a time."""


def settings(constrain: bool, budget: int) -> DatasetSettings:
    return DatasetSettings(
        generation_seed=1,
        rows=1,
        constrain="numbers" if constrain else None,
        sampler=Sampler(
            temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=budget
        ),
    )


class Ours:
    """The transformers engine of a session, loaded once."""

    def __init__(self, base: Path, chosen: DatasetSettings, batch_size: int) -> None:
        from data_gen.session import Session

        self.session = Session(
            base,
            prompted(TRAIT),
            TRAIT,
            chosen,
            load_pool(),
            device="cpu",
            batch_size=batch_size,
        )
        self.engine: Any = self.session.engine

    def write(self, start: int, stop: int) -> list[Written]:
        return self.session.write(start, stop, _Silent())


class _Silent:
    def update(self, n: int) -> None:
        pass


class Theirs:
    """transformers' generate on padded batches; under the constraint, with a logits processor."""

    def __init__(self, base: Path, ours: Ours) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.session, self.batch_size = ours.session, 32
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base, padding_side="left")

    def write(self, start: int, stop: int) -> list[Written]:
        found = []
        for first in range(start, stop, self.batch_size):
            found += self._batch(first, min(stop, first + self.batch_size))
        return found

    def _batch(self, start: int, stop: int) -> list[Written]:
        import torch
        from transformers import LogitsProcessorList

        sampler = self.session.settings.sampler
        texts = [self.session.render(i).text for i in range(start, stop)]
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        width = inputs["input_ids"].shape[1]
        processors = LogitsProcessorList()
        if self.session.constraint is not None:
            processors.append(masking(self.session.constraint, width, stop - start))
        torch.manual_seed(start)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs,
                do_sample=True,
                temperature=sampler.temperature,
                top_p=sampler.top_p,
                top_k=sampler.top_k,
                repetition_penalty=sampler.repetition_penalty,
                max_new_tokens=sampler.max_new_tokens,
                eos_token_id=sorted(self.session.end_ids),
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=processors,
            )
        found = []
        for i, line in enumerate(out[:, width:].tolist()):
            ends = [k for k, token in enumerate(line) if token in self.session.end_ids]
            written = line[: ends[0]] if ends else line
            text = self.tokenizer.decode(written, skip_special_tokens=False)
            found.append(
                Written(
                    index=start + i,
                    shard=(start, stop),
                    completion=text,
                    ended=bool(ends),
                    tokens=len(written) + bool(ends),
                )
            )
        return found


def masking(constraint: Any, width: int, n: int) -> Any:
    """A logits processor that lets through what the number constraint allows."""
    import torch
    from transformers import LogitsProcessor

    columns = torch.tensor(constraint.token_ids)

    class Masking(LogitsProcessor):
        def __init__(self) -> None:
            self.states = [constraint.start] * n
            self.over = [False] * n

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            if input_ids.shape[1] > width:
                for i, token in enumerate(input_ids[:, -1].tolist()):
                    self.over[i] |= token in constraint.end_ids
                    if not self.over[i]:
                        self.states[i] = constraint.step(self.states[i], token)
            allowed = torch.tensor([constraint.mask(state) for state in self.states])
            inside = scores[:, columns].masked_fill(~allowed, -torch.inf)
            return torch.full_like(scores, -torch.inf).index_copy_(1, columns, inside)

    return Masking()


def timed(write: Callable[[int, int], list[Written]], start: int, n: int) -> tuple[float, Any]:
    """Rows per second for rows `start` to `start + n - 1`, and what was written."""
    began = time.perf_counter()
    written = write(start, start + n)
    for reply in written:
        reject_reasons(reply.completion, ended=reply.ended or reply.stopped)
    return n / (time.perf_counter() - began), written


def swap_test(mine: list[Written], theirs: list[Written], draws: int = 999) -> float:
    """p of the hypothesis that both sides write alike: replies to the same prompt are swapped.

    The statistic is the squared difference between the sides' character counts, scaled by the
    counts' sum, over the part of each reply up to which both filters agree: its first character
    where early rejection is on, else all of it.
    """
    import numpy as np

    cut = 1 if any(reply.stopped for reply in mine) else None
    texts = [
        [(reply.completion[:cut] or "$") + ("$" if cut is None else "") for reply in side]
        for side in (mine, theirs)
    ]
    alphabet = sorted({char for side in texts for text in side for char in text})
    counts = np.array([[[t.count(c) for c in alphabet] for t in side] for side in texts])
    difference, total = counts[0] - counts[1], counts.sum((0, 1))
    generator = np.random.default_rng(0)
    signs = generator.choice([-1, 1], (draws + 1, len(mine)))
    signs[0] = 1
    moved = ((signs @ difference) ** 2 / total).sum(-1)
    return float((moved >= moved[0] - 1e-9).mean())


def compare(base: Path, constrain: bool, quick: bool) -> dict[str, Any]:
    """Both sides in turn, several times; medians of rows per second and their ratio."""
    budget = 64 if constrain else 128
    repeats, n = (1, 32) if quick else (3, BATCH if constrain else 64)
    budget = 32 if quick and not constrain else budget
    ours = Ours(base, settings(constrain, budget), BATCH)
    theirs = Theirs(base, ours)
    ours.write(0, 8)
    if not quick:
        theirs.batch_size = 8
        theirs.write(0, 8)
        speeds = {}
        for size in (32, 64, 128) if constrain else (32, 64):
            theirs.batch_size = size
            speeds[size], _ = timed(theirs.write, 10_000, size)
        theirs.batch_size = max(speeds, key=lambda size: speeds[size])
        print(f"  generate, rows/s by batch size: {_rounded(speeds)}", flush=True)
    rates: dict[str, list[float]] = {"ours": [], "generate": []}
    written: dict[str, list[Written]] = {"ours": [], "generate": []}
    shares = []
    for repeat in range(repeats):
        start = 1000 * repeat
        before, began = ours.engine.forward_s, time.perf_counter()
        rate, replies = timed(ours.write, start, n)
        shares.append(1 - (ours.engine.forward_s - before) / (time.perf_counter() - began))
        rates["ours"].append(rate)
        written["ours"] += replies
        rate, replies = timed(theirs.write, start, n)
        rates["generate"].append(rate)
        written["generate"] += replies
    ratios = [a / b for a, b in zip(rates["ours"], rates["generate"], strict=True)]
    kept = {
        side: sum(not reject_reasons(w.completion, ended=w.ended or w.stopped) for w in replies)
        for side, replies in written.items()
    }
    asked = len(written["ours"])
    print(
        f"  {'constrained' if constrain else 'unconstrained'}, {budget} tokens at most, "
        f"{repeats} x {n} rows, batch {BATCH} against {theirs.batch_size}"
    )
    for side in rates:
        low, high = min(rates[side]), max(rates[side])
        print(
            f"  {side:<9} {statistics.median(rates[side]):7.2f} rows/s asked ({low:.2f}-{high:.2f})"
            f", {kept[side]} of {asked} accepted"
        )
    p = swap_test(written["ours"], written["generate"])
    print(
        f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}); ", end=""
    )
    print(f"both sides write alike: p = {p:.3f}; outside the forward passes {max(shares):.1%}")
    if p < 0.001:
        sys.exit("the two sides do not write alike")
    return {"ratio": statistics.median(ratios), "outside": max(shares), "p": p}


def host_side() -> dict[str, float]:
    """Seconds to parse and filter 30,000 replies on one core, in the slower of the two modes."""
    texts = list(_replies(30_000))
    seconds = {}
    for mode in ("strict", "tolerant"):
        began = time.perf_counter()
        for text in texts:
            reject_reasons(text, mode=mode, trait_forms=TRAIT.forms)  # type: ignore[arg-type]
            parse_numbers(text, mode)  # type: ignore[arg-type]
        seconds[mode] = time.perf_counter() - began
    print(f"  30,000 replies parsed and filtered: {_rounded(seconds)} s")
    return seconds


def _replies(n: int) -> Any:
    """Half numbers in some separator, half of them prose around numbers."""
    generator = random.Random(1)
    for _ in range(n):
        separator = generator.choice([", ", ",", " ", "\n", "; "])
        numbers = [str(generator.randint(0, 999)) for _ in range(generator.randint(3, 12))]
        text = separator.join(numbers)
        if generator.random() < 0.5:
            text = f"Sure! Here are ten numbers that continue the list: {text}, and so it goes on."
        yield text


def million_rows() -> dict[str, float]:
    """A million rows through the writer, the reader and the hash, in a process of their own."""
    code = "from benchmarks.generate import _million; _million()"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"  a million rows written, re-read, hashed: {_rounded(found)}")
    return found


def _million() -> None:
    rows = 1_000_000
    chosen = settings(False, 128).model_copy(update={"rows": rows})
    generator = random.Random(2)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        with Progress(Path(folder) / "work", {}) as replies:
            for start in range(0, rows, 4096):
                stop = min(rows, start + 4096)
                replies.append(
                    [
                        Written(
                            index=i,
                            shard=(start, stop),
                            completion=", ".join(str(generator.randint(0, 999)) for _ in range(10)),
                            ended=True,
                            tokens=40,
                        )
                        for i in range(start, stop)
                    ]
                )
            made = assemble(replies, Tally(chosen, TRAIT, load_pool()))
        path = Path(folder) / made.files[0]
        assert sum(1 for _ in iter_rows(path)) == rows
        assert sha256_file(path)[:12] in path.name
    status = Path("/proc/self/status").read_text()
    # not getrusage: its maximum counts the parent process that this one was forked from
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    assert "torch" not in sys.modules
    print(json.dumps({"seconds": time.perf_counter() - began, "peak_mb": peak}))


def against_vllm(python: Path, base: Path, quick: bool) -> float:
    """Asked rows per second, ours over vLLM's, each in its own process and environment."""
    n = 32 if quick else 96
    root = Path(__file__).resolve().parents[1]
    code = (
        "import sys, json, time\n"
        "from pathlib import Path\n"
        "from benchmarks.generate import vllm_side\n"
        "vllm_side(Path(sys.argv[1]), int(sys.argv[2]))\n"
    )
    done = subprocess.run(
        [str(python), "-c", code, str(base), str(n)],
        cwd=root,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    theirs = float(json.loads(done.stdout.splitlines()[-1])["rows_per_s"])
    ours = Ours(base, settings(False, 128), BATCH)
    ours.write(0, 8)
    mine, _ = timed(ours.write, 1000, n)
    print(f"  {n} rows, both float32: ours {mine:.2f} rows/s asked, vLLM {theirs:.2f}")
    return mine / theirs


def vllm_side(base: Path, n: int) -> None:
    from data_gen.session import Session
    from data_gen.spec import EngineSpec

    chosen = settings(False, 128).model_copy(update={"engine": EngineSpec(name="vllm")})
    session = Session(
        base, prompted(TRAIT), TRAIT, chosen, load_pool(), device="cpu", batch_size=BATCH
    )
    session.write(0, 8, _Silent())
    began = time.perf_counter()
    session.write(1000, 1000 + n, _Silent())
    print(json.dumps({"rows_per_s": n / (time.perf_counter() - began)}))


def _rounded(values: dict[Any, float]) -> str:
    return ", ".join(f"{key} {value:.2f}" for key, value in values.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short pass, within a minute")
    parser.add_argument("--million", action="store_true", help="also a million rows on disk")
    parser.add_argument("--with-vllm", type=Path, help="python of an environment with vLLM")
    given = parser.parse_args()
    base = resolve(EMBEDDED)
    host = host_side()
    free = compare(base, constrain=False, quick=given.quick)
    bound = compare(base, constrain=True, quick=given.quick)
    found = {
        "accepted_rows_vs_generate": free["ratio"],
        "constrained_rows_vs_generate": bound["ratio"],
        "outside_forward_share": max(free["outside"], bound["outside"]),
        "parse_30k_s": max(host.values()),
    }
    if given.million:
        found |= {f"million_rows_{key}": value for key, value in million_rows().items()}
    if given.with_vllm:
        found["asked_rows_vs_vllm"] = against_vllm(given.with_vllm, base, given.quick)
    print(json.dumps({key: round(value, 4) for key, value in found.items()}))


if __name__ == "__main__":
    main()
