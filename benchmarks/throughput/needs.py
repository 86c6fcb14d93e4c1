"""Computes what an update needs at least: tokens, floating-point operations, bytes. Each formula stands here only."""

from __future__ import annotations

from collections.abc import Sequence

from throughput.fixtures import Shape


def tokens_needed(queries: Sequence[int], responses: Sequence[int], ppo_epochs: int) -> int:
    """Counts real tokens that must go through a network in an update.

    One pass over every episode each for sampling (whose logits give the log-probabilities), reference, values and
    reward, and in every PPO epoch one of the policy and one of the critic. Recomputed activations do not count.

    Args:
        queries, responses: real tokens of every episode.
    """
    return (4 + 2 * ppo_epochs) * (sum(queries) + sum(responses))


def training_flops(shape: Shape, queries: Sequence[int], responses: Sequence[int], ppo_epochs: int) -> float:
    """Counts floating-point operations of all PPO epochs of an update, a backward pass as two forward ones.

    Forward: 2 per weight and token in the layers of policy and critic, 2 L^2 d per layer for attention under a causal
    mask, and 2 per weight of the output layer and response token. Recomputation, norms and biases do not count.
    """
    lengths = [q + r for q, r in zip(queries, responses, strict=True)]
    layers = 2 * shape.layer_weights * sum(lengths)
    attention = 2 * shape.layers * shape.hidden * sum(length**2 for length in lengths)
    output = 2 * shape.output_weights * sum(responses)
    return 3.0 * ppo_epochs * (2 * (layers + attention) + output)


def decoding_bytes(shape: Shape, queries: Sequence[int], responses: Sequence[int], width: int) -> float:
    """Counts bytes that sampling a batch must read: all weights at every step, keys and values of the rows so far.

    The pass over the queries does not count, and rows that have ended are not read.

    Args:
        width: bytes of a number (bfloat16: 2).
    """
    steps = max(responses)
    rows = sum(r * q + r * (r - 1) // 2 for q, r in zip(queries, responses, strict=True))
    return width * (steps * (shape.layer_weights + shape.output_weights) + 2.0 * shape.layers * shape.hidden * rows)
