"""Sampling responses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.hardware import accumulator_dtype
from rlhf.models.packing import packed, packs
from rlhf.ops.sequences import model_inputs

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

LEAVING = 0.25  # share of the rows that must have ended before they leave the batch: the cache is copied then
BLOCK = 256


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """In training mode, checkpointed layers keep no cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def uniforms(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """The randomness of `sample`, one number in [0, 1) per token, `(rows, length)`, on the device of the generator."""
    device = generator.device
    return torch.rand(rows, length, dtype=accumulator_dtype(device), generator=generator, device=device)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    queries: Tensor,
    query_mask: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    eos_id: int,
    pad_id: int,
) -> Tensor:
    """Sample one response per query from the model's full distribution at a temperature (D25).

    There is no top-k, top-p or other processing, whatever the model's `generation_config` says. A row ends with its
    first EOS and is PAD after it. Rows that have ended leave the batch, and sampling stops when all have. A row's
    response depends on its own query and its own random numbers, not on the rows beside it.

    Args:
        queries, query_mask: `(B, P)`, padded on the left.
        uniforms: `(B, R)`, see `uniforms`; R is the longest that a response may get.

    Returns:
        Token ids `(B, r)` with r at most R.
    """
    steps = uniforms.shape[1]
    mask, position = F.pad(query_mask.long(), (0, steps), value=1), query_mask.sum(1, keepdim=True) - 1
    cache = cache_with_room(model, steps)
    responses = torch.full((len(queries), steps), pad_id, device=queries.device)
    rows = torch.arange(len(queries), device=queries.device)  # which rows are in the batch
    alive = torch.ones_like(rows, dtype=torch.bool)
    with evaluation_mode(model):
        logits = read_queries(model, queries, query_mask, cache)
        for step in range(steps):
            tokens = choose(logits.float() / temperature, uniforms[rows, step])
            responses[rows, step] = torch.where(alive, tokens, pad_id)
            alive = alive & (tokens != eos_id)
            left = int(alive.sum())
            if not left or step == steps - 1:
                break
            if left <= (1 - LEAVING) * len(rows):
                cache.batch_select_indices(alive)
                rows, mask, position, tokens = (x[alive] for x in (rows, mask, position, tokens))
                alive = alive[alive]
            position = position + 1
            width = queries.shape[1] + step + 1
            inputs = {"input_ids": tokens.unsqueeze(1), "attention_mask": mask[:, :width], "position_ids": position}
            logits = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]
    return responses[:, : step + 1]


def read_queries(model: PreTrainedModel, queries: Tensor, query_mask: Tensor, cache: Cache) -> Tensor:
    """Logits of the first token of every response, `(B, V)`; the keys and values of the queries go into the cache."""
    layers: list[Any] = cache.layers
    if not packs(model) or not all(hasattr(layer, "unpack") for layer in layers):
        inputs = model_inputs(queries, query_mask)
        return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    lengths = query_mask.sum(1)
    inputs = packed(queries, query_mask, first=lengths - 1)
    last = lengths.cumsum(0) - 1
    logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=last).logits[0]
    for layer in layers:
        layer.unpack(query_mask)
    return logits


def choose(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token per row by inverting the cumulative distribution, `(B, V), (B,) -> (B,)`.

    The distribution is summed up by blocks of the vocabulary, in the precision of the random numbers: first the block
    is found, then the token in it. A token whose probability rounds to 0 is never drawn, however the sums round. Unlike
    `torch.multinomial`, this needs one random number per row, and not one per row and token.
    """
    width = logits.shape[1]
    logits = F.pad(logits, (0, -width % BLOCK), value=-torch.inf)
    weights = torch.exp(logits - logits.amax(1, keepdim=True)).unflatten(1, (-1, BLOCK))
    sums = weights.sum(2, dtype=uniforms.dtype)
    blocks = _cumulative(sums)
    target = uniforms.unsqueeze(1) * blocks[:, -1:]
    block = _first_above(blocks, target, sums)
    before = F.pad(blocks, (1, 0)).gather(1, block)
    own = weights[torch.arange(len(logits), device=logits.device), block.squeeze(1)].to(uniforms.dtype)
    token = _first_above(_cumulative(own), target - before, own)
    return (block * BLOCK + token).squeeze(1)


def _first_above(cumulative: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Finds the first column with a weight whose cumulative sum is above the target, else the last one with a weight.

    A binary search could stop at a column without a weight: each sum rounds by itself, and so may exceed the next one.

    Args:
        cumulative, weights: `(B, n)`.
        target: `(B, 1)`.
    """
    columns = torch.arange(weights.shape[1], device=weights.device)
    last = torch.where(weights > 0, columns, 0).amax(1, keepdim=True)
    return torch.where((cumulative > target) & (weights > 0), columns, last).amin(1, keepdim=True)


def _cumulative(values: Tensor) -> Tensor:
    """Sums up to each column, `(B, n) -> (B, n)`, by a matrix: `cumsum` is not deterministic on GPUs."""
    ones = torch.ones(values.shape[1], values.shape[1], dtype=values.dtype, device=values.device)
    return values @ ones.triu()


def cache_with_room(model: PreTrainedModel, steps: int) -> Cache:
    """An empty cache of keys and values whose plain layers make room for all steps at once, and so never move again."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            start, width = self.get_seq_length(), key_states.shape[2]
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self._buffers = [
                    x.new_empty(*x.shape[:2], width + steps, x.shape[3]) for x in (key_states, value_states)
                ]
            for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[:, :, start : start + width] = new
            self.keys, self.values = (buffer[:, :, : start + width] for buffer in self._buffers)
            return self.keys, self.values

        def unpack(self, mask: Tensor) -> None:
            """From rows behind one another, `(1, heads, N, d)`, to rows with the padding of a mask `(B, W)`."""
            rows, width = mask.shape
            before = [buffer[0, :, : self.get_seq_length()] for buffer in self._buffers]
            self._buffers = [x.new_zeros(rows, len(x), width + steps, x.shape[2]) for x in before]
            self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)
            for padded, states in zip((self.keys, self.values), before, strict=True):
                padded.transpose(1, 2)[mask.bool()] = states.transpose(0, 1)

        def batch_select_indices(self, indices: Tensor) -> None:
            width = self.get_seq_length()
            self._buffers = [buffer[indices] for buffer in self._buffers]
            self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)

    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
