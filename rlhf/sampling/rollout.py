"""The experience of one PPO update, and the loader that makes it and cuts it into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32, Int
from torch import Tensor

from rlhf.errors import UserError
from rlhf.hardware import sent
from rlhf.ops.sequences import length_mask
from rlhf.ops.token_rewards import ScorePosition
from rlhf.sampling.grouping import split
from rlhf.seeding import permutation


class Layout(NamedTuple):
    """How many columns of each episode are real, on the CPU: nothing that is made of it waits for a GPU; `(N,)` each.

    Attributes:
        queries: tokens of the query.
        lengths: tokens of the response.
        trained: of these, those that the policy is trained on: all or, if the episode is not kept, none.
        states: columns of the value mask.
    """

    queries: Tensor
    lengths: Tensor
    trained: Tensor
    states: Tensor


class Rollout:
    """N episodes: queries of P tokens, responses of up to R.

    A plain class on purpose: DeepSpeed's precision plugin casts floats in dicts, tuples and dataclasses to bf16, which
    would put an error of up to 2.5% into the ratio; what has its own `.to()` is left alone.

    Attributes:
        texts: per episode a dict with `query`, `response`, `reference` and the `record`.
        rows: the rows of the whole rollout that a slice holds.
        groups: rows that fit through a network together; none of a slice: all of it.
        layout: of a slice, so that training it waits for no GPU; see `read_layout`.
        policy_share, value_share: average real tokens per micro-batch of the global minibatch (D14), set on slices.
    """

    queries: Int[Tensor, "N P"]  # token ids, padded on the left
    query_mask: Int[Tensor, "N P"]
    responses: Int[Tensor, "N R"]  # token ids, PAD after the first EOS
    lengths: Int[Tensor, " N"]  # real response tokens, EOS included
    has_eos: Bool[Tensor, " N"]
    mask: Bool[Tensor, "N R"]  # the tokens that the policy is trained on: those within `lengths`
    value_mask: Bool[Tensor, "N R"]  # one wider: also the column after the last token
    logprobs: Float32[Tensor, "N R"]  # of the policy, at the sampling temperature
    engine_logprobs: Float32[Tensor, "N R"]  # of the engine that sampled, if it is another program; 0 outside `lengths`
    ref_logprobs: Float32[Tensor, "N R"]  # of the reference
    values: Float32[Tensor, "N R"]  # 0 outside `value_mask`, and without a critic
    scores: Float32[Tensor, " N"]  # after the penalty for a missing EOS
    kl: Float32[Tensor, "N R"]  # estimate per token, 0 outside `mask`
    rewards: Float32[Tensor, "N R"]
    advantages: Float32[Tensor, "N R"]
    returns: Float32[Tensor, "N R"]  # with a critic

    def __init__(self, texts: list[dict[str, Any]] | None = None, **tensors: Tensor) -> None:
        self.texts = texts or []
        self.policy_share = self.value_share = 0.0
        self.rows: list[int] = []
        self.groups: list[list[int]] = []
        self.layout: Layout | None = None
        for name, tensor in tensors.items():
            if name not in Rollout.__annotations__:
                raise TypeError(f"a Rollout has no field {name!r}")
            setattr(self, name, tensor)

    def __len__(self) -> int:
        return len(self.queries)

    def _map(self, change: Callable[[str, Tensor], Tensor], texts: list[dict[str, Any]]) -> Rollout:
        fields = {name: change(name, getattr(self, name)) for name in Rollout.__annotations__ if hasattr(self, name)}
        new = Rollout(texts, **fields)
        new.policy_share, new.value_share, new.rows = self.policy_share, self.value_share, self.rows
        new.layout = self.layout
        return new

    def to(self, device: torch.device | str, **kwargs: Any) -> Rollout:
        """Moves all tensors to a device, their precision unchanged."""
        return self._map(lambda _, tensor: tensor.to(device, **kwargs), self.texts)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The inputs of the networks: `queries`, `query_mask`, `responses` and `mask`; of a slice, masks on the CPU."""
        if self.layout is None:
            return self.queries, self.query_mask, self.responses, self.mask
        query_mask = length_mask(self.layout.queries, self.queries.shape[1]).flip(1).long()
        return self.queries, query_mask, self.responses, length_mask(self.layout.trained, self.responses.shape[1])

    def read_layout(self) -> Layout:
        """Returns the layout of a slice, or reads it from the masks as they are now, in one copy from their device."""
        if self.layout is not None:
            return self.layout
        queries, trained, states = (mask.sum(1) for mask in (self.query_mask, self.mask, self.value_mask))
        return Layout(*torch.stack([queries, self.lengths, trained, states]).cpu())

    def keep(self, kept: Tensor) -> None:
        """Takes all but the kept episodes, bool `(N,)`, out of the masks."""
        self.mask, self.value_mask = self.mask & kept.unsqueeze(1), self.value_mask & kept.unsqueeze(1)

    def samples(self) -> list[dict[str, Any]]:
        """Returns the texts of each episode with its `score` and `has_eos`."""
        columns = zip(self.texts, self.scores.tolist(), self.has_eos.tolist(), strict=True)
        return [{**text, "score": score, "has_eos": has_eos} for text, score, has_eos in columns]

    def total_lengths(self) -> list[int]:
        """Returns the number of tokens of each episode, query and response together."""
        return (self.query_mask.sum(1) + self.lengths).tolist()

    def select(self, rows: list[int], layout: Layout | None = None) -> Rollout:
        """Returns some episodes, without the columns that none of them uses.

        Args:
            layout: of all episodes, if it is known.
        """
        chosen = torch.tensor(rows, device="cpu")
        part = Layout(*(x[chosen] for x in layout or self.read_layout()))
        index = sent(chosen, self.queries.device)
        first = self.queries.shape[1] - int(part.queries.max())
        last = min(int(part.lengths.max()) + 1, self.responses.shape[1])

        def cut(name: str, tensor: Tensor) -> Tensor:
            columns = slice(first, None) if name in ("queries", "query_mask") else slice(last)
            return tensor[index] if tensor.dim() == 1 else tensor[index, columns]

        new = self._map(cut, [self.texts[r] for r in rows] if self.texts else [])
        new.rows, new.layout = rows, part
        return new


def response_masks(lengths: Tensor, width: int, score_position: ScorePosition = "after_eos") -> tuple[Tensor, Tensor]:
    """Returns `mask` and `value_mask` of a rollout, `(N,) -> (N, width)` each (D29).

    The value mask is one wider if the score lands one column after EOS. If it lands on EOS, both are the same.
    """
    mask = length_mask(lengths, width)
    return mask, mask if score_position == "eos" else length_mask(lengths + 1, width)


def as_scores(scores: Tensor, episodes: Rollout) -> Tensor:
    """Returns rewards in float32 on the device of their episodes, of which each must have one."""
    if scores.shape != (len(episodes),):
        raise UserError(f"score_responses returned shape {tuple(scores.shape)} for {len(episodes)} episodes.")
    return scores.to(episodes.responses.device, torch.float32)


def real_tokens(episodes: Rollout) -> Tensor:
    """Returns which tokens of the responses are real, `(N, R)`, those of episodes that are not kept, too."""
    return length_mask(episodes.lengths, episodes.responses.shape[1])


def engine_differences(episodes: Rollout) -> Tensor:
    """Computes how far the log-probabilities of an engine are from those of the policy, `(N, R)`, 0 on padding."""
    return torch.where(real_tokens(episodes), episodes.engine_logprobs - episodes.logprobs, 0.0).abs()


def in_groups(
    episodes: Rollout, groups: list[list[int]], evaluate: Callable[[Rollout], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Evaluates groups of rows, without the columns that a group does not use, and puts the results together.

    Results `(n, r)` are padded with 0 to the width of the rollout, `(N, R)`; results `(n,)` become `(N,)`. Without
    groups, all rows go together.
    """
    width = episodes.responses.shape[1]
    parts, groups, layout = [], groups or [list(range(len(episodes)))], episodes.read_layout()
    for rows in groups:
        out = evaluate(episodes.select(rows, layout))
        parts.append([F.pad(x, (0, width - x.shape[1])) if x.dim() == 2 else x for x in out])
    order = torch.tensor([row for rows in groups for row in rows], device="cpu").argsort()
    places = sent(order, episodes.responses.device)
    return tuple(torch.cat(columns)[places] for columns in zip(*parts, strict=True))


def minibatches(episodes: int, count: int, update: int, epoch: int, rank: int) -> Iterator[list[int]]:
    """Yields the row numbers of each minibatch of a PPO epoch: a fresh permutation in equal parts (D33)."""
    order = permutation(episodes, update, epoch, rank)
    size = episodes // count
    for start in range(0, episodes, size):
        yield order[start : start + size]


@dataclass(eq=False)
class RolloutLoader:
    """A plain iterable with a length; every pass is one PPO update: roll out, then yield micro-batches.

    The work happens at the first `next()`, not in `iter()`: Lightning calls `iter()` before training starts.
    """

    make: Callable[[int], Rollout]  # makes this rank's rollout of an update
    update: Callable[[], int]  # returns the number of the current update
    reduce_sum: Callable[[Tensor], Tensor]  # over ranks
    rank: int
    world_size: int
    ppo_epochs: int  # passes over each rollout, in a fresh permutation each (D33)
    minibatches: int  # optimizer steps per pass
    accumulate: int  # micro-batches per optimizer step, formed by length

    def __len__(self) -> int:
        return self.ppo_epochs * self.minibatches * self.accumulate

    def __iter__(self) -> Iterator[Rollout]:
        update = self.update()
        rollout = self.make(update)
        layout = rollout.read_layout()
        lengths = (layout.queries + layout.lengths).tolist()
        steps = [
            rows
            for epoch in range(self.ppo_epochs)
            for rows in minibatches(len(rollout), self.minibatches, update, epoch, self.rank)
        ]
        tokens = torch.stack([layout.trained, layout.states], 1)
        counts = torch.stack([tokens[rows].sum(0) for rows in steps]).to(rollout.mask.device)
        shares = self.reduce_sum(counts) / (self.accumulate * self.world_size)
        for rows, share in zip(steps, shares.tolist(), strict=True):
            for group in split([lengths[row] for row in rows], self.accumulate):
                micro = rollout.select([rows[n] for n in group], layout)
                micro.policy_share, micro.value_share = (max(tokens, 1e-9) for tokens in share)
                yield micro
