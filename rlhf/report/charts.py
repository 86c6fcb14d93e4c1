"""Charts of reports, by Altair: interactive in report.html, PNG in report.md. Imported only when a page is made."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from rlhf.report.calibration import sigmoid
from rlhf.report.lengths import WIDTH, Unit, fitted_curve
from rlhf.report.overoptimisation import measures
from rlhf.report.runs import Baseline

Panels = dict[str, alt.TopLevelMixin]  # charts by title, to be shown beside each other
# The colours of Okabe and Ito, which the colour-blind can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
CONFIG: dict[str, Any] = {
    "range": {"category": COLOURS}, "view": {"stroke": None}, "line": {"strokeWidth": 1.8},
}  # fmt: skip
# In a browser the colours are those of the page, light or dark.
HTML_CONFIG = CONFIG | {
    "background": None, "font": "system-ui, sans-serif",
    "range": {"category": [f"var(--series{index})" for index in range(len(COLOURS))]},
    "axis": {"labelColor": "var(--muted)", "titleColor": "var(--muted)", "gridColor": "var(--line)",
             "domainColor": "var(--line)", "tickColor": "var(--line)", "titleFontWeight": "normal"},
    "legend": {"labelColor": "var(--fg)", "titleColor": "var(--muted)", "symbolFillColor": None},
}  # fmt: skip
LEVEL: dict[str, Any] = {"color": "#888888", "strokeDash": [4, 4]}
LENGTH_RATIO = "log(length / reference length)"
WIN_RATE = "win rate against the reference"
POINTS = 500  # of a curve; a longer one shows every n-th


def chart(table: pd.DataFrame) -> alt.Chart:
    """Makes a chart of a table, whose numbers it holds; NaN is a gap."""
    return alt.Chart(alt.Data(values=json.loads(table.to_json(orient="records", double_precision=12))))


def drawn_by(series: str, table: pd.DataFrame, second: str = "strokeDash") -> dict[str, Any]:
    """Tells series apart by colour and also by dashes or shape; one series alone has no legend.

    Runs of several sizes and seeds have the colour of their size and the dashes of their seed. All layers of a chart
    take the same, or Vega-Lite makes a legend of each.
    """
    sized = series == "run" and _seeds_of_sizes(table)
    line: Any = {"symbolType": "stroke", "symbolStrokeWidth": 2, "symbolSize": 300} if second == "strokeDash" else {}
    look: dict[str, Any] = {}
    for name, column in (("color", "size" if sized else series), (second, "seed" if sized else series)):
        names = table[column].unique().tolist()
        columns = 1 if max(len(str(name)) for name in names) > 16 else 3
        legend = alt.Legend(orient="top", title=column if sized else None, columns=columns, labelLimit=300, **line)
        make = {"color": alt.Color, "strokeDash": alt.StrokeDash, "shape": alt.Shape}[name]
        look[name] = make(f"{column}:N", scale=alt.Scale(domain=names), legend=legend if len(names) > 1 else None)
    return look


def number(column: str, title: str, axis: Any = alt.X) -> Any:
    """Makes an axis of numbers, which need not begin at 0."""
    ticks = alt.Axis(tickCount=6)
    return axis(f"{column}:Q", title=title, axis=ticks, scale=alt.Scale(zero=False, nice=False, padding=8))


def hover(table: pd.DataFrame) -> list[alt.Tooltip]:
    """Shows all columns of a point under the mouse."""
    numeric = [name for name in table if pd.api.types.is_float_dtype(table[name])]
    return [
        alt.Tooltip(name, type="quantitative" if name in numeric else "nominal", **_format(name in numeric))
        for name in map(str, table)
        if name != "parameters"
    ]


def _format(is_number: bool) -> dict[str, Any]:
    return {"format": ".4~g"} if is_number else {}


def several(table: pd.DataFrame) -> bool:
    """Tells whether a table has more than one run."""
    return len(table[["size", "seed"]].drop_duplicates()) > 1


def level(y: float, axis: str = "y") -> alt.Chart:
    """Draws a dashed line."""
    return chart(pd.DataFrame({axis: [y]})).mark_rule(clip=True, **LEVEL).encode(**{axis: alt.datum(y)})


def bars(table: pd.DataFrame, x: Any, look: dict[str, Any], title: str = WIN_RATE) -> alt.Chart:
    """Draws 95% intervals."""
    encoded: Any = {"x": x, "y": number("low", title, alt.Y), "y2": "high:Q", **look}
    return chart(table).mark_rule(clip=True, opacity=0.6).encode(**encoded)


def against_size(
    table: pd.DataFrame, panels: Mapping[str, str], series: str = "policy", baselines: Sequence[Baseline] = ()
) -> Panels:
    """Shows numbers against model size: a point per seed, a line through their means, stars for baselines.

    `panels` has columns and the titles of their panels. One seed per size has intervals, where the table has them.
    """
    look = drawn_by(series, table)
    ticks = alt.Axis(values=sorted(set(table["parameters"])), format=".3~s")
    scale = alt.Scale(type="log", nice=False, padding=20)
    x = alt.X("parameters:Q", title="model size (parameters)", axis=ticks, scale=scale)
    single = not table.duplicated(["size", series]).any()
    made: Panels = {}
    for column, title in panels.items():
        y = number(column, title, alt.Y)
        means = table.groupby([series, "parameters"], sort=False)[column].mean().reset_index()
        layers = [
            chart(table).mark_point(clip=True, filled=True, size=60).encode(x=x, y=y, tooltip=hover(table), **look),
            chart(means).mark_line(clip=True).encode(x=x, y=y, **look),
        ]
        if single and {"low", "high"} <= set(table):
            layers.append(bars(table, x, look, title))
        if baselines:
            stars = pd.DataFrame([(s.name, s.parameters, s.win_rate) for s in baselines])
            stars.columns = pd.Index(["name", "parameters", column])
            star = (
                "M0,-1L0.24,-0.32L0.95,-0.31L0.38,0.12L0.59,0.81L0,0.4L-0.59,0.81L-0.38,0.12L-0.95,-0.31L-0.24,-0.32Z"
            )
            base = chart(stars).encode(x=x, y=y, tooltip=hover(stars))
            layers.append(base.mark_point(clip=True, shape=star, size=150, filled=True, color=COLOURS[4]))
            layers.append(base.mark_text(dy=-14, color=COLOURS[4]).encode(text="name:N"))
        made[title] = alt.layer(*layers)
    return made


def win_rates(table: pd.DataFrame) -> Panels:
    """Shows the win rate of each policy of each run with its interval, below each other."""
    table = _named(table).assign(name=lambda rows: rows["policy"] + (", " + rows["run"] if several(rows) else ""))
    y = alt.Y("name:N", sort=None, title=None)
    look = drawn_by("policy", table, "shape")
    x = alt.X("win_rate:Q", title=WIN_RATE, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"))
    points = chart(table).mark_point(clip=True, filled=True, size=90).encode(x=x, y=y, tooltip=hover(table), **look)
    interval = chart(table).mark_rule(clip=True).encode(x="low:Q", x2="high:Q", y=y, color=look["color"])
    return {"Win rate with its 95% interval": alt.layer(points, interval, level(0.5, "x"))}


def mean_lengths(table: pd.DataFrame, unit: Unit) -> Panels:
    """Shows win rate against mean length, as returned by `lengths.mean_lengths`: a point per run and policy."""
    x, y = number("length", f"mean length of the responses ({unit})"), number("win_rate", WIN_RATE, alt.Y)
    points = (
        chart(table).mark_point(clip=True, filled=True, size=90).encode(x=x, y=y, **drawn_by("policy", table, "shape"))
    )
    lines = level(table["reference_length"].mean(), "x"), level(0.5)
    return {"Win rate and mean length": alt.layer(points.encode(tooltip=hover(table)), *lines)}


def length_controlled(bins: pd.DataFrame, fits: pd.DataFrame) -> Panels:
    """Shows `lengths.length_bins` and the curves of `lengths.length_fits`, a panel per size."""
    fits = fits.drop_duplicates(["size", "policy"], keep="last").dropna(subset="adjusted")  # over all seeds
    made: Panels = {}
    for size, own in bins.groupby("size", sort=False):
        look = drawn_by("policy", own)
        curves = []
        for _, fitted in fits[fits["size"] == size].iterrows():
            centres = own["bin"][own["policy"] == fitted["policy"]]
            x = np.linspace(centres.min() - WIDTH / 2, centres.max() + WIDTH / 2, 60)
            curves.append(pd.DataFrame({"policy": fitted["policy"], "bin": x, "win_rate": fitted_curve(fitted, x)}))
        axis, y = number("bin", LENGTH_RATIO), number("win_rate", WIN_RATE, alt.Y)
        points = chart(own).mark_point(clip=True, filled=True, size=70).encode(x=axis, y=y, tooltip=hover(own), **look)
        layers = [points, bars(own, axis, look), level(0.5)]
        if curves:
            fit = pd.concat(curves)
            layers.append(chart(fit).mark_line(clip=True).encode(x=axis, y=y, **look))
        title = "Win rate by length" if bins["size"].nunique() == 1 else f"Win rate by length, size {size}"
        made[title] = alt.layer(*layers)
    return made


def calibration(bins: pd.DataFrame) -> Panels:
    """Shows accuracy against margin, as returned by `calibration.calibration_bins`, a panel per split.

    A point is a bin of a run; a line goes through the bins of all seeds of a size; the dashed line is sigmoid(margin).
    """
    numbers = ["margin", "accuracy"]
    sums = bins.assign(**bins[numbers].mul(bins["pairs"], axis=0)).groupby(["split", "size", "from"], sort=False)
    totals = sums[[*numbers, "pairs"]].sum().reset_index()
    lines = totals.assign(**totals[numbers].div(totals["pairs"], axis=0))
    ideal = pd.DataFrame({"margin": np.linspace(0, max(1.0, bins["margin"].max() * 1.05), 60)})
    ideal = ideal.assign(accuracy=sigmoid(ideal["margin"].to_numpy()))
    x, y = number("margin", "|margin| (mean of the bin)"), number("accuracy", "accuracy", alt.Y)
    made: Panels = {}
    for split, own in bins.groupby("split", sort=False):
        look, line = drawn_by("size", own), lines[lines["split"] == split]
        layers = [
            chart(own).mark_point(clip=True, filled=True, size=60).encode(x=x, y=y, tooltip=hover(own), **look),
            chart(line).mark_line(clip=True).encode(x=x, y=y, **look),
            chart(ideal).mark_line(clip=True, **LEVEL).encode(x=x, y=y),
        ]
        if not several(bins):
            layers.append(bars(own, x, look, "accuracy"))
        made[f"Calibration on {split}"] = alt.layer(*layers)
    return made


def course(table: pd.DataFrame) -> Panels:
    """Shows each measure over the root of the KL of PPO, a line per run."""
    titles = {"score": "Score of the reward model", "gold": "Gold score", "win_rate": "Win rate"}
    made: Panels = {}
    for name in measures(table):
        title = titles.get(name, name.replace("_", " ").capitalize())
        own = _named(table).rename(columns={name: "value"})
        own = own[[*_of_run(own), "update", "sqrt_kl", "value"]].sort_values("update")
        made[f"{title} and KL"] = _lines(own, "sqrt_kl", "√KL (√nats)", title, "run", alt.Order("update:Q"))
    return made


def curves(table: pd.DataFrame, panels: Mapping[str, Sequence[str]], x_label: str) -> Panels:
    """Shows the curves of a stage: those of one run together in their panel; of several runs, each in a panel."""
    if several(table):
        panels = {f"{title}: {name}": [name] for title, names in panels.items() for name in names}
    made: Panels = {}
    for title, names in panels.items():
        part = _named(table[table["curve"].isin(names)])
        if len(part):
            place = part.groupby(["run", "curve"], sort=False).cumcount(ascending=False)
            every = -(-part.groupby(["run", "curve"], sort=False)["step"].transform("size") // POINTS)
            part = part[place % every == 0][[*_of_run(part), "curve", "step", "value"]]
            made[title] = _lines(part, "step", x_label, "", "run" if several(table) else "curve")
    return made


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """Adds `run`, what tells the runs of a table apart."""
    twice = table.drop_duplicates(["size", "seed"])["size"].duplicated().any()
    seeds = ", seed " + table["seed"].astype(str) if twice else ""
    return table.assign(run=table["size"].astype(str) + seeds)


def _seeds_of_sizes(table: pd.DataFrame) -> bool:
    return "size" in table and 1 < table["size"].nunique() < table["run"].nunique()


def _of_run(table: pd.DataFrame) -> list[str]:
    return ["run", "size", "seed"] if _seeds_of_sizes(table) else ["run"]


def _lines(
    table: pd.DataFrame, x: str, x_label: str, y_label: str, series: str, order: Any = None
) -> alt.TopLevelMixin:
    few = table.groupby(series).size().max() < 20
    dots: Any = {"filled": True, "size": 50, "opacity": 1 if few else 0}  # those of long curves only catch the mouse
    axes: Any = {"x": number(x, x_label), "y": number("value", y_label, alt.Y)}
    line: Any = {"order": order} if order is not None else {}
    base, look = chart(table).encode(**axes), drawn_by(series, table)  # one copy of the numbers for both layers
    shown = hover(table.drop(columns=["size", "seed"], errors="ignore"))  # which stand in `run`
    points = base.mark_point(clip=True, **dots).encode(**look, tooltip=shown)
    return alt.layer(base.mark_line(clip=True).encode(**look, **line), points)


def ablations(points: pd.DataFrame, default: str, metrics: Sequence[str]) -> Panels:
    """Shows each ablation in colour over the default in grey: a panel per ablation and metric.

    A line is the mean over seeds, a band reaches from the lowest to the highest seed. Points are rows of `ablation`
    (`default` is one), `seed`, `metric`, `episodes` and `value`; metrics without points are left out.
    """
    kinds = alt.Scale(domain=["default", "ablation"], range=[LEVEL["color"], COLOURS[1]])
    made: Panels = {}
    for name in [name for name in points["ablation"].unique() if name != default] or [default]:
        for metric in metrics:
            known = points[points["metric"] == metric]
            own = known[known["ablation"].isin([default, name])][["ablation", "episodes", "value"]]
            own = own.assign(ablation=own["ablation"].map({default: "default"}).fillna("ablation"))
            ends = [known["value"].min(), known["value"].max()]
            y: Any = {"title": metric, "scale": alt.Scale(domain=ends)}  # the same for all ablations
            legend = None if made else alt.Legend(orient="top-left", title=None)
            base = chart(own).encode(x=number("episodes", "episodes"))
            base = base.encode(color=alt.Color("ablation:N", scale=kinds, legend=legend))
            band = base.mark_area(opacity=0.25).encode(y=alt.Y("min(value):Q", **y), y2="max(value):Q")
            line = base.mark_line().encode(y=alt.Y("mean(value):Q", **y))
            made[f"{name.replace('_', ' ')}: {metric}"] = alt.layer(band, line)
    return made


def against_kl(points: pd.DataFrame, measures: Mapping[str, str]) -> Panels:
    """Shows measures against the KL to the SFT model: a dot per `method`, `seed` and `point`, a line through the means.

    `measures` has columns and the titles of their panels.
    """
    look, x = drawn_by("method", points, "shape"), number("kl", "KL to the SFT model (nats per response)")
    means = points.groupby(["method", "point"], sort=False)[["kl", *measures]].mean().reset_index()
    made: Panels = {}
    for column, title in measures.items():
        y = number(column, title, alt.Y)
        dots = chart(points).mark_point(clip=True, filled=True, size=35, opacity=0.6)
        line = chart(means).mark_line(clip=True).encode(x=x, y=y, order=alt.Order("point:Q"), color=look["color"])
        made[title] = alt.layer(dots.encode(x=x, y=y, tooltip=hover(points), **look), line)
    return made


def save_png(panels: Mapping[str, Any], file: Path, columns: int = 3) -> None:
    """Writes charts as one PNG, some in a row."""
    charts = [made.properties(title=title, width=280, height=200) for title, made in panels.items()]
    whole = alt.concat(*charts, columns=columns).resolve_scale(
        color="independent", shape="independent", strokeDash="independent"
    )
    whole.configure(**CONFIG, background="white").save(str(file), format="png", scale_factor=1.6)


def specs(panels: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns charts as Vega-Lite, as wide as the page lets them be.

    Dragging moves them, shift and the wheel zoom (the wheel alone moves the page), a double click goes back.
    """
    found = {}
    for title, made in panels.items():
        encoding = made.to_dict()["layer"][0]["encoding"]
        axes: Any = [name for name in ("x", "y") if encoding[name]["type"] == "quantitative"]
        zoom = alt.selection_interval(bind="scales", zoom="wheel![event.shiftKey]", encodings=axes)
        look = {"width": "container", "height": 220, "description": title, "config": HTML_CONFIG}
        found[title] = made.add_params(zoom).to_dict() | look
    return found
