from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from rlhf.evaluation.statistics import proportion
from rlhf.report.agreement import (
    cohen_kappa,
    fleiss_kappa,
    ratings,
    reward_agreement,
    reward_seed_agreement,
    seed_agreement,
)

NAN = float("nan")
# The worked example of Wikipedia's article on Fleiss' kappa: 10 subjects, 14 raters, 5 answers.
COUNTS = [
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1), (7, 7, 0, 0, 0),
    (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
]  # fmt: skip


def rows_of(outcomes: dict[int, list[float]], **columns: object) -> pd.DataFrame:
    """Judged rows of seeds, whose queries stand in another order each."""
    parts = []
    for seed, values in outcomes.items():
        part = pd.DataFrame({"query": [f"q{n}" for n in range(len(values))], "outcome": values, "seed": seed})
        parts.append(part.sample(frac=1, random_state=seed))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(**{"size": "s", "parameters": 1, "policy": "PPO", **columns})


def test_the_reward_model_agrees_where_it_prefers_what_the_judge_prefers() -> None:
    rows = rows_of({1: [1, 0.75, 0, 0.25, 1, 0.5, NAN, 1]}).sort_values("query", ignore_index=True)
    rows["a_score"] = [2, 2, 2, -1, 0, 9, 9, NAN]
    rows["b_score"] = [0, 3, 3, 0, 0, 0, 0, 0]
    found = reward_agreement(rows).iloc[0]
    # agrees, not, agrees, agrees, equal scores; the tie is undecided; invalid, and without a score
    assert found[["pairs", "undecided"]].tolist() == [5, 1]
    assert found[["agreement", "low", "high"]].tolist() == pytest.approx(list(proportion(3.5 / 5, 5)))
    assert reward_agreement(rows.assign(a_score=NAN)).empty


def test_cohen() -> None:
    """20 and 15 of 50 on the diagonal: observed 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5."""
    x = pd.Series([1] * 25 + [0] * 25)
    y = pd.Series([1] * 20 + [0] * 5 + [1] * 10 + [0] * 15)
    assert cohen_kappa(x, y) == pytest.approx(0.4)
    assert cohen_kappa(x, x) == 1
    assert np.isnan(cohen_kappa(x[:20], y[:20]))


def test_fleiss_of_the_worked_example() -> None:
    raters = pd.DataFrame([np.repeat(range(5), counts) for counts in COUNTS])
    found = fleiss_kappa(raters)
    assert found.value == pytest.approx(0.210, abs=5e-4)
    assert found.low < found.value < found.high
    assert np.isnan(fleiss_kappa(raters * 0)).all()


def test_seeds_against_brute_force() -> None:
    random = np.random.default_rng(1)
    skill = random.random(60)
    values = {seed: list((skill + random.normal(0, 0.3, 60)).clip(0, 1).round()) for seed in (1, 2, 3)}
    values[2][5], values[3][9], values[1][11] = 0.5, 0.5, NAN
    found = seed_agreement(rows_of(values)).iloc[0]
    kept = [n for n in range(60) if n != 11]
    answers = {seed: [np.sign(values[seed][n] - 0.5) for n in kept] for seed in values}
    pairs = [[answers[x][n] == answers[y][n] for n in range(59)] for x, y in combinations((1, 2, 3), 2)]
    assert found["queries"] == 59
    assert found["pairwise"] == pytest.approx(np.mean(pairs))
    assert found["unanimous"] == pytest.approx(np.mean([len({answers[s][n] for s in answers}) == 1 for n in range(59)]))
    kappas = []
    for x, y in combinations((1, 2, 3), 2):
        chance = sum(np.mean(np.equal(answers[x], c)) * np.mean(np.equal(answers[y], c)) for c in (-1, 0, 1))
        kappas.append((np.mean(np.equal(answers[x], answers[y])) - chance) / (1 - chance))
    assert found["cohen"] == pytest.approx(np.mean(kappas))
    pool = np.concatenate(list(answers.values()))
    chance = sum(np.mean(pool == c) ** 2 for c in (-1, 0, 1))
    assert found["fleiss"] == pytest.approx((found["pairwise"] - chance) / (1 - chance))
    assert found["low"] < found["fleiss"] < found["high"]


def test_ratings_need_every_seed() -> None:
    table = ratings(rows_of({1: [1, 0.5, 0.25, NAN], 2: [0.75, 0, 0, 1]}))
    assert table.loc["q0"].tolist() == [2, 2]
    assert table.loc["q1"].tolist() == [1, 0]
    assert list(table.index) == ["q0", "q1", "q2"]
    assert seed_agreement(rows_of({1: [1, 0]})).empty


def test_reward_models_of_seeds_are_paired_by_their_place() -> None:
    def margins(seed: int, values: list[float], policies: str = "wxyz") -> pd.DataFrame:
        table = pd.DataFrame({"split": "posts", "batch": "b", "confidence": pd.NA, "margin": values})
        return table.assign(chosen_policy=list(policies), size="s", parameters=1, seed=seed)

    one = margins(1, [1, 2, -1, -3])
    found = reward_seed_agreement(pd.concat([one, margins(2, [3, -1, -1, -2])])).iloc[0]
    assert found[["split", "seeds", "pairs", "pairwise", "unanimous"]].tolist() == ["posts", 2, 4, 0.75, 0.75]
    # by chance 0.5 * 0.25 + 0.5 * 0.75 = 0.5; of both together 3/8 and 5/8, 34/64
    assert found[["cohen", "fleiss"]].tolist() == pytest.approx([0.5, (0.75 - 34 / 64) / (1 - 34 / 64)])
    assert reward_seed_agreement(pd.concat([one, margins(2, [3, -1, -1, -2], "wxzy")])).empty
    assert reward_seed_agreement(one).empty
