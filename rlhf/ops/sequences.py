"""Token sequences: padding, positions, stop tokens, log-probabilities of chosen tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def pad_sequences(
    sequences: Sequence[Sequence[int]], value: int, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """Pad token lists to the longest of them.

    Returns:
        `input_ids (B, T)` and `attention_mask (B, T)`, both int64.
    """
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), value)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        where = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[row, where] = torch.tensor(sequence, dtype=torch.long)
        mask[row, where] = 1
    return ids, mask


def position_ids(attention_mask: Tensor) -> Tensor:
    """The n-th real token has position n, whatever the padding (D09). `(B, T) -> (B, T)`; padding gets 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0) * attention_mask


def model_inputs(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """What a model is fed: padding as id 0 with mask 0 (D05), positions explicit (D09). All `(B, T)`."""
    mask = attention_mask.long()
    return {"input_ids": input_ids * mask, "attention_mask": mask, "position_ids": position_ids(mask)}


def move_padding(input_ids: Tensor, attention_mask: Tensor, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """The same sequences with all padding on one side; ids and mask, `(B, T)` each."""
    order = attention_mask.long().argsort(dim=1, descending=side == "right", stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def right_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same sequences with all padding on the right, no wider than the longest; ids and mask, `(B, T)` each."""
    width = int(attention_mask.sum(1).max())
    ids, mask = move_padding(input_ids, attention_mask, "right")
    return ids[:, :width], mask[:, :width]


def causal_inputs(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """What a causal model is fed when all padding is on the right: padding as id 0 (D05), positions explicit (D09).

    There is no attention mask: no real token sees what stands behind it, and without a mask attention takes its fast
    causal kernels. All `(B, T)`.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return {"input_ids": input_ids * attention_mask, "position_ids": positions.expand_as(input_ids)}


def last_real_token(attention_mask: Tensor) -> Tensor:
    """Index of the last real token of every row, `(B, T) -> (B,)`, for padding on either side (D19)."""
    positions = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    return (positions * attention_mask).argmax(-1)


def response_lengths(responses: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
    """Length of each response up to and with its first EOS, and whether there is one.

    Args:
        responses: `(B, R)` token ids; what follows the first EOS is ignored.

    Returns:
        `lengths (B,)` (R where there is no EOS) and `has_eos (B,)`.
    """
    is_eos = responses == eos_id
    has_eos = is_eos.any(-1)
    lengths = torch.where(has_eos, is_eos.long().argmax(-1) + 1, responses.shape[-1])
    return lengths, has_eos


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """True for the first `lengths` of `width` columns, `(B,) -> (B, width)`."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(-1)


def truncate_after_eos(responses: Tensor, eos_id: int, pad_id: int) -> Tensor:
    """Replace everything after the first EOS by PAD (D25). `(B, R) -> (B, R)`."""
    lengths, _ = response_lengths(responses, eos_id)
    return torch.where(length_mask(lengths, responses.shape[-1]), responses, pad_id)


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of chosen tokens and entropy of the distribution, at a temperature (D26), in float32.

    Args:
        logits: `(B, T, V)`; position t predicts `tokens[:, t]`.
        tokens: `(B, T)`.

    Returns:
        `logprobs (B, T)` and `entropy (B, T)` in nats.
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy
