"""Hidden states of a model's backbone, as few as are read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.ops.sequences import causal_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, first: int) -> Tensor:
    """Of sequences whose padding is on the right, `(B, T) -> (B, T, H)`; only those of columns from `first` on count.

    The others still serve as keys and values, so all layers need them but the MLP of the last one, which leaves them
    out: a sixteenth of a model of 16 layers, of which the MLP is two thirds.
    """
    backbone: Any = model.base_model
    with _last_mlp_from(backbone, first):
        return backbone(**causal_inputs(input_ids, attention_mask), use_cache=False).last_hidden_state


@contextmanager
def _last_mlp_from(backbone: Any, first: int) -> Iterator[None]:
    checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in backbone.modules())
    mlp = None if checkpointed else last_mlp(backbone)  # checkpointed layers run again in the backward pass
    if mlp is None or not first:
        yield
        return
    hooks = [
        mlp.register_forward_pre_hook(lambda _, inputs: inputs[0][:, first:].contiguous()),
        mlp.register_forward_hook(lambda _, inputs, output: F.pad(output, (0, 0, first, 0))),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def last_mlp(backbone: nn.Module) -> nn.Module | None:
    """The MLP of the last layer, where it is a function of each token alone; experts that are routed to are not."""
    layers = next((child for child in backbone.children() if isinstance(child, nn.ModuleList)), None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is None or len(inspect.signature(mlp.forward).parameters) != 1:
        return None
    routed = hasattr(mlp, "experts") or any(isinstance(part, nn.ModuleList) for part in mlp.modules())
    return None if routed else mlp
