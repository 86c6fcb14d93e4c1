"""Figures of reports, as PNG. This module imports seaborn, so it is imported only when figures are drawn."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from rlhf.report.calibration import sigmoid
from rlhf.report.lengths import WIDTH, Unit, fitted_curve
from rlhf.report.overoptimisation import measures
from rlhf.report.runs import Baseline

# The colours of Okabe and Ito, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "0.45"
DASHED: Any = {"color": GREY, "linestyle": "--", "linewidth": 1}
DOTTED: Any = {"color": GREY, "linestyle": ":", "linewidth": 1.3}
RUNS: Any = {"units": "seed", "estimator": None, "hue": "size"}  # a line per run, in the colour of its size
WIN_RATE = "win rate against the reference"


@contextmanager
def canvas(
    file: Path, count: int, columns: int = 3, height: float = 3.4, legend: bool = True, **settings: Any
) -> Iterator[list[Axes]]:
    """Yields panels to draw in, at most `columns` in a row, and writes them to a file at the end.

    The legend is that of the first panel, to the right of all; without `legend` each panel has its own.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    with sns.axes_style("whitegrid", {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure((5.6 if count == 1 else 4.0 * columns, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **settings)
        for axis in axes.flat[count:]:
            axis.set_axis_off()
        yield list(axes.flat[:count])
        for axis in axes.flat[:count]:
            axis.legend().set_visible(not legend)
        if legend:
            figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
        figure.savefig(file, dpi=120)


def palette(names: pd.Series) -> dict[Any, str]:
    """Returns a colour per name."""
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names.unique())}


def size_palette(sizes: pd.Series) -> dict[Any, Any]:
    """Returns a colour per size, from dark to light as sizes grow."""
    return dict(zip(sizes.unique(), sns.color_palette("viridis", sizes.nunique()), strict=True))


def side_by_side(names: pd.Series) -> pd.Series:
    """Returns a number per row, evenly spaced around 0 and equal for equal names."""
    return names.map({name: index for index, name in enumerate(names.unique())}) - (names.nunique() - 1) / 2


def plot_against_size(
    table: pd.DataFrame,
    panels: Mapping[str, str],
    file: Path,
    series: str = "policy",
    baselines: Sequence[Baseline] = (),
    level: float | None = None,
) -> None:
    """Draws numbers against model size: a dot per seed, a line through the means per series.

    With one seed per size the dots have error bars, where the table has `low` and `high`. Baselines are stars, and
    `level` is the height of a dashed line. `panels` has columns and the titles of their panels.
    """
    colours, sizes = palette(table[series]), table.drop_duplicates("size")
    table = table.assign(x=table["parameters"] * 1.03 ** side_by_side(table[series]))
    look: Any = {"x": "x", "hue": series, "style": series, "palette": colours, "markers": True}
    single = not table.duplicated(["size", series]).any()
    known = [*sizes["parameters"], *(star.parameters for star in baselines)]
    with canvas(file, len(panels)) as axes:
        for axis, (column, title) in zip(axes, panels.items(), strict=True):
            sns.lineplot(table, y=column, errorbar=None, dashes=False, markersize=8, ax=axis, **look)
            sns.scatterplot(table, y=column, alpha=0.4, legend=False, ax=axis, **look)
            if single and {"low", "high"} <= set(table):
                axis.vlines(table["x"], table["low"], table["high"], colors=table[series].map(colours), alpha=0.6)
            if level is not None:
                axis.axhline(level, **DASHED)
            for index, star in enumerate(baselines):
                shape: Any = {"marker": "*", "s": 190, "edgecolors": "black", "color": COLOURS[-1 - index % 3]}
                label = f"{star.name} ({star.win_rate:.2f})"
                axis.scatter(star.parameters, star.win_rate, zorder=4, label=label, **shape)
            axis.set(title=title, xlabel="model size (parameters, log scale)", ylabel="")
            axis.set(xscale="log", xlim=(min(known) / 1.4, max(known) * 1.4))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xticks(sizes["parameters"], sizes["size"])


def plot_mean_lengths(table: pd.DataFrame, unit: Unit, file: Path) -> None:
    """Draws win rate against mean length, as returned by `lengths.mean_lengths`: a dot per run and policy."""
    style = "size" if table["size"].nunique() > 1 else None
    look: Any = {"hue": "policy", "style": style, "palette": palette(table["policy"]), "s": 60, "alpha": 0.8}
    with canvas(file, 1) as [axis]:
        axis.axhline(0.5, **DASHED)
        axis.axvline(table["reference_length"].mean(), label="reference", **DOTTED)
        sns.scatterplot(table, x="length", y="win_rate", ax=axis, **look)
        axis.set(xlabel=f"mean length of the responses ({unit})", ylabel=WIN_RATE)


def plot_length_controlled(bins: pd.DataFrame, fits: pd.DataFrame, file: Path) -> None:
    """Draws `lengths.length_bins` and `lengths.length_fits`, a panel per size, all policies in each.

    Dots are bins with their intervals, as large as they have rows; lines are the logistic fits, over the bins that have
    rows; the ring on the dotted line is the length-adjusted win rate.
    """
    colours = palette(bins["policy"])
    bins = bins.assign(x=bins["bin"] + side_by_side(bins["policy"]) * WIDTH * 0.16)
    look: Any = {"hue": "policy", "palette": colours, "size": "rows", "sizes": (15, 100), "alpha": 0.75}
    fits = fits.drop_duplicates(["size", "policy"], keep="last")  # over all seeds
    with canvas(file, bins["size"].nunique(), sharex=True, sharey=True) as axes:
        for axis, (size, own) in zip(axes, bins.groupby("size", sort=False), strict=True):
            axis.axhline(0.5, **DASHED)
            axis.axvline(0, **DOTTED)
            axis.vlines(own["x"], own["low"], own["high"], colors=own["policy"].map(colours), alpha=0.5)
            sns.scatterplot(own, x="x", y="win_rate", ax=axis, **look)
            for _, fitted in fits[fits["size"] == size].iterrows():
                centres, colour = own["bin"][own["policy"] == fitted["policy"]], colours[fitted["policy"]]
                x = np.linspace(centres.min() - WIDTH / 2, centres.max() + WIDTH / 2, 100)
                axis.plot(x, fitted_curve(fitted, x), color=colour)
                axis.plot(0, fitted["adjusted"], marker="o", markersize=9, color=colour, markerfacecolor="white")
            axis.set(title=size, ylim=(-0.02, 1.02), xlabel="log(length / reference length)", ylabel=WIN_RATE)
            axis.label_outer()


def plot_calibration(bins: pd.DataFrame, file: Path) -> None:
    """Draws accuracy against margin, as returned by `calibration.calibration_bins`, and sigmoid(margin).

    Each split has a panel. A dot is a bin of a run, in the colour of its size; a line goes through the bins of all
    seeds of a size together.
    """
    numbers, colours = ["margin", "accuracy"], size_palette(bins["size"])
    sums = bins.assign(**bins[numbers].mul(bins["pairs"], axis=0)).groupby(["split", "size", "from"], sort=False)
    sums = sums[[*numbers, "pairs"]].sum().reset_index()
    lines = sums.assign(**sums[numbers].div(sums["pairs"], axis=0))
    single = len(bins[["size", "seed"]].drop_duplicates()) == 1
    look: Any = {"x": "margin", "y": "accuracy", "hue": "size", "palette": colours}
    x = np.linspace(0, max(1.0, bins["margin"].max() * 1.05), 200)
    with canvas(file, bins["split"].nunique(), sharey=True) as axes:
        for axis, (split, own) in zip(axes, bins.groupby("split", sort=False), strict=True):
            axis.plot(x, sigmoid(x), color="black", linestyle="--", label="sigmoid(margin)")
            sns.lineplot(lines[lines["split"] == split], ax=axis, **look)
            sns.scatterplot(own, alpha=0.55, legend=False, ax=axis, **look)
            if single:
                axis.vlines(own["margin"], own["low"], own["high"], colors=own["size"].map(colours), alpha=0.5)
            axis.set(title=split, xlabel="|margin| (mean of the bin)")


def plot_course(table: pd.DataFrame, over: Mapping[str, str], file: Path) -> None:
    """Draws each measure over the course of PPO, a line per run; `over` has the columns of x-axes and their labels."""
    titles = {"score": "score of the reward model", "gold": "gold score", "win_rate": WIN_RATE}
    names = measures(table)
    look: Any = {**RUNS, "palette": size_palette(table["size"]), "marker": "o", "sort": False}
    with canvas(file, len(over) * len(names), len(names)) as axes:
        for axis, ((x, x_label), name) in zip(axes, product(over.items(), names), strict=True):
            sns.lineplot(table.sort_values("update"), x=x, y=name, ax=axis, **look)
            axis.set(title=titles.get(name, name.replace("_", " ")), xlabel=x_label, ylabel="")
            if name == "win_rate":
                axis.axhline(0.5, **DASHED)


def plot_curves(curves: pd.DataFrame, panels: Mapping[str, Sequence[str]], x_label: str, file: Path) -> None:
    """Draws the curves of a stage: those of one run together in their panel; of several runs, each in a panel.

    `panels` has titles and the names of their curves, of which at least one is there.
    """
    several = len(curves[["size", "seed"]].drop_duplicates()) > 1
    if several:
        panels = {f"{title}\n{name}": [name] for title, names in panels.items() for name in names}
    parts = {title: part for title, names in panels.items() if len(part := curves[curves["curve"].isin(names)])}
    look: Any = {**RUNS, "palette": size_palette(curves["size"])} if several else {"hue": "curve"}
    with canvas(file, len(parts), legend=several) as axes:
        for axis, (title, part) in zip(axes, parts.items(), strict=True):
            few = part.groupby(["size", "seed", "curve"]).size().max() < 10
            sns.lineplot(part, x="step", y="value", marker="o" if few else None, ax=axis, **look)
            axis.set(title=title, xlabel=x_label, ylabel="")


def plot_ablations(points: pd.DataFrame, default: str, metrics: Sequence[str], file: Path) -> None:
    """Draws each ablation in colour over the default in grey: a row per ablation, a column per metric.

    A line is the mean over seeds, a band reaches from the lowest to the highest seed. Points are rows of `ablation`
    (`default` is one), `seed`, `metric`, `episodes` and `value`; metrics without points are left out.
    """
    names = [name for name in points["ablation"].unique() if name != default] or [default]
    shown = [metric for metric in metrics if (points["metric"] == metric).any()]
    look: Any = {"errorbar": ("pi", 100), "palette": {"default": GREY, "ablation": "tab:red"}}
    with canvas(file, len(names) * len(shown), len(shown), 1.9, sharex=True, sharey="col") as axes:
        for axis, (name, metric) in zip(axes, product(names, shown), strict=True):
            own = points[points["ablation"].isin([default, name]) & (points["metric"] == metric)]
            kind = own["ablation"].map({default: "default"}).fillna("ablation")
            sns.lineplot(own, x="episodes", y="value", hue=kind, ax=axis, **look)
            axis.set(title=metric if name == names[0] else "", xlabel="episodes" if name == names[-1] else "")
            axis.set_ylabel(name.replace("_", "\n") if metric == shown[0] else "")
