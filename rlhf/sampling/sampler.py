"""Sampling responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from rlhf.hardware import accumulator_dtype
from rlhf.models.packing import packed, packs
from rlhf.ops.sequences import model_inputs

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

LEAVING = 0.25  # share of the rows that must have ended before they leave the batch: the cache is copied then
BLOCK = 256


class Decoding(NamedTuple):
    """The temperature at which tokens are drawn, the tokens that end a response, and PAD, which fills it up."""

    temperature: float
    eos_ids: Sequence[int]
    pad_id: int


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Keeps a model in evaluation mode inside the block: in training mode, checkpointed layers keep no cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def uniforms(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Draws the random numbers of `sample`: one in [0, 1) per token, `(rows, length)`, on the generator's device."""
    device = generator.device
    return torch.rand(rows, length, dtype=accumulator_dtype(device), generator=generator, device=device)


@torch.no_grad()
def sample(model: PreTrainedModel, queries: Tensor, query_mask: Tensor, uniforms: Tensor, decoding: Decoding) -> Tensor:
    """Samples one response per query from the model's full distribution at a temperature (D25).

    There is no top-k, top-p or other processing, whatever the model's `generation_config` says. A row ends with its
    first EOS and is PAD after it. Rows that have ended leave the batch, and sampling stops when all have. A row's
    response depends on its own query and its own random numbers, not on the rows beside it.

    Args:
        queries, query_mask: `(B, P)`, padded on the left.
        uniforms: `(B, R)`, see `uniforms`; R is the longest response allowed.

    Returns:
        Token ids `(B, r)` with r at most R.
    """
    temperature, eos_ids, pad_id = decoding.temperature, queries.new_tensor(decoding.eos_ids), decoding.pad_id
    steps = uniforms.shape[1]
    mask, position = F.pad(query_mask.long(), (0, steps), value=1), query_mask.sum(1, keepdim=True) - 1
    cache = _cache_with_room(model, steps)
    responses = torch.full((len(queries), steps), pad_id, device=queries.device)
    rows = torch.arange(len(queries), device=queries.device)  # those that are in the batch
    alive = torch.ones_like(rows, dtype=torch.bool)
    with evaluation_mode(model):
        logits = _read_queries(model, queries, query_mask, cache)
        for step in range(steps):
            tokens = choose(logits.float() / temperature, uniforms[rows, step])
            responses[rows, step] = torch.where(alive, tokens, pad_id)
            alive = alive & ~torch.isin(tokens, eos_ids)
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


def _read_queries(model: PreTrainedModel, queries: Tensor, query_mask: Tensor, cache: Cache) -> Tensor:
    """Returns the logits of every first token, `(B, V)`, and puts the keys and values of the queries into the cache."""
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
    """Draws a token per row by inverting the cumulative distribution, `(B, V), (B,) -> (B,)`.

    The distribution is summed up by blocks of the vocabulary, in the precision of the random numbers: first the block
    is found, then the token in it. A token of probability 0 is never drawn, however the sums round. Unlike
    `torch.multinomial`, this needs one random number per row, not one per row and token.
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
    """Finds the first column with a weight and a cumulative sum above the target, else the last one with a weight.

    A binary search could stop at a column without a weight: each sum is rounded by itself and may exceed the next one.
    """
    columns = torch.arange(weights.shape[1], device=weights.device)
    last = torch.where(weights > 0, columns, 0).amax(1, keepdim=True)
    return torch.where((cumulative > target) & (weights > 0), columns, last).amin(1, keepdim=True)


def _cumulative(values: Tensor) -> Tensor:
    """Computes the sums up to each column by a matrix product: `cumsum` is not deterministic on GPUs."""
    ones = torch.ones(values.shape[1], values.shape[1], dtype=values.dtype, device=values.device)
    return values @ ones.triu()


def _cache_with_room(model: PreTrainedModel, steps: int) -> Cache:
    """Returns an empty cache whose plain layers allocate room for all steps at once, and so are never copied."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        @override
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
            """Turns packed rows, `(1, heads, N, d)`, into rows with the padding of a mask `(B, W)`."""
            rows, width = mask.shape
            before = [buffer[0, :, : self.get_seq_length()] for buffer in self._buffers]
            self._buffers = [x.new_zeros(rows, len(x), width + steps, x.shape[2]) for x in before]
            self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)
            for padded, states in zip((self.keys, self.values), before, strict=True):
                padded.transpose(1, 2)[mask.bool()] = states.transpose(0, 1)

        @override
        def batch_select_indices(self, indices: Tensor) -> None:
            width = self.get_seq_length()
            self._buffers = [buffer[indices] for buffer in self._buffers]
            self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)

    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
