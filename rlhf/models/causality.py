"""The backbone of a language model, and whether its tokens see only those before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 0.02  # of the largest state: rounding in bfloat16 is below it


def backbone_of(model: PreTrainedModel) -> Any:
    """Returns the part of a model that computes its last hidden states.

    It is `base_model`, except for types whose class gives it another name than it has (Llama 4): there it is the part
    that holds the embeddings.
    """
    base: Any = model.base_model
    if base is not model:
        return base
    embeddings: Any = model.get_input_embeddings()
    return next(child for child in model.children() if any(part is embeddings for part in child.modules()))


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Tells whether the states of tokens stay the same when later tokens change, by forwards of a few tokens.

    One agreement is enough: where experts are chosen, rounding can tip the choice, so that states differ by chance.
    """
    backbone = backbone_of(model)
    device = next(model.parameters()).device

    def states(*ids: int) -> Tensor:
        inputs = torch.tensor([ids], device=device)
        return backbone(input_ids=inputs, use_cache=False).last_hidden_state[0, :3].float()

    for first in ((0, 1, 0), (1, 1, 0), (0, 0, 1)):
        before_ones, before_zeros = states(*first, 1, 1), states(*first, 0, 0)
        if (before_ones - before_zeros).abs().max() <= TOLERANCE * before_ones.abs().max():
            return True
    return False
