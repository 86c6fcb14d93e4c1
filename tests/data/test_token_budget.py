"""Micro-batches under a token budget: none is larger, all steps and processes have as many, bad budgets are refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from lightning.pytorch import Callback

import rlhf.data.token_budget
from rlhf.errors import UserError
from rlhf.modules import PPOModule, PPOSettings, RewardModule, SFTModule

Make = Callable[..., Any]
ALL = ["sft", "reward", "ppo"]


class Sizes(Callback):
    """Tokens, padding included, of every micro-batch that goes through a model."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, dict):
            self.seen.append(batch["input_ids"].numel())
        else:
            self.seen.append(len(batch) * max(batch.total_lengths()))


@pytest.fixture
def fit(
    model_path: str, reward_path: str, trainer: Make, sft_data: Make, preference_data: Make, rollout_data: Make
) -> Make:
    """A finished run: its micro-batches, and its DataModule."""

    def fit(stage: str, max_epochs: int = 2, **settings: Any) -> tuple[list[int], Any]:
        modules = {"sft": SFTModule, "reward": RewardModule, "ppo": PPOModule}
        given: dict[str, Any] = {"ppo": PPOSettings(response_length=6)} if stage == "ppo" else {}
        given |= {"reward_path": reward_path} if stage == "ppo" else {}
        data = {"sft": sft_data, "reward": preference_data, "ppo": rollout_data}[stage](**settings)
        sizes = Sizes()
        run = trainer(max_epochs=max_epochs, limit_val_batches=0, callbacks=[sizes])
        run.fit(modules[stage](model_path, **given), data)
        assert len(sizes.seen) % run.accumulate_grad_batches == 0
        return sizes.seen, data

    return fit


@pytest.mark.parametrize(("stage", "tokens"), [("sft", 400), ("reward", 900), ("ppo", 420)])
def test_no_micro_batch_is_larger_than_the_budget(fit: Make, stage: str, tokens: int) -> None:
    seen, data = fit(stage, max_tokens_per_micro_batch=tokens)
    assert max(seen) <= tokens
    accumulate = data.trainer.accumulate_grad_batches
    assert accumulate > 1
    per_step = [sum(seen[i : i + accumulate]) for i in range(0, len(seen), accumulate)]
    assert max(per_step) > (accumulate - 1) * tokens / 2  # fewer micro-batches would not do, or not by much


@pytest.mark.parametrize("stage", ALL)
def test_a_smaller_budget_gives_more_micro_batches(fit: Make, stage: str) -> None:
    counts = []
    for tokens in (10_000, 1_200, 700):
        _, data = fit(stage, max_epochs=1, max_tokens_per_micro_batch=tokens)
        counts.append(data.trainer.accumulate_grad_batches)
    assert counts[0] == 1
    assert all(a <= b for a, b in pairwise(counts))
    assert counts[-1] > 1


@pytest.mark.parametrize("stage", ALL)
def test_a_budget_below_the_longest_example_is_refused(fit: Make, stage: str) -> None:
    with pytest.raises(UserError, match=r"data\.max_tokens_per_micro_batch is 60, less than the \d+ tokens of the"):
        fit(stage, max_tokens_per_micro_batch=60)


def test_a_budget_needs_a_number_of_epochs(fit: Make) -> None:
    with pytest.raises(UserError, match=r"max_tokens_per_micro_batch needs trainer\.max_epochs"):
        fit("sft", max_epochs=-1, max_tokens_per_micro_batch=500)


@pytest.mark.parametrize("stage", ALL)
def test_auto_takes_what_fits(fit: Make, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for mebibytes in (10_000, 60, 40):
        monkeypatch.setattr(rlhf.data.token_budget, "device_memory", lambda *_, room=mebibytes: room * 2**20)
        seen, data = fit(stage, max_epochs=1, max_tokens_per_micro_batch="auto")
        assert max(seen) <= data.tokens
        counts.append(data.trainer.accumulate_grad_batches)
    assert counts[0] == 1
    assert all(a <= b for a, b in pairwise(counts))


def test_auto_says_when_nothing_fits(fit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlhf.data.token_budget, "device_memory", lambda *_: 2**20)
    with pytest.raises(UserError, match=r"max_tokens_per_micro_batch auto: .* needed for the longest example alone"):
        fit("sft", max_tokens_per_micro_batch="auto")


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_rollout_does_not_depend_on_how_many_rows_go_at_a_time(fit: Make, size: int) -> None:
    import torch

    rollouts = [fit("ppo", max_epochs=1, rollout_batch_size=n)[1].last_rollout for n in (size, 8)]
    assert torch.equal(*(r.responses for r in rollouts))
    for name in ("logprobs", "ref_logprobs", "values", "scores", "advantages"):
        one, other = (getattr(r, name) for r in rollouts)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_under_zero3_every_process_has_as_many_groups(fit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    _, data = fit("ppo", max_epochs=1)
    module = data.module
    batch = next(iter(data.val_dataloader()[0]))
    own = len(module.respond(batch, 0).groups)
    monkeypatch.setattr(PPOModule, "placements", ("device", "zero3"))
    monkeypatch.setattr(module, "reduce_max", lambda x: torch.maximum(x, torch.tensor([5, -8])))
    groups = module.respond(batch, 0).groups
    assert own < 5 == len(groups)
    assert sorted(row for group in groups for row in group) == list(range(len(batch["queries"])))
