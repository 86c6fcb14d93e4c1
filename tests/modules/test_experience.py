"""What a rollout depends on, and what it must not depend on (D12, D29, D33)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.modules import Optimization, PPOModule, PPOSettings

Make = Callable[..., Any]
SETTINGS = PPOSettings(response_length=8, ppo_epochs=1)


class OnRank(PPOModule):
    """Thinks that it is some process of several."""

    rank = 0

    @property
    def global_rank(self) -> int:
        return self.rank


@pytest.fixture
def fitted(model_path: str, reward_path: str, trainer: Make, rollout_data: Make) -> Make:
    """A module after one update, and a batch of prompts to answer."""

    def fitted(kind: type[PPOModule], **settings: Any) -> tuple[Any, dict[str, Any]]:
        module, data = kind(model_path, reward_path, ppo=SETTINGS), rollout_data()
        trainer(limit_val_batches=0, **settings).fit(module, data)
        return module, {**data.collate("train", [0, 1, 2, 3], True), "chunk": 4}

    return fitted


def test_every_update_and_every_rank_samples_by_a_seed_of_its_own(fitted: Make) -> None:
    module, batch = fitted(OnRank)

    def responses(update: int, rank: int) -> Tensor:
        module.rank = rank
        return module.rollout(batch, update).responses

    first = responses(3, 0)
    assert torch.equal(first, responses(3, 0))
    for other in (responses(4, 0), responses(3, 1)):
        assert (first == other).float().mean() < 0.2


class Short(PPOModule):
    """Gives responses of 1 to 3 tokens, where 8 would be allowed."""

    def sample_responses(self, queries: Tensor, query_mask: Tensor, *args: Any) -> Tensor:
        eos = self.tokenizer.eos_token_id
        return torch.tensor([[9, 8, eos], [eos, 5, 5], [9, eos, 5], [7, 6, eos]] * (len(queries) // 4))


def test_the_longest_response_has_a_column_for_its_score(fitted: Make) -> None:
    module, batch = fitted(Short)
    rollout = module.rollout(batch, 0)
    pad, eos = module.tokenizer.pad_token_id, module.tokenizer.eos_token_id
    assert rollout.responses.tolist() == [[9, 8, eos, pad], [eos, pad, pad, pad], [9, eos, pad, pad], [7, 6, eos, pad]]
    assert rollout.value_mask.sum(1).tolist() == [4, 2, 3, 4]
    landed = rollout.rewards.gather(1, rollout.lengths.unsqueeze(1)).squeeze(1)
    assert torch.equal(landed, rollout.scores)


def test_rollout_and_training_have_the_same_precision(
    model_path: str, reward_path: str, trainer: Make, rollout_data: Make
) -> None:
    module = PPOModule(model_path, reward_path, ppo=SETTINGS, optimization=Optimization(1e-3))
    t = trainer(limit_val_batches=0, precision="bf16-mixed")
    t.fit(module, rollout_data(micro_batch_size=8, rollout_batch_size=8))
    assert t.callback_metrics["val/ratio_max_deviation"] < 1e-5
