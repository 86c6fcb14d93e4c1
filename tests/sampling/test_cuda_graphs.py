"""Sampling with steps of fixed shape gives what plain sampling gives; the capture itself needs a GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, MambaConfig, MistralConfig

import rlhf.sampling.cuda_graphs
from rlhf.errors import UserError
from rlhf.models.loading import load_causal_lm
from rlhf.models.packing import packs
from rlhf.ops.sequences import pad_sequences
from rlhf.sampling import token_readers
from rlhf.sampling.cuda_graphs import _captured, _Steps, replays, sample_in_graph, sampling_function
from rlhf.sampling.sampler import Decoding, sample, uniforms

PAD, NEVER = 10_000, -1
QUERIES = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]


@pytest.fixture(params=[False, True], ids=["sdpa", "sdpa_packed"])
def model(request: pytest.FixtureRequest, sharp_path: str, monkeypatch: pytest.MonkeyPatch, device: str) -> Any:
    """A model before and after `packs` has renamed its attention; it is not sampled plainly."""
    model = load_causal_lm(sharp_path)
    if request.param:
        if device != "cpu":
            pytest.skip("models in float32 are padded on a GPU")
        assert packs(model)
    monkeypatch.setattr(rlhf.sampling.cuda_graphs, "sample", None)
    return model


def both(model: Any, decoding: Decoding, queries: list[list[int]] = QUERIES, steps: int = 24) -> list[torch.Tensor]:
    """The responses of `sample_in_graph`, then those of `sample`, which may rename the attention."""
    numbers = uniforms(len(queries), steps, torch.Generator().manual_seed(26))  # none within 4e-5 of another token
    inputs = (*pad_sequences(queries, PAD, "left"), numbers.to(model.device))
    return [draw(model, *inputs, decoding) for draw in (sample_in_graph, sample)]


def test_the_responses_are_those_of_plain_sampling(model: Any) -> None:
    endless, same = both(model, Decoding(0.7, (NEVER,), PAD))
    assert endless.shape == (3, 24)
    assert torch.equal(endless, same)
    ended, same = both(model, Decoding(0.7, (int(endless[1, 4]),), PAD))
    assert (ended == PAD).any()
    assert torch.equal(ended, same)


def test_it_works_under_autocast(model: Any, device: str) -> None:
    """There keys that are rotated have another precision than values."""
    with torch.autocast(device, torch.bfloat16):
        assert replays(model)
        found, _ = both(model, Decoding(0.7, (NEVER,), PAD))
    assert found.shape == (3, 24)


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("draw", [sample, sample_in_graph])
@torch.no_grad()
def test_in_bfloat16_tokens_are_the_likeliest_of_a_plain_forward(
    draw: Any, how: str, sharp_path: str, device: str
) -> None:
    """Up to rounding: at a temperature of almost 0, each of them has nearly the largest logit."""
    model: Any = load_causal_lm(sharp_path, dtype=torch.bfloat16 if how == "weights" else torch.float32)
    numbers = uniforms(3, 24, torch.Generator().manual_seed(26)).to(model.device)
    with torch.autocast(device, torch.bfloat16, enabled=how == "autocast"):
        assert draw is sample or replays(model)
        found = draw(model, *pad_sequences(QUERIES, PAD, "left"), numbers, Decoding(1e-4, (NEVER,), PAD))
        for query, response in zip(QUERIES, found, strict=True):
            ids = torch.cat([torch.tensor(query), response]).unsqueeze(0)
            logits = model(ids).logits[0, len(query) - 1 : -1].float()
            short = logits.amax(-1) - logits.gather(1, response.unsqueeze(1)).squeeze(1)
            assert (short <= 0.05 * (logits.amax(-1) - logits.mean(-1))).all()


def test_a_response_with_pad_inside_keeps_its_last_token(model: Any) -> None:
    alone = QUERIES[:1]
    endless, _ = both(model, Decoding(0.7, (NEVER,), PAD), alone)
    pad_id = int(endless[0, 5])
    assert endless[0, -1] != pad_id
    assert torch.equal(endless, both(model, Decoding(0.7, (NEVER,), pad_id), alone)[0])


def test_memory_that_nobody_has_written_does_not_matter(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask does not hide NaN in the room of a cache; PyTorch fills new memory with it where all is deterministic."""
    monkeypatch.setattr(token_readers, "packs", lambda _: False)  # caches of packed queries begin with zeros
    decoding = Decoding(0.7, (NEVER,), PAD)
    expected, _ = both(model, decoding)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan()
        assert torch.equal(both(model, decoding)[0], expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_logits_that_are_no_numbers_are_refused(model: Any) -> None:
    assert replays(model)
    model.get_output_embeddings().weight.data[7] = 3e38
    with pytest.raises(UserError, match=r"logits of .* are NaN or infinite"):
        both(model, Decoding(0.7, (NEVER,), PAD))


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
    numbers = uniforms(3, 40, torch.Generator()).to(model.device)
    found = sample_in_graph(model, *pad_sequences(QUERIES, PAD, "left"), numbers, Decoding(1.0, (7,), PAD))
    assert torch.equal(found, torch.full((3, 1), 7))
    assert not calls


SHAPE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}
HEADS: dict[str, Any] = SHAPE | {"num_attention_heads": 2, "intermediate_size": 16}
OTHERS = {
    "sliding windows": MistralConfig(**HEADS, num_key_value_heads=1, sliding_window=4),
    "an attention that adds its mask": GPTNeoXConfig(**HEADS, attn_implementation="eager"),
    "a state without columns": MambaConfig(**SHAPE, state_size=4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_has_no_such_cache_is_sampled_plainly(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, from_config: Any
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(rlhf.sampling.cuda_graphs, "sample", lambda *args: seen.append(args) or sample(*args))
    model = from_config(OTHERS[name])
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        found, same = both(model, Decoding(0.7, (NEVER,), PAD))
        both(model, Decoding(0.7, (NEVER,), PAD))
    assert torch.equal(found, same)
    assert len(seen) == 2
    assert sum("ppo.cuda_graphs has no effect" in record.message for record in caplog.records) == 1


def test_a_step_that_cannot_be_captured_is_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def capture(_: Any, capture_error_mode: str) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might ...")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    with pytest.raises(UserError, match=r"GPT.*: operation not permitted when stream is capturing; set ppo"):
        _captured(SimpleNamespace(decode=lambda: None), type(model).__name__)  # type: ignore[arg-type]


def test_a_failed_capture_ends_no_run_that_did_not_ask_for_one(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fail(_: Any, name: str) -> None:
        asked.append(name)
        raise UserError("A CUDA graph cannot hold a step.")

    monkeypatch.setattr(rlhf.sampling.cuda_graphs, "_captured", fail)
    monkeypatch.setattr(rlhf.sampling.cuda_graphs, "sample", sample)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    queries, mask = pad_sequences(QUERIES, PAD, "left")
    numbers = uniforms(3, 12, torch.Generator())
    inputs = [x.to(model.device) for x in (queries, mask, numbers)]
    decoding, draw = Decoding(0.7, (NEVER,), PAD), sampling_function(None, torch.device("cuda"))
    with pytest.warns(UserWarning, match="step by step"):
        first = draw(model, *inputs, decoding)
    assert first.tolist() == draw(model, *inputs, decoding).tolist() == sample(model, *inputs, decoding).tolist()
    assert len(asked) == 1
    rlhf.sampling.cuda_graphs._replays.clear()
    with pytest.raises(UserError, match="cannot hold"):
        sampling_function(True, torch.device("cuda"))(model, *inputs, decoding)


@pytest.mark.parametrize(("setting", "device", "expected"), [(None, "cpu", sample), (True, "cpu", sample_in_graph)])
def test_graphs_are_the_default_on_a_gpu_only(setting: bool | None, device: str, expected: Any) -> None:
    assert sampling_function(setting, torch.device(device)) is expected
    assert sampling_function(False, torch.device("cuda")) is sample
