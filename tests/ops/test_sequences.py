from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf.ops.masking import masked_sum
from rlhf.ops.sequences import (
    causal_inputs,
    last_real_token,
    length_mask,
    model_inputs,
    pad_sequences,
    position_ids,
    response_lengths,
    right_padded,
    token_logprobs,
    truncate_after_eos,
)

PAD, EOS = 999, 9


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("left", [[PAD, PAD, 4], [5, 6, 7]], [[0, 0, 1], [1, 1, 1]]),
        ("right", [[4, PAD, PAD], [5, 6, 7]], [[1, 0, 0], [1, 1, 1]]),
    ],
)
def test_pad_sequences(side: str, ids: list[list[int]], mask: list[list[int]]) -> None:
    padded, attention = pad_sequences([[4], [5, 6, 7]], PAD, side)
    assert padded.tolist() == ids
    assert attention.tolist() == mask


def test_padding_is_by_length_not_by_token() -> None:
    """A real token that equals the padding value stays real."""
    _, mask = pad_sequences([[PAD, PAD], [1]], PAD)
    assert mask.tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sequences", [[[4]], [[], [5, 6]], [[1, 2, 3], [4], [5, 6]]])
def test_padded_sequences_come_back(sequences: list[list[int]], side: str) -> None:
    """Also a single row, and a row without tokens."""
    ids, mask = pad_sequences(sequences, PAD, side)
    assert [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)] == sequences
    assert (ids[mask == 0] == PAD).all()
    assert ids.dtype == mask.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
@pytest.mark.parametrize(
    ("mask", "positions", "last"),
    [
        ([0, 0, 1, 1, 1], [0, 0, 0, 1, 2], 4),
        ([1, 1, 1, 0, 0], [0, 1, 2, 0, 0], 2),
        ([0, 1, 1, 1, 0], [0, 0, 1, 2, 0], 3),
        ([1, 1, 1, 1, 1], [0, 1, 2, 3, 4], 4),
        ([0, 0, 0, 0, 1], [0, 0, 0, 0, 0], 4),
        ([1, 0, 0, 0, 0], [0, 0, 0, 0, 0], 0),
    ],
)
def test_the_nth_real_token_has_position_n(
    mask: list[int], positions: list[int], last: int, dtype: torch.dtype
) -> None:
    attention_mask = torch.tensor([mask], dtype=dtype)
    assert position_ids(attention_mask).tolist() == [positions]
    assert last_real_token(attention_mask).tolist() == [last]


def test_padding_is_fed_as_id_zero() -> None:
    inputs = model_inputs(torch.tensor([[PAD, 5, 6], [7, 8, PAD]]), torch.tensor([[0, 1, 1], [1, 1, 0]]))
    assert inputs["input_ids"].tolist() == [[0, 5, 6], [7, 8, 0]]
    assert inputs["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 0]]
    assert inputs["position_ids"].tolist() == [[0, 0, 1], [0, 1, 0]]


def test_padding_on_the_right_is_fed_as_id_zero_without_a_mask() -> None:
    inputs = causal_inputs(torch.tensor([[5, 6, 7], [8, PAD, PAD]]), torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert set(inputs) == {"input_ids", "position_ids"}
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[0, 0, 1, 1], [1, 1, 0, 0]], [[2, 3], [4, 5]]),
        ([[0, 1, 1, 0], [0, 0, 0, 1]], [[1, 2], [7, None]]),
        ([[1, 0, 1, 1], [0, 1, 0, 1]], [[0, 2, 3], [5, 7, None]]),
        ([[1, 1, 1, 1], [0, 0, 0, 1]], [[0, 1, 2, 3], [7, None, None, None]]),
        ([[0, 0, 0, 1]], [[3]]),
    ],
)
def test_padding_moves_to_the_right_and_the_rest_stays_in_order(
    mask: list[list[int]], expected: list[list[int | None]], dtype: torch.dtype
) -> None:
    """Whatever side it was on, and no wider than the longest row; a column's token is its number."""
    attention_mask = torch.tensor(mask, dtype=dtype)
    ids, moved = right_padded(torch.arange(attention_mask.numel()).view(attention_mask.shape), attention_mask)
    assert moved.dtype == dtype
    assert moved.long().tolist() == [[int(token is not None) for token in row] for row in expected]
    real = [[token for token in row if token is not None] for row in expected]
    assert [row[keep.bool()].tolist() for row, keep in zip(ids, moved, strict=True)] == real


@pytest.mark.parametrize("seed", range(3))
def test_moving_padding_keeps_random_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = torch.tensor(rng.integers(0, 2, (30, 9)))
    ids = torch.tensor(rng.integers(0, 50, (30, 9)))
    moved, moved_mask = right_padded(ids, mask)
    assert moved.shape[1] == mask.sum(1).max()
    assert torch.equal(moved_mask.bool(), length_mask(mask.sum(1), moved.shape[1]))
    assert torch.equal(moved[moved_mask.bool()], ids[mask.bool()])


RESPONSES = pytest.mark.parametrize(
    ("response", "length", "has_eos", "truncated"),
    [
        ([EOS, 1, 2], 1, True, [EOS, PAD, PAD]),
        ([1, EOS, 2], 2, True, [1, EOS, PAD]),
        ([1, 2, EOS], 3, True, [1, 2, EOS]),
        ([1, EOS, EOS], 2, True, [1, EOS, PAD]),
        ([EOS, EOS, EOS], 1, True, [EOS, PAD, PAD]),
        ([1, 2, 3], 3, False, [1, 2, 3]),
        ([EOS], 1, True, [EOS]),
        ([1], 1, False, [1]),
    ],
)


@RESPONSES
def test_responses_end_with_their_first_eos(
    response: list[int], length: int, has_eos: bool, truncated: list[int]
) -> None:
    rows = torch.tensor([response])
    lengths, found = response_lengths(rows, (EOS,))
    assert (lengths.tolist(), found.tolist()) == ([length], [has_eos])
    assert truncate_after_eos(rows, (EOS,), PAD).tolist() == [truncated]


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_truncated_on_their_own(seed: int) -> None:
    """Random rows, some without EOS and some with several, against Python lists."""
    rows = torch.tensor(np.random.default_rng(seed).integers(5, 12, (40, 6)))
    lengths, has_eos = response_lengths(rows, (EOS,))
    truncated = truncate_after_eos(rows, (EOS,), PAD)
    for row, tokens in enumerate(rows.tolist()):
        end = tokens.index(EOS) + 1 if EOS in tokens else 6
        assert (lengths[row].item(), has_eos[row].item()) == (end, EOS in tokens)
        assert truncated[row].tolist() == tokens[:end] + [PAD] * (6 - end)
    assert 0 < has_eos.sum() < 40
    assert torch.equal(truncate_after_eos(truncated, (EOS,), PAD), truncated)


def test_length_mask() -> None:
    mask = length_mask(torch.tensor([0, 2, 3, 4]), 3)
    assert mask.tolist() == [[False] * 3, [True, True, False], [True] * 3, [True] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_token_logprobs_match_numpy(temperature: float, dtype: torch.dtype) -> None:
    """`p = exp(logits / T)` over its sum; the log of the token's p, and minus the sum of p log p."""
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(0, 4, (2, 5, 11))).to(dtype)
    tokens = torch.tensor(rng.integers(0, 11, (2, 5)))
    powers = np.exp(logits.double().numpy() / temperature)
    probabilities = powers / powers.sum(-1, keepdims=True)
    logprobs, entropy = token_logprobs(logits, tokens, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    for b, t in np.ndindex(2, 5):
        p = probabilities[b, t]
        assert logprobs[b, t].item() == pytest.approx(math.log(p[tokens[b, t]]), abs=1e-5)
        assert entropy[b, t].item() == pytest.approx(-sum(p * np.log(p)), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_logprobs_and_entropy(seed: int, temperature: float) -> None:
    """Derived: one-hot - p for the logprob, -p x (log p + H) for the entropy, both divided by T; and by differences."""
    rng = np.random.default_rng(seed)
    scores, token, weight = rng.normal(0, 2, 7), 3, 0.6
    logits = torch.tensor(scores).float().view(1, 1, 7).requires_grad_()
    logprob, entropy = token_logprobs(logits, torch.tensor([[token]]), temperature)
    (logprob + weight * entropy).sum().backward()

    def value(x: np.ndarray) -> float:
        logs = x / temperature - np.log(np.exp(x / temperature).sum())
        return logs[token] - weight * (np.exp(logs) * logs).sum()

    p = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
    h = -(p * np.log(p)).sum()
    derived = (np.eye(7)[token] - p - weight * p * (np.log(p) + h)) / temperature
    step = 1e-5 * np.eye(7)
    differences = [(value(scores + d) - value(scores - d)) / 2e-5 for d in step]
    np.testing.assert_allclose(differences, derived, atol=1e-8)
    np.testing.assert_allclose(logits.grad.flatten().numpy(), derived, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0])
def test_probabilities_sum_to_one_and_a_constant_changes_nothing(temperature: float) -> None:
    row = torch.randn(9, generator=torch.Generator().manual_seed(0))
    every_token = torch.arange(9).unsqueeze(0)
    logprobs, entropy = token_logprobs(row.expand(1, 9, 9), every_token, temperature)
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert (entropy >= 0).all()
    assert (entropy <= math.log(9) + 1e-6).all()
    shifted = token_logprobs((row + 16).expand(1, 9, 9), every_token, temperature)
    torch.testing.assert_close(shifted[0], logprobs, atol=1e-5 / temperature, rtol=0)


def test_entropy_of_a_uniform_and_of_a_certain_choice() -> None:
    logits = torch.tensor([[[3.0] * 8, [500.0] + [0.0] * 7]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([[2, 0]]), 0.7)
    assert entropy[0].tolist() == pytest.approx([math.log(8), 0.0], abs=1e-6)
    assert logprobs[0].tolist() == pytest.approx([-math.log(8), 0.0], abs=1e-6)


def test_extreme_logits_have_finite_gradients() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0]]]).requires_grad_()
    logprobs, entropy = token_logprobs(logits, torch.tensor([[1, 1]]), 0.01)
    (logprobs + entropy).sum().backward()
    assert entropy.tolist() == [[0, 0]]
    assert logprobs[0].tolist() == pytest.approx([-2e6, 0])
    assert logits.grad[0].tolist() == [[pytest.approx(-100), pytest.approx(100), 0], [0, 0, 0]]


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), -float("inf")])
def test_logits_at_padding_leave_the_other_positions_alone(padding: float) -> None:
    """Their gradients too: no position sees another's."""
    clean = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    results = []
    for filler in (padding, 0.0):
        logits = clean.clone()
        logits[0, 2] = filler
        logits.requires_grad_()
        logprobs, entropy = token_logprobs(logits, torch.tensor([[1, 2, 3]]))
        masked_sum(logprobs + entropy, torch.tensor([[True, True, False]])).backward()
        results.append((logprobs[0, :2], entropy[0, :2], logits.grad[0, :2]))
    for dirty, expected in zip(*results, strict=True):
        assert torch.equal(dirty, expected)
