"""The backbone of a language model, and short forwards that show what it can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.ops.sequences import model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 0.02  # of the largest state: rounding in bfloat16 is below it
EXACT = 1e-4  # rounding in float32 on a CPU: small encoders differ by 1e-3 only

_left: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what the probe found, while the model lives


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

    Raises:
        FloatingPointError: the states are not finite.
    """
    backbone = backbone_of(model)
    device = next(model.parameters()).device

    def states(*ids: int) -> Tensor:
        inputs = torch.tensor([ids], device=device)
        return backbone(input_ids=inputs, use_cache=False).last_hidden_state[0, :3].float()

    single = device.type == "cpu" and model.dtype == torch.float32
    tolerance = EXACT if single else TOLERANCE
    for first in ((0, 1, 0), (1, 1, 0), (0, 0, 1)):
        found = states(*first, 1, 1)
        if near(found, states(*first, 0, 0), tolerance):
            return True
        if not found.isfinite().all():
            raise FloatingPointError("the states are not finite")
    return False


@torch.no_grad()
def takes_left_padding(model: PreTrainedModel, device: torch.device) -> bool:
    """Tells whether a model gives a row its states behind padding, too; recurrent ones often do not.

    A forward of a short row shows it, once per model.
    """
    if model not in _left:
        backbone: Any = backbone_of(model)
        row = torch.tensor([[0, 1, 0, 0, 1, 1]], device=device)
        inputs = model_inputs(F.pad(row, (3, 0)), F.pad(torch.ones_like(row), (3, 0)))
        with plain_precision(model):
            behind, alone = (backbone(**x, use_cache=False).last_hidden_state for x in (inputs, {"input_ids": row}))
        _left[model] = near(behind[0, 3:].float(), alone[0].float())
    return _left[model]


def half_kept(model: nn.Module) -> torch.dtype | None:
    """Returns the half precision that some weights of a model are kept in for autocast, while others are float32."""
    dtypes = {p.dtype for p in model.parameters()}
    half = dtypes & {torch.bfloat16, torch.float16}
    return half.pop() if half and torch.float32 in dtypes else None


def plain_precision(model: nn.Module) -> torch.autocast:
    """Returns the context in which a model computes in the precision of its weights: without autocast, if it can."""
    device, half = next(model.parameters()).device.type, half_kept(model)
    return torch.autocast(device, enabled=False) if half is None else torch.autocast(device, half)


def near(states: Tensor, others: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Tells whether states are the same up to rounding."""
    return bool((states - others).abs().max() <= tolerance * others.abs().max())
