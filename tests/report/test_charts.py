from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageColor

from rlhf.report import charts
from rlhf.report.runs import Baseline


def data(panel: Any) -> list[pd.DataFrame]:
    """The numbers of each layer of a chart, as the page holds them."""
    spec = panel.to_dict()
    return [pd.DataFrame((layer.get("data") or spec["data"])["values"]) for layer in spec["layer"]]


@pytest.fixture
def rates() -> pd.DataFrame:
    """Two policies, two sizes, two seeds."""
    rows = [(s, p, seed, policy, r + seed / 100) for s, p in (("1b", 10**9), ("7b", 7 * 10**9)) for seed in (1, 2)
            for policy, r in (("SFT", 0.3), ("PPO", 0.6))]  # fmt: skip
    return pd.DataFrame(rows, columns=["size", "parameters", "seed", "policy", "win_rate"]).assign(low=0.1, high=0.9)


def test_win_rate_against_size_has_every_seed_their_means_and_every_star(rates: pd.DataFrame, tmp_path: Path) -> None:
    panels = charts.against_size(rates, {"win_rate": "Win rate"}, baselines=[Baseline("GPT", 2 * 10**9, 0.7)])
    points, means, stars, _ = data(panels["Win rate"])
    assert points["win_rate"].tolist() == rates["win_rate"].tolist()
    assert means.set_index(["policy", "parameters"])["win_rate"]["PPO", 10**9] == pytest.approx(0.615)
    assert stars.iloc[0].tolist() == ["GPT", 2 * 10**9, 0.7]
    charts.save_png(panels, tmp_path / "x.png")
    for colour in charts.COLOURS[:2]:
        picture = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"), int)
        assert (np.abs(picture - ImageColor.getrgb(colour)).max(-1) < 5).any()


def test_only_one_seed_per_size_has_intervals(rates: pd.DataFrame) -> None:
    def marks(table: pd.DataFrame) -> list[str]:
        spec = charts.against_size(table, {"win_rate": "Win rate"})["Win rate"].to_dict()
        return [layer["mark"]["type"] for layer in spec["layer"]]

    assert "rule" not in marks(rates)
    assert "rule" in marks(rates[rates["seed"] == 1])


def test_curves_of_one_run_share_a_panel_and_those_of_several_do_not() -> None:
    table = pd.DataFrame({"size": "1b", "seed": 1, "curve": ["kl", "kl", "loss"], "step": [1, 2, 1], "value": 1.0})
    panels = {"both": ["kl", "loss"], "None": ["none"]}
    assert list(charts.curves(table, panels, "episodes")) == ["both"]
    several = pd.concat([table, table.assign(seed=2)])
    made = charts.curves(several, panels, "episodes")
    assert list(made) == ["both: kl", "both: loss"]
    assert data(made["both: kl"])[0]["run"].unique().tolist() == ["1b, seed 1", "1b, seed 2"]


def test_runs_of_several_sizes_and_seeds_have_the_colour_of_their_size_and_the_dashes_of_their_seed() -> None:
    rows = [(size, seed, "kl", step, 1.0) for size in ("1b", "7b") for seed in (1, 2) for step in (1, 2)]
    table = pd.DataFrame(rows, columns=["size", "seed", "curve", "step", "value"])

    def look(table: pd.DataFrame) -> dict[str, Any]:
        [panel] = charts.curves(table, {"KL": ["kl"]}, "episodes").values()
        return {
            name: each["field"] for name, each in panel.to_dict()["layer"][0]["encoding"].items() if "scale" in each
        }

    assert look(table) == {"x": "step", "y": "value", "color": "size", "strokeDash": "seed"}
    one_seed = table[(table["seed"] == 1) | (table["size"] == "7b")]
    assert look(one_seed[one_seed["seed"] == 1]) == {"x": "step", "y": "value", "color": "run", "strokeDash": "run"}


def test_a_long_curve_is_thinned_and_keeps_its_last_point() -> None:
    steps = np.arange(1, 2500)
    table = pd.DataFrame({"size": "1b", "seed": 1, "curve": "kl", "step": steps, "value": steps / 7})
    shown = data(charts.curves(table, {"KL": ["kl"]}, "episodes")["KL"])[0]
    assert len(shown) == 500  # every fifth
    assert shown["step"].iloc[-1] == 2499
    assert shown["value"].tolist() == pytest.approx((shown["step"] / 7).tolist())


def test_lengths_without_a_fit_have_their_bins_only() -> None:
    """A layer without a number makes Vega complain on the console."""
    bins = pd.DataFrame({"size": "s", "policy": ["a", "b"], "bin": 0.0, "win_rate": 0.5, "low": 0.1, "high": 0.9})
    fits = pd.DataFrame({"size": "s", "policy": ["a", "b"], "adjusted": [0.5, None], "slope": [1.0, None]})
    *_, curves = data(charts.length_controlled(bins, fits)["Win rate by length"])
    assert curves["policy"].unique().tolist() == ["a"]


def test_series_are_told_apart_without_colour(rates: pd.DataFrame) -> None:
    spec = charts.mean_lengths(rates.assign(length=3.0, reference_length=4.0), "tokens")
    encoding = spec["Win rate and mean length"].to_dict()["layer"][0]["encoding"]
    assert encoding["shape"]["scale"]["domain"] == encoding["color"]["scale"]["domain"] == ["SFT", "PPO"]
