from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.precision.utils import _convert_fp_tensor
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from rlhf.sampling.rollout import Rollout, RolloutLoader, in_groups, response_masks

N, P, R = 12, 7, 6
QUERY_LENGTHS = torch.tensor([3, 7, 2, 5, 1, 4, 3, 6, 2, 2, 5, 3])
LENGTHS = torch.tensor([1, 4, 6, 2, 2, 5, 1, 3, 6, 2, 1, 4])


@pytest.fixture
def rollout() -> Rollout:
    """Twelve episodes; `scores` holds the number of each."""
    cells = torch.arange(N * R).view(N, R)
    mask, value_mask = response_masks(LENGTHS, R)
    names = ("logprobs", "ref_logprobs", "values", "kl", "rewards", "advantages", "returns")
    return Rollout(
        [{"query": f"q{n}", "response": f"r{n}"} for n in range(N)],
        queries=torch.arange(N * P).view(N, P) + 1,
        query_mask=(torch.arange(P) >= P - QUERY_LENGTHS.unsqueeze(1)).long(),
        responses=cells + 1,
        lengths=LENGTHS,
        has_eos=LENGTHS < R,
        mask=mask,
        value_mask=value_mask,
        scores=torch.arange(N).float(),
        **{name: cells + (i + 1) / 10 for i, name in enumerate(names)},
    )


def loader(rollout: Rollout, **settings: Any) -> RolloutLoader:
    defaults: dict[str, Any] = {
        "make": lambda update: rollout, "update": lambda: 0, "reduce_sum": lambda x: x, "rank": 0, "world_size": 1,
        "ppo_epochs": 2, "minibatches": 2, "accumulate": 3,
    }  # fmt: skip
    return RolloutLoader(**(defaults | settings))


def order(micro_batches: list[Rollout]) -> list[int]:
    return torch.cat([m.scores for m in micro_batches]).int().tolist()


@pytest.mark.parametrize(
    ("ppo_epochs", "minibatches", "accumulate"), [(4, 1, 4), (1, 3, 2), (2, 2, 3), (1, 1, 1), (3, 12, 1), (2, 1, 12)]
)
def test_each_epoch_covers_each_row_once(rollout: Rollout, ppo_epochs: int, minibatches: int, accumulate: int) -> None:
    batches = loader(rollout, ppo_epochs=ppo_epochs, minibatches=minibatches, accumulate=accumulate)
    slices = list(batches)
    per_epoch = minibatches * accumulate
    assert len(slices) == len(batches) == ppo_epochs * per_epoch
    assert all(len(s) for s in slices)
    for epoch in range(ppo_epochs):
        assert sorted(order(slices[epoch * per_epoch : (epoch + 1) * per_epoch])) == list(range(N))


@pytest.mark.parametrize("accumulate", [1, 2, 3, 6])
def test_micro_batches_are_of_similar_length(rollout: Rollout, accumulate: int) -> None:
    """No row of one is longer than a row of the one before it."""
    minibatch = list(loader(rollout, accumulate=accumulate))[:accumulate]
    totals = [QUERY_LENGTHS[order([m])] + LENGTHS[order([m])] for m in minibatch]
    assert all(one.min() >= other.max() for one, other in pairwise(totals))
    assert rollout.total_lengths() == (QUERY_LENGTHS + LENGTHS).tolist()


@pytest.mark.parametrize(
    "groups", [[list(range(N))], [[11, 3], [0, 1, 2, 4], [10, 9, 8, 7, 6, 5]], [[n] for n in range(N)]]
)
def test_results_of_groups_come_back_in_the_order_of_rows(rollout: Rollout, groups: list[list[int]]) -> None:
    """Matrices are padded with 0 to the width of the rollout."""
    seen: list[list[int]] = []

    def evaluate(part: Rollout) -> tuple[Tensor, ...]:
        seen.append(part.rows)
        return part.scores, torch.where(part.mask, part.logprobs, 0.0)

    scores, logprobs = in_groups(rollout, groups, evaluate)
    assert seen == groups
    assert scores.tolist() == list(range(N))
    assert torch.equal(logprobs, torch.where(rollout.mask, rollout.logprobs, 0.0))


def test_the_permutation_is_fresh_in_every_epoch_update_and_rank(rollout: Rollout) -> None:
    first, second = (order(list(loader(rollout))[i : i + 6]) for i in (0, 6))
    next_update = order(list(loader(rollout, update=lambda: 1))[:6])
    other_rank = order(list(loader(rollout, rank=1, world_size=2))[:6])
    orders = [list(range(N)), first, second, next_update, other_rank]
    assert len({tuple(o) for o in orders}) == len(orders)
    assert first == order(list(loader(rollout))[:6])


@pytest.mark.parametrize("accumulate", [1, 2, 6])
@pytest.mark.parametrize(("reduce_sum", "world_size"), [(lambda x: x, 1), (lambda x: x + torch.tensor([30, 40]), 2)])
def test_shares_are_tokens_of_the_minibatch_per_micro_batch(
    rollout: Rollout, accumulate: int, reduce_sum: Callable[[Tensor], Tensor], world_size: int
) -> None:
    own = loader(rollout, accumulate=accumulate, reduce_sum=reduce_sum, world_size=world_size)
    slices = list(own)
    for start in range(0, len(slices), accumulate):
        minibatch = slices[start : start + accumulate]
        tokens = LENGTHS[order(minibatch)]
        real = torch.stack([tokens.sum(), (tokens + 1).clamp(max=R).sum()])
        policy, value = (reduce_sum(real) / (accumulate * world_size)).tolist()
        assert [m.policy_share for m in minibatch] == pytest.approx([policy] * accumulate)
        assert [m.value_share for m in minibatch] == pytest.approx([value] * accumulate)


def test_shares_count_what_is_learnt_from(rollout: Rollout) -> None:
    rollout.mask = rollout.mask & (rollout.scores < 3).unsqueeze(1)
    (only,) = loader(rollout, ppo_epochs=1, minibatches=1, accumulate=1)
    assert only.policy_share == LENGTHS[:3].sum()
    rollout.mask = torch.zeros_like(rollout.mask)
    (empty,) = loader(rollout, ppo_epochs=1, minibatches=1, accumulate=1)
    assert 0 < empty.policy_share < 1e-6


def test_rollouts_are_made_at_the_first_next_and_once_per_pass(rollout: Rollout) -> None:
    made: list[int] = []
    current = 5

    def make(update: int) -> Rollout:
        made.append(update)
        return rollout

    batches = loader(rollout, make=make, update=lambda: current)
    iter(batches)
    iterator = iter(batches)
    assert made == []
    current = 6
    next(iterator)
    assert made == [6]
    list(iterator)
    assert made == [6]
    current = 7
    list(batches)
    assert made == [6, 7]


@pytest.mark.parametrize("rows", [[0], [2], [0, 6, 10], [9, 4], [4, 8], list(range(N))])
def test_select_cuts_unused_columns_and_no_real_tokens(rollout: Rollout, rows: list[int]) -> None:
    part = rollout.select(rows)
    assert part.queries.shape == part.query_mask.shape == (len(rows), int(QUERY_LENGTHS[rows].max()))
    width = min(int(LENGTHS[rows].max()) + 1, R)
    for name in ("responses", "mask", "value_mask", "logprobs", "ref_logprobs", "values", "kl", "rewards",
                 "advantages", "returns"):  # fmt: skip
        assert torch.equal(getattr(part, name), getattr(rollout, name)[rows, :width]), name
    assert torch.equal(part.queries[part.query_mask.bool()], rollout.queries[rows][rollout.query_mask[rows].bool()])
    assert part.value_mask.sum() == rollout.value_mask[rows].sum()
    assert part.scores.tolist() == rows
    assert part.lengths.tolist() == LENGTHS[rows].tolist()
    assert [t["query"] for t in part.texts] == [f"q{n}" for n in rows]


def test_rows_that_are_not_learnt_from_can_be_selected(rollout: Rollout) -> None:
    rollout.mask = rollout.value_mask = torch.zeros_like(rollout.mask)
    part = rollout.select([1, 2])
    assert len(part) == 2
    assert len(part) == 2


def test_precision_plugins_leave_its_floats_alone(rollout: Rollout) -> None:
    rollout.policy_share = 2.5
    cast = apply_to_collection(rollout, function=_convert_fp_tensor, dtype=Tensor, dst_type=torch.bfloat16)
    moved = move_data_to_device(cast, rollout.scores.device)
    assert isinstance(moved, Rollout)
    for name, value in vars(rollout).items():
        if isinstance(value, Tensor):
            assert getattr(moved, name).dtype == value.dtype
            assert torch.equal(getattr(moved, name), value)
    assert (moved.policy_share, moved.texts) == (2.5, rollout.texts)
    as_dict = apply_to_collection(vars(rollout), function=_convert_fp_tensor, dtype=Tensor, dst_type=torch.bfloat16)
    assert Counter(t.dtype for t in as_dict.values() if isinstance(t, Tensor))[torch.bfloat16] == 8


def test_moving_keeps_everything_but_the_device(rollout: Rollout) -> None:
    rollout.policy_share, rollout.value_share = 2.5, 3.5
    moved = move_data_to_device(rollout.select([1, 3]), torch.device("meta"))
    tensors = [t for t in vars(moved).values() if isinstance(t, Tensor)]
    assert len(tensors) == 15
    assert {t.device.type for t in tensors} == {"meta"}
    assert (moved.policy_share, moved.value_share) == (2.5, 3.5)
    assert [t["query"] for t in moved.texts] == ["q1", "q3"]


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="'reward'"):
        Rollout(reward=torch.zeros(1))
