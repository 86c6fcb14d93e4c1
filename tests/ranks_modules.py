"""Modules for test_ranks.py, named on its command lines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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


class FixedResponsesPPO(PPOModule):
    """Responses are a function of the prompt alone, so they do not depend on the rank that draws them."""

    def sample_responses(self, queries: Tensor, query_mask: Tensor, *_: Any) -> Tensor:
        width = self.ppo.response_length
        number = (queries * query_mask).sum(1, keepdim=True)
        column = torch.arange(width).expand(len(queries), -1)
        tokens = 10 + (number + 37 * column) % 400
        return tokens.masked_fill(column == number % (width + 1), self.tokenizer.eos_token_id)
