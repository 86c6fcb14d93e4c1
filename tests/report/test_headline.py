from __future__ import annotations

import pandas as pd

from rlhf.report.headline import headline


def summary(*runs: tuple[str, int, float, float]) -> dict[str, pd.DataFrame]:
    """A summary of runs: name, parameters, and the win rates of SFT and PPO."""
    rows = [
        (name, parameters, policy, rate, 1.5)
        for name, parameters, *rates in runs
        for policy, rate in zip(("SFT", "PPO", "reference"), (*rates, None), strict=True)
    ]
    table = pd.DataFrame(rows, columns=["size", "parameters", "policy", "win_rate", "score"])
    return {"summary": table.assign(seed=1, low=table["win_rate"] - 0.1, high=table["win_rate"] + 0.1)}


def test_one_run() -> None:
    sentence, numbers = headline(summary(("x", 1, 0.38, 0.94)))
    assert sentence == "PPO's responses are preferred over the reference 94% of the time; SFT's 38%"
    assert numbers[0] == ("Win rate", "94.0%", "95% interval 84.0% to 104.0%")
    assert numbers[1] == ("Score", "1.50", "SFT: 1.50")


def test_of_several_sizes_the_largest() -> None:
    sentence, numbers = headline(summary(("1b", 10**9, 0.3, 0.5), ("7b", 7 * 10**9, 0.4, 0.6)))
    assert sentence == "PPO's responses are preferred over the reference 60% of the time (size 7b); SFT's 40%"
    assert numbers[0][:2] == ("Win rate, 7b", "60.0%")


def test_of_named_runs_all_or_from_the_lowest_to_the_highest() -> None:
    runs = [(name, 1, 0.3, 0.5 + place / 10) for place, name in enumerate("abcde")]
    few, _ = headline(summary(*runs[:3]))
    assert few == "PPO's responses are preferred over the reference 50% of the time in a, 60% in b, 70% in c"
    many, _ = headline(summary(*runs))
    assert many == "PPO's responses are preferred over the reference 50% to 90% of the time in 5 runs"


def test_without_a_judgement() -> None:
    assert headline({}) == ("Nothing is judged yet", [])
    assert headline({"summary": summary(("x", 1, 0.5, 0.5))["summary"].drop(columns="win_rate")})[0] == (
        "The judge gave no answer"
    )
