"""PPO without a critic: advantages of groups of responses, and the KL in the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from rlhf.errors import UserError
from rlhf.models.actor_critic import Evaluation
from rlhf.modules import Optimization, PPOModule, PPOSettings
from rlhf.sampling.rollout import Rollout

Make = Callable[..., Any]
RLOO = PPOSettings(
    response_length=8, ppo_epochs=1, temperature=2.0, advantage="leave_one_out", samples_per_prompt=4,
    missing_eos_score=None,
)  # fmt: skip
GRPO = replace(RLOO, advantage="group_normalised", kl_in="loss", kl_estimator="k3")


class Keeping(PPOModule):
    """Learns from all episodes but the first two of each rollout; its policy is not the reference."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        torch.manual_seed(0)
        for parameter in self.actor_critic.policy.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))

    def keep_episodes(self, episodes: Rollout) -> Tensor:
        return torch.arange(len(episodes), device=self.device) > 1


@pytest.fixture
def fit(model_path: str, reward_path: str, trainer: Make, rollout_data: Make) -> Make:
    def fit(ppo: PPOSettings, kind: type[PPOModule] = Keeping, **settings: Any) -> tuple[Any, Any]:
        module, data = kind(model_path, reward_path, ppo=ppo, optimization=Optimization(1e-3)), rollout_data()
        trainer(limit_val_batches=0, **settings).fit(module, data)
        return module, data

    return fit


def test_all_tokens_of_an_episode_have_its_advantage_over_the_others_of_its_prompt(fit: Make) -> None:
    _, data = fit(RLOO)
    rollout = data.last_rollout
    queries = [text["query"] for text in rollout.texts]
    assert [queries.index(query) for query in queries] == [0] * 4 + [4] * 4
    assert len({text["response"] for text in rollout.texts}) > 6
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)
    assert kl.abs().min() > 1e-2
    whole = rollout.scores - 0.05 * kl
    for row in range(8):
        others = [n for n in range(2 if row < 4 else 4, 4 if row < 4 else 8) if n != row]
        expected = whole[row] - whole[others].mean() if row > 1 else torch.tensor(0.0)
        tokens = rollout.advantages[row, : rollout.lengths[row]]
        torch.testing.assert_close(tokens, expected.expand_as(tokens), atol=1e-5, rtol=1e-5)
        assert not rollout.advantages[row, rollout.lengths[row] :].any()


def test_with_the_kl_in_the_loss_rewards_are_scores(fit: Make) -> None:
    _, data = fit(GRPO)
    rollout = data.last_rollout
    torch.testing.assert_close(rollout.rewards.sum(1)[2:], rollout.scores[2:])
    own = rollout.scores[4:]
    torch.testing.assert_close(rollout.advantages[4:, 0], (own - own.mean()) / (own.std() + 1e-4), atol=1e-5, rtol=1e-5)
    assert rollout.kl.sum() > 0


def test_the_gradient_of_the_loss_is_that_of_finite_differences(fit: Make) -> None:
    module, data = fit(GRPO)
    batch = data.last_rollout
    batch.policy_share = float(batch.mask.sum())
    double = {name: getattr(batch, name).double() for name in ("logprobs", "ref_logprobs", "advantages")}
    for name, tensor in double.items():
        setattr(batch, name, tensor)
    now = (batch.logprobs + 0.05 * torch.randn_like(batch.logprobs)).requires_grad_()

    def loss(logprobs: Tensor) -> Tensor:
        return module.loss(Evaluation(logprobs, torch.zeros_like(logprobs), torch.zeros_like(logprobs)), batch)[0]

    assert gradcheck(loss, (now,))
    d = (now - batch.ref_logprobs).detach()
    (slope,) = torch.autograd.grad(loss(now), now)
    module.ppo = replace(GRPO, kl_in="reward")
    (without,) = torch.autograd.grad(loss(now), now)
    expected = torch.where(batch.mask, 0.05 * (1 - torch.exp(-d)) / batch.mask.sum(), 0.0)
    torch.testing.assert_close(slope - without, expected)


def test_there_is_no_critic_in_memory_in_the_export_or_among_the_curves(fit: Make, tmp_path: Path) -> None:
    module, _ = fit(RLOO, logger=True)
    (group,) = module.parameter_groups()
    assert {*group} == {*module.actor_critic.policy.parameters()} == {*module.parameters()}
    module.save_export(tmp_path / "export")
    assert not (tmp_path / "export" / "critic").exists()
    names = module.trainer.logged_metrics.keys()
    assert "loss/policy_avg" in names
    assert names.isdisjoint({"objective/value", "loss/value_avg", "val/clipfrac_avg"})


def test_the_share_of_prompts_whose_responses_have_equal_scores_is_a_curve(fit: Make) -> None:
    class Equal(PPOModule):
        def score_responses(self, episodes: Rollout) -> Tensor:
            return torch.tensor([2.0] * 4 + [1.0, 2.0, 2.0, 2.0])

    module, _ = fit(RLOO, Equal, logger=True)
    assert module.trainer.logged_metrics["rollout/equal_groups"] == 0.5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"samples_per_prompt": 1}, "samples_per_prompt is 1; set it to 2 or more"),
        ({"value_clip": None}, "model.ppo.value_clip is for a critic"),
        ({"lam": 1.0}, "model.ppo.lam is for a critic"),
        ({"critic_warmup": 1}, "model.ppo.critic_warmup is for a critic.+leave it at 0"),
        ({"kl_in": "loss"}, "kl_estimator is k1"),
        ({"kl_in": "loss", "kl_estimator": "k3", "kl_target": 6.0}, "model.ppo.kl_target"),
    ],
)
def test_what_does_not_apply_is_refused_by_name(fit: Make, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        fit(replace(RLOO, **settings))


def test_a_batch_that_groups_do_not_divide_is_refused(fit: Make) -> None:
    with pytest.raises(UserError, match=r"batch_size 8 .+ 1 processes x model\.ppo\.samples_per_prompt 3"):
        fit(replace(RLOO, samples_per_prompt=3))


def test_several_samples_per_prompt_go_with_a_critic_too(fit: Make) -> None:
    module, data = fit(PPOSettings(response_length=8, ppo_epochs=1, samples_per_prompt=2), PPOModule)
    assert data.last_prompts[::2] == data.last_prompts[1::2]
    assert len({*data.last_prompts}) == 4
    assert data.last_rollout.values.any()
    assert module.actor_critic.critic is not None
