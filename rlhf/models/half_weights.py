"""Weights that autocast casts in every forward, kept in the half precision that it casts them to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.models.actor_critic import response_logprobs
from rlhf.models.scalar_model import ScalarModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forward = Callable[[Tensor, Tensor], Tensor]
CASTS = (torch.ops.aten._to_copy, torch.ops.aten.to)  # the second one in inference mode


class _Uses(TorchDispatchMode):
    """Notes by their storages which tensors are cast to a precision, and which an operation reads in another way."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.cast: set[int] = set()
        self.read: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        used = self.cast if func.overloadpacket in CASTS and result.dtype == self.dtype else self.read
        used |= _storages([*args, *(kwargs or {}).values()]) - _storages(result)  # a view reads nothing
        return result


def _storages(values: Any) -> set[int]:
    return {value.untyped_storage()._cdata for value in tree_leaves(values) if isinstance(value, Tensor)}


@torch.no_grad()
def keep_half(model: nn.Module, dtype: torch.dtype, forward: Forward) -> None:
    """Keeps frozen weights of a model in the half precision of autocast, where no number depends on it.

    These are the weights that a forward reads as copies in that precision only: matrices of linear layers and their
    biases, unless they are tied to an embedding, but neither embeddings and norms nor a head that computes in float32.
    The model must then be called under autocast. One whose forward is not the same afterwards is left as it was.

    Args:
        model: on the device where it is used; weights that are trained stay as they are.
        forward: how its owner uses it; takes ids and mask, `(2, 3)` each, with padding on the left.
    """
    device = next(model.parameters()).device
    ids, mask = torch.tensor([[0, 1, 0], [1, 0, 1]], device=device), torch.tensor([[1, 1, 1], [0, 1, 1]], device=device)
    with torch.autocast(device.type, dtype):
        # What short forwards find out about the model once, they find out here, as some run without autocast.
        expected = forward(ids, mask)
        with _Uses(dtype) as uses:
            forward(ids, mask)
        alone = uses.cast - uses.read
        frozen = (p for p in model.parameters() if not p.requires_grad and p.is_floating_point())  # not quantised
        whole = {p: p.data for p in frozen if p.untyped_storage()._cdata in alone}
        for parameter in whole:
            parameter.data = parameter.data.to(dtype)
        try:
            same = torch.equal(forward(ids, mask), expected)
        except (TypeError, ValueError, RuntimeError):  # its code asks for the precision of a weight
            same = False
    if not same:
        for parameter, data in whole.items():
            parameter.data = data


def language_model_forward(model: PreTrainedModel) -> Forward:
    """Returns how a policy or reference is used."""
    return lambda ids, mask: torch.stack(response_logprobs(model, ids, mask, ids, torch.ones_like(mask), 1.0))


def scalar_forward(model: ScalarModel) -> Forward:
    """Returns how a reward model is used."""
    return lambda ids, mask: torch.cat([model.score(ids, mask), model.padding_side_difference(ids, mask).view(1)])
