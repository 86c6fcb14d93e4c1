"""What devices can and cannot do."""

from __future__ import annotations

import torch

WITHOUT_FLOAT64 = {"mps"}


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Gives the precision for sums that should not round: float64; on a Mac's GPU, which has none, float32."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64
