"""What the tests of adapters and of quantised bases share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.callbacks.export import write_export
from rlhf.models.actor_critic import response_logprobs
from rlhf.models.scalar_model import ScalarModel

IDS = torch.tensor([[5, 7, 9, 11, 13, 15], [3, 6, 2, 8, 4, 1]])
MASK = torch.ones_like(IDS)


@torch.no_grad()
def logprobs(model: Any) -> Tensor:
    """Those of the last three tokens of each row, in CPU memory."""
    ids, mask = (x.to(next(model.parameters()).device) for x in (IDS, MASK))
    return response_logprobs(model, ids[:, :3], mask[:, :3], ids[:, 3:], mask[:, 3:], 0.7)[0].cpu()


@torch.no_grad()
def scores(model: ScalarModel) -> Tensor:
    """Those of the rows, in CPU memory."""
    ids, mask = (x.to(next(model.parameters()).device) for x in (IDS, MASK))
    return model.score(ids, mask).cpu()


def moved(module: Any) -> Any:
    """A module whose trained weights are anything but what they were."""
    module.configure_model()
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


def exported(module: Any, folder: Path) -> str:
    """The folder of an export of it."""
    write_export(moved(module), folder)
    return str(folder)
