"""Responses to a whole batch of queries, sampled in groups of similar length."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.models.tokenizers import decode_responses, eos_ids
from rlhf.ops.sequences import response_lengths, truncate_after_eos
from rlhf.ops.token_rewards import ScorePosition
from rlhf.sampling.grouping import by_length
from rlhf.sampling.rollout import Rollout, response_masks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Drawn = Tensor | tuple[Tensor, Tensor]  # token ids and, of an engine, its log-probabilities of them


def respond(
    draw: Callable[[Tensor, Tensor, Tensor], Drawn],
    batch: dict[str, Any],
    numbers: Tensor,
    tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    score_position: ScorePosition,
) -> Rollout:
    """Samples a response to each query of a batch, as a rollout with texts and masks.

    Args:
        draw: samples token ids `(n, r)` from queries `(n, P)`, their mask and random numbers `(n, R)`; an engine also
            returns its own log-probabilities `(n, r)`, which become `engine_logprobs`.
        batch: `queries (N, P)` padded on the left, `query_mask (N, P)`, and `texts`.
        numbers: `(N, R)`, the random numbers of each row; R is the longest response allowed.
        tokens: the most tokens that are sampled together, counting padding and responses of R tokens.
    """
    queries, query_mask, longest = batch["queries"], batch["query_mask"], numbers.shape[1]
    ends, pad_id = eos_ids(tokenizer), tokenizer.pad_token_id
    responses = torch.full((len(queries), longest), pad_id, device=queries.device)
    engine: Tensor | None = None  # its log-probabilities
    width = 1
    for rows in by_length((query_mask.sum(1) + longest).tolist(), tokens, shortest=0):
        first = int(query_mask[rows].any(0).long().argmax())
        drawn = draw(queries[rows, first:], query_mask[rows, first:], numbers[rows])
        part, logprobs = drawn if isinstance(drawn, tuple) else (drawn, None)
        if logprobs is not None:
            engine = torch.zeros(responses.shape, device=queries.device) if engine is None else engine
            engine[rows, : part.shape[1]] = logprobs
        responses[rows, : part.shape[1]] = part
        width = max(width, part.shape[1])
    responses = truncate_after_eos(responses, ends, pad_id)
    lengths, has_eos = response_lengths(responses[:, :width], ends)
    # One more column than the longest response needs, unless it has all: the score can land on it.
    responses = responses[:, : max(width, min(int(lengths.max()) + 1, longest))]
    mask, value_mask = response_masks(lengths, responses.shape[1], score_position)
    sides = ((queries, query_mask.bool()), (responses, mask))
    real = ([row[keep].tolist() for row, keep in zip(ids, kept, strict=True)] for ids, kept in sides)
    decoded = decode_responses(tokenizer, *real)
    texts = [{**text, "response": response} for text, response in zip(batch["texts"], decoded, strict=True)]
    inputs = {"queries": queries, "query_mask": query_mask, "responses": responses}
    if engine is not None:
        inputs["engine_logprobs"] = torch.where(mask, engine[:, : responses.shape[1]], 0.0)
    return Rollout(texts, **inputs, lengths=lengths, has_eos=has_eos, mask=mask, value_mask=value_mask)
