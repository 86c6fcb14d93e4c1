from __future__ import annotations

import pandas as pd
import pytest

from rlhf.evaluation.statistics import proportion
from rlhf.report.collapse import alarms, collapse_table, with_signs

COLUMNS = ["size", "seed", "stage", "curve", "step", "value"]


def rates_of(rates: dict[int, float], rows: int = 200, **columns: object) -> pd.DataFrame:
    table = [(seed, *proportion(rate, rows)) for seed, rate in rates.items()]
    frame = pd.DataFrame(table, columns=["seed", "win_rate", "low", "high"])
    return frame.assign(**{"size": "1b", "parameters": 1, "policy": "PPO", **columns})


def curves_of(values: dict[int, dict[str, float]]) -> pd.DataFrame:
    """Curves that are 0 until their last quarter."""
    table = [
        ("1b", seed, "ppo", name, step, value if step > 6 else 0.0)
        for seed, own in values.items()
        for name, value in own.items()
        for step in range(1, 9)
    ]
    return pd.DataFrame(table, columns=COLUMNS)


def signs(kl: float, length: float, eos: float) -> dict[str, float]:
    return {"objective/kl": kl, "rollout/response_length": length, "rollout/eos_share": eos}


NO_CURVES = curves_of({})


@pytest.mark.parametrize(
    ("rates", "fallen"),
    [
        ({1: 0.6, 2: 0.62, 3: 0.3, 4: 0.58}, [3]),
        ({1: 0.6, 2: 0.62, 3: 0.3, 4: 0.25}, [3, 4]),  # siblings that fell too hide nobody
        ({1: 0.6, 2: 0.62, 3: 0.5, 4: 0.58}, []),  # lower, but not by much
        ({1: 0.6, 2: 0.2}, [2]),
        ({1: 0.6}, []),
    ],
)
def test_who_fell(rates: dict[int, float], fallen: list[int]) -> None:
    table = collapse_table(rates_of(rates))
    assert table[table["fallen"]]["seed"].tolist() == fallen
    assert (table["siblings"] == len(rates) - 1).all()


def test_few_rows_do_not_alarm_by_chance() -> None:
    assert not collapse_table(rates_of({1: 0.6, 2: 0.62, 3: 0.42}, rows=20))["fallen"].any()


def test_siblings_have_the_same_size_and_policy() -> None:
    other = [rates_of({1: 0.3, 2: 0.31}, size="2b"), rates_of({1: 0.29, 2: 0.3}, policy="SFT")]
    table = collapse_table(pd.concat([rates_of({1: 0.6, 2: 0.62}), *other]))
    assert not table["fallen"].any()
    assert table["median"].tolist() == [0.62, 0.6, 0.31, 0.3, 0.3, 0.29]


def test_what_the_fallen_have_in_common() -> None:
    curves = curves_of({1: signs(10, 30, 0.97), 2: signs(12, 31, 0.98), 3: signs(60, 50, 0.5), 4: signs(45, 30.5, 0.4)})
    table = with_signs(collapse_table(rates_of({1: 0.6, 2: 0.62, 3: 0.2, 4: 0.25})), curves)
    assert table["KL"].tolist() == [10, 12, 60, 45]
    said = alarms(table)
    assert len(said) == 3
    assert said[0].startswith("**PPO of size 1b, seed 3 fell**: win rate 0.200")
    assert "KL 60 against 11, length 50 against 30.5, EOS share 0.5 against 0.975" in said[0]
    assert said[2] == "All that fell have higher KL and lower EOS share than every sibling that did not fall."


def test_nothing_in_common() -> None:
    curves = curves_of({1: signs(10, 30, 0.97), 2: signs(12, 31, 0.98), 3: signs(11, 30, 0.97)})
    said = alarms(with_signs(collapse_table(rates_of({1: 0.6, 2: 0.62, 3: 0.2})), curves))
    assert said[1] == "Neither KL, length nor EOS share sets those that fell apart from all their siblings."


def test_without_curves() -> None:
    said = alarms(with_signs(collapse_table(rates_of({1: 0.6, 2: 0.2})), NO_CURVES))
    assert "With two seeds, which of them is the usual one is not known." in said[0]
    assert "no curves of PPO" in said[1]


def test_curves_of_ppo_are_not_those_of_sft() -> None:
    table = with_signs(collapse_table(rates_of({1: 0.6}, policy="SFT")), curves_of({1: signs(10, 30, 0.97)}))
    assert table["KL"].isna().all()


def test_a_size_with_one_seed_raises_no_alarm() -> None:
    one = with_signs(collapse_table(rates_of({1: 0.1})), NO_CURVES)
    two = with_signs(collapse_table(rates_of({1: 0.6, 2: 0.61}, size="2b")), NO_CURVES)
    [said] = alarms(pd.concat([one, two]))
    assert said.startswith("No run fell")
