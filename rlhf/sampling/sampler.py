"""Sampling responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.hardware import accumulator_dtype, sent
from rlhf.models.finite import check_logits
from rlhf.ops.sequences import response_lengths, right_padded
from rlhf.sampling.paths import reader_for
from rlhf.sampling.token_readers import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAVING = 0.25  # share of the rows that must have ended before they leave the batch: the cache is copied then
LOOK_EVERY = 8  # steps between two looks at which rows have ended: a look waits for the GPU
LOOKS = {"cpu": 1}  # the same by type of device, where it is less
BLOCK = 256
DRAWN, OVER = -1, -2  # what `given` says of columns without a given token


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
    with evaluation_mode(model):
        reader = reader_for(model)
        if reader.takes_padding:
            return without_end(
                _draw(reader(model, queries, query_mask, uniforms.shape[1]), uniforms, decoding), decoding
            )
        return _sample_without_padding(reader, model, *right_padded(queries, query_mask), uniforms, decoding)


def _draw(reader: Reader, uniforms: Tensor, decoding: Decoding, given: Tensor | None = None) -> Tensor:
    """Draws responses `(B, r)`; `given (B, R)` has tokens that are not drawn, else `DRAWN`, and `OVER` at the end.

    The last columns may be PAD in all rows: that all have ended is seen at a look only.
    """
    steps, device = uniforms.shape[1], uniforms.device
    look_every = LOOKS.get(device.type, LOOK_EVERY)
    eos_ids, pad_id = torch.tensor(decoding.eos_ids, device=device), decoding.pad_id
    responses = torch.full(uniforms.shape, pad_id, device=device)
    rows = torch.arange(len(uniforms), device=device)  # those that are in the batch
    alive = torch.ones_like(rows, dtype=torch.bool)
    logits = reader.read_queries()
    for step in range(steps):
        tokens = choose(logits.float() / decoding.temperature, uniforms[rows, step])
        ended = torch.isin(tokens, eos_ids)
        if given is not None:
            known = given[rows, step]
            tokens, ended = torch.where(known >= 0, known, tokens), ended & (known == DRAWN)
            alive = alive & (known != OVER)
        responses[rows, step] = torch.where(alive, tokens, pad_id)
        alive = alive & ~ended
        if step == steps - 1:
            look(alive, logits.amax(1), reader.model)
            break
        if (step + 1) % look_every == 0:
            left = look(alive, logits.amax(1), reader.model).nonzero().squeeze(1)
            if not len(left):
                break
            if len(left) <= (1 - LEAVING) * len(rows):
                left = sent(left, device)
                reader.keep(left)
                rows, tokens, alive = rows[left], tokens[left], alive[left]
        logits = reader.read(tokens)
    return responses[:, : step + 1]


def look(alive: Tensor, largest: Tensor, model: nn.Module) -> Tensor:
    """Returns on the CPU which rows go on, in the one copy that waits for a GPU.

    Args:
        alive, largest: which rows have not ended, and their largest logits, `(B,)`.

    Raises:
        UserError: if the logits of a row are no distribution: one is NaN or infinite, or all are minus infinity.
    """
    goes_on, largest = torch.stack([alive, largest]).cpu()
    check_logits(largest, model)
    return goes_on


def _sample_without_padding(
    reader: type[Reader], model: PreTrainedModel, ids: Tensor, mask: Tensor, uniforms: Tensor, decoding: Decoding
) -> Tensor:
    """Reads as many tokens of each query as the shortest has, and the others as if they began the response.

    Args:
        ids, mask: the queries `(B, P)`, padded on the right.
    """
    lengths, steps = mask.sum(1, keepdim=True), uniforms.shape[1]
    shortest = int(lengths.min())
    start, rest = ids[:, :shortest], F.pad(ids[:, shortest:], (0, steps))
    column = torch.arange(rest.shape[1], device=ids.device) - (lengths - shortest)  # of each row's response
    given = torch.where(column < 0, rest, torch.where(column < steps, DRAWN, OVER))
    own = lengths - shortest + torch.arange(steps, device=ids.device)
    numbers = uniforms.new_zeros(rest.shape).scatter(1, own, uniforms)
    drawn = _draw(reader(model, start, torch.ones_like(start), rest.shape[1]), numbers, decoding, given)
    responses = F.pad(drawn, (0, rest.shape[1] - drawn.shape[1]), value=decoding.pad_id).gather(1, own)
    return without_end(responses, decoding)


def without_end(responses: Tensor, decoding: Decoding) -> Tensor:
    """Cuts off the columns in which all responses have ended."""
    lengths, _ = response_lengths(responses, decoding.eos_ids)
    return responses[:, : int(lengths.max())]


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
