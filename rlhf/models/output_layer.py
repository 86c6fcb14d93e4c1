"""The output layer of a language model, where it is nothing but a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def output_weight(model: PreTrainedModel) -> Tensor | None:
    """The matrix `(V, H)` with which `logits = hidden @ weight.T`.

    None for a model that does more to its logits (a bias, a scale, soft-capping), which a forward of two tokens shows,
    and for one whose weights are shared out by ZeRO-3: these must be asked for logits.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or hasattr(layer.weight, "ds_id"):
        return None
    if model not in _plain:
        _plain[model] = _logits_are_linear(model, layer)
    return layer.weight if _plain[model] else None


@torch.no_grad()
def _logits_are_linear(model: PreTrainedModel, layer: nn.Linear) -> bool:
    ids = torch.tensor([[0, 1]], device=layer.weight.device)
    with torch.autocast(ids.device.type, enabled=False):
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return torch.allclose(logits, nn.functional.linear(hidden, layer.weight), rtol=1e-3, atol=1e-3)
