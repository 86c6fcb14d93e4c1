"""Plots of a pipeline's curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

Curves = dict[str, "pd.Series"]


def plot_curves(curves: Curves, panels: Sequence[tuple[str, Sequence[str]]], x_label: str, file: Path) -> bool:
    """Draw curves in panels, three in a row.

    Args:
        curves: name -> values, indexed by x.
        panels: title and names of the curves per panel; names that are missing are left out.
        x_label: of the x-axis.
        file: the PNG to write.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(title, [name for name in names if name in curves]) for title, names in panels]
    shown = [(title, names) for title, names in shown if names]
    if not shown:
        return False
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (title, names) in zip(axes.flat, shown, strict=False):
        for name in names:
            marker = "o" if len(curves[name]) < 10 else ""
            axis.plot(curves[name].index, curves[name].values, marker=marker, label=name)
        axis.set_title(title)
        axis.set_xlabel(x_label)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return True
