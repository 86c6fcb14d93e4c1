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


def plot_ablations(points: pd.DataFrame, default: str, metrics: Sequence[str], file: Path) -> None:
    """Draw each ablation in colour over the default in grey: a row per ablation, a column per metric.

    A line is the mean over seeds, a band reaches from the lowest to the highest seed.

    Args:
        points: rows of `ablation`, `seed`, `metric`, `episodes`, `value`.
        default: the name of the default among the ablations.
        metrics: the columns; those that are missing are left out.
        file: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in points["ablation"].unique() if name != default] or [default]
    shown = [metric for metric in metrics if (points["metric"] == metric).any()]
    size = (3.4 * len(shown) + 0.6, 1.7 * len(names) + 0.6)
    figure, axes = plt.subplots(len(names), len(shown), figsize=size, squeeze=False, sharex=True, sharey="col")
    for row, name in zip(axes, names, strict=True):
        row[0].set_ylabel(name.replace("_", "\n"))
        for axis, metric in zip(row, shown, strict=True):
            for line, label, colour in ((default, "default", "0.5"), (name, "ablation", "tab:red")):
                chosen = points[(points["ablation"] == line) & (points["metric"] == metric)]
                seeds = chosen.groupby("episodes")["value"].agg(["mean", "min", "max"])
                axis.plot(seeds.index, seeds["mean"], color=colour, linewidth=1.3, label=label)
                axis.fill_between(seeds.index, seeds["min"], seeds["max"], color=colour, alpha=0.25, linewidth=0)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    for axis, metric in zip(axes[0], shown, strict=True):
        axis.set_title(metric)
    for axis in axes[-1]:
        axis.set_xlabel("episodes")
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)
