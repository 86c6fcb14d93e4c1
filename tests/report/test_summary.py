from __future__ import annotations

import pandas as pd
import pytest

from rlhf.report.summary import ppo_gains, sample_responses, side_by_side, summarise

NAN = float("nan")
FIRST = {"size": "s", "parameters": 1, "seed": 1, "query": "q0", "b": " good ", "b_score": 0.5, "b_gold": NAN,
         "b_tokens": 9, "a_gold": NAN, "a_kl": NAN, "a_has_eos": 1.0, "a_first": "a", "b_first": "a"}  # fmt: skip


def rows_of(*changes: dict[str, object]) -> pd.DataFrame:
    return pd.DataFrame([FIRST | change for change in changes])


@pytest.fixture
def rows() -> pd.DataFrame:
    """Two queries, answered by SFT and PPO."""
    return rows_of(
        {"policy": "SFT", "a": "one", "a_score": 0.0, "a_tokens": 4, "outcome": 0.0},
        {"policy": "SFT", "a": "two", "a_score": 2.0, "a_tokens": 6, "outcome": 1.0, "query": "q1", "b_score": 1.5},
        {"policy": "PPO", "a": "three", "a_score": 3.0, "a_tokens": 5, "outcome": 1.0, "a_has_eos": 0.0},
        {"policy": "PPO", "a": "four", "a_score": 2.0, "a_tokens": 5, "outcome": NAN, "query": "q1"},
    )


def test_a_row_per_policy_and_one_for_the_reference(rows: pd.DataFrame) -> None:
    found = summarise(rows, pd.DataFrame({"rougeL": [0.1, 0.3, 0.5, 0.7]})).set_index("policy")
    assert list(found.index) == ["SFT", "PPO", "reference"]
    assert not {"gold", "kl"} & {*found}  # no table has them
    assert found["score"].tolist() == [1.0, 2.5, 1.0]
    assert found.loc["SFT", "score_std"] == pytest.approx(2**0.5)
    assert found.loc["PPO", ["win_rate", "rougeL", "eos", "length"]].tolist() == pytest.approx([1.0, 0.6, 0.5, 5.0])
    assert found.loc["reference", "length"] == 9
    assert found.loc["reference", ["win_rate", "rougeL", "eos"]].isna().all()


def test_the_kl_is_the_mean_over_the_responses_of_a_policy(rows: pd.DataFrame) -> None:
    known = rows.assign(a_kl=[NAN, NAN, 0.5, 2.0])
    found = summarise(known, pd.DataFrame({"rougeL": [0.1] * 4})).set_index("policy")
    assert found["kl"].dropna().to_dict() == {"PPO": 1.25}


def test_gains_are_in_deviations_of_sft(rows: pd.DataFrame) -> None:
    text = f"PPO moved the mean score by {1.5 / 2**0.5:+.2f} standard deviations of the SFT scores"
    assert ppo_gains(rows) == [f"{text}, on 2 queries."]
    golden = rows.assign(a_gold=[1.0, 1.0, 0.5, 0.5])
    assert ppo_gains(golden) == [f"{text}, and the gold score by -0.50, on 2 queries."]
    two = ppo_gains(pd.concat([rows, rows.assign(seed=2)]))
    assert [line[:16] for line in two] == ["Size s, seed 1: ", "Size s, seed 2: "]
    assert ppo_gains(rows[rows["policy"] == "SFT"]) == []
    assert ppo_gains(rows.assign(a_score=[-1.0, -1.0, 0.0, 0.0])) == []  # no deviation to measure in


def test_samples_of_each_size_of_its_smallest_seed(rows: pd.DataFrame) -> None:
    text = sample_responses(rows, 1)
    assert text == "> q0\n\n- **SFT** (0.00): one\n- **PPO** (3.00): three\n- **reference**: good"
    two = sample_responses(pd.concat([rows, rows.assign(size="t", a="big"), rows.assign(seed=2, a="unseen")]), 2)
    assert two.count("**SFT t** (0.00): big") == 1
    assert two.count("- **reference**") == 2
    assert "unseen" not in two


def test_seeds_side_by_side_with_the_last_quarter_of_ppo() -> None:
    rates = pd.DataFrame({"size": "1b", "parameters": 1, "seed": [1, 1, 2], "policy": ["SFT", "PPO", "PPO"],
                          "rows": 9, "win_rate": [0.3, 0.6, 0.2], "low": 0.1, "high": 0.7})  # fmt: skip
    names = {"objective/kl": 10.0, "rollout/response_length": 30.0, "rollout/eos_share": 0.5, "validation/length": 7.0}
    table = [
        ("1b", 1, stage, name, step, step * value / 7.5 if step > 6 and stage == "ppo" else 0.0)
        for stage in ("sft", "ppo")
        for name, value in names.items()
        for step in range(1, 9)
    ]
    curves = pd.DataFrame(table, columns=["size", "seed", "stage", "curve", "step", "value"])
    found = side_by_side(rates, curves)
    assert list(found) == [*rates.drop(columns="rows"), "KL", "length", "EOS share"]
    assert found["win_rate"].tolist() == [0.3, 0.6, 0.2]
    assert found.loc[1, ["KL", "length", "EOS share"]].tolist() == pytest.approx([10, 30, 0.5])  # points 7 and 8 of 8
    assert found.loc[[0, 2], ["KL", "length", "EOS share"]].isna().all(axis=None)  # SFT, and a run without curves
    assert side_by_side(rates, curves[:0])["KL"].isna().all()
