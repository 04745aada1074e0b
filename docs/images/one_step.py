"""Draws ``one_step.svg``: what happens in a step with predicted gradients. Run it by ``python docs/images/one_step.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

EXACT, PREDICTED, NEUTRAL, INK = "#4477aa", "#ee8866", "#dddddd", "#222222"
LANES = {"control": 3.0, "others": 1.25}


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str, **style: object) -> None:
    """A rounded box with a text in its middle."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", facecolor=colour, **style)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, **style: object) -> None:
    """An arrow; dashed ones stand for gradients."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, **style})


def main() -> None:
    """Draw the picture beside this file."""
    figure = Figure(figsize=(10.0, 4.1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12.25), ylim=(-0.6, 4.6))
    axes.axis("off")

    box(axes, 0.3, 1.1, 1.3, 3.0, NEUTRAL, "the whole\nbatch\n\nembeddings", alpha=0.9, edgecolor="none")
    box(
        axes,
        9.95,
        1.1,
        2.0,
        3.0,
        NEUTRAL,
        "rest of the model,\nany loss,\non the whole batch:\nexact",
        edgecolor="none",
    )
    for lane, (colour, alpha) in {"control": (EXACT, 0.55), "others": (PREDICTED, 0.45)}.items():
        y = LANES[lane]
        for block, name in enumerate(("block 1", "block 2", "block 3", "…")):
            box(axes, 3.3 + 1.65 * block, y, 1.25, 0.95, colour, name, alpha=alpha, edgecolor="none")
        for gap in range(5):
            left, right = 2.88 + 1.65 * gap, 3.26 + 1.65 * gap
            arrow(axes, (left, y + 0.68), (right, y + 0.68), INK)
            if lane == "control":
                arrow(axes, (right, y + 0.27), (left, y + 0.27), EXACT)
            else:
                arrow(axes, (right, y + 0.27), (left, y + 0.27), PREDICTED, linestyle=(0, (2, 1)))
    for lane, text in (("control", "a random few"), ("others", "all others")):
        arrow(axes, (1.65, 2.6), (2.75, LANES[lane] + 0.68), INK)
        axes.text(2.85, LANES[lane] + (1.0 if lane == "control" else -0.12), text, fontsize=9, ha="right", color=INK)
    axes.text(6.4, 4.2, "control examples: forward and exact backward", ha="center", fontsize=10, color=INK)
    axes.text(
        6.4,
        0.72,
        "forward only; gradients are predicted: backward through the same blocks\nwith 5 rows of each example instead of all",
        ha="center",
        va="center",
        fontsize=10,
        color=INK,
    )
    arrow(axes, (0.5, -0.3), (1.1, -0.3), INK)
    axes.text(1.25, -0.3, "values", va="center", fontsize=9)
    arrow(axes, (3.0, -0.3), (2.4, -0.3), EXACT)
    axes.text(3.15, -0.3, "exact gradients", va="center", fontsize=9)
    arrow(axes, (5.6, -0.3), (5.0, -0.3), PREDICTED, linestyle=(0, (3, 2)))
    axes.text(5.75, -0.3, "predicted gradients, corrected by the exact ones: no bias", va="center", fontsize=9)
    target = Path(__file__).with_suffix(".svg")
    with mpl.rc_context({"svg.hashsalt": "hf_lgp", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
