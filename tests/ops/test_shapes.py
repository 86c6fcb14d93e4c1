"""The types of `rlhf.ops` are checked while tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from rlhf.ops.advantages import gae
from rlhf.ops.losses import masked_total, pairwise_losses
from rlhf.ops.sequences import position_ids, token_logprobs
from rlhf.ops.token_rewards import kl_estimate, penalise_missing_eos, token_rewards

MATRIX, ROW, COLUMNS = torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, dtype=torch.long)
REAL = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (gae, (MATRIX, MATRIX[:, :1])),
        (masked_total, (MATRIX, REAL[:, :1], 1.0)),
        (masked_total, (MATRIX, REAL.long(), 1.0)),
        (pairwise_losses, (ROW, ROW.unsqueeze(1))),
        (penalise_missing_eos, (ROW, REAL, -1.0)),
        (token_rewards, (MATRIX, ROW, COLUMNS.float(), REAL, 0.05)),
        (token_logprobs, (MATRIX, MATRIX.long())),
        (position_ids, (MATRIX,)),
        (kl_estimate, (MATRIX, MATRIX, "k4")),
    ],
)
def test_a_wrong_shape_or_dtype_is_refused(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Most of them would broadcast and give a number."""
    with pytest.raises(TypeCheckError):
        function(*arguments)
