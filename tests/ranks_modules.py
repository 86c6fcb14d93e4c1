"""Modules for test_ranks.py, named on its command lines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.loading import load_causal_lm
from rlhf.modules import PPOModule, SFTModule


class SGDModule(SFTModule):
    """Adam's first step is the same whatever the scale of the gradient; this one's is not.

    A subclass may have a parameter without dimensions, here one that scales the losses.
    """

    def configure_model(self) -> None:
        super().configure_model()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def token_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        losses, mask = super().token_losses(batch)
        return self.scale * losses, mask

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WaitingPPO(PPOModule):
    """Its policy must be the SFT model, in the precision in which it is trained, until the critic is warm."""

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.lora is not None:
            return
        held = self.trainer.current_epoch < self.ppo.critic_warmup
        weights = load_causal_lm(self.model_path, dtype=self.weights_dtype).parameters()
        pairs = list(zip(weights, self.actor_critic.policy.parameters(), strict=True))
        assert all(torch.equal(old, new) for old, new in pairs) == held


class FixedResponsesPPO(WaitingPPO):
    """Responses are a function of the prompt alone, so they do not depend on the rank that draws them."""

    def sample_responses(self, queries: Tensor, query_mask: Tensor, *_: Any) -> Tensor:
        width = self.ppo.response_length
        number = (queries * query_mask).sum(1, keepdim=True)
        column = torch.arange(width).expand(len(queries), -1)
        tokens = 10 + (number + 37 * column) % 400
        return tokens.masked_fill(column == number % (width + 1), self.tokenizer.eos_token_id)


class FixedGroupsPPO(FixedResponsesPPO):
    """The second response to a prompt is another function of it."""

    def sample_responses(self, queries: Tensor, query_mask: Tensor, *_: Any) -> Tensor:
        responses = super().sample_responses(queries, query_mask)
        second = torch.arange(len(queries)).unsqueeze(1) % 2 == 1
        return torch.where(second & (responses != self.tokenizer.eos_token_id), responses + 1, responses)
