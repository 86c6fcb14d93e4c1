from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from rlhf.report.figures import COLOURS, plot_against_size, plot_curves, size_palette
from rlhf.report.runs import Baseline


def drawn(file: Path, colour: str) -> bool:
    """Whether the picture has this colour."""
    return bool((np.abs(imread(file)[..., :3] - to_rgb(colour)).max(-1) < 0.02).any())


@pytest.fixture
def rates() -> pd.DataFrame:
    """Two policies, two sizes, two seeds."""
    rows = [(s, p, seed, policy, r) for s, p in (("1b", 10**9), ("7b", 7 * 10**9)) for seed in (1, 2)
            for policy, r in (("SFT", 0.3), ("PPO", 0.6))]  # fmt: skip
    return pd.DataFrame(rows, columns=["size", "parameters", "seed", "policy", "win_rate"]).assign(low=0.1, high=0.9)


def test_win_rate_against_size_has_every_policy_and_every_star(rates: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    stars = [Baseline("GPT", 2 * 10**9, 0.7)]
    plot_against_size(rates, {"win_rate": "Win rate"}, file, baselines=stars, level=0.5)
    assert drawn(file, COLOURS[0])
    assert drawn(file, COLOURS[1])
    assert drawn(file, COLOURS[-1])  # the star
    plot_against_size(rates, {"win_rate": "Win rate"}, file)
    assert not drawn(file, COLOURS[-1])


def test_one_size_and_one_seed(rates: pd.DataFrame, tmp_path: Path) -> None:
    one = rates[(rates["size"] == "1b") & (rates["seed"] == 1)]
    plot_against_size(one.assign(parameters=1), {"win_rate": ""}, tmp_path / "x.png")
    assert drawn(tmp_path / "x.png", COLOURS[0])


def test_sizes_have_colours_of_their_own() -> None:
    colours = [tuple(colour) for colour in size_palette(pd.Series(["1b", "3b", "7b"])).values()]
    brightness = [sum(colour[:3]) for colour in colours]
    assert len(set(colours)) == 3
    assert brightness == sorted(brightness)


def test_a_panel_per_curve_that_some_run_has(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"size": ["1b", "1b", "7b"], "seed": 1, "curve": "kl", "step": [1, 2, 1], "value": [0.0, 1, 2]}
    )
    plot_curves(table, {"KL": ["kl", "none"]}, "episodes", tmp_path / "x.png")
    both = pd.concat([table, table.assign(curve="loss")])
    plot_curves(both, {"KL": ["kl", "loss"], "None": ["none"]}, "episodes", tmp_path / "y.png")
    assert imread(tmp_path / "y.png").shape[1] > 1.4 * imread(tmp_path / "x.png").shape[1]


def test_curves_of_one_run_share_their_panel(tmp_path: Path) -> None:
    table = pd.DataFrame({"size": "1b", "seed": 1, "curve": ["kl", "kl", "loss"], "step": [1, 2, 1], "value": 1.0})
    plot_curves(table, {"KL": ["kl"]}, "episodes", tmp_path / "x.png")
    plot_curves(table, {"both": ["kl", "loss"], "None": ["none"]}, "episodes", tmp_path / "y.png")
    assert imread(tmp_path / "y.png").shape == imread(tmp_path / "x.png").shape
