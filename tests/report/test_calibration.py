from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from rlhf.evaluation.statistics import proportion
from rlhf.report.calibration import accuracy_rows, calibration_bins, calibration_errors


def margins_of(margins: list[float] | np.ndarray, **columns: object) -> pd.DataFrame:
    table = pd.DataFrame({"margin": np.asarray(margins, dtype=float), "batch": "b", "confidence": None})
    return table.assign(**{"size": "s", "parameters": 1, "seed": 1, "split": "posts", **columns})


def brute_force(margins: np.ndarray) -> float:
    """Expected calibration error over ten bins from 0.5 to 1, in plain Python."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        bins.setdefault(min(9, int((confidence - 0.5) / 0.05)), []).append((confidence, margin > 0))
    gaps = [abs(sum(r for _, r in part) - sum(c for c, _ in part)) for part in bins.values()]
    return sum(gaps) / len(margins)


def test_the_error_is_that_of_its_definition_and_of_the_bins() -> None:
    margins = np.random.default_rng(1).normal(0.7, 1.5, 500)
    table = margins_of(margins)
    found, bins = calibration_errors(table).iloc[0], calibration_bins(table)
    assert found["ece"] == pytest.approx(brute_force(margins), abs=1e-6)
    weighted = bins["pairs"] / bins["pairs"].sum() * (bins["accuracy"] - bins["confidence"]).abs()
    assert weighted.sum() == pytest.approx(found["ece"], abs=1e-6)
    assert found["accuracy"] == pytest.approx((margins > 0).mean())
    assert found["pairs"] == bins["pairs"].sum() == 500


def test_margins_that_mean_what_they_say_have_no_error() -> None:
    random = np.random.default_rng(2)
    size = np.abs(random.normal(0, 2, 40_000))
    right = random.random(40_000) < 1 / (1 + np.exp(-size))
    assert calibration_errors(margins_of(np.where(right, size, -size)))["ece"].iloc[0] < 0.01
    assert (
        calibration_errors(margins_of(np.where(right, 5 * size, -5 * size)))["ece"].iloc[0] > 0.1
    )  # too sure of itself


def test_bins_by_hand() -> None:
    table = margins_of([0.1, -0.1, 0.1, 9.0])  # sigmoid 0.525 and 0.9999
    bins = calibration_bins(table)
    assert bins["pairs"].tolist() == [3, 1]
    assert bins["from"].tolist() == pytest.approx([0.5, 0.95])
    assert bins["margin"].tolist() == pytest.approx([0.1, 9.0])
    assert bins["accuracy"].tolist() == pytest.approx([2 / 3, 1])
    assert bins[["low", "high"]].iloc[0].tolist() == pytest.approx(list(proportion(2 / 3, 3))[1:])


def test_accuracy_per_run_split_batch_and_confidence_and_on_clean_labels() -> None:
    first = margins_of([1, -1, 1, 1], confidence=[1, 1, 2, 2], gold_margin=[1, -1, -1, 1])
    table = pd.concat([first, margins_of([1, -2], split="news", gold_margin=1.0), margins_of([-1.0], seed=2)])
    found = accuracy_rows(table)
    value = found.set_index(["seed", "labels", "split", "group", "value"])["accuracy"]
    assert value[(1, "as given", "posts", "all", "")] == 0.75
    assert value[(1, "as given", "posts", "confidence", 1)] == 0.5
    assert value[(1, "as given", "posts", "batch", "b")] == 0.75
    assert value[(1, "as given", "news", "all", "")] == 0.5
    assert value[(1, "clean (gold score)", "posts", "all", "")] == 0.75  # right, right, wrong, right
    assert value[(2, "as given", "posts", "all", "")] == 0
    assert set(found[found["seed"] == 2]["labels"]) == {"as given"}
