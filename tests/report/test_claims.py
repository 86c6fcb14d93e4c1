from __future__ import annotations

import pandas as pd
import pytest

from rlhf.evaluation.statistics import Estimate
from rlhf.report.claims import (
    accuracy_rises,
    ahead_at_every_length,
    ppo_beats_sft,
    rouge_rises,
    seeds_agree,
    shown,
    verdict,
)

NAN = float("nan")
UP, DOWN, OPEN = Estimate(0.1, 0.05, 0.2), Estimate(-0.1, -0.2, -0.05), Estimate(0.1, -0.05, 0.2)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([UP, UP], "holds"),
        ([UP, OPEN], "undecided"),
        ([OPEN, DOWN, UP], "does not hold"),
        ([Estimate(NAN, NAN, NAN)], "undecided"),
        ([Estimate(0.0, 0.0, 0.0)], "does not hold"),  # nothing differs
        ([UP, Estimate(0.0, -0.1, 0.1)], "undecided"),
    ],
)
def test_verdicts(differences: list[Estimate], expected: str) -> None:
    assert verdict(differences) == expected


def test_ppo_against_sft_over_all_seeds() -> None:
    rows = [(1, *UP), (2, *DOWN), ("all", *UP)]
    table = pd.DataFrame(rows, columns=["seed", "difference", "low", "high"])
    table = table.assign(size="1b", policy="PPO", baseline="SFT", queries=50)
    other = table.assign(size="2b", baseline="other")
    [claim] = ppo_beats_sft(pd.concat([table, other]))
    assert claim.claim == "PPO beats SFT against the reference at size 1b"
    assert claim.verdict == "holds"
    assert claim.evidence == (
        "win rate of PPO minus SFT +0.100 (+0.050 to +0.200) over 50 queries; ahead in 1 of 2 seeds"
    )
    [claim] = ppo_beats_sft(table[table["seed"] == 2])
    assert claim.verdict == "does not hold"
    assert "seeds" not in claim.evidence


def test_an_unknown_difference_is_called_so() -> None:
    row = ("s", 1, 1, "PPO", "SFT", 0, NAN, NAN, NAN)
    names = ["size", "parameters", "seed", "policy", "baseline", "queries", "difference", "low", "high"]
    (claim,) = ppo_beats_sft(pd.DataFrame([row], columns=names))
    assert (claim.verdict, claim.evidence) == ("undecided", "win rate of PPO minus SFT unknown over 0 queries")
    assert shown(Estimate(0.5, NAN, NAN), "+") == "+0.500 (no interval)"


def test_every_length_names_the_bins_below() -> None:
    def claim(*differences: Estimate) -> tuple[str, str]:
        table = pd.DataFrame(differences, columns=["difference", "low", "high"])
        [found] = ahead_at_every_length(table.assign(size="1b", bin=[0.25 * n for n in range(len(table))]))
        return found.verdict, found.evidence

    nothing = Estimate(0.0, -0.2, 0.2)
    assert claim(UP, OPEN)[0] == claim(UP, nothing)[0] == "holds"  # at or above
    assert claim(OPEN, OPEN)[0] == "undecided"
    found, evidence = claim(nothing, nothing)
    assert found == "does not hold"
    assert evidence == "2 of 2 bins with 20 queries or more of both; no difference in any"
    assert claim(UP, Estimate(-0.05, -0.1, 0.1))[0] == "undecided"
    found, evidence = claim(UP, DOWN)
    assert found == "does not hold"
    assert evidence.startswith("1 of 2 bins")
    assert evidence.endswith("below at log(length / reference length) +0.25 (-0.100, -0.200 to -0.050)")


def test_rouge_over_sizes_is_paired_by_query() -> None:
    queries = [f"q{n}" for n in range(40)]
    parts = []
    for size, gain in (("1b", 0.0), ("2b", 0.02), ("3b", 0.01)):  # queries differ more than sizes
        scores = [0.02 * n + gain for n in range(40)]
        parts.append(pd.DataFrame({"query": queries, "rougeL": scores}).assign(size=size, seed=1, policy="SFT"))
    scores = pd.concat(parts)
    [claim] = rouge_rises(scores)
    assert claim.verdict == "does not hold"
    assert "1b 0.390, 2b 0.410, 3b 0.400" in claim.evidence
    assert "1b to 2b +0.020 (+0.020 to +0.020)" in claim.evidence
    assert rouge_rises(scores[scores["size"] != "3b"])[0].verdict == "holds"
    assert rouge_rises(scores[scores["size"] == "3b"]) == []


def test_accuracy_over_sizes_on_the_cleanest_labels_that_all_have() -> None:
    def rows(size: str, accuracy: float, labels: str) -> dict[str, object]:
        return {"size": size, "parameters": len(size), "seed": 1, "split": "posts", "group": "all", "labels": labels,
                "pairs": 1000, "accuracy": accuracy}  # fmt: skip

    given = [rows("1b", 0.6, "as given"), rows("10b", 0.5, "as given")]
    clean = [rows("1b", 0.7, "clean (gold score)"), rows("10b", 0.8, "clean (gold score)")]
    [claim] = accuracy_rises(pd.DataFrame([*given, *clean]))
    assert claim.verdict == "holds"
    assert "1b 0.700, 10b 0.800" in claim.evidence
    [claim] = accuracy_rises(pd.DataFrame([*given, clean[0]]))
    assert claim.verdict == "does not hold"
    assert "labels as given" in claim.claim


def test_seeds() -> None:
    row = {"size": "1b", "policy": "PPO", "seeds": 4, "queries": 50, "unanimous": 0.5, "fleiss": 0.3, "low": 0.2}
    [claim] = seeds_agree(pd.DataFrame([row | {"high": 0.4}]))
    assert claim.verdict == "holds"
    assert claim.evidence == "Fleiss' kappa 0.300 (0.200 to 0.400), 50.0% of 50 queries unanimous, 4 seeds"
