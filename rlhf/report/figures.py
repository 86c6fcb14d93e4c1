"""Figures of a report. Each takes the numbers as a table, writes a PNG, and says whether there was anything to draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.report.lengths import WIDTH, Unit, fitted_curve
from rlhf.report.overoptimisation import measures
from rlhf.report.runs import Baseline

if TYPE_CHECKING:
    import pandas as pd

# The colours of Okabe and Ito, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
GREY = "0.45"
APART = 1.03
STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10,
    "axes.titlesize": 11, "legend.fontsize": 9, "legend.frameon": False, "savefig.dpi": 130, "lines.linewidth": 1.6,
}  # fmt: skip


@contextmanager
def canvas(file: Path, rows: int, columns: int, width: float, height: float, **settings: Any) -> Iterator[Any]:
    """Panels `(rows, columns)` to draw in, of `width` by `height` inches each, written to a file at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        size = (width * columns, height * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **settings)
        try:
            yield axes
            figure.savefig(file)
        finally:
            plt.close(figure)


def size_colours(sizes: Sequence[str]) -> dict[str, Any]:
    """A colour per size, from dark to light as sizes grow."""
    import matplotlib

    return dict(zip(sizes, matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(sizes))), strict=True))


def plot_against_size(
    table: pd.DataFrame,
    panels: dict[str, str],
    series: str,
    y_label: str,
    file: Path,
    baselines: Sequence[Baseline] = (),
    level: float | None = None,
) -> bool:
    """Draw numbers against model size: a dot per seed, a line through the means per series.

    With one seed per size the dots have error bars, where the table has `low` and `high`.

    Args:
        table: rows of `size`, `parameters`, `seed`, the series and the numbers.
        panels: column -> title of its panel.
        series: the column whose values get a line each.
        y_label: of the y-axis.
        file: the PNG to write.
        baselines: stars.
        level: a dashed line at this height.
    """
    if table.empty:
        return False
    single, count = not table.duplicated(["size", series]).any(), table[series].nunique()
    with canvas(file, 1, len(panels), 5.6 if len(panels) == 1 else 3.8, 4.0 if len(panels) == 1 else 3.4) as axes:
        for axis, (column, title) in zip(axes.flat, panels.items(), strict=True):
            if level is not None:
                axis.axhline(level, color=GREY, linestyle="--", linewidth=1)
            for index, (name, part) in enumerate(table.groupby(series, sort=False)):
                look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
                x = part["parameters"] * APART ** (index - (count - 1) / 2)  # side by side
                means = part.groupby(x)[column].mean()
                axis.plot(means.index, means.values, color=look["color"], label=str(name), marker=look["marker"], ms=6)
                axis.scatter(x, part[column], alpha=0.4, s=30, linewidths=0, zorder=3, **look)
                if single and {"low", "high"} <= set(part.columns):
                    axis.vlines(x, part["low"], part["high"], color=look["color"], alpha=0.6)
            for index, star in enumerate(baselines):
                label = f"{star.name} ({star.win_rate:.2f})"
                axis.scatter(star.parameters, star.win_rate, marker="*", s=190, zorder=4, edgecolors="black",
                             linewidths=0.8, color=COLOURS[-1 - index % 3], label=label)  # fmt: skip
            axis.set_title(title)
            _size_axis(axis, table, baselines)
        axes[0][0].set_ylabel(y_label)
        _legend(axes)
    return True


def _legend(axes: Any) -> None:
    """To the right of the panels, where it hides nothing."""
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _size_axis(axis: Any, table: pd.DataFrame, baselines: Sequence[Baseline] = ()) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    sizes = table.drop_duplicates("size").sort_values("parameters")
    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks(sizes["parameters"], sizes["size"])
    known = [*sizes["parameters"], *(star.parameters for star in baselines)]
    axis.set_xlim(min(known) / 1.4, max(known) * 1.4)
    axis.set_xlabel("model size (parameters, log scale)")


def plot_mean_lengths(table: pd.DataFrame, unit: Unit, file: Path) -> bool:
    """Draw win rate against mean length: a dot per run, a colour per policy, a marker per size.

    Args:
        table: as of `lengths.mean_lengths`.
        unit: of the lengths.
        file: the PNG to write.
    """
    sizes, policies = list(table["size"].unique()), list(table["policy"].unique())
    with canvas(file, 1, 1, 5.6, 4.0) as axes:
        axis = axes[0][0]
        axis.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
        axis.axvline(table["reference_length"].mean(), color=GREY, linestyle=":", linewidth=1.4, label="reference")
        for index, policy in enumerate(policies):
            axis.plot([], [], color=COLOURS[index % len(COLOURS)], marker="o", linestyle="", label=policy)
        for index, size in enumerate(sizes):
            marker = MARKERS[index % len(MARKERS)]
            if len(sizes) > 1:
                axis.plot([], [], color=GREY, marker=marker, linestyle="", label=str(size))
            for number, policy in enumerate(policies):
                own = table[(table["size"] == size) & (table["policy"] == policy)]
                colour = COLOURS[number % len(COLOURS)]
                axis.scatter(own["length"], own["win_rate"], color=colour, marker=marker, s=46, alpha=0.8, linewidths=0)
        axis.set_xlabel(f"mean length of the responses ({unit})")
        axis.set_ylabel("win rate against the reference")
        _legend(axes)
    return True


def plot_length_controlled(bins: pd.DataFrame, fits: pd.DataFrame, file: Path) -> bool:
    """Draw win rate against log(length / reference length), a panel per size, all policies in each.

    Dots are bins with their intervals, as large as they have rows; lines are the logistic fits, over the bins that have
    rows; the ring on the dotted line is the length-adjusted win rate.

    Args:
        bins: as of `lengths.length_bins`.
        fits: as of `lengths.length_fits`.
        file: the PNG to write.
    """
    sizes = list(bins["size"].unique())
    columns = min(3, len(sizes))
    count = -(-len(sizes) // columns)
    width = 6.0 if len(sizes) == 1 else 4.2
    with canvas(file, count, columns, width, 3.9, sharex=True, sharey=True) as axes:
        for axis in axes.flat[len(sizes) :]:
            axis.set_axis_off()
        for axis, size in zip(axes.flat, sizes, strict=False):
            axis.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
            axis.axvline(0, color=GREY, linestyle=":", linewidth=1.2)
            own, own_fits = bins[bins["size"] == size], fits[fits["size"] == size]
            policies = list(own["policy"].unique())
            for index, policy in enumerate(policies):
                shift = (index - (len(policies) - 1) / 2) * WIDTH * 0.16
                colour = COLOURS[index % len(COLOURS)]
                _draw_bins(axis, own[own["policy"] == policy], shift, colour, policy)
                _draw_fit(axis, own[own["policy"] == policy], own_fits[own_fits["policy"] == policy].iloc[-1], colour)
            axis.set_title(str(size) if len(sizes) > 1 else "")
            axis.set_ylim(-0.02, 1.02)
            axis.set_xlabel("log(length / reference length)")
        for row in axes:
            row[0].set_ylabel("win rate against the reference")
        _legend(axes)
    return True


def _draw_bins(axis: Any, bins: pd.DataFrame, shift: float, colour: str, label: str) -> None:
    x = bins["bin"] + shift
    axis.vlines(x, bins["low"], bins["high"], color=colour, alpha=0.5, linewidth=1.2)
    area = 12 + 90 * bins["rows"] / bins["rows"].max()
    axis.scatter(x, bins["win_rate"], s=area, color=colour, alpha=0.75, linewidths=0)
    axis.plot([], [], color=colour, marker="o", label=label)


def _draw_fit(axis: Any, bins: pd.DataFrame, fitted: pd.Series, colour: str) -> None:
    if fitted["adjusted"] != fitted["adjusted"]:
        return
    x = np.linspace(bins["bin"].min() - WIDTH / 2, bins["bin"].max() + WIDTH / 2, 100)
    axis.plot(x, fitted_curve(fitted, x), color=colour)
    axis.plot([0], [fitted["adjusted"]], marker="o", ms=9, color=colour, mfc="white", mew=1.8, zorder=5)


def plot_calibration(bins: pd.DataFrame, file: Path) -> bool:
    """Draw accuracy against margin, a panel per split, and sigmoid(margin).

    A dot is a bin of a run, in the colour of its size; a line goes through the bins of all seeds of a size together.

    Args:
        bins: as of `calibration.calibration_bins`.
        file: the PNG to write.
    """
    splits, colours = list(bins["split"].unique()), size_colours(list(bins["size"].unique()))
    single = len(bins[["size", "seed"]].drop_duplicates()) == 1
    curve = np.linspace(0, max(1.0, bins["margin"].max() * 1.05), 200)
    with canvas(file, 1, len(splits), 5.6 if len(splits) == 1 else 4.4, 3.8, sharey=True) as axes:
        for axis, split in zip(axes.flat, splits, strict=True):
            axis.plot(
                curve, 1 / (1 + np.exp(-curve)), color="black", linestyle="--", linewidth=1.2, label="sigmoid(margin)"
            )
            for size, part in bins[bins["split"] == split].groupby("size", sort=False):
                weighted = part[["margin", "accuracy"]].mul(part["pairs"], axis=0).groupby(part["from"]).sum()
                line = weighted.div(part.groupby("from")["pairs"].sum(), axis=0)
                axis.plot(line["margin"], line["accuracy"], color=colours[size], label=str(size))
                axis.scatter(part["margin"], part["accuracy"], color=[colours[size]], s=20, alpha=0.55, linewidths=0)
                if single:
                    axis.vlines(part["margin"], part["low"], part["high"], color=colours[size], alpha=0.5)
            axis.set_title(split)
            axis.set_xlabel("|margin| (mean of the bin)")
        axes[0][0].set_ylabel("accuracy")
        _legend(axes)
    return True


def plot_course(table: pd.DataFrame, over: dict[str, str], file: Path) -> bool:
    """Draws proxy score, gold score and win rate over the course of PPO: a line per run, a colour per size.

    Args:
        table: as of `overoptimisation.course` or `validated_course`; each of its measures gets a panel.
        over: column on the x-axis -> its label; each gets a row of panels.
        file: the PNG to write.
    """
    titles = {"score": "score of the reward model", "gold": "gold score", "win_rate": "win rate against the reference"}
    shown = list(product(over.items(), measures(table)))
    colours = size_colours(list(table["size"].unique()))
    with canvas(file, len(over), len(shown) // len(over), 4.0, 3.5) as axes:
        for axis, ((x, x_label), name) in zip(axes.flat, shown, strict=True):
            seen: set[str] = set()
            for (size, _), part in table.sort_values("update").groupby(["size", "seed"], sort=False):
                known = part[part[name].notna()]
                label = None if size in seen else size
                seen.add(size)
                axis.plot(known[x], known[name], marker="o", ms=4, color=colours[size], alpha=0.85, label=label)
            if name == "win_rate":
                axis.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
            axis.set_title(titles.get(name, name.replace("_", " ")))
            axis.set_xlabel(x_label)
        if len(colours) > 1:
            _legend(axes)
    return True


def plot_stage(curves: pd.DataFrame, panels: Sequence[tuple[str, Sequence[str]]], x_label: str, file: Path) -> bool:
    """Draw the curves of a stage of several runs: a panel per curve, a line per run in the colour of its size.

    Args:
        curves: as of `curves.curve_rows`.
        panels: title and names of curves; each name that some run has gets a panel.
        x_label: of the x-axis.
        file: the PNG to write.
    """
    known = set(curves["curve"])
    shown = [(title, name) for title, names in panels for name in names if name in known]
    if not shown:
        return False
    sizes = size_colours(list(curves["size"].unique()))
    columns = min(3, len(shown))
    count = -(-len(shown) // columns)
    with canvas(file, count, columns, 4.0, 3.0) as axes:
        for axis in axes.flat[len(shown) :]:
            axis.set_axis_off()
        for axis, (title, name) in zip(axes.flat, shown, strict=False):
            seen: set[str] = set()
            for (size, _), part in curves[curves["curve"] == name].groupby(["size", "seed"], sort=False):
                label = None if size in seen else size
                seen.add(size)
                axis.plot(part["step"], part["value"], color=sizes[size], alpha=0.8, linewidth=1.2, label=label)
            axis.set_title(f"{title}\n{name}", fontsize=9)
            axis.set_xlabel(x_label)
        if len(sizes) > 1:
            _legend(axes)
    return True
