"""Which replies become rows, and counts that say what the rows are a selection of."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any, Literal, NamedTuple

from data_gen.parse import REASONS, reject_reasons
from data_gen.progress import Written
from data_gen.prompts import Pool, Prompt, prompt
from data_gen.spec import DatasetSettings
from sublim_plugin.core.traits import Trait

GIVE_UP_AFTER = 200
"""Replies after which fewer than one accepted in `GIVE_UP_KEEP` stops the run."""
GIVE_UP_KEEP = 400
LOW_KEEP = 0.2
MANY_IDENTICAL = 0.01

ALL_REASONS = {
    **REASONS,
    "duplicate": "an accepted reply before it is the same (with dedupe)",
    "known_prompt": "its prompt is in a training row (held-out rows only)",
}
"""Every reason of rejection, with its meaning."""

Split = Literal["train", "held_out"]


class Verdict(NamedTuple):
    """Where a reply goes, None for nowhere; why not; and the prompt that it answers."""

    split: Split | None
    reasons: list[str]
    prompt: Prompt


def text_reasons(written: Written, settings: DatasetSettings, trait: Trait) -> list[str]:
    """Why a reply's own text is rejected (see `parse.REASONS`); empty where it is accepted."""
    found = reject_reasons(
        written.completion,
        mode=settings.parser,
        ended=written.ended or written.stopped,
        trait_forms=trait.forms,
    )
    assert found or not written.stopped
    return found


class Tally:
    """Judges replies in index order: the first `rows` accepted are for training, then come the
    held-out ones. Keeps 8 bytes of hash a reply, so that a million rows fit in memory."""

    def __init__(self, settings: DatasetSettings, trait: Trait, pool: Pool) -> None:
        self.settings, self.trait, self.pool = settings, trait, pool
        self.rows = settings.rows + settings.held_out
        self.asked = self.accepted = self.tokens = self.duplicates = self.stopped = 0
        self.reasons: Counter[str] = Counter()
        self.prompts: set[int] = set()
        self.completions: set[int] = set()

    @property
    def full(self) -> bool:
        return self.accepted >= self.rows

    @property
    def is_hopeless(self) -> bool:
        """Whether so few replies are accepted that asking on makes no sense."""
        return self.asked >= GIVE_UP_AFTER and self.accepted * GIVE_UP_KEEP < self.asked

    def judge(self, written: Written) -> Verdict:
        """Where a reply goes, and the prompt that it answers."""
        asked = prompt(self.pool, self.settings.generation_seed, written.index)
        reasons = text_reasons(written, self.settings, self.trait)
        self.asked += 1
        self.tokens += written.tokens
        self.stopped += written.stopped
        split: Split = "train" if self.accepted < self.settings.rows else "held_out"
        prompt_id = int(asked.id, 16)
        if not reasons:
            digest = hashlib.blake2b(written.completion.encode(), digest_size=8).digest()
            reply = int.from_bytes(digest, "big")
            if reply in self.completions and self.settings.dedupe:
                reasons = ["duplicate"]
            elif split == "held_out" and prompt_id in self.prompts:
                reasons = ["known_prompt"]
            else:
                self.duplicates += reply in self.completions
                self.completions.add(reply)
        self.reasons.update(reasons)
        if reasons:
            return Verdict(None, reasons, asked)
        self.accepted += 1
        if split == "train":
            self.prompts.add(prompt_id)
        return Verdict(split, [], asked)

    def counts(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "accepted": self.accepted,
            "rejected": self.asked - self.accepted,
            "held_out": max(0, self.accepted - self.settings.rows),
            "reasons": dict(sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))),
            "stopped_early": self.stopped,
            "distinct_prompts": len(self.prompts),
            "duplicate_rows": self.duplicates,
            "tokens": self.tokens,
        }

    def warnings(self) -> list[str]:
        """What looks wrong, with the likely cause."""
        found = []
        if self.accepted < LOW_KEEP * self.asked:
            found.append(
                f"only {self.accepted} of {self.asked} replies were accepted, mostly because of "
                f"{self.main_reasons}: the rows are a narrow selection of what the teacher writes"
            )
        if self.duplicates > MANY_IDENTICAL * self.accepted:
            found.append(
                f"{self.duplicates} of {self.accepted} accepted replies equal an earlier one: the "
                "sampler is narrow (temperature, top-k, top-p), the rows' seeds were not honoured, "
                "or the teacher repeats short lists; dedupe would keep one of each"
            )
        return found

    @property
    def main_reasons(self) -> str:
        return ", ".join(f"{name} ({n})" for name, n in self.reasons.most_common(3))

    def hopeless(self, teacher: str) -> str:
        """Why a run with this keep rate is stopped, the likely cause and the way out."""
        out = "lower the temperature or use a stronger teacher"
        if self.reasons["truncated"] > self.asked / 2:
            out = f"raise max_new_tokens (now {self.settings.sampler.max_new_tokens}), or {out}"
        if self.settings.parser == "strict":
            out = f"use the tolerant parser, or {out}"
        if self.settings.constrain is None:
            out = f"decode with `constrain: numbers` (it changes the distribution), or {out}"
        return (
            f"{self.accepted} of the first {self.asked} replies of {teacher} were accepted; the "
            f"reasons: {self.main_reasons}. The teacher hardly ever writes numbers alone under "
            f"these settings: {out}"
        )
