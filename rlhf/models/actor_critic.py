"""Policy and critic as one network with two parts, so that one engine and one optimizer train both (D24, D39)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from rlhf.hardware import sent
from rlhf.models.backbone import hidden_states
from rlhf.models.output_layer import logprobs_at
from rlhf.models.scalar_model import ScalarModel
from rlhf.ops.sequences import right_padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Evaluation(NamedTuple):
    """The results of policy and critic for given responses; each `(B, R)`, float32."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


def join(queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Joins left-padded queries `(B, P)` and right-padded responses `(B, R)`; returns ids and mask, `(B, P + R)`."""
    return torch.cat([queries, responses], 1), torch.cat([query_mask, response_mask.to(query_mask.dtype)], 1)


def response_logprobs(
    policy: PreTrainedModel,
    queries: Tensor,
    query_mask: Tensor,
    responses: Tensor,
    response_mask: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Computes the log-probability of each response token, and the entropy there, at the sampling temperature (D26).

    Args:
        queries, query_mask: `(B, P)`, padded on the left.
        responses, response_mask: `(B, R)`, padded on the right. With both masks on the CPU, nothing waits for a GPU.

    Returns:
        `logprobs (B, R)` and `entropy (B, R)` in float32, 0 on padding.
    """
    ids, mask = right_padded(*join(queries, query_mask, responses, response_mask))
    rows, columns = response_mask.nonzero(as_tuple=True)
    predicting = query_mask.sum(1)[rows] - 1 + columns
    places = sent(rows, ids.device), sent(columns, ids.device)
    found = logprobs_at(policy, ids, mask, (rows, predicting), responses[places], temperature)
    logprobs, entropy = (x.new_zeros(responses.shape).index_put(places, x) for x in found)
    return logprobs, entropy


class ActorCritic(nn.Module):
    """A policy and a critic, separate networks, or a policy alone."""

    def __init__(self, policy: PreTrainedModel, critic: ScalarModel | None) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def forward(
        self, queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor, temperature: float
    ) -> Evaluation:
        """Evaluates responses; shapes are those of `response_logprobs`.

        `values[:, t]` is the critic's value of the state before response token t, so the column after the last real
        token holds the value of the finished response; later columns mean nothing. Without a critic they are 0.
        """
        logprobs, entropy = response_logprobs(self.policy, queries, query_mask, responses, response_mask, temperature)
        if self.critic is None:
            return Evaluation(logprobs, entropy, torch.zeros_like(logprobs))
        ids, mask = right_padded(*join(queries, query_mask, responses, response_mask))
        rows, steps = (torch.arange(size, device=mask.device) for size in responses.shape)
        columns = torch.minimum(query_mask.sum(1, keepdim=True) - 1 + steps, mask.sum(1, keepdim=True) - 1)
        values = self.critic.read(hidden_states(self.critic.model, ids, mask, rows.unsqueeze(1), columns))
        return Evaluation(logprobs, entropy, values)
