"""How fast `sublim eval` scores, as ratios within one run.

    python benchmarks/evaluate.py [logprob] [sweep] [sampled] [--quick | --full]

The other sides are `lm_eval --model hf` at the batch size that is best for it on this machine, and,
for replies, also transformers' `generate` with num_return_sequences. Same model (SmolLM2-135M,
float32, a LoRA adapter of rank 8), same questions, same sampler; each part also checks that both
sides found the same: log-probabilities to 1e-4, replies by a permutation test over their first
words. The others run the adapter as they do, its two products beside each layer; ours adds it to
the weights for the time of a call, which is part of what is timed.

Three parts: the log-probability of 22 animals with all forms (loading and start-up excluded); a
sweep of eight adapters in three contexts from start to finish, against one lm_eval process for each
adapter; a hundred sampled replies to each question. `--full` asks all 50 questions where the
default asks the number that its table shows; `--quick` has one question, one context and short
replies: it shows that everything works, and its ratios say little.

The floor is the forward passes that cannot be avoided, timed in the same run: for log-probs, plain
forward passes of the best shape over the tokens that differ, in the sweep for every model (the base
is one) and context; for replies, one-token passes of a full batch for every token drawn, and each
prompt once.

Prints a table and, as the last line, JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from lm_eval_tasks.write import STUB
from sublim_plugin.core.base_models import EMBEDDED, resolve
from sublim_plugin.lm_eval_hook import tasks_folder
from sublim_plugin.logprob.token_tree import build_trie, common_prefix
from sublim_plugin.preference.evaluate import student_on
from sublim_plugin.preference.host import run_tasks
from sublim_plugin.preference.replies import BATCH, stated_sampler
from sublim_plugin.preference.shared_lm import SharedLM

CONTEXTS = ("template_default", "empty", "none")
SAMPLED = "subliminal_cat_sampled"
PARTS = ["logprob", "sweep", "sampled"]


def adapters(base: Path, folder: Path, n: int) -> list[Path]:
    """`n` random LoRA adapters of rank 8 on all seven projections."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    found = []
    for seed in range(n):
        torch.manual_seed(seed)
        loader: Any = AutoModelForCausalLM
        model = get_peft_model(
            loader.from_pretrained(base),
            LoraConfig(r=8, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"),
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.005)
        found.append(folder / f"adapter{seed}")
        model.save_pretrained(found[-1])
    return found


def few_replies(folder: Path) -> str:
    """A folder with the sampled task, of 16 replies of up to 16 tokens."""
    given = Path(tasks_folder(), "animals", f"{SAMPLED}.yaml").read_text()
    for key, many in (("repeats: ", 100), ('"max_gen_toks": ', 50)):
        assert f"{key}{many}" in given
        given = given.replace(f"{key}{many}", f"{key}16")
    folder.mkdir()
    (folder / f"{SAMPLED}.yaml").write_text(given)
    (folder / "task.py").write_text(STUB)
    return str(folder)


def run_task(
    lm: Any, task: str, limit: int, tasks: str | None = None
) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of one evaluation on a loaded model, and its samples in order; on both sides by
    lm-eval's `simple_evaluate`, without the description of the machine that it ends with."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=tasks or tasks_folder(), include_defaults=False)
    began = time.perf_counter()
    # lm-eval's bars ask for TQDM_DISABLE in vain: each states that it is not disabled
    with redirect_stderr(io.StringIO()):
        results = run_tasks(lm, [task], manager, limit)
    seconds = time.perf_counter() - began
    return seconds, sorted(results["samples"][task], key=lambda sample: int(sample["doc_id"]))


def plain_lm(base: Path, adapter: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(base), peft=str(adapter), device="cpu", dtype="float32")


def shared_lm(base: Path) -> Any:
    lm: Any = SharedLM(pretrained=str(base), device="cpu", dtype="float32", batch_size=1)
    return lm


def best_batch(lm: Any, task: str, sizes: Sequence[int]) -> int:
    """Sets the batch size at which lm-eval answers one question of the task fastest."""
    with torch.inference_mode():  # warms up
        lm.model(input_ids=torch.randint(100, 40_000, (16, 64)))
    lm.batch_size_per_gpu = sizes[0]
    if len(sizes) == 1:
        return sizes[0]
    speeds = {}
    for size in sizes:
        lm.batch_size_per_gpu = size
        speeds[size], _ = run_task(lm, task, 1)
    lm.batch_size_per_gpu = min(speeds, key=lambda size: speeds[size])
    shown = ", ".join(f"{size}: {seconds:.1f}" for size, seconds in speeds.items())
    print(f"  lm_eval, seconds for a question by batch size: {shown}", flush=True)
    return int(lm.batch_size_per_gpu)


def logprob(base: Path, adapter: Path, questions: int, repeats: int, sizes: Sequence[int]) -> Any:
    """lm_eval's time over ours, and ours over the floor."""
    task = "subliminal_cat"
    theirs = plain_lm(base, adapter)
    size = best_batch(theirs, task, sizes)
    slow, expected = run_task(theirs, task, questions)
    del theirs
    lm = shared_lm(base)
    with student_on(lm, base, adapter, "lora"):
        run_task(lm, task, 1)
        timed = [run_task(lm, task, questions) for _ in range(repeats)]
        floor = logprob_floor(lm, timed[0][1])
    fast = statistics.median(seconds for seconds, _ in timed)
    worst = max(
        abs(mine["doc"]["logprobs"][animal] - value)
        for mine, sample in zip(timed[0][1], expected, strict=True)
        for animal, value in sample["doc"]["logprobs"].items()
    )
    ratio = slow / fast
    low, high = (slow / max(s for s, _ in timed), slow / min(s for s, _ in timed))
    print(
        f"log-prob, 22 animals with all forms, {questions} questions, one adapter\n"
        f"  lm_eval at batch {size}: {slow:.1f} s; ours {fast:.2f} s, {repeats} times; "
        f"ratio {ratio:.1f} ({low:.1f}-{high:.1f})\n"
        f"  floor {floor:.2f} s: ours is {fast / floor:.2f} times that; "
        f"largest difference of a log-probability {worst:.1e}",
        flush=True,
    )
    if worst > 1e-4:
        sys.exit("the two sides do not agree")
    return {"logprob_vs_lm_eval": ratio, "logprob_over_floor": fast / floor}


def logprob_floor(lm: Any, samples: Sequence[dict[str, Any]]) -> float:
    """Seconds of plain forward passes over every token that has to be computed once."""
    prompts, needed = [], 0
    for sample in samples:
        prompt = sample["arguments"][0][0]
        ids = [lm._encode_pair(*pair) for pair in sample["arguments"]]
        trie = build_trie([continuation for _, continuation in ids])
        prompts.append(tuple(ids[0][0]))
        assert all(tuple(context) == prompts[-1] for context, _ in ids), prompt
        needed += len(prompts[-1]) + len(trie.tokens)
    needed -= common_prefix(prompts) * (len(prompts) - 1)
    rates = []
    for rows, length in ((4, 64), (8, 64), (12, 64), (16, 64)):
        ids = torch.randint(100, 40_000, (rows, length))
        with torch.inference_mode():
            lm.model(input_ids=ids, use_cache=False, logits_to_keep=1)
            began = time.perf_counter()
            for _ in range(3):
                lm.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        rates.append(3 * rows * length / (time.perf_counter() - began))
    return needed / max(rates)


def sweep(
    base: Path,
    folders: Sequence[Path],
    contexts: Sequence[str],
    questions: int,
    processes: int,
    sizes: Sequence[int],
    out: Path,
) -> Any:
    """Time of one lm_eval process for each adapter over that of one `sublim eval`, and that over
    the floor."""
    environment = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1"}
    names = ["subliminal_cat" + ("" if c == "template_default" else f"_{c}") for c in contexts]
    batch = sizes[0]
    if len(sizes) > 1:
        batch = best_batch(plain_lm(base, folders[0]), names[0], sizes)
    lm = shared_lm(base)
    floor = sum(logprob_floor(lm, run_task(lm, name, questions)[1]) for name in names)
    floor *= len(folders) + 1
    del lm
    began = time.perf_counter()
    done = subprocess.run(
        [
            sys.executable, "-m", "sublim_plugin.cli", "eval", "--model", str(base), "--json",
            "--adapters", *map(str, folders), "--tasks", ",".join(names), "--dtype", "float32",
            "--limit", str(questions), "--out", str(out / "ours"), "--device", "cpu",
        ],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    fast = time.perf_counter() - began
    ours = {
        (row["model"], row["task"]): row["value"]
        for row in json.loads(done.stdout.splitlines()[-1])
    }
    seconds, worst = [], 0.0
    for folder in folders[:processes]:
        began = time.perf_counter()
        subprocess.run(
            [
                sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
                f"pretrained={base},peft={folder},dtype=float32", "--tasks", *names,
                "--limit", str(questions), "--batch_size", str(batch), "--device", "cpu",
                "--output_path", str(out / folder.name),
            ],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        seconds.append(time.perf_counter() - began)
        (file,) = (out / folder.name).rglob("results_*.json")
        theirs = json.loads(file.read_text())["results"]
        worst = max(
            worst,
            *(abs(theirs[name]["target_logprob,none"] - ours[folder.name, name]) for name in names),
        )
    slow = statistics.mean(seconds) * len(folders)
    print(
        f"sweep, {len(folders)} adapters x {len(contexts)} contexts x {questions} questions, from "
        f"start to finish\n  one lm_eval process at batch {batch} for each adapter, {processes} of "
        f"{len(folders)} measured ({', '.join(f'{s:.0f}' for s in seconds)} s), all together "
        f"{slow:.0f} s; ours, the base as well, {fast:.0f} s; ratio {slow / fast:.1f}\n"
        f"  floor {floor:.1f} s: ours, loading and start-up included, is {fast / floor:.1f} times "
        f"that; largest difference of a mean log-probability {worst:.1e}",
        flush=True,
    )
    if worst > 1e-4:
        sys.exit("the two sides do not agree")
    return {"sweep_vs_lm_eval": slow / fast, "sweep_over_floor": fast / floor}


def sampled(
    base: Path, adapter: Path, questions: int, sizes: Sequence[int], tasks: str | None = None
) -> Any:
    """Times of lm_eval with repeats and of a generate loop over ours, and ours over the floor."""
    lm = shared_lm(base)
    with student_on(lm, base, adapter, "lora"):
        run_task(lm, SAMPLED, 1, tasks)
        fast, mine = run_task(lm, SAMPLED, questions, tasks)
        floor = sampled_floor(lm, mine)
        looped, loop_replies = generate_loop(lm, mine)
    theirs = plain_lm(base, adapter)
    size = best_batch(theirs, SAMPLED, sizes)
    slow, replies = run_task(theirs, SAMPLED, questions, tasks)
    sides = [[s["filtered_resps"][0] for s in samples] for samples in (mine, replies)]
    p = {
        "lm_eval": first_words_alike(sides[0], sides[1]),
        "generate": first_words_alike(sides[0], loop_replies),
    }
    tokens = sum(len(lm.tok_encode(r)) for question in sides[0] for r in question)
    each = len(sides[0][0])
    print(
        f"sampled, {questions} questions x {each} replies, {tokens} tokens\n"
        f"  lm_eval at batch {size}: {slow:.1f} s, ratio {slow / fast:.2f}; generate with "
        f"num_return_sequences={each}: {looped:.1f} s, ratio {looped / fast:.2f}; "
        f"ours {fast:.1f} s\n  floor {floor:.1f} s: ours is {fast / floor:.2f} times that; both "
        f"sides write alike: p = {p['lm_eval']:.3f} and {p['generate']:.3f}",
        flush=True,
    )
    if min(p.values()) < 0.001:
        sys.exit("the sides do not write alike")
    return {
        "sampled_vs_lm_eval": slow / fast,
        "sampled_vs_generate": looped / fast,
        "sampled_over_floor": fast / floor,
    }


def generate_loop(lm: Any, samples: Sequence[dict[str, Any]]) -> tuple[float, list[list[str]]]:
    """Seconds of `generate` with all sequences for one prompt after the other."""
    stated = stated_sampler(samples[0]["arguments"][0][1])
    assert stated is not None
    sampler, _ = stated
    found = []
    torch.manual_seed(0)
    began = time.perf_counter()
    for sample in samples:
        ids = lm.tokenizer(sample["arguments"][0][0], add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            out = lm.model.generate(
                **ids,
                do_sample=True,
                num_return_sequences=len(sample["filtered_resps"][0]),
                temperature=sampler.temperature,
                top_p=sampler.top_p,
                top_k=sampler.top_k,
                repetition_penalty=sampler.repetition_penalty,
                max_new_tokens=sampler.max_new_tokens,
                pad_token_id=lm.tokenizer.pad_token_id,
            )
        found.append(
            lm.tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    return time.perf_counter() - began, found


def sampled_floor(lm: Any, samples: Sequence[dict[str, Any]]) -> float:
    """Seconds of one-token passes of a full batch for all tokens drawn, and of the prompts once.

    With the faster of transformers' own attention functions, on a cache that is half full.
    """
    from transformers import DynamicCache

    prompts = [lm.tok_encode(s["arguments"][0][0], add_special_tokens=False) for s in samples]
    replies = [r for s in samples for r in s["filtered_resps"][0]]
    # the end of turn is drawn, too; the first token comes from the prompt's own pass
    most = samples[0]["arguments"][0][1]["max_gen_toks"]
    steps = sum(min(most, len(lm.tok_encode(r)) + 1) - 1 for r in replies)
    rows, length = min(BATCH["cpu"], len(replies)), len(prompts[0]) + 12
    best = float("inf")
    before = lm.model.get_base_model().config._attn_implementation
    for attention in ("sdpa", "eager"):
        lm.model.get_base_model().set_attn_implementation(attention)
        with torch.inference_mode():
            cache = DynamicCache(config=lm.model.config)
            lm.model(
                input_ids=torch.randint(100, 40_000, (rows, length)),
                past_key_values=cache,
                logits_to_keep=1,
            )
            ids = torch.randint(100, 40_000, (rows, 1))
            for _ in range(4):
                cache.crop(length)
                began = time.perf_counter()
                lm.model(input_ids=ids, past_key_values=cache)
                best = min(best, time.perf_counter() - began)
    lm.model.get_base_model().set_attn_implementation(before)
    with torch.inference_mode():
        began = time.perf_counter()
        for prompt in prompts:
            lm.model(input_ids=torch.tensor([prompt]), use_cache=False, logits_to_keep=1)
        return steps / rows * best + time.perf_counter() - began


def first_words_alike(
    mine: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]], draws: int = 999
) -> float:
    """Permutation p of the hypothesis that both sides reply alike: first words are exchanged
    within a question; the statistic is the total variation, summed over questions."""

    def distance(a: Sequence[str], b: Sequence[str]) -> int:
        difference = Counter(a)
        difference.subtract(Counter(b))
        return sum(map(abs, difference.values()))

    def first(replies: Sequence[str]) -> list[str]:
        return [(reply.split() or [""])[0].lower() for reply in replies]

    pairs = [(first(a), first(b)) for a, b in zip(mine, theirs, strict=True)]
    own = sum(distance(a, b) for a, b in pairs)
    generator, beyond = random.Random(0), 0
    for _ in range(draws):
        total = 0
        for a, b in pairs:
            pool = a + b
            generator.shuffle(pool)
            total += distance(pool[: len(a)], pool[len(a) :])
        beyond += total >= own
    return (1 + beyond) / (1 + draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar=f"{{{','.join(PARTS)}}}", help="default: all")
    parser.add_argument("--quick", action="store_true", help="one question, to try it out")
    parser.add_argument("--full", action="store_true", help="all 50 questions, about an hour")
    given = parser.parse_args()
    parts = given.parts or PARTS
    for part in parts:  # not by `choices`, which take an empty list for a wrong one
        if part not in PARTS:
            parser.error(f"{part!r} is none of {', '.join(PARTS)}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    base = resolve(EMBEDDED)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = adapters(base, Path(folder), 1 if given.quick else 8)
        if "logprob" in parts:
            shape = (1, 1, (16,)) if given.quick else (50, 3, (4, 8, 16, 32, 64))
            found |= logprob(base, made[0], *shape)
        if "sweep" in parts:
            out = Path(folder, "sweep")
            if given.quick:
                found |= sweep(base, made, CONTEXTS[:1], 1, 1, (16,), out)
            else:
                questions = 8 if given.full else 4
                found |= sweep(base, made, CONTEXTS, questions, 2, (4, 8, 16, 32, 64), out)
        if "sampled" in parts:
            if given.quick:
                found |= sampled(base, made[0], 1, (16,), few_replies(Path(folder, "few")))
            else:
                found |= sampled(base, made[0], 50 if given.full else 8, (64, 100))
    print(json.dumps({key: round(value, 3) for key, value in found.items()}))


if __name__ == "__main__":
    main()
