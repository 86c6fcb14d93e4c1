"""Log-ratios of two policies on responses of the first, whose mean estimates the KL between them."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

from rlhf.evaluation.resumable import Row
from rlhf.hardware import best_device
from rlhf.models.actor_critic import response_logprobs
from rlhf.models.loading import load_causal_lm
from rlhf.ops.sequences import pad_sequences
from rlhf.ops.token_rewards import kl_estimate


def log_ratios(
    model: str, reference: str, pad_id: int, temperature: float, precision: str
) -> Callable[[list[Row]], pd.DataFrame]:
    """Loads two policies, and returns the function that computes the column `kl` of each row.

    It is log(model(response) / reference(response)) in nats, at the temperature of the sampling; its mean estimates
    KL(model || reference) per response as `objective/kl` of PPO does.
    """
    device, dtype = best_device(), getattr(torch, precision)
    names = {"model": model, "reference": reference}
    policies: list[Any] = [load_causal_lm(path, name, dtype).to(device).eval() for name, path in names.items()]  # type: ignore[arg-type]

    @torch.no_grad()
    def compute(rows: list[Row]) -> pd.DataFrame:
        queries, query_mask = pad_sequences([row["query_ids"] for row in rows], pad_id, "left")
        responses, mask = pad_sequences([[*map(int, row["response_ids"])] for row in rows], pad_id)
        inputs = queries.to(device), query_mask.to(device), responses.to(device), mask.to(device)
        ours, theirs = (response_logprobs(policy, *inputs, temperature)[0] for policy in policies)
        return pd.DataFrame({"kl": kl_estimate(ours, theirs).sum(1).tolist()})

    return compute
