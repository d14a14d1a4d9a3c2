"""Counts over the replies of a dataset, and what they say about its teacher."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from data_gen.progress import Written
from data_gen.teacher import Teacher

GIVE_UP_AFTER = 200
"""Replies after which fewer than one accepted in `GIVE_UP_KEEP` stops the run."""
GIVE_UP_KEEP = 400
LOW_KEEP = 0.2
MANY_IDENTICAL = 0.01


class Tally:
    """Counts over replies in index order, up to the one that completes the dataset."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.asked = self.accepted = self.tokens = self.duplicates = 0
        self.reasons: Counter[str] = Counter()
        self.prompts: set[str] = set()
        self.completions: set[bytes] = set()

    @property
    def full(self) -> bool:
        return self.accepted >= self.rows

    @property
    def is_hopeless(self) -> bool:
        """Whether so few replies are accepted that asking on makes no sense."""
        return self.asked >= GIVE_UP_AFTER and self.accepted * GIVE_UP_KEEP < self.asked

    def add(self, written: Written, reasons: list[str]) -> None:
        self.asked += 1
        self.tokens += written.tokens
        self.reasons.update(reasons)
        if not reasons:
            self.accepted += 1
            digest = hashlib.blake2b(written.completion.encode(), digest_size=8).digest()
            self.duplicates += digest in self.completions
            self.completions.add(digest)

    def counts(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "accepted": self.accepted,
            "rejected": self.asked - self.accepted,
            "reasons": dict(sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))),
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
                f"{_most(self.reasons)}: the rows are a narrow selection of what the teacher writes"
            )
        if self.duplicates > MANY_IDENTICAL * self.accepted:
            found.append(
                f"{self.duplicates} of {self.accepted} accepted replies equal an earlier one: the "
                "sampler is narrow (temperature, top-k, top-p) or the teacher repeats short lists"
            )
        return found


def _most(reasons: Counter[str]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in reasons.most_common(3))


def hopeless(tally: Tally, teacher: Teacher) -> str:
    """Why a run with this keep rate is stopped, the likely cause and the way out."""
    out = "lower the temperature or use a stronger teacher"
    if tally.reasons["truncated"] > tally.asked / 2:
        out = f"raise sampler.max_new_tokens (now {teacher.sampler.max_new_tokens}), or {out}"
    if teacher.constraint is None:
        out = f"decode with `constrain: numbers` (it changes the distribution), or {out}"
    return (
        f"{tally.accepted} of the first {tally.asked} replies of {teacher.path} as "
        f"{teacher.trait.name} were accepted; the reasons: {_most(tally.reasons)}. The teacher "
        f"hardly ever writes numbers alone under these settings: {out}"
    )
