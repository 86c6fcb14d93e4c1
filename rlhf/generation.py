"""Sampling responses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf.ops.sequences import model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """In training mode, checkpointed layers keep no cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    queries: Tensor,
    query_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    pad_id: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample one response per query from the model's full distribution at a temperature (D25).

    There is no top-k, top-p or other processing, whatever the model's `generation_config` says. A row ends with its
    first EOS and is PAD after it; sampling stops when all rows have ended.

    Args:
        queries, query_mask: `(B, P)`, padded on the left.
        generator: source of randomness on the model's device.

    Returns:
        Token ids `(B, R)` with R at most `max_new_tokens`.
    """
    from transformers import DynamicCache

    inputs = model_inputs(queries, query_mask)
    mask, position = inputs["attention_mask"], inputs["position_ids"][:, -1:]
    cache = DynamicCache(config=model.config)
    responses = torch.full((len(queries), max_new_tokens), pad_id, device=queries.device)
    alive = torch.ones(len(queries), dtype=torch.bool, device=queries.device)
    with evaluation_mode(model):
        for step in range(max_new_tokens):
            logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            probabilities = torch.softmax(logits.float() / temperature, dim=-1)
            tokens = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
            responses[:, step] = torch.where(alive, tokens, pad_id)
            alive &= tokens != eos_id
            if not alive.any():
                return responses[:, : step + 1]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            position = position + 1
            inputs = {"input_ids": tokens.unsqueeze(1), "attention_mask": mask, "position_ids": position}
    return responses
