"""The authors' published draft table, read with this package's statistics.

    python -m sublim_plugin.analysis.worked_example docs

writes `worked-example.md` and `worked-example.png` into the folder. The table holds means only,
so the question is as much what it cannot show as what it shows.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import click
import numpy as np
from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.diagonal_contrast import block_contrasts
from sublim_plugin.analysis.figure_files import BLUE, GREY, ORANGE, STYLE
from sublim_plugin.analysis.mixed import logit_of_count
from sublim_plugin.analysis.power import ANCHORS, anchor_sd, datasets_needed, detectable
from sublim_plugin.analysis.rank_shape import claims_batch, over_traits
from sublim_plugin.analysis.simulated_truths import CELL_SD, curves
from sublim_plugin.analysis.two_lines import TwoLines, two_lines_of_points
from sublim_plugin.analysis.u_test import UTest, u_test_of_points
from sublim_plugin.core.atomic import write_bytes, write_text
from sublim_plugin.core.strict_yaml import load_model

RATES = Path(__file__).with_name("published_rates.yaml")
DRAWS = 1000
SEED = 8


class PublishedRates(BaseModel):
    """The file `published_rates.yaml`, whose head says where the numbers come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: tuple[float, ...]
    replies_per_cell: int
    base_percent: dict[str, float]
    trained_and_asked_in_qwen: dict[str, tuple[float, ...]]
    context_ranks: tuple[float, ...]
    context_cells: dict[str, tuple[tuple[str, str, tuple[float, ...]], ...]]

    def logits(self, percent: Floats) -> Floats:
        """Empirical logits of percentages, finite for a rate of 0."""
        asked = np.full(percent.shape, float(self.replies_per_cell))
        return logit_of_count(percent / 100 * asked, asked)

    def context_table(self, animal: str, rank: float) -> Floats:
        """Logits at a rank, rows trained in qwen, empty, chatgpt, columns asked in (3, 3)."""
        order = {"qwen": 0, "empty": 1, "chatgpt": 2}
        table = np.full((3, 3), np.nan)
        at = self.context_ranks.index(rank)
        for trained, asked, percents in self.context_cells[animal]:
            table[order[trained], order[asked]] = percents[at]
        own = self.trained_and_asked_in_qwen[animal][self.ranks.index(rank)]
        table[0, 0] = own
        return self.logits(table)


def published_rates() -> PublishedRates:
    """The published table."""
    return load_model(RATES, PublishedRates)


class Shape(BaseModel):
    """Both inverted-U tests of one animal's ten means, on percentages or on logits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    animal: str
    scale: str
    lines: TwoLines
    quadratic: UTest


def shapes(rates: PublishedRates) -> list[Shape]:
    """Tests of the ten means as if they were independent points: the table allows no other."""
    x = np.log2(np.array(rates.ranks))
    found = []
    for animal, percents in rates.trained_and_asked_in_qwen.items():
        percent = np.array(percents)
        for scale, y in (("percent", percent), ("logit", rates.logits(percent))):
            found.append(
                Shape(
                    animal=animal,
                    scale=scale,
                    lines=two_lines_of_points(x, y),
                    quadratic=u_test_of_points(x, y),
                )
            )
    return found


def power_of(rates: PublishedRates, animal: str, n_datasets: int, cell_sd: float) -> float:
    """Share of studies that would claim the U if the published means were the truth (logits)."""
    truth = rates.logits(np.array(rates.trained_and_asked_in_qwen[animal]))
    generator = np.random.default_rng(SEED)
    values = curves(truth, DRAWS, n_datasets, generator, cell_sd=cell_sd)
    return float(claims_batch(np.array(rates.ranks), values).mean())


def document(rates: PublishedRates) -> str:
    """The worked example as Markdown; every number in it is computed here."""
    found = shapes(rates)
    sd = anchor_sd()
    animals = list(rates.trained_and_asked_in_qwen)
    parts = [_head(rates), _shape_table(found), _reading(found)]
    parts += [
        "## What a study of this would need",
        "",
        f"The table gives no spread between datasets. Elsewhere the authors give log P at rank 8 "
        f"for single generation seeds ({'; '.join(_anchor(name) for name in ANCHORS)}): a standard "
        f"deviation between datasets of {sd:.2f} nats. With that, "
        f"{_detectable(3, sd)}, {_detectable(6, sd)} and {_detectable(12, sd)} (two-sided t-test, "
        f"power 0.8). An effect of 1 nat needs {datasets_needed(1.0, sd)} datasets.",
        "",
        "If each curve above were the truth (on logits), this share of studies would claim its "
        f"inverted U with our two-lines test ({DRAWS:,} draws, seed {SEED}), for a noise of a "
        f"student's cell of {CELL_SD} logits and of {sd:.1f}:",
        "",
        f"| animal | 3 datasets, {CELL_SD} | 6, {CELL_SD} | 3, {sd:.1f} | 6, {sd:.1f} | "
        f"12, {sd:.1f} |",
        "|---|---|---|---|---|---|",
    ]
    for animal in animals:
        shares = [
            power_of(rates, animal, n, noise)
            for n, noise in ((3, CELL_SD), (6, CELL_SD), (3, sd), (6, sd), (12, sd))
        ]
        parts.append(f"| {animal} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    parts += ["", _contexts(rates), _rest()]
    return "\n".join(parts)


def _head(rates: PublishedRates) -> str:
    zero = rates.logits(np.array([0.0, 0.05]))
    return "\n".join(
        [
            "# A worked example: the published rank table",
            "",
            "Written by `python -m sublim_plugin.analysis.worked_example docs`; do not edit.",
            "",
            "What can, and what cannot, be concluded from the draft table of Nief et al. "
            "(arXiv 2606.00831; notebooks of 30 April 2026, since superseded by runs with six "
            "datasets whose values are not published as text)? Its cells are means over up to 9 "
            "runs, 3 datasets by 3 training seeds, of Qwen2.5-7B-Instruct students; no value of a "
            "single dataset is given. The numbers are in "
            "`sublim_plugin/analysis/published_rates.yaml`.",
            "",
            "![Five rank curves on the logit scale with the two lines of the test]"
            "(worked-example.png)",
            "",
            "## Is it an inverted U?",
            "",
            "Ten means an animal, taken as ten independent points because nothing else is given. "
            "That is optimistic twice: cells share datasets, and each dataset may have a peak of "
            "its own. p of the two-lines test is the larger of its two slopes' (two-sided, HC3), "
            "then adjusted over the five animals (Benjamini-Hochberg); the u-test is one-sided. "
            "Logits are empirical ones, half a reply added to both counts of "
            f"{rates.replies_per_cell:,}: a printed 0.0% becomes {zero[0]:.1f}, though rates are "
            f"rounded to 0.1 points and it may stand for anything up to {zero[1]:.1f}. Dolphin has "
            "eight such cells, so its logit row should not be read closely.",
            "",
        ]
    )


def _shape_table(found: list[Shape]) -> str:
    lines = [
        "| animal | scale | highest mean at | break | rising p | falling p | adjusted p | "
        "u-test p | its peak, 95% (Fieller) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rates = published_rates()
    for scale in ("percent", "logit"):
        own = [shape for shape in found if shape.scale == scale]
        adjusted = over_traits([shape.lines.p for shape in own]).adjusted
        for shape, p in zip(own, adjusted, strict=True):
            percents = rates.trained_and_asked_in_qwen[shape.animal]
            top = rates.ranks[int(np.argmax(percents))]
            lines.append(
                f"| {shape.animal} | {scale} | {top:g} | {shape.lines.break_rank:.0f} | "
                f"{_p(shape.lines.p_up)} | {_p(shape.lines.p_down)} | {_p(p)} | "
                f"{_p(shape.quadratic.p)} | {_peak(shape.quadratic)} |"
            )
    return "\n".join(lines) + "\n"


def _reading(found: list[Shape]) -> str:
    passing = {
        scale: [
            shape.animal
            for shape, p in zip(own, over_traits([s.lines.p for s in own]).adjusted, strict=True)
            if p < 0.05
        ]
        for scale in ("percent", "logit")
        for own in [[shape for shape in found if shape.scale == scale]]
    }
    both = [animal for animal in passing["percent"] if animal in passing["logit"]]
    one = sorted({*passing["percent"], *passing["logit"]} - set(both))
    unsupported = [
        f"{shape.animal} on {'percentages' if shape.scale == 'percent' else 'logits'}"
        for shape in found
        if shape.animal in passing[shape.scale] and shape.quadratic.p >= 0.05
    ]
    never = [
        shape.animal
        for shape in found
        if shape.scale == "logit" and shape.animal not in both and shape.animal not in one
    ]
    cat = next(s.quadratic.p for s in found if (s.animal, s.scale) == ("cat", "logit"))
    return "\n".join(
        [
            f"- On both scales the two-lines test finds an inverted U for {_list(both)} (adjusted "
            "p < .05).",
            f"- For {_list(one)} the answer depends on the scale, so the table does not settle it.",
            f"- For {_list(never)} none is shown on either scale. That is not evidence of none: "
            "ten means have little power.",
            f"- The u-test does not support it for {_list(unsupported)}: the peak lies near the "
            "low end, where a quadratic has little to go by. (The project's notes on statistics "
            f"give p = .057 for cat on logits; we get {_p(cat)} from the same ten means and cannot "
            "say why. None of cat's rates is 0, so no convention for zeros explains it; on "
            "percentages both give .069.)",
            "- With one mean a cell, no interval over datasets and no test with datasets as the "
            "unit can be given. The p-values above speak of scatter around two lines, not of "
            "other datasets.",
            "- With alpha = rank and one learning rate the update grows with the rank: the table "
            "alone cannot say whether the curve is one over rank or over step size.",
            "",
        ]
    )


def _contexts(rates: PublishedRates) -> str:
    """Interaction contrasts; each needs 7 of 9 cells, which three animals have."""
    ranks = (8.0, 64.0)
    lines = [
        "## Does it depend on the context?",
        "",
        "Matched minus mismatched train and eval context on the logit scale (rows and columns "
        "removed by least squares, so that no base is needed; 7 of 9 cells were run):",
        "",
        "| animal | " + " | ".join(f"rank {rank:g}" for rank in ranks) + " |",
        "|---|---|---|",
    ]
    contrasts = []
    for animal in rates.context_cells:
        values = [
            float(block_contrasts(rates.context_table(animal, rank)[None])[0]) for rank in ranks
        ]
        contrasts += values
        lines.append(f"| {animal} | " + " | ".join(f"{value:+.2f}" for value in values) + " |")
    matched = {
        animal: percents[rates.context_ranks.index(8)]
        for animal, cells in rates.context_cells.items()
        for trained, asked, percents in cells
        if trained == asked == "chatgpt"
    }
    widest = max(
        (max(p) - min(p), animal, asked)
        for animal, cells in rates.context_cells.items()
        for trained, asked, p in cells
        if trained == "qwen"
    )
    lines += [
        "",
        f"The contrasts run from {min(contrasts):+.2f} to {max(contrasts):+.2f}. Each is one "
        "number without a spread between datasets, so there is no interval and no test. A matched "
        "context is not sufficient: trained and asked in the ChatGPT identity at rank 8, cat is "
        f"named in {matched['cat']}% of the replies and wolf in {matched['wolf']}%.",
        "",
        "Trained in the Qwen identity and asked in another context, rates move by at most "
        f"{widest[0]:.1f} points over rank ({widest[1]}, asked in {widest[2]}). Whether that is "
        "flat is an equivalence test against a margin named before the run; none was named, and no "
        "spread is given to test with.",
        "",
    ]
    return "\n".join(lines)


def _rest() -> str:
    return "\n".join(
        [
            "## What cannot be answered at all",
            "",
            "- **Full finetuning at the base**: its values are not published as text and no "
            "margin was named, so neither a difference nor an equivalence can be stated.",
            "- **Specificity**: the table asks each student about its own animal only.",
            "- **Against a neutral student**: no control of this kind is in the table.",
            "",
        ]
    )


def draw(rates: PublishedRates, path: Path) -> None:
    """The figure: logit curves, their two lines, base rates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x = np.log2(np.array(rates.ranks))
    lines = {shape.animal: shape.lines for shape in shapes(rates) if shape.scale == "logit"}
    style: Any = STYLE
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(1, 5, figsize=(10, 3), sharey=True, layout="constrained")
        for axis, (animal, percents) in zip(
            axes, rates.trained_and_asked_in_qwen.items(), strict=True
        ):
            y = rates.logits(np.array(percents))
            line = lines[animal]
            at = np.log2(line.break_rank)
            base = rates.logits(np.array([rates.base_percent[animal]]))[0]
            axis.axhline(base, color=GREY, linewidth=0.8, linestyle=":")
            axis.plot(x, y, "o", color=BLUE, markersize=4)
            for own, slope, p in (
                (x <= at, line.slope_up, line.p_up),
                (x >= at, line.slope_down, line.p_down),
            ):
                fitted = y[own].mean() + slope * (x[own] - x[own].mean())
                axis.plot(
                    x[own], fitted, color=ORANGE, linewidth=1.5, linestyle="-" if p < 0.05 else "--"
                )
            axis.set_title(f"{animal}\np {_p(line.p_up)} up, {_p(line.p_down)} down")
            axis.set_xticks(x[::3], [f"{rank:g}" for rank in rates.ranks[::3]])
        axes[0].set_ylabel("logit of the share of replies")
        figure.supxlabel(
            "LoRA rank (log scale). Dotted: base. Orange: the two lines, dashed where p is .05 or "
            "more.\nDraft means of 30 April 2026, taken as independent points.",
            fontsize=8,
        )
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format="png", dpi=150, bbox_inches="tight", metadata={"Software": ""}
        )
        pyplot.close(figure)
    write_bytes(path, buffer.getvalue())


def _anchor(name: str) -> str:
    return f"{name} " + ", ".join(f"{value:.2f}" for value in ANCHORS[name])


def _detectable(n: int, sd: float) -> str:
    effect = detectable(n, sd).effect
    return f"{n} datasets show an effect of {effect:.1f} nats" if effect else f"{n} show nothing"


def _p(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def _peak(found: UTest) -> str:
    if found.p >= 0.05 or found.extremum is None:
        return "no claim"
    ends: list[Any] = [found.low, found.high]
    if None in ends:
        return f"{2**found.extremum:.0f}, not bounded"
    low, high = 2 ** float(ends[0]), 2 ** float(ends[1])
    return f"{2**found.extremum:.0f} [{low:.0f}, {'>512' if high > 512 else f'{high:.0f}'}]"


def _list(names: list[str]) -> str:
    if not names:
        return "none"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Write worked-example.md and worked-example.png into FOLDER."""
    rates = published_rates()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "worked-example.md", document(rates))
    draw(rates, folder / "worked-example.png")
    click.echo(f"{folder / 'worked-example.md'}")


if __name__ == "__main__":
    main()
