"""The metrics of many probes for one target at once, as `probe_metrics` computes those of one.

N probes that were asked the same, Q questions, C candidates, M metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from sublim_plugin.analysis.asked import Floats
from sublim_plugin.analysis.collect import METRICS, ProbeRecord
from sublim_plugin.analysis.probe_metrics import (
    TOLERANCE,
    candidate_key,
    check_against_host,
    metrics,
    paired,
)

_AT_ONCE = 256
"""Probes that are expanded at a time, to stay within tens of megabytes."""


Known = dict[str, tuple[Floats, Floats]]
"""By probe id and for each question: the highest log-probability, and the sum over candidates of
probabilities relative to it. The same for every target."""


class Pair(NamedTuple):
    """Mean over questions of ours minus theirs, with standard errors (None for one question)."""

    logprob: float
    logprob_se: float | None
    share: float
    share_se: float | None


class _Group(NamedTuple):
    logprob_NQ: Floats
    share_NQ: Floats
    means_NM: Floats


class Columns:
    """Means of every probe and differences between two, for one target.

    Raises:
        InputError: the target is no candidate of a probe, or a number differs from the one in its
            results.json (see `probe_metrics.metrics`).
    """

    def __init__(self, probes: Sequence[ProbeRecord], target: str, known: Known) -> None:
        self.target = target
        self.probes = {probe.id: probe for probe in probes}
        self.places: dict[str, tuple[int, int]] = {}
        self.groups: list[_Group] = []
        by_asked: dict[int, list[ProbeRecord]] = {}
        for probe in probes:
            by_asked.setdefault(id(probe.asked), []).append(probe)
        for number, own in enumerate(by_asked.values()):
            self.places |= {probe.id: (number, i) for i, probe in enumerate(own)}
            self.groups.append(_group(own, target, known))

    def means(self, probe: ProbeRecord) -> dict[str, float]:
        """A probe's metrics, over its questions."""
        group, i = self.places[probe.id]
        return dict(zip(METRICS, self.groups[group].means_NM[i].tolist(), strict=True))

    def pairs(self, wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Pair]:
        """The differences of pairs of probe ids, ours first."""
        found: dict[tuple[str, str], Pair] = {}
        together: dict[int, list[tuple[str, str]]] = {}
        for pair in dict.fromkeys(wanted):
            ours, theirs = (self.places[one][0] for one in pair)
            if ours == theirs:
                together.setdefault(ours, []).append(pair)
            else:
                found[pair] = self._apart(*pair)
        for number, own in together.items():
            at = np.array([[self.places[one][1] for one in pair] for pair in own])
            group = self.groups[number]
            columns = [
                values
                for field in (group.logprob_NQ, group.share_NQ)
                for values in _mean_and_error(field[at[:, 0]] - field[at[:, 1]])
            ]
            for pair, *numbers in zip(own, *columns, strict=True):
                found[pair] = Pair(*numbers)
        return found

    def _apart(self, ours: str, theirs: str) -> Pair:
        """Of two that were asked the same in another order."""
        one, other = (metrics(self.probes[name], self.target) for name in (ours, theirs))
        logprob, share = paired(one, other, "logprob_Q"), paired(one, other, "share_Q")
        return Pair(logprob.mean, logprob.se, share.mean, share.se)


def _group(probes: Sequence[ProbeRecord], target: str, known: Known) -> _Group:
    column = probes[0].asked.candidates.index(candidate_key(probes[0], target))
    parts = [
        _part(probes[at : at + _AT_ONCE], target, column, known)
        for at in range(0, len(probes), _AT_ONCE)
    ]
    return _Group(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def _part(probes: Sequence[ProbeRecord], target: str, column: int, known: Known) -> _Group:
    scores_NQC = np.stack([probe.logprob_QC for probe in probes])
    own_NQ = scores_NQC[:, :, column]
    if not all(probe.id in known for probe in probes):
        highest_NQ = scores_NQC.max(2)
        sums_NQ = np.exp(scores_NQC - highest_NQ[:, :, None]).sum(2)
        for i, probe in enumerate(probes):
            known[probe.id] = highest_NQ[i], sums_NQ[i]
    top_NQ, relative_NQ = (
        np.stack(field) for field in zip(*(known[probe.id] for probe in probes), strict=True)
    )
    # the ratio through the largest term stays exact where every probability underflows
    share_NQ = np.exp(own_NQ - top_NQ) / relative_NQ
    rank_NQ = 1.0 + (scores_NQC > own_NQ[:, :, None]).sum(2)
    coverage_NQ = np.exp(top_NQ) * relative_NQ
    fields = (own_NQ, np.exp(own_NQ), share_NQ, rank_NQ, coverage_NQ)
    means_NM = np.stack([field.mean(1) for field in fields], axis=1)
    _check(probes, target, means_NM)
    return _Group(own_NQ.copy(), share_NQ, means_NM)


def _check(probes: Sequence[ProbeRecord], target: str, means_NM: Floats) -> None:
    """Compare with what the scoring host reported; where one differs, say what."""
    try:
        host_NM = np.stack(
            [probe.host.values_TM[probe.host.targets.index(target)] for probe in probes]
        )
    except ValueError:
        host_NM = np.full_like(means_NM, np.nan)
    bound_NM = TOLERANCE * np.maximum(1.0, np.maximum(np.abs(means_NM), np.abs(host_NM)))
    fits_N = (np.abs(means_NM - host_NM) <= bound_NM).all(1)  # NaN does not
    for i in np.flatnonzero(~fits_N):
        check_against_host(probes[i], target, dict(zip(METRICS, means_NM[i].tolist(), strict=True)))


def _mean_and_error(values_NQ: Floats) -> tuple[list[float], list[float | None]]:
    n = values_NQ.shape[1]
    errors: list[float | None] = [None] * len(values_NQ)
    if n > 1:
        errors = (values_NQ.std(1, ddof=1) / np.sqrt(n)).tolist()
    return values_NQ.mean(1).tolist(), errors
