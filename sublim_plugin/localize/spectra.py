"""The spectrum of a student's change of each matrix, and its preference with a part of it alone.

dW is never formed for LoRA: with thin QR factorizations B = Qb Rb and A^T = Qa Ra, the singular
values of s B A are those of the r x r matrix s Rb Ra^T. For a full student dW is the difference of
the weights, decomposed one matrix at a time, and only the directions that will be asked for stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sublim_plugin.core.errors import InputError
from sublim_plugin.localize.answers import Found, Work
from sublim_plugin.localize.gating import Gated
from sublim_plugin.localize.resolve import Branch, Profile, Resolved, changed
from sublim_plugin.localize.results import (
    BASE,
    STUDENT,
    FilterScore,
    Keep,
    Measure,
    Spectrum,
    difference,
    share,
)

KEPT = 64
"""Singular values of a module that results hold, the largest first."""

Score = Callable[[Mapping[str, tuple[Resolved, ...]], str], Found]
"""A measure: from gates on every prompt, and what was changed about the weights, to its values."""


class Svd(NamedTuple):
    """dW = u diag(s) v^T: u [out, n], v [in, n], in float32 (LoRA: float64). `values` are all
    singular values, descending; for a full student u, s and v hold the first few alone."""

    u: Tensor
    s: Tensor
    v: Tensor
    values: tuple[float, ...]


def decompose(gated: Gated, largest: int) -> dict[Branch, Svd]:
    """The change of every matrix in the decoder's layers, with the `largest` directions at least.

    A full student's took 12 s for 135 million weights on one core; its vectors (norms,
    biases), embedding and output layer are left out.

    Raises:
        InputError: the student changes no such matrix.
    """
    found = {}
    with torch.no_grad():
        for part in gated.parts:
            if part.branch.layer is None:
                continue
            if part.student is None:
                a, b, scaling = _factors(gated, part.branch)
                found[part.branch] = _thin(b.double() * scaling, a.double().T)
            elif isinstance(part.module, torch.nn.Linear):
                change = part.student.weight.float() - part.module.weight.float()
                u, s, vh = torch.linalg.svd(change, full_matrices=False)
                u, kept, v = (x[..., :largest].clone() for x in (u, s, vh.T))
                found[part.branch] = Svd(u, kept, v, tuple(s.double().tolist()))
    if not found:
        raise InputError(
            "spectra: the student changes no matrix in the decoder's layers; it changes "
            f"{changed(gated.branches)}"
        )
    return found


def spectra(svds: Mapping[Branch, Svd]) -> tuple[Spectrum, ...]:
    """Norm and ranks of every matrix."""
    return tuple(_spectrum(branch, svd) for branch, svd in svds.items())


@contextmanager
def filtered(
    gated: Gated, svds: Mapping[Branch, Svd], keep: Keep, k: int | None
) -> Iterator[Resolved]:
    """Inside, the student has the top k singular directions of every matrix of `svds`, the rest, or
    all of them (`k` is None); the gate that is given has these matrices on and everything else off.

    Raises:
        InputError: k is less than one.
    """
    if k is not None and k < 1:
        raise InputError(f"spectra: {k} singular directions; expected 1 or more")
    saved: list[tuple[Tensor, Tensor]] = []

    def put(weight: Tensor, value: Tensor) -> None:
        saved.append((weight, weight.clone()))
        weight.copy_(value)

    with torch.no_grad():
        for part in gated.parts:
            svd = svds.get(part.branch)
            if svd is None:
                continue
            if part.student is not None:
                weight, bias = part.student.weight, part.student.bias
                if k is not None:
                    top = (svd.u[:, :k] * svd.s[:k]) @ svd.v[:, :k].T
                    put(
                        weight,
                        part.module.weight.float() + top if keep == "top" else weight.float() - top,
                    )
                if bias is not None:
                    put(bias, part.module.bias)
            elif k is not None:
                a, b, scaling = _factors(gated, part.branch)
                chosen = slice(None, k) if keep == "top" else slice(k, None)
                u, s, v = svd.u[:, chosen], svd.s[chosen], svd.v[:, chosen]
                new_a, new_b = torch.zeros_like(a), torch.zeros_like(b)
                new_a[: len(s)], new_b[:, : len(s)] = v.T.to(a.dtype), (u * s / scaling).to(b.dtype)
                put(a, new_a)
                put(b, new_b)
    bits = tuple(branch in svds for branch in gated.branches)
    try:
        yield Resolved((), Profile(bits, bits), "inside")
    finally:
        with torch.no_grad():
            for weight, before in saved:
                weight.copy_(before)


def filter_scores(
    work: Work, svds: Mapping[Branch, Svd], ks: Sequence[int], measure: Measure, score: Score
) -> list[FilterScore]:
    """The base with the top k directions, with the rest, for each k, and with all of them."""
    plain = score({name: work.gates[name] for name in (BASE, STUDENT)}, "").scores
    total = difference(plain[STUDENT], plain[BASE])
    wanted: list[tuple[Keep, int | None]] = [(keep, k) for k in ks for keep in ("top", "rest")]
    found = []
    for keep, k in [*wanted, ("all", None)]:
        with filtered(work.gated, svds, keep, k) as gate:
            gates = {STUDENT: (gate,) * len(work.prompts)}
            scores = score(gates, f"matrices {keep} {k}").scores[STUDENT]
        effect = difference(scores, plain[BASE])
        part = share(effect, total, len(scores))
        found.append(FilterScore(measure=measure, keep=keep, k=k, effect=effect, share=part))
    return found


def _factors(gated: Gated, branch: Branch) -> tuple[Tensor, Tensor, float]:
    """A [r, in], B [out, r] and the factor before B A."""
    layer: Any = gated.model.get_submodule(branch.name)
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def _thin(left: Tensor, right: Tensor) -> Svd:
    """SVD of left right^T from left [out, r] and right [in, r], r at most both."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    return Svd(q_left @ u[:, : len(s)], s, q_right @ vh.T[:, : len(s)], tuple(s.tolist()))


def _spectrum(branch: Branch, svd: Svd) -> Spectrum:
    values = svd.values
    total, square = math.fsum(values), math.fsum(v * v for v in values)
    shares = [v / total for v in values if v > 0] if total else []
    return Spectrum(
        name=branch.name,
        layer=branch.layer,
        module=branch.module,
        shape=(svd.u.shape[0], svd.v.shape[0]),
        norm=math.sqrt(square),
        effective_rank=math.exp(-math.fsum(p * math.log(p) for p in shares)) if shares else 0.0,
        stable_rank=square / values[0] ** 2 if values and values[0] else 0.0,
        singular_values=tuple(values[:KEPT]),
    )
