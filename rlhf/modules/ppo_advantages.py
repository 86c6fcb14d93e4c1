"""From the rewards of a rollout to its advantages."""

from __future__ import annotations

import torch

from rlhf.errors import UserError
from rlhf.modules.settings import PPOSettings
from rlhf.ops.advantages import gae, group_normalised, leave_one_out
from rlhf.ops.losses import importance_weights
from rlhf.ops.masking import Reduce, identity, whiten
from rlhf.sampling.rollout import Rollout

OF_GROUPS = {"leave_one_out": leave_one_out, "group_normalised": group_normalised}


def set_advantages(episodes: Rollout, ppo: PPOSettings, reduce_sum: Reduce) -> None:
    """Computes the advantages of a rollout from `rewards` and, with a critic, `values` and the returns (D30 to D32).

    Without a critic an episode is one action: all of its tokens have the advantage of its whole reward. The loss is a
    mean over the tokens of the global minibatch (D14), in which a response weighs as much as it has tokens. So it does
    in RLOO, which sums the log-probabilities of a response; GRPO takes the mean over each response first.
    """
    if ppo.has_critic:
        if ppo.whiten_rewards:
            episodes.rewards = whiten(episodes.rewards, episodes.value_mask, False, reduce_sum)
        advantages, returns = gae(episodes.rewards, episodes.values, ppo.gamma, ppo.lam)
        episodes.returns = torch.where(episodes.value_mask, returns, 0.0)
    else:
        whole = torch.where(episodes.value_mask, episodes.rewards, 0.0).sum(1)
        of_episodes = OF_GROUPS[ppo.advantage](whole, episodes.mask.any(1), ppo.samples_per_prompt)
        advantages = of_episodes.unsqueeze(1).expand_as(episodes.mask)
    over = ppo.whiten_advantages or ("global" if ppo.has_critic else "off")
    reduce = {"global": reduce_sum, "rank": identity}.get(over)
    if reduce is not None:
        advantages = whiten(advantages, episodes.mask, reduce=reduce)
    if (cap := ppo.importance_cap) is not None:
        if not hasattr(episodes, "engine_logprobs"):
            raise UserError(
                "model.ppo.importance_cap needs an engine's log-probabilities, but sample_responses returned none; "
                "return them, or leave it out."
            )
        advantages = advantages * importance_weights(episodes.logprobs, episodes.engine_logprobs, cap)
    episodes.advantages = torch.where(episodes.mask, advantages, 0.0)
