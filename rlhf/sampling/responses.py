"""Responses to a whole batch of queries, sampled in groups of similar length."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.ops.rewards import ScorePosition
from rlhf.ops.sequences import response_lengths, truncate_after_eos
from rlhf.sampling.grouping import by_length
from rlhf.sampling.rollout import Rollout, response_masks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# queries (n, P), their mask (n, P) and random numbers (n, R) -> token ids (n, r)
Draw = Callable[[Tensor, Tensor, Tensor], Tensor]


def respond(
    draw: Draw,
    batch: dict[str, Any],
    numbers: Tensor,
    tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    score_position: ScorePosition,
) -> Rollout:
    """Samples a response to each query of a batch, as a rollout with texts and masks.

    Args:
        draw: samples the responses to some queries.
        batch: `queries (N, P)` padded on the left, `query_mask (N, P)`, and `texts`.
        numbers: `(N, R)`, the random numbers of each row; R is the longest response allowed.
        tokens: the most tokens that are sampled together, counting padding and responses of R tokens.
        tokenizer: decodes the responses.
        score_position: see `response_masks`.
    """
    queries, query_mask = batch["queries"], batch["query_mask"]
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    responses = sample_in_groups(draw, queries, query_mask, numbers, tokens, eos_id=eos_id, pad_id=pad_id)
    lengths, has_eos = response_lengths(responses, eos_id)
    mask, value_mask = response_masks(lengths, responses.shape[1], score_position)
    real = [row[keep].tolist() for row, keep in zip(responses, mask, strict=True)]
    decoded = tokenizer.batch_decode(real, skip_special_tokens=True)
    texts = [{**text, "response": response} for text, response in zip(batch["texts"], decoded, strict=True)]
    return Rollout(
        texts, queries=queries, query_mask=query_mask, responses=responses, lengths=lengths, has_eos=has_eos,
        mask=mask, value_mask=value_mask,
    )  # fmt: skip


def sample_in_groups(
    draw: Draw,
    queries: Tensor,
    query_mask: Tensor,
    numbers: Tensor,
    tokens: int,
    *,
    eos_id: int,
    pad_id: int,
) -> Tensor:
    """Samples responses, `(N, r)`; everything after the first EOS is PAD.

    There is one more column than the longest response needs, if it is shorter than allowed: the score may be added to
    the token after EOS (D29).

    Arguments are those of `respond`.
    """
    longest = numbers.shape[1]
    responses = torch.full((len(queries), longest), pad_id, device=queries.device)
    width = 1
    for rows in by_length((query_mask.sum(1) + longest).tolist(), tokens, shortest=0):
        first = int(query_mask[rows].any(0).long().argmax())
        part = draw(queries[rows, first:], query_mask[rows, first:], numbers[rows])
        responses[rows, : part.shape[1]] = part
        width = max(width, part.shape[1])
    responses = truncate_after_eos(responses[:, :width], eos_id, pad_id)
    width = min(int(response_lengths(responses, eos_id)[0].max()) + 1, longest)
    return F.pad(responses, (0, max(0, width - responses.shape[1])), value=pad_id)
