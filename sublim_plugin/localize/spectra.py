"""The spectrum of a student's change of each matrix, and its preference with a part of it alone.

dW is never formed for LoRA: with thin QR factorizations B = Qb Rb and A^T = Qa Ra, the singular
values of s B A are those of the r x r matrix s Rb Ra^T. For a full student dW is the difference of
the weights, decomposed as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from sublim_plugin.core.errors import InputError
from sublim_plugin.localize.answers import Work, logprob_scores
from sublim_plugin.localize.gating import Gated
from sublim_plugin.localize.resolve import Branch
from sublim_plugin.localize.results import BASE, STUDENT, FilterScore, Keep, Spectrum, difference

KEPT = 64
"""Singular values of a module that results hold, the largest first."""


class Svd(NamedTuple):
    """dW = u diag(s) v^T: u [out, n], s [n] descending, v [in, n], in float32 (LoRA: float64)."""

    u: Tensor
    s: Tensor
    v: Tensor


def decompose(gated: Gated) -> dict[Branch, Svd]:
    """The change of every matrix in the decoder's layers.

    A full student's needs as much memory again as its layers, and a minute for 135 million weights
    on two cores; its vectors (norms, biases), embedding and output layer are left out.
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
                found[part.branch] = Svd(u, s, vh.T)
    return found


def spectra(svds: Mapping[Branch, Svd]) -> tuple[Spectrum, ...]:
    """Norm and ranks of every matrix."""
    return tuple(_spectrum(branch, svd) for branch, svd in svds.items())


@contextmanager
def filtered(gated: Gated, svds: Mapping[Branch, Svd], keep: Keep, k: int) -> Iterator[None]:
    """Inside, the student has the top k singular directions of every matrix alone, or all others.
    What `decompose` leaves out stays the student's.

    Raises:
        InputError: k is less than one.
    """
    if k < 1:
        raise InputError(f"spectra: {k} singular directions; expected 1 or more")
    saved: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for part in gated.parts:
            svd = svds.get(part.branch)
            if svd is None:
                continue
            chosen = slice(None, k) if keep == "top" else slice(k, None)
            u, s, v = svd.u[:, chosen], svd.s[chosen], svd.v[:, chosen]
            if part.student is None:
                a, b, scaling = _factors(gated, part.branch)
                new_a, new_b = torch.zeros_like(a), torch.zeros_like(b)
                new_a[: len(s)], new_b[:, : len(s)] = v.T.to(a.dtype), (u * s / scaling).to(b.dtype)
                saved += [(a, a.clone()), (b, b.clone())]
                a.copy_(new_a)
                b.copy_(new_b)
            else:
                weight = part.student.weight
                saved.append((weight, weight.clone()))
                weight.copy_(part.module.weight.float() + (u * s) @ v.T)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in saved:
                weight.copy_(before)


def filter_scores(work: Work, svds: Mapping[Branch, Svd], ks: Sequence[int]) -> list[FilterScore]:
    """The student with the top k directions, and with the rest, for each k."""
    gates = {name: work.gates[name] for name in (BASE, STUDENT)}
    plain = logprob_scores(work, gates, False).scores
    total = difference(plain[STUDENT], plain[BASE])
    found = []
    for k in ks:
        for keep in get_args(Keep):
            with filtered(work.gated, svds, keep, k):
                only = {STUDENT: gates[STUDENT]}
                scores = logprob_scores(work, only, False, f"{keep} {k}").scores[STUDENT]
            effect = difference(scores, plain[BASE])
            share = None if total.low <= 0 <= total.high else effect.value / total.value
            found.append(FilterScore(keep=keep, k=k, effect=effect, share=share))
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
    return Svd(q_left @ u[:, : len(s)], s, q_right @ vh.T[:, : len(s)])


def _spectrum(branch: Branch, svd: Svd) -> Spectrum:
    values: Sequence[float] = svd.s.double().tolist()
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
