"""A signal as text for the terminal, and in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from sublim_plugin.signal.results import (
    STEP,
    Alignment,
    Cosines,
    Group,
    Loss,
    Measure,
    Measured,
    Signal,
    Where,
)

LOSS_NAMES: dict[Loss, str] = {"rows": "rows", "soft_targets": "soft targets"}
ON: dict[bool, tuple[Measure, Measure]] = {
    True: ("number_log_ratio", "number_kl"),
    False: ("log_ratio", "kl"),
}


def text(found: Signal) -> str:
    """Everything that was measured, as the terminal shows it; the reading is its last line."""
    context = ", ".join(value for key, value in found.context.items() if value != "text")
    blocks = [
        f"{found.dataset}: {found.teacher} teacher; {found.n_rows} of {found.n_rows_of} rows, "
        f"{found.tokens} tokens; the student's context: {context}\n"
        f"base: {_with(found.base_logprob)} nats a token"
    ]
    if found.where is not None:
        for number in (found.constrained, not found.constrained):
            if ON[number][0] in found.where.overall.measures:
                blocks.append(_where(found.where, number, found.constrained))
    if found.alignments:
        blocks.append(_alignments(found))
        updates = {one.loss: one.update for one in found.alignments if one.update}
        if updates:
            blocks.append(_parts(updates))
        if found.alignments[0].candidates:
            blocks.append(_candidates(found))
    blocks += [f"not measured: {line}" for line in found.missing]
    blocks.append(f"Reading: {reading(found)}")
    return "\n\n".join(blocks) + "\n"


def reading(found: Signal) -> str:
    """The signal in one sentence."""
    parts = []
    if found.where is not None:
        ratio, apart = (found.where.overall.measures.get(m) for m in ON[found.constrained])
        if ratio and apart:
            tokens = "renormalized over the number tokens, " if found.constrained else ""
            divergent, sign = _divergent(found)
            parts.append(
                f"{tokens}a token of these rows is {_with(ratio.mean, 4)} nats likelier under the "
                f"teacher than under the base (KL {apart.mean.value:.4f}){divergent}{sign}"
            )
    target = found.trait.rpartition("/")[2]
    for one in found.alignments:
        if one.target is not None:
            parts.append(
                f"a step of norm {STEP:g} down the gradient of the {LOSS_NAMES[one.loss]} moves "
                f"{target}'s log share by {_with(one.target, 4)} nats to first order, rank "
                f"{one.target_rank} of {len(one.candidates)} candidates"
            )
    sentence = "; ".join(parts) or "nothing but the base's own log-probability was measured"
    return sentence[0].upper() + sentence[1:] + ". Intervals are over rows of one dataset."


def _divergent(found: Signal) -> tuple[str, str]:
    assert found.where is not None
    groups = found.where.number_divergence if found.constrained else found.where.divergence
    group = next((one for one in groups if one.name == "divergent"), None)
    if group is None:
        return ", with no divergence token", ""
    share = group.measures[ON[found.constrained][1]].share
    of = "" if share is None else f", which hold {share:.0%} of the KL"
    return f", {group.share:.0%} of the tokens are divergence tokens", of


def _where(found: Where, number: bool, constrained: bool) -> str:
    ratio, apart = ON[number]
    title = (
        "over the number tokens that the grammar admits, renormalized"
        if number
        else "over the whole vocabulary"
    )
    if constrained:
        title += (
            ": what the rows were sampled from"
            if number
            else ": the rows were not sampled from this"
        )
    lines: list[tuple[str, ...]] = [
        ("tokens", "", "of all", "log ratio", "95% interval", "of sum", "KL", "95% interval",
         "of sum")
    ]  # fmt: skip
    apart_groups = found.number_divergence if number else found.divergence
    names = {"divergent": "divergent", "other": "not divergent"}
    groups: list[tuple[str, Group]] = [
        ("all", found.overall),
        *((group.name, group) for group in (*found.by_position, *found.by_kind)),
        *((names[group.name], group) for group in apart_groups),
    ]
    for name, group in groups:
        if ratio not in group.measures:
            continue
        a, b = group.measures[ratio], group.measures[apart]
        lines.append(
            (name, str(a.positions), f"{group.share:.0%}", f"{a.mean.value:+.4f}",
             f"{a.mean.low:+.4f} to {a.mean.high:+.4f}", _percent(a.share), f"{b.mean.value:.4f}",
             f"{b.mean.low:.4f} to {b.mean.high:.4f}", _percent(b.share))
        )  # fmt: skip
    return f"{title}; nats a token, teacher against base\n{aligned(lines)}"


def _alignments(found: Signal) -> str:
    target = found.trait.rpartition("/")[2]
    rows: list[tuple[str, list[str]]] = [
        ("loss at the base, nats a token", [f"{one.value:.4f}" for one in found.alignments]),
        ("norm of the gradient", [f"{one.gradient_norm:.4g}" for one in found.alignments]),
    ]
    cosines = {
        "cosine with the teacher's update": [one.update for one in found.alignments],
        f"cosine with the gradient of log P({target})": [one.logprob for one in found.alignments],
        f"cosine with that of {target}'s log share": [one.log_share for one in found.alignments],
    }
    for name, values in cosines.items():
        if any(values):
            rows.append((name, [_with(value.total, 4) if value else "" for value in values]))
    head = ("down the gradient of", *(LOSS_NAMES[one.loss] for one in found.alignments))
    return aligned([head, *((name, *cells) for name, cells in rows)])


def _parts(updates: dict[Loss, Cosines]) -> str:
    """Cosines with the teacher's update by module kind and layer."""
    first = next(iter(updates.values()))
    lines = [("cosine with the update in", *(LOSS_NAMES[loss] for loss in updates))]
    for module in first.by_module:
        lines.append((module, *(_signed(one.by_module[module]) for one in updates.values())))
    for layer in first.by_layer:
        lines.append(
            (f"layer {layer}", *(_signed(one.by_layer[layer]) for one in updates.values()))
        )
    return aligned(lines)


def _candidates(found: Signal) -> str:
    lines = [
        (
            f"change of log share (nats), step of norm {STEP:g}, {found.n_questions} questions",
            *(LOSS_NAMES[one.loss] for one in found.alignments),
        )
    ]
    target = found.trait.rpartition("/")[2]
    for name in ranked(found.alignments):
        cells = [
            next(f"{c.log_share:+.4f}" for c in one.candidates if c.name == name)
            for one in found.alignments
        ]
        lines.append((f"{name} (the target)" if name == target else name, *cells))
    return aligned(lines)


def ranked(alignments: Sequence[Alignment]) -> list[str]:
    """The candidates by change of log share down the last loss, the largest first."""
    last = alignments[-1].candidates
    return [one.name for one in sorted(last, key=lambda one: -one.log_share)]


def aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _with(value: Measured, digits: int = 3) -> str:
    return f"{value.value:+.{digits}f} ({value.low:+.{digits}f} to {value.high:+.{digits}f})"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
