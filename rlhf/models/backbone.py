"""Hidden states of a model's backbone, computed only for the tokens that are read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf.hardware import sent
from rlhf.models.packing import packed, packs
from rlhf.models.probes import backbone_of
from rlhf.ops.sequences import causal_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """Computes the last hidden states of some tokens, `(..., H)`.

    The tokens of a row before the first one that is read still serve as keys and values, so all layers need them but
    the last: its MLP leaves them out. If the model packs, its attention does so too, and there is no padding.

    Args:
        input_ids, attention_mask: `(B, T)`, padded on the right.
        rows, columns: places of real tokens, in any shape `(...)` to which both broadcast, on the mask's device. If
            that is the CPU, nothing here waits for a GPU.
    """
    device = input_ids.device
    rows, columns = torch.broadcast_tensors(rows, columns)
    lengths = attention_mask.sum(1)
    first = (lengths - 1).scatter_reduce(0, rows.flatten(), columns.flatten(), "amin")
    backbone, places = backbone_of(model), torch.arange(input_ids.shape[1], device=lengths.device)
    if not packs(model):
        with _last_mlp_on(backbone, places >= first.min(), device):
            states = backbone(**causal_inputs(input_ids, attention_mask), use_cache=False).last_hidden_state
        return states[sent(rows, device), sent(columns, device)]
    with _last_mlp_on(backbone, (places >= first.unsqueeze(1))[attention_mask.bool()], device):
        states = backbone(**packed(input_ids, attention_mask, first), use_cache=False).last_hidden_state[0]
    return states[sent((lengths.cumsum(0) - lengths)[rows] + columns, device)]


@contextmanager
def _last_mlp_on(backbone: Any, read: Tensor, device: torch.device) -> Iterator[None]:
    """Lets the last MLP compute only columns that are read, `(T,)`, inside the block; the others become 0."""
    checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in backbone.modules())
    mlp = None if checkpointed else last_mlp(backbone)  # checkpointed layers run again in the backward pass
    if mlp is None or read.all():
        yield
        return
    columns = sent(read.nonzero().squeeze(1), device)

    def pick(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0].index_select(1, columns)

    def put_back(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output.new_zeros(len(output), len(read), output.shape[2]).index_copy(1, columns, output)

    hooks = [mlp.register_forward_pre_hook(pick), mlp.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def last_mlp(backbone: nn.Module) -> nn.Module | None:
    """Returns the MLP of the last layer if it is a function of each token alone, which routed experts are not."""
    layers = next((child for child in backbone.children() if isinstance(child, nn.ModuleList)), None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is None or len(inspect.signature(mlp.forward).parameters) != 1:
        return None
    routed = hasattr(mlp, "experts") or any(isinstance(part, nn.ModuleList) for part in mlp.modules())
    return None if routed else mlp
