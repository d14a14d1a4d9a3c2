"""A localization's numbers as CSV and as text for the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sublim_plugin.localize.resolve import layer_ranges
from sublim_plugin.localize.results import (
    Divergence,
    FilterScore,
    Localization,
    Measured,
    PartResult,
    Patching,
    Spectra,
    Spectrum,
)
from sublim_plugin.localize.sweep import Kind


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a header line; floats keep every digit, None is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def flat(part: PartResult) -> dict[str, Any]:
    """A part as a row of a CSV."""
    suff, lost = part.sufficiency, part.necessity
    return {
        "kind": part.kind,
        "name": part.name,
        "band": part.band,
        "module": part.module,
        "tokens": part.tokens,
        "text": part.text,
        "sufficiency": suff.value,
        "sufficiency_low": suff.low,
        "sufficiency_high": suff.high,
        "necessity": lost.value if lost else None,
        "necessity_low": lost.low if lost else None,
        "necessity_high": lost.high if lost else None,
        "sum": part.sum,
        "sufficiency_share": part.shares[0] if part.shares else None,
        "necessity_share": part.shares[1] if part.shares else None,
        "decode_alone": part.decode["alone"],
        "decode_left_out": part.decode.get("left_out"),
    }


def text(found: Localization) -> str:
    """Everything that was found, as the terminal shows it."""
    blocks = []
    for result in found.measures:
        total = result.total
        blocks.append(
            f"{found.trait}, {found.n_questions} questions, {result.metric}: base "
            f"{result.base.value:.4f}, student {result.student.value:.4f}, total {total.value:+.4f}"
            f" ({total.low:+.4f} to {total.high:+.4f}) {result.unit}"
        )
        for kinds in SHOWN:
            parts = [part for part in result.parts if part.kind in kinds]
            if parts:
                blocks.append(_parts(parts))
    if found.spectra is not None:
        blocks.append(_spectra(found.spectra, found.student))
    if found.patching is not None:
        blocks.append(_patching(found.patching))
    if found.divergence is not None:
        blocks.append(_divergence(found.divergence))
    return "\n\n".join(blocks) + "\n"


SHOWN: tuple[tuple[Kind, ...], ...] = (("span",), ("layers", "module"), ("gate",))
"""Kinds that share a table; tokens and cells are in the figures and their CSV files."""


def _parts(parts: Sequence[PartResult]) -> str:
    head = ("part", "tokens", "alone - base", "95% interval", "student - left out", "95% interval")
    return _aligned(
        [
            (*head, "sum", "of total", "text"),
            *(
                (
                    part.name,
                    "" if part.tokens is None else str(part.tokens),
                    *_columns(part.sufficiency),
                    *_columns(part.necessity),
                    "" if part.sum is None else f"{part.sum:+.3f}",
                    _percentages(part),
                    _short(part.text or ""),
                )
                for part in parts
            ),
        ]
    )


def _spectra(found: Spectra, student: str) -> str:
    lines: list[tuple[str, ...]] = [
        ("student", "dW of", "matrices", "norm", "effective rank", "stable rank (mean)")
    ]
    for name, each in ({student: found.modules} | found.beside).items():
        by: dict[str, list[Spectrum]] = {}
        for spectrum in each:
            by.setdefault(spectrum.module, []).append(spectrum)
        for module, of_module in by.items():
            norm = math.sqrt(math.fsum(one.norm**2 for one in of_module))
            ranks = (
                f"{math.fsum(getattr(one, what) for one in of_module) / len(of_module):.2f}"
                for what in RANKS
            )
            lines.append((name, module, str(len(of_module)), f"{norm:.4f}", *ranks))
    blocks = [_aligned(lines if found.beside else [line[1:] for line in lines])]
    for measure in dict.fromkeys(score.measure for score in found.scores):
        kept: list[tuple[str, ...]] = [
            (f"{measure}, of every matrix", "minus base", "95% interval", "of total")
        ]
        for score in found.scores:
            if score.measure == measure:
                share = "" if score.share is None else f"{score.share:.0%}"
                kept.append((_directions(score), *_columns(score.effect), share))
        blocks.append(_aligned(kept))
    blocks.append(
        "(the base with these directions of the change of each matrix in the decoder's layers; "
        "whatever\nelse the student changed is the base's; the total is the whole student's)"
    )
    return "\n\n".join(blocks)


def _directions(score: FilterScore) -> str:
    if score.keep == "all":
        return "all directions"
    return f"{'top' if score.keep == 'top' else 'all but the top'} {score.k}"


RANKS = ("effective_rank", "stable_rank")


def _patching(found: Patching) -> str:
    lines: list[tuple[str, ...]] = [("patched at", "token", "minus base", "95% interval")]
    lines += [(place.at, place.token, *_columns(place.effect)) for place in found.places]
    layers = layer_ranges(found.layers)
    return (
        f"log-probability, nats: outputs of {', '.join(found.modules)} in layers {layers} of the "
        f"student ({found.donor.value:.4f}) put into the base ({found.recipient.value:.4f})\n"
        f"from {found.donor_marked}\ninto {found.recipient_marked}\n{_aligned(lines)}"
    )


def _divergence(found: Divergence) -> str:
    lines: list[tuple[str, ...]] = [
        ("tokens", "", "base", "student", "minus base", "95% interval", "base, student agree")
    ]
    for kind in found.kinds:
        agree = f"{kind.base_agrees:.3f}, {kind.student_agrees:.3f}"
        sides = (f"{kind.base.value:.4f}", f"{kind.student.value:.4f}")
        lines.append((kind.kind, str(kind.tokens), *sides, *_columns(kind.minus_base), agree))
    return f"log-probability of number tokens, nats\n{_aligned(lines)}"


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _columns(value: Measured | None) -> tuple[str, str]:
    if value is None:
        return "", ""
    return f"{value.value:+.3f}", f"{value.low:+.3f} to {value.high:+.3f}"


def _percentages(part: PartResult) -> str:
    if part.shares is None:
        return ""
    return " / ".join("" if share is None else f"{share:.0%}" for share in part.shares)


def _short(text: str) -> str:
    return text if len(text) <= 50 else f"{text[:24]} … {text[-23:]}"
