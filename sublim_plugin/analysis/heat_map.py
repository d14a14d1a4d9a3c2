"""A table in colour, each number readable on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sublim_plugin.analysis.figure_files import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = "PuOr_r"
"""ColorBrewer's purple to orange, white at no effect."""


def scale(values: Sequence[float]) -> Any:
    """Colours symmetric around 0, as far as the largest value."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    reach = max((abs(value) for value in values), default=0.0) or 1.0
    return ScalarMappable(Normalize(-1.15 * reach, 1.15 * reach), COLOURS)


def heat_map(
    axes: Axes,
    values: Sequence[Sequence[float | None]],
    colours: Any,
    across: Sequence[str],
    down: Sequence[str],
    texts: dict[tuple[int, int], tuple[str, bool]],
    size: float = 7.0,
) -> None:
    """Fill `axes` with a table; None is left white.

    Args:
        texts: by (line, column), what stands in a field and whether it is bold.
    """
    grid = [[float("nan") if v is None else v for v in line] for line in values]
    axes.imshow(grid, cmap=colours.cmap, norm=colours.norm, aspect="auto")
    for (y, x), (text, bold) in texts.items():
        background = colours.to_rgba(grid[y][x])
        axes.text(
            x,
            y,
            text,
            ha="center",
            va="center",
            fontsize=size,
            color=readable_on(background[:3]),
            weight="bold" if bold else "normal",
            linespacing=1.15,
        )
    axes.set_xticks(range(len(across)), across)
    axes.set_yticks(range(len(down)), down)
    axes.tick_params(length=0)
    for edge in range(1, len(across)):
        axes.axvline(edge - 0.5, color="white", linewidth=2)
    for edge in range(1, len(down)):
        axes.axhline(edge - 0.5, color="white", linewidth=2)
    axes.spines[:].set_visible(False)


def readable_on(background: Sequence[float]) -> str:
    """White or ink, whichever has more contrast with an sRGB colour (0 to 1)."""
    ink = [int(INK[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    white, dark = contrast([1, 1, 1], background), contrast(ink, background)
    return "white" if white > dark else INK


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """Contrast ratio of two sRGB colours, 1 to 21 (WCAG 2.2)."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
