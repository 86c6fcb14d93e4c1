"""Token sequences: padding, positions, stop tokens, log-probabilities of chosen tokens.

An attention mask is 1, or true, on real tokens and 0 on padding. It may be on the CPU while the ids are on a GPU: what
is made of the mask alone stays there, so that lengths can be read without waiting for the GPU.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.hardware import sent

Ids = Int[Tensor, "B T"]
Mask = Int[Tensor, "B T"] | Bool[Tensor, "B T"]
PerRow = Int[Tensor, " B"]


def pad_sequences(
    sequences: Sequence[Sequence[int]], value: int, side: Literal["left", "right"] = "right"
) -> tuple[Ids, Ids]:
    """Pads token lists to the longest of them, and returns ids and attention mask."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    masks = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, True, value, side), pad_sequence(masks, True, 0, side)


def position_ids(attention_mask: Mask) -> Ids:
    """Numbers the real tokens of each row from 0, whatever the padding (D09); padding gets 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0) * attention_mask


def model_inputs(input_ids: Ids, attention_mask: Mask) -> dict[str, Ids]:
    """Returns the inputs of a model: padding as id 0 with mask 0 (D05), and explicit positions."""
    mask = sent(attention_mask, input_ids.device).long()
    return {"input_ids": input_ids * mask, "attention_mask": mask, "position_ids": position_ids(mask)}


def move_padding(input_ids: Ids, attention_mask: Mask, side: Literal["left", "right"]) -> tuple[Ids, Mask]:
    """Moves all padding to one side, and returns ids and attention mask."""
    order = attention_mask.long().argsort(dim=1, descending=side == "right", stable=True)
    return input_ids.gather(1, sent(order, input_ids.device)), attention_mask.gather(1, order)


def right_padded(input_ids: Ids, attention_mask: Mask) -> tuple[Int[Tensor, "B t"], Tensor]:
    """Moves all padding to the right and cuts off the columns that no row uses."""
    width = int(attention_mask.sum(1).max())
    ids, mask = move_padding(input_ids, attention_mask, "right")
    return ids[:, :width], mask[:, :width]


def causal_inputs(input_ids: Ids, attention_mask: Mask) -> dict[str, Ids]:
    """Returns the inputs of a causal model when all padding is on the right.

    There is no attention mask: no real token sees the padding behind it, and without a mask attention takes its fast
    causal kernels.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    ids = input_ids * sent(attention_mask, input_ids.device)
    return {"input_ids": ids, "position_ids": positions.expand_as(input_ids)}


def last_real_token(attention_mask: Mask) -> PerRow:
    """Returns the column of the last real token of every row, for padding on either side (D19)."""
    positions = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    return (positions * attention_mask).argmax(-1)


def response_lengths(responses: Int[Tensor, "B R"], eos_ids: Sequence[int]) -> tuple[PerRow, Bool[Tensor, " B"]]:
    """Returns the length of each response up to and including its first EOS (else R), and whether there is one."""
    is_eos = torch.isin(responses, responses.new_tensor(eos_ids))
    has_eos = is_eos.any(-1)
    lengths = torch.where(has_eos, is_eos.long().argmax(-1) + 1, responses.shape[-1])
    return lengths, has_eos


def length_mask(lengths: PerRow, width: int) -> Bool[Tensor, "B {width}"]:
    """Returns a mask that is true for the first `lengths` of `width` columns."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(-1)


def truncate_after_eos(responses: Int[Tensor, "B R"], eos_ids: Sequence[int], pad_id: int) -> Int[Tensor, "B R"]:
    """Replaces everything after the first EOS by PAD (D25)."""
    lengths, _ = response_lengths(responses, eos_ids)
    return torch.where(length_mask(lengths, responses.shape[-1]), responses, pad_id)


def token_logprobs(
    logits: Float[Tensor, "*shape V"], tokens: Int[Tensor, "*shape"], temperature: float = 1.0
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Computes log-probabilities of tokens from the logits that predict them, and entropies, in nats and float32."""
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy
