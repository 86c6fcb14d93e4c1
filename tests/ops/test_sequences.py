from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf.ops.sequences import (
    last_real_token,
    length_mask,
    model_inputs,
    pad_sequences,
    position_ids,
    response_lengths,
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
    lengths, found = response_lengths(rows, EOS)
    assert (lengths.tolist(), found.tolist()) == ([length], [has_eos])
    assert truncate_after_eos(rows, EOS, PAD).tolist() == [truncated]


def test_rows_are_truncated_on_their_own() -> None:
    rows = torch.tensor([[1, EOS, 2], [1, 2, 3], [EOS, 1, EOS]])
    assert truncate_after_eos(rows, EOS, PAD).tolist() == [[1, EOS, PAD], [1, 2, 3], [EOS, PAD, PAD]]
    assert response_lengths(rows, EOS)[0].tolist() == [2, 3, 1]


def test_length_mask() -> None:
    mask = length_mask(torch.tensor([0, 2, 3, 4]), 3)
    assert mask.tolist() == [[False] * 3, [True, True, False], [True] * 3, [True] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_token_logprobs_match_numpy(temperature: float, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(0, 4, (2, 5, 11))).to(dtype)
    tokens = torch.from_numpy(rng.integers(0, 11, (2, 5)))
    powers = np.exp(logits.double().numpy() / temperature)
    probabilities = powers / powers.sum(-1, keepdims=True)
    logprobs, entropy = token_logprobs(logits, tokens, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    for b, t in np.ndindex(2, 5):
        p = probabilities[b, t]
        assert logprobs[b, t].item() == pytest.approx(math.log(p[tokens[b, t]]), abs=1e-5)
        assert entropy[b, t].item() == pytest.approx(-sum(p * np.log(p)), abs=1e-5)


def test_entropy_of_a_uniform_and_of_a_certain_choice() -> None:
    logits = torch.tensor([[[3.0] * 8, [500.0] + [0.0] * 7]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([[2, 0]]), 0.7)
    assert entropy[0].tolist() == pytest.approx([math.log(8), 0.0], abs=1e-6)
    assert logprobs[0].tolist() == pytest.approx([-math.log(8), 0.0], abs=1e-6)
