from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf.ops.sequences import response_lengths
from rlhf.ops.token_rewards import kl_estimate, penalise_missing_eos, score_index, token_rewards
from rlhf.sampling.rollout import response_masks

EOS = 9
RESPONSES = torch.tensor(
    [
        [EOS, 0, 0, 0, 0],
        [1, 2, EOS, 0, 0],
        [1, 2, 3, EOS, 0],
        [1, 2, 3, 4, EOS],
        [1, 2, 3, 4, 5],
    ]
)  # fmt: skip
LENGTHS = torch.tensor([1, 3, 4, 5, 5])
LOG2 = math.log(2)


@pytest.mark.parametrize(
    ("estimator", "at_plus_log2", "at_minus_log2"),
    [
        ("k1", 0.6931472, -0.6931472),
        ("k2", 0.2402265, 0.2402265),
        ("k3", 0.1931472, 0.3068528),
        ("abs", 0.6931472, 0.6931472),
    ],
)
def test_kl_estimators(estimator: str, at_plus_log2: float, at_minus_log2: float) -> None:
    reference = torch.tensor([[-3.0, -3.0, -3.0]])
    kl = kl_estimate(reference + torch.tensor([LOG2, -LOG2, 0.0]), reference, estimator)
    assert kl[0].tolist() == pytest.approx([at_plus_log2, at_minus_log2, 0.0], abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_are_unbiased(seed: int, estimator: str) -> None:
    """Their expectation under the policy, summed over all outcomes, is KL(policy || reference)."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    estimates = kl_estimate(torch.tensor(np.log(p)), torch.tensor(np.log(q)), estimator).numpy()
    assert sum(p * estimates) == pytest.approx(sum(p * np.log(p / q)))
    assert sum(q * estimates) != pytest.approx(sum(q * np.log(q / p)))


def test_k2_is_unbiased_where_the_policies_are_close() -> None:
    """Up to the third order in their distance: 1% apart, its bias is about 1% of the KL."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(6))
    q = p * (1 + 0.01 * rng.normal(size=6))
    q /= q.sum()
    estimates = kl_estimate(torch.tensor(np.log(p)), torch.tensor(np.log(q)), "k2").numpy()
    assert sum(p * estimates) == pytest.approx(sum(p * np.log(p / q)), rel=0.03)


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
def test_an_estimate_is_never_negative_not_even_by_rounding(estimator: str) -> None:
    sizes = 10.0 ** torch.arange(-9, 2).unsqueeze(1)
    logprobs = sizes * torch.randn(11, 10_000, generator=torch.Generator().manual_seed(0))
    kl = kl_estimate(logprobs, torch.zeros_like(logprobs), estimator)
    assert (kl >= 0).all()
    assert (kl_estimate(logprobs, logprobs, estimator) == 0).all()


def test_k3_is_precise_for_small_differences() -> None:
    d = torch.tensor([[1e-3, -1e-3]])
    assert kl_estimate(d, torch.zeros(1, 2), "k3")[0].tolist() == pytest.approx([5e-7, 5e-7], rel=0.01)


@pytest.mark.parametrize(
    ("value", "mode", "expected"),
    [
        (-1.0, "replace", [2.5, -1.0, -4.0]),
        (-1.0, "subtract", [2.5, 2.5, -4.0]),
        (1.0, "subtract", [2.5, 2.5, -4.0]),
        (-3.0, "replace", [2.5, -3.0, -4.0]),
    ],
)
def test_missing_eos(value: float, mode: str, expected: list[float]) -> None:
    scores = penalise_missing_eos(torch.tensor([2.5, 3.5, -4.0]), torch.tensor([True, False, True]), value, mode)
    assert scores.tolist() == expected


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_replaced_counts_nowhere(score: float) -> None:
    scores = penalise_missing_eos(torch.tensor([score, 2.0]), torch.tensor([False, True]), -1.0)
    assert scores.tolist() == [-1, 2]


@pytest.mark.parametrize(("position", "columns"), [("after_eos", [1, 3, 4, 4, 4]), ("eos", [0, 2, 3, 4, 4])])
def test_score_index(position: str, columns: list[int]) -> None:
    assert score_index(LENGTHS, 5, position).tolist() == columns
    assert score_index(torch.tensor([1]), 1, position).tolist() == [0]


@pytest.mark.parametrize(("position", "states"), [("after_eos", [2, 4, 5, 5, 5]), ("eos", [1, 3, 4, 5, 5])])
def test_the_value_mask_is_one_wider(position: str, states: list[int]) -> None:
    """As wide as the rewards: the score lands on the last column whose value counts."""
    mask, value_mask = response_masks(LENGTHS, 5, position)
    assert mask.sum(1).tolist() == [1, 3, 4, 5, 5]
    assert value_mask.sum(1).tolist() == states
    assert not (mask & ~value_mask).any()
    assert (score_index(LENGTHS, 5, position) + 1).tolist() == states


def test_token_rewards_add_score_and_penalty() -> None:
    kl = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    rewards = token_rewards(kl, torch.tensor([10.0, 20.0]), torch.tensor([1, 2]), mask, 0.5)
    assert rewards.tolist() == [[-0.5, 10.0, 0.0], [-0.5, -1.0, 18.0]]


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), -float("inf")])
def test_token_rewards_leave_their_input_alone_and_ignore_padding(padding: float) -> None:
    kl = torch.tensor([[1.0, padding]])
    rewards = token_rewards(kl, torch.tensor([3.0]), torch.tensor([1]), torch.tensor([[True, False]]), 1.0)
    assert rewards.tolist() == [[-1.0, 3.0]]
    assert kl[0, 0] == 1


@pytest.mark.parametrize("score", [float("nan"), float("inf"), 3.0])
def test_a_row_without_real_tokens_has_no_reward(score: float) -> None:
    mask = torch.tensor([[False, False], [True, False]])
    rewards = token_rewards(torch.ones(2, 2), torch.tensor([score, 5.0]), torch.tensor([1, 1]), mask, 0.5)
    assert rewards.tolist() == [[0, 0], [-0.5, 5]]


@pytest.mark.parametrize("position", ["after_eos", "eos"])
@pytest.mark.parametrize("seed", range(3))
def test_the_rewards_of_a_row_sum_to_its_score_less_its_kl(seed: int, position: str) -> None:
    rng = np.random.default_rng(seed)
    kl, scores = torch.tensor(rng.normal(size=(5, 5))), torch.tensor(rng.normal(size=5))
    mask, value_mask = response_masks(LENGTHS, 5, position)
    rewards = token_rewards(kl, scores, score_index(LENGTHS, 5, position), mask, 0.05)
    sums = [kl[row, :length].sum() for row, length in enumerate(LENGTHS.tolist())]
    torch.testing.assert_close(rewards.sum(1), scores - 0.05 * torch.stack(sums))
    assert (rewards[~value_mask] == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("position", ["after_eos", "eos"])
def test_from_tokens_to_rewards(position: str, estimator: str) -> None:
    """The chain of a rollout against loops over rows and tokens in float64."""
    rng = np.random.default_rng(3)
    logprobs, ref_logprobs = -rng.exponential(2, (2, *RESPONSES.shape))
    scores = rng.normal(size=len(RESPONSES))
    formula = {
        "k1": lambda d: d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: math.exp(-d) - 1 + d,
        "abs": abs,
    }[estimator]
    expected = np.zeros(RESPONSES.shape)
    for row, tokens in enumerate(RESPONSES.tolist()):
        end = tokens.index(EOS) if EOS in tokens else len(tokens) - 1
        for t in range(end + 1):
            expected[row, t] = -0.05 * formula(logprobs[row, t] - ref_logprobs[row, t])
        column = end + 1 if position == "after_eos" and end + 1 < len(tokens) else end
        expected[row, column] += scores[row] if EOS in tokens else -1.0

    lengths, has_eos = response_lengths(RESPONSES, (EOS,))
    kl = kl_estimate(torch.tensor(logprobs).float(), torch.tensor(ref_logprobs).float(), estimator)
    final = penalise_missing_eos(torch.tensor(scores).float(), has_eos, -1.0)
    mask, _ = response_masks(lengths, RESPONSES.shape[1])
    rewards = token_rewards(kl, final, score_index(lengths, RESPONSES.shape[1], position), mask, 0.05)
    np.testing.assert_allclose(rewards.numpy(), expected, rtol=1e-5, atol=1e-6)
