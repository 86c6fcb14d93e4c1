"""The figure of ablations, as PNG. This module imports seaborn, so it is imported only when it is drawn."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

GREY = "0.45"


def plot_ablations(points: pd.DataFrame, default: str, metrics: Sequence[str], file: Path) -> None:
    """Draws each ablation in colour over the default in grey: a row per ablation, a column per metric.

    A line is the mean over seeds, a band reaches from the lowest to the highest seed. Points are rows of `ablation`
    (`default` is one), `seed`, `metric`, `episodes` and `value`; metrics without points are left out.
    """
    names = [name for name in points["ablation"].unique() if name != default] or [default]
    shown = [metric for metric in metrics if (points["metric"] == metric).any()]
    look: Any = {"errorbar": ("pi", 100), "palette": {"default": GREY, "ablation": "tab:red"}}
    with sns.axes_style("whitegrid", {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure((4.0 * len(shown), 1.9 * len(names)), layout="constrained")
        axes = figure.subplots(len(names), len(shown), squeeze=False, sharex=True, sharey="col")
    for axis, (name, metric) in zip(axes.flat, product(names, shown), strict=True):
        own = points[points["ablation"].isin([default, name]) & (points["metric"] == metric)]
        kind = own["ablation"].map({default: "default"}).fillna("ablation")
        sns.lineplot(own, x="episodes", y="value", hue=kind, ax=axis, **look)
        axis.set(title=metric if name == names[0] else "", xlabel="episodes" if name == names[-1] else "")
        axis.set_ylabel(name.replace("_", "\n") if metric == shown[0] else "")
        axis.legend().set_visible(False)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(file, dpi=120)
