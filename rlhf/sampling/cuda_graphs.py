"""Sampling whose steps all have the same shapes and ask the device for nothing, so that a GPU can replay them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from rlhf.errors import UserError
from rlhf.sampling.caches import fixed_cache
from rlhf.sampling.paths import fault_of
from rlhf.sampling.sampler import LOOK_EVERY, Decoding, choose, evaluation_mode, look, sample, without_end
from rlhf.sampling.token_readers import KeyValueReader, Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_replays: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what was found, while a model lives


def sampling_function(cuda_graphs: bool | None, device: torch.device) -> Callable[..., Tensor]:
    """Returns the function that samples on a device: with replayed steps, if they are asked for, or None on a GPU."""
    if cuda_graphs is None:
        return partial(sample_in_graph, required=False) if device.type == "cuda" else sample
    return sample_in_graph if cuda_graphs else sample


@torch.no_grad()
def sample_in_graph(
    model: PreTrainedModel,
    queries: Tensor,
    query_mask: Tensor,
    uniforms: Tensor,
    decoding: Decoding,
    required: bool = True,
) -> Tensor:
    """Samples as `sampler.sample` does, with a cache of fixed size; a GPU captures one step and replays it.

    A step is then one launch instead of hundreds. Rows that have ended stay in the batch. A model for which such a
    cache is not right is sampled by `sample`, and so is one whose step the GPU could not capture before.

    Raises:
        UserError: if replayed steps are `required`, and the GPU cannot capture one.
    """
    with evaluation_mode(model):
        if not replays(model):
            return sample(model, queries, query_mask, uniforms, decoding)
        steps = _Steps(StaticReader(model, queries, query_mask, uniforms.shape[1]), uniforms, decoding)
        advance: Callable[[], None] = steps.decode
        for step in range(1, uniforms.shape[1]):
            if step % LOOK_EVERY == 1 and not look(steps.alive, steps.largest, model).any():
                break
            advance()
            if step == 1 and queries.is_cuda:
                try:
                    advance = _captured(steps, type(model).__name__)
                except UserError as error:
                    if required:
                        raise
                    rank_zero_warn(f"{error} It is sampled step by step.")
                    _replays[model] = False
        look(steps.alive, steps.largest, model)
    return without_end(steps.responses, decoding)


def _captured(steps: _Steps, name: str) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        # It records the step without running it; other threads, those of NCCL, may go on with what they do.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            steps.decode()
    except RuntimeError as error:
        reason = (str(error) or "?").splitlines()[0]
        raise UserError(
            f"A CUDA graph cannot hold a step of {name}: {reason}; set ppo.cuda_graphs to false."
        ) from error
    return graph.replay


def replays(model: PreTrainedModel) -> bool:
    """Tells whether the steps of a model in evaluation mode can have the same shapes, by a test once per model."""
    if model not in _replays:
        fault = fault_of(model, StaticReader)
        _replays[model] = fault is None
        if fault is not None:
            rank_zero_info(f"ppo.cuda_graphs has no effect on {type(model).__name__}: {fault}.")
    return _replays[model]


class StaticReader(KeyValueReader):
    """Reads the queries as its base does, then keeps a cache of fixed size and changes all its tensors in place.

    All rows stay. `mask (B, 1, 1, W)` says which columns of the cache hold real tokens, `column (1,)` which comes next.
    """

    loses_rows = False

    @override
    def read_queries(self) -> Tensor:
        logits = super().read_queries()
        self.cache = fixed_cache(self.cache)
        room = self.query_mask.new_zeros(len(self.queries), self.mask.shape[1] - self.width)
        self.mask = torch.cat([self.query_mask, room], 1).bool()[:, None, None]
        self.column = torch.full((1,), self.width, device=self.queries.device)
        return logits

    @override
    def read(self, tokens: Tensor) -> Tensor:
        self.mask.index_fill_(3, self.column, True)
        self.position.add_(1)
        self.column.add_(1)
        return self._logits(
            input_ids=tokens.unsqueeze(1), attention_mask=self.mask, position_ids=self.position, logits_to_keep=1
        )[:, -1]

    @override
    def keep(self, rows: Tensor) -> None:
        raise NotImplementedError("all rows stay")


class _Steps:
    """The state of sampling, in tensors that are changed in place; the first tokens are drawn at once.

    `column (1,)` says which token of the responses comes next.
    """

    def __init__(self, reader: Reader, uniforms: Tensor, decoding: Decoding) -> None:
        self.reader, self.uniforms, self.decoding = reader, uniforms, decoding
        self.responses = torch.full(uniforms.shape, decoding.pad_id, device=uniforms.device)
        self.eos_ids = self.responses.new_tensor(decoding.eos_ids)
        self.tokens = torch.zeros_like(self.responses[:, 0])
        self.alive = torch.ones_like(self.tokens, dtype=torch.bool)
        self.largest = torch.zeros_like(self.tokens, dtype=torch.float)
        self.column = self.tokens.new_zeros(1)
        self._draw(reader.read_queries())

    def decode(self) -> None:
        """Reads the last tokens and draws the next ones."""
        self._draw(self.reader.read(self.tokens))

    def _draw(self, logits: Tensor) -> None:
        self.largest.copy_(logits.amax(1))
        numbers = self.uniforms.index_select(1, self.column).squeeze(1)
        drawn = choose(logits.float() / self.decoding.temperature, numbers)
        kept = torch.where(self.alive, drawn, self.decoding.pad_id)
        self.responses.index_copy_(1, self.column, kept.unsqueeze(1))
        self.alive.logical_and_(~torch.isin(drawn, self.eos_ids))
        self.tokens.copy_(drawn)
        self.column.add_(1)
