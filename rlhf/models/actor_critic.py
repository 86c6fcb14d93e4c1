"""Policy and critic as one network with two parts, so that one engine and one optimizer train both (D24, D39)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from rlhf.models.scalar_model import ScalarModel
from rlhf.ops.sequences import model_inputs, token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Evaluation(NamedTuple):
    """What the networks say of given responses; each `(B, R)`, float32."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


def join(queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Left-padded queries `(B, P)` and right-padded responses `(B, R)` as one sequence and its mask, `(B, P + R)`."""
    return torch.cat([queries, responses], 1), torch.cat([query_mask, response_mask.to(query_mask.dtype)], 1)


def response_logprobs(
    policy: PreTrainedModel,
    queries: Tensor,
    query_mask: Tensor,
    responses: Tensor,
    response_mask: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token, and the entropy there, at the sampling temperature (D26).

    Logits are computed for the response only: the token before it predicts its first one.

    Args:
        queries, query_mask: `(B, P)`, padded on the left.
        responses, response_mask: `(B, R)`, padded on the right.

    Returns:
        `logprobs (B, R)` and `entropy (B, R)` in float32; what stands at padding means nothing.
    """
    ids, mask = join(queries, query_mask, responses, response_mask)
    keep = responses.shape[1] + 1
    logits = policy(**model_inputs(ids, mask), logits_to_keep=keep, use_cache=False).logits[:, -keep:-1]
    return token_logprobs(logits, responses * response_mask, temperature)


class ActorCritic(nn.Module):
    """A policy and a critic, separate networks.

    Args:
        policy: causal language model.
        critic: scalar model.
    """

    def __init__(self, policy: PreTrainedModel, critic: ScalarModel) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def forward(
        self, queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor, temperature: float
    ) -> Evaluation:
        """Evaluate responses: shapes as in `response_logprobs`.

        `values[:, t]` is the critic's value of the state before response token t, so the column after the last real
        token holds the value of the finished response.
        """
        logprobs, entropy = response_logprobs(self.policy, queries, query_mask, responses, response_mask, temperature)
        ids, mask = join(queries, query_mask, responses, response_mask)
        values = self.critic(ids, mask)[:, queries.shape[1] - 1 : -1]
        return Evaluation(logprobs, entropy, values)
