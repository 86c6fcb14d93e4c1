"""Rewards by functions of the user's own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError

RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]


def call_reward_function(function: RewardFunction, texts: list[dict[str, Any]], device: torch.device) -> Tensor:
    """Computes the rewards of episodes, `(N,)`.

    Args:
        function: (queries, responses, records) -> a number per episode.
        texts: per episode `query`, `response` and `record`.
    """
    values = function(*([text[name] for text in texts] for name in ("query", "response", "record")))
    if len(values) != len(texts):
        raise UserError(f"{function.__name__} returned {len(values)} rewards for {len(texts)} responses.")
    return torch.tensor([float(v) for v in values], device=device)
