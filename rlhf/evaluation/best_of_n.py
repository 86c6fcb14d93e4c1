"""Best-of-n: several responses to each query, of which the reward model chooses one."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from rlhf.errors import UserError
from rlhf.evaluation.resumable import Row
from rlhf.evaluation.reward_scorer import RewardScorer
from rlhf.evaluation.statistics import best_of_n_kl


def check_best_of(n: int, reward: str | None, reference: str | None) -> None:
    """Refuses best-of-n without a reward model, or with a reference: the choice is no policy with log-probabilities."""
    if n > 1 and reward is None:
        raise UserError(f"best_of is {n}: give the reward model that chooses one of {n} responses, as reward.")
    if n > 1 and reference is not None:
        raise UserError(
            f"best_of is {n}: the log-ratio to reference does not know of the choice; leave one of the two out."
        )


def best_of_n(
    respond: Callable[[list[Row], int], pd.DataFrame], scorer: RewardScorer, n: int
) -> Callable[[list[Row]], pd.DataFrame]:
    """Returns the function that draws n responses to each row and keeps the one with the highest reward.

    Of equals it keeps the first. It adds the columns `mean_score`, of all n responses, and `kl`, the upper bound of the
    KL to the policy.

    Args:
        respond: draws sample number 0, 1, ... of rows; the column `response_ids` has its tokens.
    """

    def choose(rows: list[Row]) -> pd.DataFrame:
        drawn = [respond(rows, sample) for sample in range(n)]
        scores = np.array([scorer.score_ids(sampled_ids(rows, table["response_ids"])) for table in drawn])
        best = [drawn[sample].iloc[[row]] for row, sample in enumerate(scores.argmax(0))]
        return pd.concat(best, ignore_index=True).assign(mean_score=scores.mean(0), kl=best_of_n_kl(n))

    return choose


def sampled_ids(rows: list[Row], responses: Iterable[Iterable[int]]) -> list[list[int]]:
    """Joins the token ids of queries and responses, as they were sampled: their text could have other tokens."""
    return [[*row["query_ids"], *map(int, ids)] for row, ids in zip(rows, responses, strict=True)]


def describe(table: pd.DataFrame, n: int) -> str:
    """Tells what the choice has gained, and how far from the policy it is at most."""
    return (
        f"best of {n}: mean score {table['score'].mean():.3f}, of all {n} responses {table['mean_score'].mean():.3f}; "
        f"the KL to the policy is at most {best_of_n_kl(n):.2f} nats per response."
    )
