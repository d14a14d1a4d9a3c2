"""A localization's numbers as CSV and as text for the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sublim_plugin.localize.results import (
    Divergence,
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
        blocks.append(_spectra(found.spectra))
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


def _spectra(found: Spectra) -> str:
    modules: dict[str, list[Spectrum]] = {}
    for spectrum in found.modules:
        modules.setdefault(spectrum.module, []).append(spectrum)
    lines: list[tuple[str, ...]] = [
        ("dW of", "matrices", "norm", "effective rank", "stable rank (mean)")
    ]
    for name, each in modules.items():
        norm = math.sqrt(math.fsum(one.norm**2 for one in each))
        ranks = (math.fsum(getattr(one, what) for one in each) / len(each) for what in RANKS)
        lines.append((name, str(len(each)), f"{norm:.4f}", *(f"{rank:.2f}" for rank in ranks)))
    kept: list[tuple[str, ...]] = [
        ("singular directions", "minus base", "95% interval", "of total")
    ]
    for score in found.scores:
        share = "" if score.share is None else f"{score.share:.0%}"
        name = f"{'top' if score.keep == 'top' else 'all but the top'} {score.k}"
        kept.append((name, *_columns(score.effect), share))
    return f"{_aligned(lines)}\n\n{_aligned(kept)}"


RANKS = ("effective_rank", "stable_rank")


def _patching(found: Patching) -> str:
    lines: list[tuple[str, ...]] = [("patched at", "token", "minus base", "95% interval")]
    lines += [(place.at, place.token, *_columns(place.effect)) for place in found.places]
    layers = f"{found.layers[0]}-{found.layers[-1]}" if found.layers else "none"
    return (
        f"outputs of {', '.join(found.modules)} in layers {layers} of the student "
        f"({found.donor.value:.4f}) put into the base ({found.recipient.value:.4f})\n"
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
