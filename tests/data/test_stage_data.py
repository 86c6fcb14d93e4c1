"""Micro-batches under a token budget, in all three DataModules (D14)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf.data.prompts import RolloutDataModule
from rlhf.errors import UserError
from rlhf.modules import PPOSettings
from rlhf.ops.sequences import pad_sequences
from rlhf.sampling.grouping import parts_needed
from rlhf.sampling.rollout import Rollout, response_masks

Make = Callable[..., Any]
RESPONSE = 12
STAGES = pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])


@pytest.fixture
def make(attach: Make, sft_data: Make, preference_data: Make, rollout_data: Make) -> Make:
    """A DataModule of a stage with eight examples per step, set up."""

    def make(stage: str, budget: Any, minibatches: int = 1, batch_size: int = 8, **trainer: Any) -> Any:
        data = {"sft": sft_data, "reward": preference_data, "ppo": rollout_data}[stage]
        ppo = PPOSettings(response_length=RESPONSE, ppo_epochs=2, minibatches=minibatches)
        room = RESPONSE if stage == "ppo" else 0
        attached = data(batch_size=batch_size, max_tokens_per_micro_batch=budget)
        return attach(attached, ppo=ppo, response_room=room, reduce_sum=lambda x: x, **trainer)

    return make


def steps(data: Any, epochs: int) -> list[list[int]]:
    return [step for step in data.step_lengths(epochs) if step]


def longest(make: Make, stage: str, epochs: int = 2) -> int:
    return max(length for step in steps(make(stage, None), epochs) for length in step)


def rolled_out(data: RolloutDataModule, update: int) -> Rollout:
    """A rollout of the right prompts with responses of all lengths."""
    queries = [data.splits["train"][row]["query_ids"] for row in data.prompts_of(update)]
    ids, query_mask = pad_sequences(queries, 0, "left")
    lengths = 1 + torch.randperm(RESPONSE, generator=torch.Generator().manual_seed(update))[: len(queries)]
    mask, value_mask = response_masks(lengths, RESPONSE)
    return Rollout(
        queries=ids, query_mask=query_mask, lengths=lengths, responses=torch.zeros(len(queries), RESPONSE),
        mask=mask, value_mask=value_mask,
    )  # fmt: skip


def costs(data: Any, stage: str, epoch: int) -> list[int]:
    """Tokens of every micro-batch of an epoch (PPO: an update), with padding."""
    data.trainer.current_epoch = epoch
    if stage != "ppo":
        return [batch["input_ids"].numel() for batch in data.train_dataloader()]
    data.make_rollout = lambda update: rolled_out(data, update)
    return [len(micro) * max(micro.total_lengths()) for micro in data.train_dataloader()]


@STAGES
@pytest.mark.parametrize("rows", [1, 2.5, 4])
@pytest.mark.parametrize(("world", "minibatches"), [(1, 1), (2, 1), (1, 2)])
def test_no_micro_batch_is_larger_than_the_budget(
    make: Make, stage: str, rows: float, world: int, minibatches: int
) -> None:
    """On no rank and in no epoch; and all steps of all ranks have as many, no more than the costliest needs."""
    budget, epochs = int(rows * longest(make, stage)), 2
    numbers = set()
    for rank in range(world):
        data = make(stage, budget, minibatches, rank=rank, world_size=world, max_epochs=epochs)
        parts = data.trainer.accumulate_grad_batches
        numbers.add(parts)
        assert parts == max(parts_needed(step, budget) for step in steps(data, epochs))
        for epoch in range(epochs):
            sizes = costs(data, stage, epoch)
            assert max(sizes) <= budget
            assert len(sizes) == len(data.train_dataloader())
    assert len(numbers) == 1
    assert rows == 4 or parts > 1


@STAGES
def test_a_larger_budget_takes_fewer_micro_batches(make: Make, stage: str) -> None:
    most = longest(make, stage, epochs=1)
    parts = [make(stage, rows * most).trainer.accumulate_grad_batches for rows in (1, 2, 4, 100)]
    assert parts == sorted(parts, reverse=True)
    assert parts[0] >= 4
    assert parts[-1] == 1


@STAGES
def test_more_epochs_may_need_more_micro_batches_never_fewer(make: Make, stage: str) -> None:
    budget = int(2.2 * longest(make, stage))
    parts = [make(stage, budget, max_epochs=epochs).trainer.accumulate_grad_batches for epochs in (0, 1, 2, 6)]
    assert parts == sorted(parts)
    assert parts[0] == parts[1]


@STAGES
def test_a_budget_below_the_longest_example_is_refused(make: Make, stage: str) -> None:
    most = longest(make, stage, epochs=6)
    make(stage, most, max_epochs=6)
    with pytest.raises(UserError, match=rf"max_tokens_per_micro_batch is {most - 1}, less than the {most} tokens"):
        make(stage, most - 1, max_epochs=6)


@STAGES
@pytest.mark.parametrize("epochs", [-1, None])
def test_a_run_without_an_end_has_no_token_budget(make: Make, stage: str, epochs: int | None) -> None:
    make(stage, None, max_epochs=epochs)
    with pytest.raises(UserError, match=r"max_tokens_per_micro_batch needs trainer\.max_epochs"):
        make(stage, 10_000, max_epochs=epochs)


@STAGES
def test_the_batch_must_divide_among_the_processes_all_the_same(make: Make, stage: str) -> None:
    with pytest.raises(UserError, match=r"data\.batch_size 8 does not divide into 3 processes"):
        make(stage, 10_000, world_size=3)


@STAGES
def test_the_accumulation_that_a_user_sets_must_be_that_of_the_budget(make: Make, stage: str) -> None:
    with pytest.raises(UserError, match=r"accumulate_grad_batches is 7, but .*max_tokens_per_micro_batch make it 1"):
        make(stage, 10_000, accumulate=7)


def test_the_micro_batch_size_says_nothing_under_a_budget(attach: Make, sft_data: Make) -> None:
    """8 does not divide by 3."""
    with pytest.raises(UserError, match=r"data\.micro_batch_size"):
        attach(sft_data(micro_batch_size=3))
    assert attach(sft_data(micro_batch_size=3, max_tokens_per_micro_batch=10_000)).tokens == 10_000
    assert attach(sft_data()).tokens is None
