"""Sampling with steps of fixed shape gives what plain sampling gives; the capture itself needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import rlhf.sampling.cuda_graphs
from rlhf.models.loading import load_causal_lm
from rlhf.ops.sequences import pad_sequences
from rlhf.sampling.cuda_graphs import sample_in_graph
from rlhf.sampling.sampler import sample, uniforms

PAD = 10_000
QUERIES = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]


def both(model: Any, eos_id: int, steps: int = 24) -> list[torch.Tensor]:
    numbers = uniforms(len(QUERIES), steps, torch.Generator().manual_seed(26))  # none within 4e-5 of another token
    inputs = (*pad_sequences(QUERIES, PAD, "left"), numbers)
    return [draw(model, *inputs, temperature=0.7, eos_id=eos_id, pad_id=PAD) for draw in (sample, sample_in_graph)]


def test_the_responses_are_those_of_plain_sampling(sharp_path: str) -> None:
    model = load_causal_lm(sharp_path)
    endless, same = both(model, eos_id=-1)
    assert torch.equal(endless, same)
    eos_id = int(endless[1, 4])
    assert torch.equal(*both(model, eos_id))


def test_it_stops_soon_after_all_rows_have_ended(sharp_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = load_causal_lm(sharp_path), []
    decode = rlhf.sampling.cuda_graphs._Steps.decode
    monkeypatch.setattr(rlhf.sampling.cuda_graphs._Steps, "decode", lambda self: calls.append(1) or decode(self))
    monkeypatch.setattr(rlhf.sampling.cuda_graphs, "choose", lambda logits, _: torch.full((len(logits),), 7))
    expected = torch.full((3, 1), 7)
    numbers = uniforms(3, 40, torch.Generator())
    found = sample_in_graph(model, *pad_sequences(QUERIES, PAD, "left"), numbers, temperature=1, eos_id=7, pad_id=PAD)
    assert torch.equal(found, expected)
    assert not calls


def test_a_model_with_sliding_windows_is_sampled_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MistralConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, sliding_window=4,
    )  # fmt: skip
    seen: list[Any] = []
    monkeypatch.setattr(rlhf.sampling.cuda_graphs, "sample", lambda *args, **settings: seen.append(args) or args[1])
    both(MistralForCausalLM(config).eval(), eos_id=-1)
    assert len(seen) == 1
