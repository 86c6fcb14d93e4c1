"""Sampling whose steps all have the same shapes and ask the device for nothing, so that a GPU can replay them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.ops.sequences import model_inputs
from rlhf.sampling.sampler import choose, evaluation_mode, sample

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

LOOK_EVERY = 8  # steps, to see whether all rows have ended: a look waits for the device


@torch.no_grad()
def sample_in_graph(
    model: PreTrainedModel,
    queries: Tensor,
    query_mask: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    eos_id: int,
    pad_id: int,
) -> Tensor:
    """As `sampler.sample`, with a cache of fixed size; on a GPU a step is captured once and then replayed.

    A step is then one launch instead of hundreds. Rows that have ended stay in the batch. A model whose attention is
    not plain (sliding windows, other implementations than SDPA) is sampled by `sample`.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    width = queries.shape[1] + uniforms.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=width)
    plain = all(type(layer) is StaticLayer for layer in cache.layers)
    if not plain or model.config._attn_implementation != "sdpa":
        return sample(
            model, queries, query_mask, uniforms, temperature=temperature, eos_id=eos_id, pad_id=pad_id
        )  # fmt: skip
    steps = _Steps(model, cache, queries, query_mask, uniforms, temperature, eos_id, pad_id)
    with evaluation_mode(model):
        steps.prefill(queries, query_mask)
        advance: Callable[[], None] = steps.decode
        for step in range(1, uniforms.shape[1]):
            if step % LOOK_EVERY == 1 and not steps.alive.any():
                break
            advance()
            if step == 1 and queries.is_cuda:
                advance = captured(steps.decode)
    used = int((steps.responses != pad_id).any(0).sum())
    return steps.responses[:, :used]


class _Steps:
    """The state of sampling, in tensors that are changed in place.

    `mask (B, 1, 1, W)` says which columns of the cache hold real tokens, `column (1,)` which token comes next.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        queries: Tensor,
        query_mask: Tensor,
        uniforms: Tensor,
        temperature: float,
        eos_id: int,
        pad_id: int,
    ) -> None:
        rows, self.start = queries.shape
        steps = uniforms.shape[1]
        self.model, self.cache, self.uniforms, self.temperature = model, cache, uniforms, temperature
        self.eos_id, self.pad_id = eos_id, pad_id
        room = query_mask.new_zeros(rows, steps)
        self.mask = torch.cat([query_mask, room], 1).bool()[:, None, None]
        self.positions = query_mask.sum(1, keepdim=True) - 1
        self.tokens = queries[:, :1].clone()
        self.responses = torch.full((rows, steps), pad_id, device=queries.device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=queries.device)
        self.column = torch.zeros(1, dtype=torch.long, device=queries.device)

    def prefill(self, queries: Tensor, query_mask: Tensor) -> None:
        """Read the queries and draw the first tokens."""
        inputs = model_inputs(queries, query_mask)
        self._draw(
            self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        )  # fmt: skip

    def decode(self) -> None:
        """Read the last tokens and draw the next ones."""
        out = self.model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._draw(out.logits[:, -1])

    def _draw(self, logits: Tensor) -> None:
        numbers = self.uniforms.index_select(1, self.column).squeeze(1)
        drawn = choose(logits.float() / self.temperature, numbers)
        kept = torch.where(self.alive, drawn, self.pad_id)
        self.responses.index_copy_(1, self.column, kept.unsqueeze(1))
        self.alive.logical_and_(drawn != self.eos_id)
        self.mask.index_fill_(3, self.start + self.column, True)
        self.tokens.copy_(drawn.unsqueeze(1))
        self.positions.add_(1)
        self.column.add_(1)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """A step that has run before, as a CUDA graph. Capturing runs nothing."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
