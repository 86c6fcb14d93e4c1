"""Log-probabilities from a language model, with as few logits as possible."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf.hardware import sent
from rlhf.models.backbone import hidden_states
from rlhf.models.probes import backbone_of, plain_precision
from rlhf.ops.logprobs import linear_logprobs
from rlhf.ops.sequences import causal_inputs, token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what the probe found, while the model lives


def logprobs_at(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    places: tuple[Tensor, Tensor],
    tokens: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Computes log-probabilities of tokens and entropies at a temperature, `(n,)` each, in float32.

    Args:
        input_ids, attention_mask: `(B, T)`, padded on the right.
        places: rows and columns, `(n,)` each, of the states that predict the tokens, on the mask's device.
        tokens: `(n,)`.
    """
    rows, columns = places
    weight = output_weight(model)
    if weight is not None:
        hidden = hidden_states(model, input_ids, attention_mask, rows, columns)
        return linear_logprobs(hidden, weight, tokens, temperature)
    first, last = (int(x) for x in columns.aminmax()) if len(columns) else (0, 0)
    device = input_ids.device
    keep = torch.arange(first, last + 1, device=device)
    inputs = causal_inputs(input_ids, attention_mask)
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    if logits.shape[1] != len(keep):  # the model does not know `logits_to_keep`
        logits = logits[:, keep]
    return token_logprobs(logits[sent(rows, device), sent(columns - first, device)], tokens, temperature)


def next_token_logprobs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
    """Computes the log-probabilities of the tokens that a mask chooses, `(B, T - 1)`; all others are 0.

    Args:
        input_ids, attention_mask, mask: `(B, T)`, padded on the right. With both masks on the CPU, nothing waits for a
            GPU.
    """
    rows, columns = mask[:, 1:].nonzero(as_tuple=True)
    tokens, there = input_ids[:, 1:], (sent(rows, input_ids.device), sent(columns, input_ids.device))
    logprobs, _ = logprobs_at(model, input_ids, attention_mask, (rows, columns), tokens[there])
    return logprobs.new_zeros(tokens.shape).index_put(there, logprobs)


def output_weight(model: PreTrainedModel) -> Tensor | None:
    """Returns the matrix `(V, H)` with which `logits = hidden @ weight.T`, or None.

    None is for models that do more to their logits (a bias, a scale, soft-capping), which a forward of two tokens
    shows, once per model, and for weights that ZeRO-3 partitions: such models must compute their own logits.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or layer.bias is not None or hasattr(layer.weight, "ds_id"):
        return None
    if model not in _plain:
        _plain[model] = _is_plain(model, layer)
    return layer.weight if _plain[model] else None


@torch.no_grad()
def _is_plain(model: PreTrainedModel, layer: nn.Linear) -> bool:
    """Tells whether the layer's input is the last hidden states and its output the logits, large ones too."""
    ids = torch.tensor([[0, 1]], device=layer.weight.device)
    large = torch.linspace(-1e3, 1e3, len(layer.weight), dtype=layer.weight.dtype, device=ids.device)
    received: list[Tensor] = []

    def give_large(_: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        received.append(inputs[0])
        return large.expand_as(logits)

    hook = layer.register_forward_hook(give_large)
    try:
        with plain_precision(model):
            logits = model(input_ids=ids, use_cache=False).logits
            hidden = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    return torch.equal(logits.float(), large.float().expand_as(logits)) and torch.allclose(received[0], hidden)
