"""Sampling with steps of fixed shape gives what plain sampling gives; the capture itself needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import rlhf.sampling.cuda_graphs
from rlhf.models.loading import load_causal_lm
from rlhf.models.packing import packs
from rlhf.ops.sequences import pad_sequences
from rlhf.sampling.cuda_graphs import _Steps, sample_in_graph
from rlhf.sampling.sampler import Decoding, sample, uniforms

PAD, NEVER = 10_000, -1
QUERIES = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]


@pytest.fixture(params=[False, True], ids=["sdpa", "sdpa_packed"])
def model(request: pytest.FixtureRequest, sharp_path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model before and after `packs` has renamed its attention; it is not sampled plainly."""
    model = load_causal_lm(sharp_path)
    if request.param:
        assert packs(model)
    monkeypatch.setattr(rlhf.sampling.cuda_graphs, "sample", None)
    return model


def both(model: Any, decoding: Decoding, queries: list[list[int]] = QUERIES, steps: int = 24) -> list[torch.Tensor]:
    """The responses of `sample_in_graph`, then those of `sample`, which may rename the attention."""
    numbers = uniforms(len(queries), steps, torch.Generator().manual_seed(26))  # none within 4e-5 of another token
    inputs = (*pad_sequences(queries, PAD, "left"), numbers)
    return [draw(model, *inputs, decoding) for draw in (sample_in_graph, sample)]


def test_the_responses_are_those_of_plain_sampling(model: Any) -> None:
    endless, same = both(model, Decoding(0.7, (NEVER,), PAD))
    assert endless.shape == (3, 24)
    assert torch.equal(endless, same)
    ended, same = both(model, Decoding(0.7, (int(endless[1, 4]),), PAD))
    assert (ended == PAD).any()
    assert torch.equal(ended, same)


def test_a_response_with_pad_inside_keeps_its_last_token(model: Any) -> None:
    alone = QUERIES[:1]
    endless, _ = both(model, Decoding(0.7, (NEVER,), PAD), alone)
    pad_id = int(endless[0, 5])
    assert endless[0, -1] != pad_id
    assert torch.equal(endless, both(model, Decoding(0.7, (NEVER,), pad_id), alone)[0])


def test_its_own_steps_are_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: _Steps) -> None:
        raise ArithmeticError

    monkeypatch.setattr(_Steps, "decode", fail)
    with pytest.raises(ArithmeticError):
        both(model, Decoding(0.7, (NEVER,), PAD))


def test_it_stops_soon_after_all_rows_have_ended(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    decode = _Steps.decode
    monkeypatch.setattr(_Steps, "decode", lambda self: calls.append(1) or decode(self))
    monkeypatch.setattr(rlhf.sampling.cuda_graphs, "choose", lambda logits, _: torch.full((len(logits),), 7))
    numbers = uniforms(3, 40, torch.Generator())
    found = sample_in_graph(model, *pad_sequences(QUERIES, PAD, "left"), numbers, Decoding(1.0, (7,), PAD))
    assert torch.equal(found, torch.full((3, 1), 7))
    assert not calls


def test_a_model_with_sliding_windows_is_sampled_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MistralConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, sliding_window=4,
    )  # fmt: skip
    seen: list[Any] = []
    monkeypatch.setattr(rlhf.sampling.cuda_graphs, "sample", lambda *args: seen.append(args) or args[1])
    both(MistralForCausalLM(config).eval(), Decoding(0.7, (NEVER,), PAD))
    assert len(seen) == 1
