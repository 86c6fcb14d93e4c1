"""Sampling whose steps all have the same shapes and ask the device for nothing, so that a GPU can replay them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.models.packing import ATTENTION
from rlhf.ops.sequences import model_inputs, response_lengths
from rlhf.sampling.sampler import Decoding, choose, evaluation_mode, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOOK_EVERY = 8  # steps between two looks whether all rows have ended: a look waits for the device


@torch.no_grad()
def sample_in_graph(
    model: PreTrainedModel, queries: Tensor, query_mask: Tensor, uniforms: Tensor, decoding: Decoding
) -> Tensor:
    """Samples as `sampler.sample` does, with a cache of fixed size; a GPU captures one step and replays it.

    A step is then one launch instead of hundreds. Rows that have ended stay in the batch. A model with sliding windows
    or another attention than SDPA is sampled by `sample`.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    cache = StaticCache(config=model.config, max_cache_len=queries.shape[1] + uniforms.shape[1])
    plain = all(type(layer) is StaticLayer for layer in cache.layers)
    if not plain or model.config._attn_implementation not in ("sdpa", ATTENTION):
        return sample(model, queries, query_mask, uniforms, decoding)
    forward = partial(model, past_key_values=cache, use_cache=True, logits_to_keep=1)
    steps = _Steps(forward, queries, query_mask, uniforms, decoding)
    with evaluation_mode(model):
        steps.draw(**model_inputs(queries, query_mask))
        advance: Callable[[], None] = steps.decode
        for step in range(1, uniforms.shape[1]):
            if step % LOOK_EVERY == 1 and not steps.alive.any():
                break
            advance()
            if step == 1 and queries.is_cuda:
                graph = torch.cuda.CUDAGraph()
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):  # records the step without running it
                    steps.decode()
                advance = graph.replay
    lengths, _ = response_lengths(steps.responses, decoding.eos_ids)
    return steps.responses[:, : int(lengths.max())]


class _Steps:
    """The state of sampling, in tensors that are changed in place.

    `mask (B, 1, 1, W)` says which columns of the cache hold real tokens, `column (1,)` which token comes next.
    """

    def __init__(
        self, forward: Callable[..., Any], queries: Tensor, query_mask: Tensor, uniforms: Tensor, decoding: Decoding
    ) -> None:
        self.forward, self.uniforms, self.decoding, self.start = forward, uniforms, decoding, queries.shape[1]
        self.eos_ids = queries.new_tensor(decoding.eos_ids)
        self.mask = torch.cat([query_mask, torch.zeros_like(uniforms, dtype=query_mask.dtype)], 1).bool()[:, None, None]
        self.positions = query_mask.sum(1, keepdim=True) - 1
        self.tokens = queries[:, :1].clone()
        self.responses = torch.full_like(uniforms, decoding.pad_id, dtype=queries.dtype)
        self.alive = torch.ones_like(queries[:, 0], dtype=torch.bool)
        self.column = queries.new_zeros(1)

    def decode(self) -> None:
        """Reads the last tokens and draws the next ones."""
        self.draw(input_ids=self.tokens, attention_mask=self.mask, position_ids=self.positions)

    def draw(self, **inputs: Tensor) -> None:
        """Reads the inputs and draws a token for each row."""
        logits = self.forward(**inputs).logits[:, -1]
        numbers = self.uniforms.index_select(1, self.column).squeeze(1)
        drawn = choose(logits.float() / self.decoding.temperature, numbers)
        kept = torch.where(self.alive, drawn, self.decoding.pad_id)
        self.responses.index_copy_(1, self.column, kept.unsqueeze(1))
        self.alive.logical_and_(~torch.isin(drawn, self.eos_ids))
        self.mask.index_fill_(3, self.start + self.column, True)
        self.tokens.copy_(drawn.unsqueeze(1))
        self.positions.add_(1)
        self.column.add_(1)
